"""ZeRO's shards and universal folders are read whole, or it is said what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from efflaunch.errors import CheckpointError
from efflaunch.model.import_zero import folder_of, num_bytes, open_weights
from efflaunch.tests.model.zero_files import write_universal, write_zero

WEIGHTS = {"a": torch.arange(15.0).view(5, 3), "b": torch.arange(4.0) + 100, "c": torch.arange(6.0).view(2, 3) + 200}


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 4)])
def test_shards_are_put_together(tmp_path: Path, stage: int, ranks: int) -> None:
    counts: list[int] = []
    folder = write_zero(tmp_path / "global_step1", WEIGHTS, stage=stage, ranks=ranks)
    weights = open_weights(folder, counts.append)
    assert all(torch.equal(weights.read(name), value) for name, value in WEIGHTS.items()) and list(weights.shapes) == list(WEIGHTS)
    assert weights.about == f"ZeRO stage {stage} of {ranks} ranks, DeepSpeed 0.0" and 0 < sum(counts) <= num_bytes(folder)
    counted = num_bytes(folder)
    (folder / "training_args.pt").write_bytes(b"x" * 1000)
    assert num_bytes(folder) == counted, "only what is read"


def test_a_universal_checkpoint_is_read(tmp_path: Path) -> None:
    weights = open_weights(write_universal(tmp_path / "u", WEIGHTS))
    assert all(torch.equal(weights.read(name), value) for name, value in WEIGHTS.items())


def test_the_newest_folder_is_what_latest_names(tmp_path: Path) -> None:
    folder = write_zero(tmp_path / "global_step7", WEIGHTS)
    (tmp_path / "latest").write_text("global_step7\n")
    assert folder_of(tmp_path) == folder and folder_of(folder) == folder
    for text in ("../elsewhere", "global_step8", ""):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(CheckpointError, match="of no directory beside it"):
            folder_of(tmp_path)


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        open_weights(folder)
    return error.value


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_zero(tmp_path / "step", WEIGHTS, ranks=4)
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert "none of [2]" in refused(folder).found
    (folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink()
    assert "2 files of ranks, of stage [3] on [4] ranks" in refused(folder).found
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    assert "no such file" in refused(folder).found


def test_shards_of_another_number_of_ranks_are_refused(tmp_path: Path) -> None:
    two, four = (write_zero(tmp_path / str(ranks), WEIGHTS, ranks=ranks) for ranks in (2, 4))
    shutil.copy(four / "zero_pp_rank_1_mp_rank_00_optim_states.pt", two)
    assert "on [2, 4] ranks" in refused(two).found


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"param_shapes": [{"a": torch.Size([5, 4])}]}, "numbers in the buffers"),
        ({"param_shapes": [{"a": None}]}, "TypeError"),
        ({"frozen_param_shapes": {"base": torch.Size([2])}}, "1 frozen weights, base first"),
    ],
)
def test_what_is_not_of_the_shards_is_refused(tmp_path: Path, model: dict[str, Any], found: str) -> None:
    assert found in refused(write_zero(tmp_path / "step", WEIGHTS, **model)).found


@pytest.mark.parametrize("file", ["mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_01_optim_states.pt", "layer_00-model_states.pt"])
def test_models_that_are_cut_are_refused(tmp_path: Path, file: str) -> None:
    folder = write_zero(tmp_path / "step", WEIGHTS)
    (folder / file).touch()
    error = refused(folder)
    assert file in error.found and "ds_to_universal" in error.hint


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "no *_optim_states.pt" in refused(tmp_path).found
    (tmp_path / "zero").mkdir()
    assert "no NAME/fp32.pt" in refused(tmp_path).found
    with pytest.raises(CheckpointError, match="no such directory"):
        folder_of(tmp_path / "nothing")
