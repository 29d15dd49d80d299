"""A run directory: its identity, its frozen configuration, and who may read it. Whoever runs in it has its lock (lock.py).

run.yaml is the configuration in plain YAML with `revision` and `efflaunch_version`; run.sha256 is its hash.
Starting the run again with another configuration writes the next revision; the earlier ones stay in `revisions/`.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import ConfigError
from ...utils.atomic_files import write_atomic
from ...utils.names import as_identifier
from ...utils.stored_paths import base_of
from ...utils.text import typed
from ..config.aliases import current_data
from ..config.paths import absolute_paths
from ..config.run_config import Config
from ..config.schema import dump_config, flat, load_config

RUN_FILE, HASH_FILE = "run.yaml", "run.sha256"
_EXTRA_KEYS = ("efflaunch_version", "revision")
_MAX_EXPERIMENT = 80
_OTHERS = 0o077
"""Permission bits that a private run takes from everybody but its owner."""


_OWN = (
    *("logs", "revisions", "slurm", "ray", "checkpoints", "scores"),
    *("metrics.jsonl", "state.json", "profile.yaml", "rates.json", "costs.json"),
)
"""Names a run directory may hold where a start was cut off before run.yaml, or run.yaml was lost. Hidden names are locks and probes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRun:
    """The contents of run.yaml."""

    config: Config
    revision: int
    version: str


def make_run_id(experiment: str) -> str:
    """`quickstart-20260131-142501-3f9c`: made once, in one process; the suffix keeps two starts in a second apart."""
    return f"{as_identifier(experiment)[:_MAX_EXPERIMENT]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def attempt_dir(run_dir: Path, attempt: int) -> Path:
    """Return the folder in which the ranks of an attempt log."""
    return run_dir / "logs" / f"attempt-{attempt}"


def read_run(run_dir: Path) -> StoredRun:
    """The stored configuration; ConfigError where there is none, or it was changed by hand."""
    import yaml

    path = run_dir / RUN_FILE
    if not path.is_file():
        raise ConfigError(
            str(run_dir),
            found="no run.yaml",
            expected="a run directory",
            hint=_instead(run_dir),
        )
    hint = f"undo the edit (revisions/ holds every version), then: {typed('resume', run_dir, 'key=value')}"
    try:
        text = path.read_bytes()
        data = yaml.safe_load(text) if is_as_written(run_dir, text) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            str(path), found=f"{type(error).__name__}: {error}", expected="the file as efflaunch wrote it", hint=hint
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("revision"), int) or not isinstance(data.get("efflaunch_version"), str):
        problem = "contents that do not match run.sha256" if data is None else "no revision and version"
        raise ConfigError(str(path), found=problem, expected="the file as efflaunch wrote it", hint=hint)
    stored = current_data({key: value for key, value in data.items() if key not in _EXTRA_KEYS}, str(path))
    config = _located(run_dir, load_config(stored))
    return StoredRun(config=config, revision=data["revision"], version=data["efflaunch_version"])


def _instead(run_dir: Path) -> str:
    """What to type where there is no run.yaml: the newest revision is the same file."""
    numbers = [int(path.stem) for path in (run_dir / "revisions").glob("*.yaml") if path.stem.isdecimal()]
    if not numbers:
        return "efflaunch status runs/NAME, with a directory that efflaunch made"
    return f"cp {shlex.quote(str(run_dir / 'revisions' / f'{max(numbers)}.yaml'))} {shlex.quote(str(run_dir / RUN_FILE))}"


def is_as_written(run_dir: Path, text: bytes) -> bool:
    """Return whether `text`, of run.yaml, is what efflaunch wrote: its hash is in run.sha256, or a revision is the same byte by byte.

    The second holds where a start was killed between the two files (the hash is written last), and where the hash is lost.
    """
    try:
        recorded = (run_dir / HASH_FILE).read_text(encoding="utf-8", errors="replace").split()[:1]
    except OSError:
        recorded = []
    if recorded == [hashlib.sha256(text).hexdigest()]:
        return True
    named = re.search(rb"^revision: (\d{1,9})$", text, re.MULTILINE)
    if named is None:
        return False
    revision = run_dir / "revisions" / f"{int(named[1])}.yaml"
    return revision.is_file() and revision.read_bytes() == text


def write_attempt(run_dir: Path, attempt: int, config: Config) -> list[str]:
    """Keep what an attempt runs with beside its logs, where that is not run.yaml; one line per key that differs."""
    import yaml

    changes = config_diff(read_run(run_dir).config, config)
    directory = attempt_dir(run_dir, attempt)
    directory.mkdir(parents=True, exist_ok=True)
    if changes:
        text = yaml.safe_dump(dump_config(config), sort_keys=False, default_flow_style=None, width=120)
        write_atomic(directory / RUN_FILE, text)
    return changes


