"""Tries generated wrong inputs on the command line: `python -m efflaunch.bench.fuzz --inputs N --json FILE`.

Commands run in this process, one after the other. An input ends well where it is accepted, or refused with exit code 93 and a
message. Counted are `tracebacks` (exit code 1, or an exception that leaves main), `hangs` (more processor time than CPU_S), and
`accepted_wrong` (exit code 0 for what is wrong by construction). The exit code is 1 where any was found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from ..errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, UserError
from ..launcher import cli
from ..launcher.config.compose import compose
from ..launcher.config.run_config import Config
from ..launcher.rundir.run_dir import make_run_dir, write_run
from ..launcher.rundir.state import Attempt, Failure, new_state, write_state
from ..launcher.start import check_mirror
from ..launcher.unexpected import DEBUG
from .fuzz_inputs import BASE, HERE, Files, Input, all_inputs, corpus_files
from .record import machine, write_json

CPU_S = 20.0
"""Processor time after which an input hangs; the slowest good one takes less than one."""
KEPT = 50
"""Findings that are written down in full."""


class HangError(BaseException):
    """Raised inside an input that takes too long; no handler of ours takes it for its own."""


@dataclass(slots=True)
class Findings:
    """Counts and faults of all inputs so far."""

    inputs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)

    def add(self, given: Input, ending: str, detail: str) -> None:
        self.inputs += 1
        self.counts[ending] += 1
        self.by_kind.setdefault(given.kind, Counter())[ending] += 1
        if ending not in ("accepted", "refused") and len(self.kept) < KEPT:
            files = {name: content.decode("latin-1")[:2000] for name, content in given.files.items()}
            self.kept.append({"ending": ending, "kind": given.kind, "words": list(given.words), "files": files, "detail": detail[-3000:]})

    def summary(self) -> dict[str, Any]:
        """The figures of the result."""
        bad = {name: self.counts[name] for name in ("tracebacks", "hangs", "accepted_wrong")}
        kinds = {kind: dict(counts) for kind, counts in sorted(self.by_kind.items())}
        return {"inputs": self.inputs, **bad, "refused": self.counts["refused"], "accepted": self.counts["accepted"], "kinds": kinds}


def run_template(folder: Path) -> Files:
    """The files of a small run directory as a run leaves it, below `run/`; its corpus lies in `folder`."""
    for name, content in corpus_files([30, 20, 40], masked=False).items():
        (folder / name).write_bytes(content)
    lengths = (
        "data.builtin=null",
        f"data.prefixes=[{folder}/corpus]",
        "data.tokenizer=null",
        "data.max_seq_len=64",
        "data.global_batch_tokens=64",
    )
    run_dir = folder / "run"
    make_run_dir(run_dir)
    write_run(run_dir, compose([*BASE, *lengths, "run.id=run", f"run.root={folder}"]), 1)
    failure = Failure(rank=0, message="why", traceback="Traceback", log="logs/attempt-1/rank-0.log", exit_code=1)
    attempt = Attempt(number=1, started=1.0, ended=2.0, exit_code=1, last_step=1, failure=failure, decision="given up")
    write_state(run_dir, replace(new_state(world_size=4, revision=1, attempts=(attempt,)), state="failed", ended=3.0, exit_code=1))
    (run_dir / "logs" / "attempt-1").mkdir()
    (run_dir / "logs" / "attempt-1" / "rank-0.log").write_text("words\n")
    numbers = {"loss": 2.0, "step_s": 1.0, "total_tokens": 9, "tokens_per_s": 9.0, "lr": 0.1}
    ranks = [{"rank": 0, "tokens": 5, "peak_bytes": 7}]
    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "steps": 20, "world_size": 4, "parameters": 10, "resumed_from": None, "memory": ["keep"]},
        {"event": "step", "step": 1, **numbers, "plan": "p", "ranks": ranks},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    checkpoint = run_dir / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    record = '{"format": 2, "step": 1, "attempt": "a", "time": 1.0, "world_size": 1, "files": {}, "manifests": {}, "hash": "x"}'
    (checkpoint / "COMMIT").write_text(record)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


def try_input(given: Input, base: Config, folder: Path) -> tuple[str, str]:
    """(`accepted`, `refused`, `tracebacks`, `hangs` or `accepted_wrong`; what was printed) of one input."""
    for name, content in given.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    words = [word.replace(HERE, str(folder)) for word in given.words]
    # As a terminal would: what cannot be encoded is no fault of the command.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), _limited():
            code = _act(words, base, folder)
    except HangError:
        return "hangs", "".join(traceback.format_exc())
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_DONE
    except UserError:
        code = EXIT_USER
    except Exception:  # what leaves main is what is looked for
        return "tracebacks", "".join(traceback.format_exc())
    out.seek(0)
    said = out.read()
    if code not in (EXIT_DONE, EXIT_PREEMPTED, EXIT_USER) or "Traceback (most" in said:
        return "tracebacks", said
    if code != EXIT_USER and given.must_fail:
        return "accepted_wrong", said
    return ("refused" if code == EXIT_USER else "accepted"), said


def _act(words: list[str], base: Config, folder: Path) -> int:
    if words == ["data"]:
        _open_corpus(base, folder)
        return EXIT_DONE
    if words[0] == "mirror":
        _look_at_mirror(base, folder, words[1])
        return EXIT_DONE
    return cli.main([*words, DEBUG])


def _open_corpus(base: Config, folder: Path) -> None:
    """Open the corpus as a run does, and read its first step."""
    from ..launcher.checks import check_data
    from ..training.data.source import open_data

    data = replace(base.data, builtin=None, prefixes=[str(folder / "corpus")], tokenizer=None, max_seq_len=64, global_batch_tokens=64)
    check_data(replace(base, data=data))
    source = open_data(data, 0, 4096)
    source.num_target_tokens(0)
    for index, length in enumerate(source.lengths(0)):
        source.tokens(0, index, 0, length)


def _look_at_mirror(base: Config, folder: Path, address: str) -> None:
    """Look at a second place as a run does before it starts, whose directory is another than that of the files."""
    from ..checkpoint.config import check_checkpoint

    config = replace(base, checkpoint=replace(base.checkpoint, mirror=address))
    check_checkpoint(config.checkpoint)
    check_mirror(config, folder / "another")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """HangError after CPU_S of processor time; a wait is no hang of ours, and the machine may be busy."""

    def ring(number: int, frame: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(num_inputs: int, number: int, on_progress: Any = None) -> Findings:
    """Try so many inputs of seed `number`, each in a folder of its own that is removed again."""
    findings, here = Findings(), Path.cwd()
    with tempfile.TemporaryDirectory(prefix="efflaunch-fuzz-") as top:
        made = Path(top) / "template"
        made.mkdir()
        template, base = run_template(made), compose([*BASE, "run.id=run"])

        @seed(number)
        @settings(max_examples=num_inputs, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(all_inputs(template))
        def one(given_input: Input) -> None:
            folder = Path(top) / "input"
            folder.mkdir()
            os.chdir(folder)
            try:
                findings.add(given_input, *try_input(given_input, base, folder))
            finally:
                os.chdir(here)
                shutil.rmtree(folder, ignore_errors=True)
            if on_progress is not None:
                on_progress(findings)

        one()
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5000, metavar="N", help="how many; 5000")
    parser.add_argument("--seed", type=int, default=0, help="the same seed tries the same inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures and what was found go")
    options = parser.parse_args()
    begun = time.monotonic()

    def on_progress(so_far: Findings) -> None:
        if so_far.inputs % 100 == 0:
            print(so_far.summary(), file=sys.stderr, flush=True)

    findings = fuzz(options.inputs, options.seed, on_progress)
    summary = findings.summary()
    result = {
        "benchmark": "fuzz",
        **machine(),
        **summary,
        "seed": options.seed,
        "seconds": time.monotonic() - begun,
        "findings": findings.kept,
    }
    if options.json is not None:
        write_json(options.json, result)
    print({name: result[name] for name in ("inputs", "tracebacks", "hangs", "accepted_wrong", "seconds")})
    return int(any(summary[name] for name in ("tracebacks", "hangs", "accepted_wrong")))


if __name__ == "__main__":
    sys.exit(main())
