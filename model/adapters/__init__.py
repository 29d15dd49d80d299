"""What is trained beside a frozen model?

config.py, names.py and targets.py (which matrices, how many numbers) load no torch; lora.py is the modules, dora.py what a magnitude
changes, base.py says which frozen weights an adapter belongs to, peft_files.py reads and writes adapters as PEFT has them, merge.py adds
them to their matrices.
"""
