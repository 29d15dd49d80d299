"""How do agents of several nodes agree?

Whatever started them: where they meet, what they look at first, what is made of how they ended. next_action.py and faulty_nodes.py
decide and are pure; back ends import node.py.
"""
