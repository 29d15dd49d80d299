"""What survives?

Saving without a visible stall, two-phase commit, verified restore, mirrors and replicas. training/ imports engine.py, commands import
files.py, verify.py and tier.py; the rest is internal.
"""
