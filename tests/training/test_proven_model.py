"""A run of a family without parity rows proves itself before it trains, once; a difference ends it on every rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.model.config import ModelConfig
from efflaunch.tests.model.public_configs import SUPPORTED, write_config
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def prove(path: str, run_dir: Path, home: Path, residual: float = 1.0) -> tuple[list[str], str | None]:
    """What runs on this rank, and the error it ends with. `residual`: what a wrong adapter adds its halves with."""
    import os

    import torch

    from efflaunch.model.families.structural import StructuralLayer
    from efflaunch.training.proven_model import prove_model

    torch.set_num_threads(1)
    os.environ["HOME"], seen, right = str(home), [], StructuralLayer._added
    if residual != 1.0:
        StructuralLayer._added = lambda self, total, part: total + residual * part  # type: ignore[method-assign]
    try:
        prove_model(ModelConfig(name="m", path=path), run_dir, seen.append)
    except ConfigError as error:
        return seen, str(error)
    finally:
        StructuralLayer._added = right  # type: ignore[method-assign]
    return seen, None


def runs(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).mkdir(parents=True)
    return [folder / name for name in names]


def test_a_run_proves_itself_once(pool: RankPool, tmp_path: Path) -> None:
    path = str(write_config(tmp_path / "model", SUPPORTED["stablelm-3b-4e1t"]))
    first, second, home, elsewhere = runs(tmp_path, "first", "second", "home", "elsewhere")
    (seen, error), (others, nothing) = pool.run(prove, path, first, home, ranks=2)
    assert error is None and nothing is None and seen[0] == "proving the model" and others == []
    proof = json.loads((first / "proof.json").read_text())
    assert proof["family"] == "stablelm" and proof["layers"] == [0, 1] and max(proof["loss_difference"].values()) < 1e-10
    assert [file.stem for file in (home / ".cache" / "efflaunch" / "proofs").iterdir()] == [proof["digest"]]
    assert pool.run(prove, path, second, home, ranks=1) == [([], None)], "the user's cache has it"
    assert pool.run(prove, path, first, elsewhere, ranks=1) == [([], None)], "the run's directory has it"


def test_a_difference_ends_every_rank(pool: RankPool, tmp_path: Path) -> None:
    path = str(write_config(tmp_path / "model", SUPPORTED["stablelm-3b-4e1t"]))
    run, home = runs(tmp_path, "run", "home")
    answers = pool.run(prove, path, run, home, 1.5, ranks=2)
    assert answers[0][1] == answers[1][1] and "from plain Hugging Face's" in str(answers[0][1])
    assert list(run.iterdir()) == [] and list(home.iterdir()) == []


def test_families_with_rows_are_not_compared_again(pool: RankPool, tmp_path: Path) -> None:
    path: Any = str(write_config(tmp_path / "model", SUPPORTED["Llama-3.2-1B"]))
    run, home = runs(tmp_path, "run", "home")
    assert pool.run(prove, path, run, home, ranks=1) == [([], None)] and list(run.iterdir()) == []
