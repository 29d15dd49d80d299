"""In which order do the experts of a layer exchange, compute and reduce?

cost.py prices one operator, graph.py has the tasks of a phase, engine.py runs them in time, solve.py compares orders and keeps the best
as the plan of plan.py. All of it is pure: plans are made and simulated here, and no training run executes one yet.
"""
