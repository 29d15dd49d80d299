"""What is trained on?

From files of a person to an indexed corpus, and from it to the tokens of each rank and step. `efflaunch data` imports prepare.py,
session.py source.py.
"""
