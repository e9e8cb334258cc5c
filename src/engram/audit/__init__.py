"""Probes: what does a model still know?"""
