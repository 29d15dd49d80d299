"""What DeepSpeed itself writes becomes a model directory with its very weights; another model's names and shapes are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from efflaunch.errors import CheckpointError, ConfigError
from efflaunch.model.import_model import import_model
from efflaunch.tests.model.zero_files import write_universal, write_zero
from efflaunch.tests.parity.reference import reference_model
from efflaunch.tests.ranks import RankPool
from efflaunch.training.config import Dtype

CASES = {"stage1": (1, "llama", True), "stage2": (2, "llama_mha_tied", False), "stage3": (3, "llama", False)}


def save_with_deepspeed(stage: int, family: str, is_bf16: bool, out: str) -> dict[str, Any] | None:
    """Two steps of plain DeepSpeed, and its checkpoint; rank 0 returns the float32 weights by DeepSpeed's own words."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    torch.set_num_threads(1)
    from efflaunch.parallel.sharding.deepspeed import load_deepspeed

    deepspeed = load_deepspeed(torch.device("cpu"))
    from deepspeed.utils import safe_get_full_fp32_param

    model = reference_model(family, torch.float32)
    model.config.save_pretrained(out)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "sub_group_size": 20_000},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bf16},
    }
    groups = [{"params": [each for each in model.parameters() if (each.ndim > 1) == kind]} for kind in (True, False)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config, dist_init_required=False)
    tokens = torch.arange(16)[None] + dist.get_rank()
    for _ in range(2):
        engine.backward(engine(tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(out, tag="global_step2")
    weights = {name: safe_get_full_fp32_param(parameter).clone().numpy() for name, parameter in model.named_parameters()}
    engine.destroy()
    return weights if dist.get_rank() == 0 else None


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("case", CASES)
def test_what_deepspeed_writes_becomes_a_model_directory(pool: RankPool, tmp_path: Path, case: str) -> None:
    wanted = pool.run(save_with_deepspeed, *CASES[case], str(tmp_path / "theirs"), ranks=2)[0]
    told: list[tuple[int, int]] = []
    report = import_model(tmp_path / "theirs", tmp_path / "ours", on_progress=lambda done, total: told.append((done, total)))
    assert f"ZeRO stage {CASES[case][0]} of 2 ranks, DeepSpeed 0.19" in report.about and report.checkpoint.name == "global_step2"
    loaded = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32)
    assert all(torch.equal(parameter, torch.from_numpy(wanted[name])) for name, parameter in loaded.named_parameters())
    assert report.num_parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1][0] == told[-1][1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model's directory without weights, and its weights."""
    model = reference_model("llama", torch.float32)
    folder = tmp_path_factory.mktemp("model")
    model.config.save_pretrained(folder)
    return folder, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_names_of_a_wrapper_and_flat_universal_weights_are_taken(tmp_path: Path, tiny: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = tiny
    places = (
        write_zero(tmp_path / "wrapped", {f"module.{name}": value for name, value in weights.items()}, stage=2),
        write_universal(tmp_path / "universal", {name: value.flatten() for name, value in weights.items()}),
    )
    for place in places:
        report = import_model(place, tmp_path / f"{place.name}-out", folder, dtype=Dtype.BFLOAT16, max_shard_bytes=100_000)
        loaded = AutoModelForCausalLM.from_pretrained(report.path).to(torch.float32)
        assert report.num_files > 1 and report.num_bytes == 2 * report.num_parameters
        assert all(torch.equal(value, weights[name].bfloat16().float()) for name, value in loaded.named_parameters())


def test_another_models_checkpoint_is_refused_and_nothing_is_left(tmp_path: Path, tiny: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = tiny
    name = "model.layers.0.mlp.up_proj.weight"
    changed: dict[str, dict[str, torch.Tensor]] = {
        f"no {name}": {other: value for other, value in weights.items() if other != name},
        "extra, which the model has not": {**weights, "extra": torch.zeros(3)},
        f"{name} of shape [3], not": {**weights, name: torch.zeros(3)},
        f"{name} of shape [64, 112], not [112, 64]": {**weights, name: torch.zeros(64, 112)},
    }
    for index, (found, theirs) in enumerate(changed.items()):
        with pytest.raises(CheckpointError) as error:
            import_model(write_zero(tmp_path / str(index), theirs), tmp_path / "out", folder)
        assert found in error.value.found and "--model" in error.value.hint
    with pytest.raises(ConfigError, match=r"no config\.json in it or beside it"):
        import_model(tmp_path / "0", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
