"""What became of a run?

A run directory as facts (facts.py), as pictures (figures.py), as one page (page.py), and beside others (comparison.py). Imported by
the commands `report` and `compare`; reads files alone, and loads matplotlib for pictures only.
"""
