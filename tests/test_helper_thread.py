"""A helper thread that dies ends its process with the reason on record; every thread of the package is one."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import efflaunch
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.rundir.run_dir import attempt_dir, make_run_dir, write_run
from efflaunch.tests.limits import ENDS_S
from efflaunch.utils.helper_thread import HelperThread

ROOT = Path(efflaunch.__file__).resolve().parent
PLAIN_THREADS = {
    "bench": "measures",
    "tests": "tests",
    "training/reporting/wandb_sink.py": "runs as a script of its own; its thread says the end whatever happens",
    "launcher/output.py": "a display that fails ends no run",
    "checkpoint/tier.py": "a probe with a time limit: an answer that does not come is a mirror that does not answer",
    "checkpoint/replica/keeper.py": "a conversation that fails is hung up on; what is kept stays",
}


def dying(config: object, run_dir: Path, stop: object, pulse: object) -> int:
    """A training function whose committer dies while the main thread waits for it."""

    def work() -> None:
        _ = 1 // int(os.environ["DIVISOR"])

    HelperThread(work, "committer").start()
    threading.Event().wait()
    return 0


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=ENDS_S, env=environment)


HEAD = """
import sys, threading, time
from efflaunch.utils.helper_thread import HelperThread, ends_with_helpers, print_death
def fail(): raise {error}
"""


@pytest.mark.parametrize("error", ["ZeroDivisionError('by keep_every')", "SystemExit(0)", "KeyboardInterrupt"])
def test_a_dead_helper_ends_the_process(error: str) -> None:
    done = python(
        HEAD.format(error=error) + "with ends_with_helpers(print_death):\n HelperThread(fail, 'committer').start()\n time.sleep(90)"
    )
    assert done.returncode == 1
    assert "HelperDiedError: the helper thread `committer` ended: " in done.stderr and error.partition("(")[0] in done.stderr


def test_the_exit_code_is_the_records() -> None:
    body = "with ends_with_helpers(lambda died: 93):\n HelperThread(fail, 'x').start()\n time.sleep(90)"
    assert python(HEAD.format(error="OSError") + body).returncode == 93
    body = "with ends_with_helpers(lambda died: 1 // 0):\n HelperThread(fail, 'x').start()\n time.sleep(90)"
    assert python(HEAD.format(error="OSError") + body).returncode == 1


def test_other_threads_and_other_times_are_left_alone() -> None:
    body = """
with ends_with_helpers(print_death):
    other = threading.Thread(target=fail); other.start(); other.join()
late = HelperThread(fail, 'late'); late.start(); late.join()
print('alive')
"""
    done = python(HEAD.format(error="OSError") + body)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_a_rank_whose_helper_dies_says_why(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run_dir(run_dir)
    write_run(run_dir, compose(["+experiment=quickstart", "run.id=run"]), 1)
    attempt_dir(run_dir, 1).mkdir(parents=True)
    code = f"""
import os
from efflaunch.launcher.agent import worker
from efflaunch.utils.heartbeat import Heartbeat
os.environ.update(RANK="0", LOCAL_RANK="0", DIVISOR="0")
worker.attach = lambda board, rank: Heartbeat()
worker.main({str(run_dir)!r}, "efflaunch.tests.test_helper_thread:dying", 1, os.getppid(), "")
"""
    done = python(code)
    assert done.returncode == 1, done.stderr
    record = json.loads((attempt_dir(run_dir, 1) / "rank-0.error.json").read_text())
    assert record["message"] == "the helper thread `committer` ended: ZeroDivisionError: integer division or modulo by zero"
    assert "in work" in record["traceback"]


def test_every_thread_is_a_helper() -> None:
    starts = set()
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(".") or name.partition("/")[0] in PLAIN_THREADS or name in PLAIN_THREADS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "threading.Thread":
                starts.add(name)
    assert starts == {"utils/helper_thread.py"}
