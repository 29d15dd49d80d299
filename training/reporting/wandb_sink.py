"""Runs W&B in a process of its own: nothing it does (a slow connection, an exit hook, a crash) reaches the trainer.

The trainer's end writes JSON lines to the child's standard input: the arguments of `wandb.init`, then one line per step.
End of input, also when the trainer is killed, means finish; a child that cannot in FINISH_S seconds (its argument) ends itself.
This file is run as a script by the child, so it imports nothing of the package.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

FINISH_S = 8.0
"""Longest time to bring the files in order, or to send the rest, at the end of a run."""
_MARGIN_S = 1.0
"""The trainer's end waits so much longer, for the child's last words."""


class SinkError(Exception):
    """The child's last words."""


class WandbSink:
    """Sends scalars to the W&B process. SinkError with the child's last words where it has ended."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Start the process; `arguments`: JSON for `wandb.init`; `settings` as a dictionary."""
        from ...utils.signal_mask import stop_signals_blocked  # the child runs this file by itself

        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        # Read by wandb when it is imported: its crash reporter looks up an outside host even offline.
        quiet = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
        with stop_signals_blocked():
            self._child = subprocess.Popen(
                [sys.executable, __file__, str(FINISH_S)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                env={**os.environ, **quiet},
            )
        self._send(arguments)

    def write(self, scalars: dict[str, float], step: int) -> None:
        self._send({**scalars, "step": step})

    def close(self) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.close()
            code = self._child.wait(FINISH_S + _MARGIN_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._child.kill()
            code = self._child.wait()
        if code != 0:
            raise SinkError(self._last_words())

    def _send(self, value: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(value).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            self._child.wait()
            raise SinkError(self._last_words()) from None

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = [line.strip() for line in self._words.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with exit code {self._child.returncode}"


def main(finish_s: float) -> None:
    """Run the W&B process; `finish_s`: what it has from the end of its input on."""
    # The trainer decides when it is over; a Ctrl-C on the terminal reaches the whole process group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Held since it was started; also by what wandb starts itself, unless they are released here.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines, finish_s), daemon=True).start()
    import wandb

    arguments = lines.get()
    if arguments is None:
        return
    run = wandb.init(**{**arguments, "settings": wandb.Settings(**arguments["settings"])})
    # Steps after a restored checkpoint are logged again: the step is a metric, not wandb's own rising counter.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for values in _until_end(lines):
        run.log(values)
    run.finish()


def _read(lines: queue.SimpleQueue[dict[str, Any] | None], finish_s: float) -> None:
    """Takes every line at once, so that the trainer's end never waits, and limits what comes after the last one."""
    try:
        for line in sys.stdin:
            lines.put(json.loads(line))
    except ValueError:
        # The trainer was killed in the middle of a line: that is the end.
        pass
    finally:
        lines.put(None)
        limit = threading.Timer(finish_s, _give_up, (finish_s,))
        limit.daemon = True
        limit.start()


def _give_up(finish_s: float) -> None:
    sys.stderr.write(f"not finished {finish_s:.0f} s after the end of the run\n")
    sys.stderr.flush()
    os._exit(1)


def _until_end(lines: queue.SimpleQueue[dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
    while (values := lines.get()) is not None:
        yield values


if __name__ == "__main__":
    # A script's own folder comes first on its path: `import wandb` must not look among our modules.
    sys.path.pop(0)
    main(float(sys.argv[1]))
