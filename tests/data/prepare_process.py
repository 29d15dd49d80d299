"""A `data prepare` in its own process that may kill itself: `python prepare_process.py SETTINGS.json`.

SETTINGS: arguments (of Request), commit_every_s, kill_after_batches, kill_at_rename (count of final names given before it dies).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from efflaunch.training.data import writer
from efflaunch.training.data.encode import EncodeOptions
from efflaunch.training.data.prepare import PrepareProgress, PrepareRequest, prepare


def main() -> None:
    """Run, or die on the way."""
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    arguments = settings["arguments"]
    request = PrepareRequest(
        **{**arguments, "encode": EncodeOptions(**arguments["encode"]), "commit_every_s": settings.get("commit_every_s", 0.0)}
    )
    batches = 0

    def report(progress: PrepareProgress) -> None:
        nonlocal batches
        batches += 1
        if batches == settings.get("kill_after_batches"):
            print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    if "kill_at_rename" in settings:
        _die_at_rename(settings["kill_at_rename"])
    prepare(request, report)
    print("done", flush=True)


def _die_at_rename(count: int) -> None:
    real, done = os.replace, 0

    def replace(source: str, target: str) -> None:
        nonlocal done
        if not str(source).endswith((".prepare.json.part", ".json.part.part")):
            if done == count:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
        real(source, target)

    writer.os.replace = replace  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
