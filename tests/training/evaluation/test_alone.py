"""Weights of a checkpoint without its optimizer, and checkpoints that cannot be evaluated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.errors import CheckpointError, ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.model.config import ModelConfig
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.tests.training.small import Small, backward, plain_model
from efflaunch.training.evaluation import alone
from efflaunch.training.evaluation.alone import check_base, load_checkpoint, read_results

ONE_STAGE = SimpleNamespace(pipeline=None)


def trained(model):
    """As engines build it, whole on one rank; says how often its weights were said to have changed."""
    updater, optimizer = SimpleNamespace(told=0), torch.optim.AdamW(model.parameters())
    updater.weights_changed = lambda: setattr(updater, "told", updater.told + 1)
    return SimpleNamespace(model=model, state=Fsdp2State(model, optimizer), updater=updater)


def saved(folder, model, **metadata):
    """A checkpoint after one update, which has optimizer states in it."""
    own = trained(model)
    backward(model)
    own.state._optimizer.step()
    engine = CheckpointEngine(CheckpointConfig(name="t"), folder, state=own.state, metadata=metadata)
    engine.save(1, {})
    engine.wait()
    engine.close()
    return folder / "step-00000001"


def test_weights_are_filled_and_nothing_else(tmp_path):
    model = plain_model()
    path = saved(tmp_path / "checkpoints", model)
    other = trained(plain_model(seed=5))
    load_checkpoint(other, path, ONE_STAGE)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.model.named_parameters())[name])
    assert other.updater.told == 1 and not other.state._optimizer.state


def test_another_models_weights_are_refused(tmp_path):
    path = saved(tmp_path / "checkpoints", plain_model())
    with pytest.raises(CheckpointError, match="another model's weights"):
        load_checkpoint(trained(Small(width=9)), path, ONE_STAGE)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = saved(tmp_path / "checkpoints", plain_model())
    file = path / "__0_0.distcp"
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    with pytest.raises(CheckpointError, match="--verify finds a whole one"):
        load_checkpoint(trained(plain_model(seed=5)), path, ONE_STAGE)


def test_adapters_are_judged_beside_the_frozen_weights_they_were_trained_with(tmp_path):
    adapter, config = {"base": "abc", "scaling": 2.0}, SimpleNamespace(model=ModelConfig(name="t"))
    path = saved(tmp_path / "checkpoints", plain_model(), adapter=adapter)
    check_base(config, path, adapter)
    with pytest.raises(ConfigError, match="trained beside other weights"):
        check_base(config, path, {**adapter, "base": "def"})
    (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--verify finds a whole one"):
        check_base(config, path, adapter)


@pytest.mark.parametrize(("adapter", "loads"), [("none", False), ("lora", True), ("qlora", True)])
def test_frozen_weights_are_read_from_the_models_files(monkeypatch, adapter, loads):
    """What a checkpoint of adapters does not hold is not left random."""
    asked, topology = [], SimpleNamespace(mesh=None, experts=None, rank=0)

    def build(*_, load, **__):
        asked.append(load)
        raise InterruptedError

    for name, made in {
        "solve_layout": None, "rank_kernel": (None, None), "make_groups": topology, "stage_place": None, "builder_of": build,
        "agreed_adapter": {"base": "abc"}, "check_base": None, "agreed_ledger": SimpleNamespace(inputs=SimpleNamespace(policy=None)),
    }.items():  # fmt: skip
        monkeypatch.setattr(alone, name, lambda *_, made=made, **__: made)
    config = compose(["+experiment=quickstart", f"adapter={adapter}"])
    for checkpoint in ("checkpoints/step-00000001", None):
        with pytest.raises(InterruptedError):
            alone._build(config, torch.device("cpu"), checkpoint, lambda _: None)
    assert asked == [loads, True]


def test_results_are_what_evaluations_reported():
    events = [
        {"event": "eval_progress", "corpus": "a"},
        {"event": "eval", "time": 1.0, "step": 0, "corpus": "a", "loss": 2.0},
        {"event": "eval", "time": 2.0, "step": 0, "corpus": "b", "loss": 3.0},
    ]
    assert read_results(events) == [{"corpus": "a", "loss": 2.0}, {"corpus": "b", "loss": 3.0}]
