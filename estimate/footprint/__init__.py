"""What takes memory, and when?

One file for each kind of bytes (activations, weights, optimizer, kernels, host), each a list of terms by phase. Imported by
estimate/ledger.py and the solver.
"""
