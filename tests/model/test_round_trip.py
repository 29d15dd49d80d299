"""What is loaded and exported untrained is what was there, bit for bit: names, types and numbers of tensors, fields of config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from efflaunch.model.config import ModelConfig
from efflaunch.model.export import export
from efflaunch.tests.model.small import FAMILIES, edit_weights, of, save_model
from efflaunch.tests.ranks import RankPool
from efflaunch.training.config import Dtype

OURS = {"dtype", "use_cache", "_name_or_path", "transformers_version"}
"""Fields of config.json that are of the writing, not of the model."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def load_and_save(config: ModelConfig, run_dir: Path) -> None:
    """A checkpoint of the model as it was loaded."""
    from efflaunch.checkpoint.config import CheckpointConfig
    from efflaunch.checkpoint.engine import CheckpointEngine
    from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
    from efflaunch.parallel.topology import build_topology
    from efflaunch.tests.model.model_ranks import _loaded
    from efflaunch.training.optimizers.adamw import build_optimizer
    from efflaunch.training.optimizers.config import OptimConfig

    model = _loaded(config, build_topology(replicate=1, device="cpu"), torch.float32)
    state = Fsdp2State(model, build_optimizer(model, OptimConfig(name="test", lr=0.1)))
    metadata = {"hf_config": model.config.to_dict()}
    engine = CheckpointEngine(CheckpointConfig(name="test"), run_dir / "checkpoints", state=state, metadata=metadata)
    engine.save(1, {})
    engine.wait()


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_and_exported_is_what_it_was(pool: RankPool, tmp_path: Path, family: str) -> None:
    source = save_model(tmp_path / "source", family)
    exact = ("e_score_correction_bias",)
    edit_weights(source, lambda tensors: {name: t if name.endswith(exact) else t.bfloat16() for name, t in tensors.items()})
    pool.run(load_and_save, of(source), tmp_path / "run", ranks=1)
    export(tmp_path / "run", tmp_path / "out", dtype=Dtype.BFLOAT16)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    fields, exported = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "out"))
    assert {name for name in fields if fields[name] != exported[name]} <= OURS
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == fields["architectures"]
