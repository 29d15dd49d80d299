"""How is the computation split?

Topology and sharding over ranks, and sequence/ over tokens. config.py, layout.py and sequence/plan.py are pure; training/ and model/
import the runtimes.
"""
