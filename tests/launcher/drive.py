"""`python drive.py key=value ...`: the efflaunch command with the fake training function instead of the real one."""

from __future__ import annotations

import sys

from efflaunch.launcher import start
from efflaunch.tests.other_training import run_with

if __name__ == "__main__":
    start.check_data = lambda config: None
    sys.exit(run_with("fake_training:train"))
