"""Where do weights, gradients and optimizer states lie over the ranks, and by which collectives do they come together?

`engine.py` is the protocol (pure), `parts.py` tells which part of a tensor this rank holds, `fsdp2.py` is the first engine. The
names of what an engine is made of (DTensor, FSDPModule, fully_shard) live in this folder alone; everyone else asks by these three.
"""
