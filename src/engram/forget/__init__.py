"""Forgetters: a model and a request in, a new model out."""
