"""Agents of several nodes, whatever started them: where they meet, what they look at first, what is made of how they ended."""
