"""Who runs a layer under a memory policy?

Forward and backward by pieces, what is saved, read back and recomputed. layer.py is for model/; estimate/ mirrors these files in
numbers (each says where).
"""
