"""What was measured on this machine?

Reads the profile and finds the rates that stand in place of the cluster's.
"""
