"""Where the optimizer lives and when it updates (docs/optimizer.md)."""
