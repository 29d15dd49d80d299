"""What is trained for: language modelling, preferences (DPO), scored completions (GRPO); their mathematics apart from ranks."""
