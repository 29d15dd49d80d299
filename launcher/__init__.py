"""Where does it run?

From a command line to running ranks: commands/ (what is typed), config/ (what a run is), rundir/ (what lies on disk), agent/ (one
node's ranks), nodes/ (several), and a back end each: local.py, slurm/, ray/. Imported by bench/ and tests alone; imports no torch.
"""
