"""How fast is this machine for this model?

Probes that run on a configuration's ranks. Imported by `efflaunch profile` through its entry point.
"""
