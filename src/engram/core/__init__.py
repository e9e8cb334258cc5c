"""The protocols that a method implements, the templates that keep it short, verdicts, and the timeline."""
