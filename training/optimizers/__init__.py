"""Where does the optimizer live and when does it update?

On the device or the host, after backward or within it (docs/optimizer.md). session.py imports build.py, configurations check.py and
config.py.
"""
