"""What survives a restart without reading storage?

A copy of every snapshot in the memory of hosts, for restarts that find a host alive. plan.py decides and is pure; engine.py imports
replicas.py.
"""
