"""What is trained for?

Language modelling, preferences (DPO), scored completions (GRPO); their mathematics apart from ranks. step.py imports build.py.
"""
