"""A copy of every snapshot in the memory of hosts, for restarts that find a host alive."""
