"""Learners that need a single task, or none at all."""
