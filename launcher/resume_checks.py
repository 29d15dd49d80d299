"""Whether a run can go on from its newest checkpoint with the configuration it is given, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.files import list_checkpoints, read_state
from ..training.schedule_course import load_course, resumed_course
from .config.run_config import Config


def check_resumed(config: Config, run_dir: Path) -> list[str]:
    """What a resume changes about the learning rate and the data, a line each. ConfigError where no schedule reaches the last step, DataError where corpora were replaced (data.changed).

    Looks at the newest whole checkpoint of the run directory; the ranks look again at the one they restore.
    """
    newest = next((info for info in reversed(list_checkpoints(run_dir)) if info.is_whole), None)
    if newest is None:
        return []
    saved = read_state(newest.path)
    course = load_course(saved["extra"].get("schedule", {}), config.optim)
    change = None if course is None else resumed_course(config.optim, course, newest.step, config.train.steps)[1]
    replaced = () if config.data.builtin else _check_data(config, saved["metadata"].get("data"), newest.step)
    return [*([] if change is None else [change]), *(f"data: {line}" for line in replaced)]


def _check_data(config: Config, saved: Any, step: int) -> tuple[str, ...]:
    from ..training.data.identity import check_data_changes, data_changes, data_identity, settings_of
    from ..training.data.indexed import IndexedCorpus

    corpora = [IndexedCorpus(prefix) for prefix in config.data.prefixes]
    now = data_identity(corpora, settings_of(config.data, config.train.seed), None)
    changes = data_changes(saved, now)
    check_data_changes(changes, config.data.changed, step)
    return changes.lines
