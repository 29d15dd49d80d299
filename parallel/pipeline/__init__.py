"""In which order does one rank of a stage make the forward and backward passes of a step's micro-batches?

`plan.py` has the actions and the orders made of them (pure); training/step.py executes any of them that `check_schedule` accepts.
"""
