"""How much, against whom?

Measurements against named peers, each `python -m efflaunch.bench.NAME --json FILE`. bench/report.py writes docs/benchmarks.md from
their files. Nothing imports from here but tests.
"""
