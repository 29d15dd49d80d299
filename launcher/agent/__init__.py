"""Who starts the ranks of a node and watches them?

The agent (`python -m efflaunch.launcher.agent RUN_DIR`): elastic workers, signals, restarts, hang detection. Imported by backends and
nodes/; runs no training itself.
"""
