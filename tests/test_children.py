"""Processes beside a rank outlive the stop signals that reach every process of a job, from their first moment on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S
from efflaunch.utils.signal_mask import STOP_SIGNALS, stop_signals_blocked

CHILD = """
import sys
sys.stdin.readline()
from efflaunch.utils.signal_mask import ignore_stop_signals
ignore_stop_signals()
print("ready", flush=True)
sys.stdin.readline()
print("alive", flush=True)
"""


def start() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


def test_signals_before_and_after_it_is_ready() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with stop_signals_blocked():
        child = start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert child.stdin is not None and child.stdout is not None
    with child:
        for answer in ("ready", "alive"):
            for number in STOP_SIGNALS:
                os.kill(child.pid, number)
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == f"{answer}\n"
    assert child.returncode == 0


def test_without_it_such_a_signal_ends_the_process() -> None:
    child = start()
    os.kill(child.pid, signal.SIGUSR2)
    assert child.wait(ENDS_S) == -signal.SIGUSR2
    child.communicate()
