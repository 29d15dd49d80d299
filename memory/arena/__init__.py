"""Where does every tensor of a step go?

Addresses traced, planned once, replayed under guard. training/ imports step.py; place.py, plan.py and search.py are pure.
"""
