"""How does a person submit by hand?

Batch scripts one can read, copy and submit. The code behind them is launcher/slurm/; the facts of a site are cluster.slurm
(cluster/slurm_site.py).
"""
