"""Where work happens: runs and their journal, training, prediction, teachers, importances, many models."""
