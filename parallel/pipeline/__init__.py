"""In which order do the ranks of a pipeline, or one rank of a stage, make the forward and backward passes of a step's micro-batches?

`plan.py` has the actions of one rank and the orders made of them (pure); training/step.py executes any of them that `check_schedule`
accepts. `pipeline_plan.py` has the orders of all ranks of a pipeline and what travels between them, `generators.py` and `virtual_stages.py`
make the known ones, `solve.py` chooses.
"""
