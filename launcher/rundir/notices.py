"""Notices of what happened to the process that started a run, for `efflaunch status` and the run's log: a lost terminal, a stop signal."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...utils.text import plain_data
from .small_files import tail_lines

NOTICES_FILE = "logs/notices.jsonl"
_MAX_LINES = 100


@dataclass(frozen=True, slots=True)
class Notices:
    """Takes sentences; `log` is the run's own log beside it. On a full disk they are lost: they are only notices."""

    run_dir: Path
    log: Path

    def add(self, text: str, detail: str = "") -> None:
        """Keep it with the time of now; `detail`, as a traceback, goes to the log alone."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        _append(self.run_dir / NOTICES_FILE, json.dumps({"time": now, "text": text}))
        _append(self.log, f"{stamp} efflaunch: {text}\n{detail}".rstrip())


def _append(path: Path, line: str) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(fd, f"{line}\n".encode("utf-8", "backslashreplace"))
        finally:
            os.close(fd)


def read_notices(run_dir: Path, since: float) -> list[dict[str, Any]]:
    """`time` and `text` of the newest ones that are not older than `since`, oldest first."""
    notices = []
    for line in tail_lines(run_dir / NOTICES_FILE, _MAX_LINES):
        try:
            notice = json.loads(line)
            if float(notice["time"]) >= since:
                notices.append(plain_data({"time": float(notice["time"]), "text": str(notice["text"])}))
        except (ValueError, KeyError, TypeError):
            # Cut off by a full disk.
            continue
    return notices
