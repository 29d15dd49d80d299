"""Clusters of several nodes on this machine, for benchmarks and tests."""
