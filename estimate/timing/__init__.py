"""How long does it take?

Seconds of a step and of each sequence group, from FLOPs, bandwidths and bytes moved. Imported by the ledger, the solver and the planner
of sequences.
"""
