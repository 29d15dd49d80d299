"""How do processes write files, mask signals, beat and compile small loops?

Helpers that know nothing of training: anybody may import them; they import only errors and units.
"""
