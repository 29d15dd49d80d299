"""What does a run report?

metrics.jsonl, stragglers, predicted against measured, wandb. Called by trainer.py; nothing here changes the run.
"""
