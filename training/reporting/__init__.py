"""What is said of a run?

metrics.jsonl, stragglers, predicted against measured, wandb. Called by trainer.py; nothing here changes the run.
"""
