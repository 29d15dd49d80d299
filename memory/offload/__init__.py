"""Where are moved activations?

Pinned host memory or files, with their streams and events. The executor and training/ import open.py and host_store.py.
"""
