"""What is a run?

From files and overrides to one checked Config (compose.py), its schema, and checks of the whole. The only place that knows Hydra. No
torch.
"""
