"""On what does a run run?

Facts about machines (conf/cluster), measured rates of a machine, and what a SLURM site asks of a job. Pure; anybody above may import
it. The code that talks to SLURM is launcher/slurm/, the batch script for people is slurm/.
"""
