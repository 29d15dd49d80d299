"""Which activations are kept, moved and recomputed?

A linear program for each shape, searched and then verified against the ledger. Import solve.py and report.py; the rest is theirs.
"""
