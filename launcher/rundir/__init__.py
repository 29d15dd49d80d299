"""What lies in a run directory?

run.yaml and revisions, state.json, the lock, metrics as they grow. Imported by every command and backend; knows nothing of schedulers.
"""
