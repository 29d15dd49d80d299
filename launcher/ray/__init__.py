"""Runs on a Ray cluster. Nothing here imports ray at module level."""
