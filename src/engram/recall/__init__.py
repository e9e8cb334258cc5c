"""Learners that hold knowledge outside of their weights."""
