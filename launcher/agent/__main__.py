"""`python -m efflaunch.launcher.agent RUN_DIR` is the agent of one node."""

from __future__ import annotations

import sys

from .agent import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
