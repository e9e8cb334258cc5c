"""Protectors: tables that are harder to learn from."""
