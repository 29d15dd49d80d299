"""What does the peer do?

The peers of bench/memory.py, installed, not copied; each makes the gradients of plain Hugging Face before it is measured.
"""
