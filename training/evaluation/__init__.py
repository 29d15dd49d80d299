"""How good is the model, on what it was not trained on?

Windows over held-out corpora, their loss on any layout, by position and by context; the best checkpoint. trainer.py imports during.py,
`efflaunch evaluate` starts alone.py.
"""
