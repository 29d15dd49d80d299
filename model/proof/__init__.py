"""Is the model of this config trained exactly, layer by layer?

A tiny copy with every kind of layer (`tiny_config`, no torch), and the comparison of its passes here with those of plain Hugging Face
(`compare`), in float64 (`wide_floats`). Import `tiny_config` and `compare`; one process does it, without ranks.
"""
