"""What is done?

One rank's steps: data, optimizers, objectives, profiling, reporting, and trainer.py that runs them in order. The launcher starts
`trainer:train` and imports config files and data facts.
"""
