"""What is remembered?

What is kept, moved and recomputed: config.py and policy.py say it and are pure, executor/ does it, offload/ holds what was moved,
arena/ gives every tensor its address. What it costs is estimate/.
"""
