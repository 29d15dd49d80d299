"""How does a run live on a Ray cluster?

Request and driver, placement, the actor of each node, attempts. Nothing here imports ray at module level. backend_registry.py imports
launcher.py; `python -m efflaunch.launcher.ray.driver|task|on_slurm` are called by saved requests and scripts, so those names stay.
"""
