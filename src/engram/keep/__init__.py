"""Learners that take tasks in one after the other and keep what they knew."""
