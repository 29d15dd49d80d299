"""A run as a SLURM batch job: its script, its decisions, what runs on its nodes."""
