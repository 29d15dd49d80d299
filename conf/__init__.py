"""What can be chosen?

Hydra's groups and experiments as files: `conf/GROUP/NAME.yaml`. Read by launcher/config/compose.py alone; the keys and their types are
the `*/config.py` of each folder.
"""
