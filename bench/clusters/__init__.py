"""On which cluster is it measured?

A SLURM and a Ray of several nodes on this machine, in network namespaces of their own. For benchmarks and tests.
"""
