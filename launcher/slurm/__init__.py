"""How does a run live in a SLURM batch job?

Code: its script, its decisions, what runs on its nodes. The templates for people are slurm/ at the root; the facts of a site
(partition, account, ...) are cluster.slurm, described in cluster/slurm_site.py. `python -m efflaunch.launcher.slurm.job|task` are
called by saved scripts, so those names stay.
"""
