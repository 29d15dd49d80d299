"""What of this machine and its software is fit for which work?

`examine` (examination.py) looks at everything and judges it; each other module looks at one thing. Imported by `efflaunch doctor`
alone. Only torch_probe.py, run as a process of its own, imports torch: what is looked for may be the reason that it fails.
"""
