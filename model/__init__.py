"""What is trained?

Families (facts and adapters), sizes, weights in and out, the loss by chunks. spec.py, config.py and hf_fields.py import no torch and
are for everybody above; the rest is for training/.
"""
