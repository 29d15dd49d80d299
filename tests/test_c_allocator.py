"""Freed blocks go back to the system: seen in a process of its own, as resident bytes and not as time."""

from __future__ import annotations

import subprocess
import sys

from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S

CODE = """
import sys
from efflaunch.utils.c_allocator import LARGE_BYTES, return_freed_blocks
import numpy

def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

assert sys.argv[1] == "as it is" or return_freed_blocks()
kept, before = [], resident()
for _ in range(4):
    blocks = [numpy.ones(size, numpy.uint8) for size in (24 << 20, 8 << 20, 3 << 20, 2 << 20) for _ in range(4)]
    kept.append(numpy.ones(LARGE_BYTES // 2, numpy.uint8))  # on top of the heap: what lies below cannot be trimmed
    del blocks
print(resident() - before - sum(block.nbytes for block in kept))
"""


def left_over(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, mode], env=environment(), capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_was_freed_is_not_resident() -> None:
    assert left_over("return") < 2 << 20 < left_over("as it is")
