"""On which ranks are the experts of a layer, and how do rows get there and back?

exchange.py moves rows between the ranks that share a layer's experts; its `ExpertRanks` is a group of them.
"""