def read_attempt(run_dir: Path, attempt: int) -> Config:
    """Read the configuration of an attempt: its own (see elastic_nodes), else run.yaml. ConfigError as of read_run."""
    import yaml

    path = attempt_dir(run_dir, attempt) / RUN_FILE
    stored = read_run(run_dir).config
    if not path.is_file():
        return stored
    try:
        return _located(run_dir, load_config(current_data(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        hint = f"efflaunch resume {run_dir} begins another attempt"
        raise ConfigError(
            str(path), found=f"{type(error).__name__}: {error}", expected="the file as efflaunch wrote it", hint=hint
        ) from error


def _located(run_dir: Path, config: Config) -> Config:
    # Runs of earlier versions hold relative paths.
    return absolute_paths(config, base_of(run_dir, config.run.root, config.run.id))


def write_run(run_dir: Path, config: Config, revision: int) -> None:
    """Write run.yaml and run.sha256 as `revision`, and a copy under revisions/."""
    import yaml

    data = {"efflaunch_version": __version__, "revision": revision, **dump_config(config)}
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
    (run_dir / "revisions").mkdir(exist_ok=True)
    write_atomic(run_dir / "revisions" / f"{revision}.yaml", text)
    write_atomic(run_dir / RUN_FILE, text)
    write_atomic(run_dir / HASH_FILE, _hash_line(text.encode()))


def _hash_line(text: bytes) -> str:
    return f"{hashlib.sha256(text).hexdigest()}  {RUN_FILE}\n"


def _mend_hash(run_dir: Path) -> None:
    """Write run.sha256 of a run.yaml that is as written, where it is missing or of the revision before. The lock must be held."""
    expected, path = _hash_line((run_dir / RUN_FILE).read_bytes()), run_dir / HASH_FILE
    if not path.is_file() or path.read_bytes() != expected.encode():
        write_atomic(path, expected)


def config_diff(old: Config, new: Config) -> list[str]:
    """Return one line per key that differs, `train.steps: 100 -> 200`."""
    before, after = dict(flat(dump_config(old))), dict(flat(dump_config(new)))
    keys = [*before, *(key for key in after if key not in before)]
    return [f"{key}: {_shown(before, key)} -> {_shown(after, key)}" for key in keys if before.get(key, ...) != after.get(key, ...)]


def _shown(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key, "absent")
    return "null" if value is None else str(value)


def store_config(run_dir: Path, config: Config) -> tuple[int, list[str]]:
    """Make `config` the run's: (its revision, what differs from the revision before). The lock must be held.

    Relative paths become absolute here: later commands are typed in other directories.
    """
    config = absolute_paths(config)
    if not (run_dir / RUN_FILE).is_file():
        write_run(run_dir, config, 1)
        return 1, []
    stored = read_run(run_dir)
    changes = config_diff(stored.config, config)
    if not changes:
        _mend_hash(run_dir)
        return stored.revision, []
    write_run(run_dir, config, stored.revision + 1)
    return stored.revision + 1, changes


def make_run_dir(run_dir: Path, *, private: bool = True) -> None:
    """Create it, or make an existing one what `private` says; ConfigError where that cannot be.

    Private: for its owner alone, and so is every file this process and its children make from here on.
    """
    try:
        _make_dirs(run_dir, private=private)
        (run_dir / "logs").mkdir(exist_ok=True)
        probe = run_dir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            "run.root",
            found=f"{error.filename or run_dir}: {error.strerror}",
            expected="a directory that can be written",
            hint="run.root=DIR with a directory of yours",
        ) from error


def keep_private(private: bool) -> None:
    """Files this process and its children make from here on are for their owner alone, if they are to be."""
    if private:
        os.umask(_OTHERS)


def _make_dirs(run_dir: Path, *, private: bool) -> None:
    # Directories above it are not the run's: others may have runs there.
    if not run_dir.parent.exists():
        run_dir.parent.mkdir(parents=True, exist_ok=True)
    was_there = run_dir.exists()
    if was_there:
        _check_ours(run_dir)
    keep_private(private)
    run_dir.mkdir(exist_ok=True)
    mode = stat.S_IMODE(run_dir.stat().st_mode)
    if private and mode & _OTHERS:
        _close(run_dir, mode)
    elif not private and was_there and not mode & _OTHERS:
        _open_to_others(run_dir)


def _check_ours(run_dir: Path) -> None:
    """ConfigError for a folder of something else: neither its mode nor its files are ours to change."""
    if not run_dir.is_dir():
        raise ConfigError("run.id", found=f"{run_dir}, which is no directory", expected="a new name", hint="another run.id")
    if (run_dir / RUN_FILE).is_file():
        return
    other = sorted(path.name for path in run_dir.iterdir() if path.name not in _OWN and not path.name.startswith("."))
    if other:
        raise ConfigError(
            "run.id",
            found=f"{run_dir}, a directory without run.yaml that holds {other[0]!r}" + (" and more" if other[1:] else ""),
            expected="a new or empty directory, or one of a run",
            hint="another run.id, or another run.root",
        )


def _close(run_dir: Path, mode: int) -> None:
    if run_dir.stat().st_uid != os.geteuid():
        raise ConfigError(
            "run.private",
            found=f"{run_dir}, which belongs to another user",
            expected="a directory of yours, for it is to be closed to others",
            hint="run.private=false to use a shared one, or another run.id",
        )
    run_dir.chmod(mode & ~_OTHERS)


def _open_to_others(run_dir: Path) -> None:
    """A private run that is no longer to be: its files get the modes they would have had."""
    mask = os.umask(_OTHERS)
    os.umask(mask)
    for path in (run_dir, *run_dir.rglob("*")):
        if not path.is_symlink() and path.stat().st_uid == os.geteuid():
            mode = stat.S_IMODE(path.stat().st_mode)
            # Others may do what the owner may, less what the umask takes.
            path.chmod(mode | ((mode & 0o700) // 8 | (mode & 0o700) // 64) & ~mask)


def place_of(config: Config) -> Path:
    """The run directory."""
    assert config.run.id is not None, "made before launching"
    return Path(config.run.root) / config.run.id
