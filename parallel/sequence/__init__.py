"""Who holds which tokens of a step?

Plans (plan, solve, cost, bound: pure) and their runtimes (ulysses, ring, attention). training/ imports service.py and runtime.py,
estimate/ cost.py and degrees.py.
"""
