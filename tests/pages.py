"""Documentation pages run as they stand: every bash block of a page, in order, in one empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from efflaunch.tests.limits import ENDS_S

DOCS = Path(__file__).resolve().parent.parent / "docs"


def bash_blocks(page: str) -> list[str]:
    """The ```bash blocks of docs/`page`."""
    return re.findall(r"^```bash\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_page(page: str, directory: Path) -> str:
    """What the blocks print; AssertionError where one fails. `efflaunch` and `python` are this interpreter's; no hub is reached.

    Runs that a page starts do not measure this machine first (parallel.probe_s=0): a page shows commands, and no times.
    """
    tools, work = directory / "bin", directory / "work"
    tools.mkdir()
    work.mkdir()
    without_probe = 'case "$1" in +experiment=*) first=$1; shift; set -- "$first" parallel.probe_s=0 "$@";; esac\n'
    for name, before, command in (("efflaunch", without_probe, f"{sys.executable} -m efflaunch"), ("python", "", sys.executable)):
        script = tools / name
        script.write_text(f'#!/bin/sh\n{before}exec {command} "$@"\n')
        script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    text = "set -euo pipefail\n" + "\n".join(bash_blocks(page))
    done = subprocess.run(["bash", "-c", text], cwd=work, env=environment, capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
