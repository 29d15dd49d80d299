"""Batch scripts a person can read, copy and submit by hand."""
