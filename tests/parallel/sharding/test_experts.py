"""Experts over ranks beside FSDP2: first weights, files, checkpoints under other layouts, the norm, and an update on two meshes at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.errors import ConfigError
from efflaunch.memory.policy import MemoryPolicy
from efflaunch.model.build import build_config, build_model
from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.model.weights import load_weights, persistent_buffers
from efflaunch.parallel.sharding.experts import spread_experts
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.parallel.sharding.parts import memory_of
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.model.small import of, save_model
from efflaunch.tests.ranks import RankPool
from efflaunch.training.optimizers.adamw import build_optimizer, clip_gradients
from efflaunch.training.optimizers.config import MuonScale, OptimConfig, StateDtype

EP_2, HSDP = {"experts": 2}, {"replicate": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "EP 2": (4, EP_2),
    "EP 4": (4, {"experts": 4}),
    "EP 2, HSDP": (4, {**EP_2, **HSDP}),
    "no EP": (4, {}),
    "HSDP": (4, HSDP),
    "one rank": (1, {}),
}
OPTIM = OptimConfig(name="test", lr=0.1, weight_decay=0.3)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "gpt_oss")


def build(folder: Path, layout: dict[str, int]) -> Any:
    """The model in float64 under a layout, with the weights of the files. Collective."""
    topology, config = build_topology(replicate=layout.get("replicate", 1), device="cpu", experts=layout.get("experts", 1)), of(folder)
    model = build_model(
        build_config(hf_config_dict(config)), MemoryPolicy(), topology.mesh, device=torch.device("cpu"), compute_dtype=torch.float64,
        seed=3, loss_chunk_tokens=8, expert_mesh=topology.experts,
    )  # fmt: skip
    load_weights(model, config, 3)
    return model


def whole(values: Any) -> dict[str, Tensor]:
    """Every tensor, whole; collective."""
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone() for name, value in values}


def give_gradients(model: nn.Module) -> None:
    """Gradients that are a function of the weights."""
    for parameter in model.parameters():
        parameter.grad = (parameter * 0.5 + 1).detach()


def engine(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> CheckpointEngine:
    return CheckpointEngine(CheckpointConfig(name="test"), folder, state=Fsdp2State(model, optimizer), metadata={})


def loaded(folder: Path, layout: dict[str, int]) -> dict[str, Tensor]:
    model = build(folder, layout)
    return whole([*model.named_parameters(), *persistent_buffers(model).items()])


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral", "dots1"])
def test_files_fill_the_same_weights_whatever_the_layout(pool: RankPool, tmp_path: Path, family: str) -> None:
    files = save_model(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32).double()
    expected = {**dict(theirs.named_parameters()), **persistent_buffers(theirs)}
    for name in ("EP 2", "EP 4", "EP 2, HSDP"):
        ranks, layout = LAYOUTS[name]
        for weights in pool.run(loaded, files, layout, ranks=ranks):
            assert weights.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in weights.items()), name


def updated(
    folder: Path, layout: dict[str, int], max_norm: float | None, optim: OptimConfig = OPTIM
) -> tuple[dict[str, Tensor], float, list[tuple[str, int]]]:
    """Weights after two fused steps on clipped gradients, the first norm, and what the groups of the optimizer hold."""
    model = build(folder, layout)
    optimizer, norms = build_optimizer(model, optim), []
    for _ in range(2):
        give_gradients(model)
        norms.append(clip_gradients(model, max_norm))
        optimizer.step()
    groups = [(group["name"], len(group["params"])) for group in optimizer.param_groups]
    return whole(model.named_parameters()), norms[0], groups


@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["free", "clipped"])
def test_the_norm_and_an_update_are_those_of_one_process(pool: RankPool, folder: Path, max_norm: float | None) -> None:
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float64)
    plain.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    optimizer, norms = build_optimizer(plain, OPTIM), []
    for _ in range(2):
        give_gradients(plain)
        norms.append(float(torch.nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])))
        clip_gradients(plain, max_norm)
        optimizer.step()
    for name in ("EP 2", "EP 2, HSDP"):
        ranks, layout = LAYOUTS[name]
        for weights, norm, groups in pool.run(updated, folder, layout, max_norm, ranks=ranks):
            assert norm == pytest.approx(norms[0], rel=1e-12)
            assert groups == [(group["name"], len(group["params"])) for group in optimizer.param_groups]
            for key, parameter in plain.named_parameters():
                torch.testing.assert_close(weights[key], parameter.detach(), rtol=1e-12, atol=1e-12, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("scale", list(MuonScale), ids=lambda scale: scale.value)
def test_muons_update_is_that_of_one_process(pool: RankPool, folder: Path, scale: MuonScale) -> None:
    """Each expert's rows lie over the ranks that have it; one of them orthogonalises it, as one process does."""
    optim = replace(OPTIM, algorithm="muon", muon_scale=scale)
    alone = pool.run(updated, folder, {}, None, optim, ranks=1)[0][0]
    for name in ("EP 2", "EP 2, HSDP", "EP 4"):
        ranks, layout = LAYOUTS[name]
        for key, value in pool.run(updated, folder, layout, None, optim, ranks=ranks)[0][0].items():
            torch.testing.assert_close(value, alone[key], rtol=1e-12, atol=1e-12, msg=lambda m, n=key: f"{n}: {m}")


def test_the_original_scale_goes_by_outputs_over_inputs(pool: RankPool, folder: Path) -> None:
    """Of gpt_oss, whose stacks are (E, inputs, outputs): down is 48 to 32, gate and up 32 to 48, and an update's length tells which."""
    model = pool.run(updated, folder, {}, None, replace(OPTIM, lr=0.0, weight_decay=0.0), ranks=1)[0][0]
    scales = {"down_proj": 1.0, "gate_up_proj": (48 / 32) ** 0.5}
    optim = replace(OPTIM, algorithm="muon", muon_scale=MuonScale.ORIGINAL, weight_decay=0.0, muon_momentum=0.0)
    moved = pool.run(updated, folder, {}, None, optim, ranks=1)[0][0]
    for name, scale in scales.items():
        key = f"model.layers.0.mlp.experts.{name}"
        change = (moved[key] - model[key])[0] if name == "down_proj" else (moved[key] - model[key])[0, :, ::2]
        largest = float(torch.linalg.matrix_norm(change, 2)) / (2 * OPTIM.lr * scale)
        assert 0.7 < largest < 1.25, "twice the rate times a matrix whose singular values are about 1"


def test_moments_of_less_precision_lie_on_two_meshes_too(pool: RankPool, tmp_path: Path) -> None:
    """A number's moment in bfloat16 is rounded alike whichever rank has it: each has 4,096 of every weight of experts, or more."""
    folder = save_model(tmp_path, "gpt_oss", num_local_experts=8, intermediate_size=64)
    optim = replace(OPTIM, state_dtype=StateDtype.BFLOAT16)
    alone = pool.run(updated, folder, {}, 0.5, optim, ranks=1)[0][0]
    exact = pool.run(updated, folder, {}, 0.5, ranks=1)[0][0]
    spread = pool.run(updated, folder, EP_2, 0.5, optim, ranks=4)[0][0]
    for key, value in alone.items():
        torch.testing.assert_close(spread[key], value, rtol=1e-6, atol=1e-6)
    assert any(not torch.allclose(exact[key], value, rtol=1e-6, atol=1e-6) for key, value in alone.items())


def save(files: Path, folder: Path, layout: dict[str, int]) -> dict[str, Tensor]:
    """A checkpoint after one step; weights and states, whole."""
    model = build(files, layout)
    optimizer = build_optimizer(model, OPTIM)
    give_gradients(model)
    optimizer.step()
    saving = engine(folder, model, optimizer)
    saving.save(1, {})
    saving.wait()
    saving.close()
    return whole(Fsdp2State(model, optimizer).tensors().items())


def restore(files: Path, folder: Path, layout: dict[str, int]) -> dict[str, Tensor]:
    """The same from the checkpoint, over weights of zeros."""
    model = build(files, layout)
    with torch.no_grad():
        for parameter in model.parameters():
            memory_of(parameter).zero_()
    optimizer = build_optimizer(model, OPTIM)
    loading = engine(folder, model, optimizer)
    restored = loading.restore()
    loading.close()
    assert restored is not None and restored.step == 1
    return whole(Fsdp2State(model, optimizer).tensors().items())


@pytest.mark.parametrize("saved", ["EP 2", "HSDP"])
def test_a_checkpoint_is_read_under_every_layout(pool: RankPool, folder: Path, tmp_path: Path, saved: str) -> None:
    ranks, layout = LAYOUTS[saved]
    expected = pool.run(save, folder, tmp_path, layout, ranks=ranks)[0]
    assert any(bool(value.any()) for key, value in expected.items() if key.endswith("mlp.experts.down_proj.exp_avg"))
    for name in LAYOUTS if saved == "EP 2" else ("EP 2", "EP 4"):
        ranks, layout = LAYOUTS[name]
        for restored in pool.run(restore, folder, tmp_path, layout, ranks=ranks):
            assert restored.keys() == expected.keys()
            assert all(torch.equal(restored[key], value) for key, value in expected.items()), name


def lie(folder: Path, layout: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Sizes of this rank's parts of a layer's experts."""
    experts = build(folder, layout).model.layers[0].mlp.experts
    return {name: tuple(memory_of(parameter).shape) for name, parameter in experts.named_parameters()}


def test_a_rank_has_its_experts_and_a_part_of_each(pool: RankPool, folder: Path) -> None:
    for sizes in pool.run(lie, folder, EP_2, ranks=4):
        assert sizes == {"gate_up_proj": (2, 16, 96), "gate_up_proj_bias": (2, 48), "down_proj": (2, 24, 32), "down_proj_bias": (2, 16)}
    for sizes in pool.run(lie, folder, {"experts": 4}, ranks=4):
        assert sizes == {"gate_up_proj": (1, 32, 96), "gate_up_proj_bias": (1, 96), "down_proj": (1, 48, 32), "down_proj_bias": (1, 32)}


def test_a_torch_whose_layers_have_one_mesh_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch.distributed.fsdp._fully_shard._fsdp_common"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    mesh: Any = SimpleNamespace()
    with pytest.raises(ConfigError) as caught:
        spread_experts([], mesh)
    assert caught.value.where == "parallel.experts.ep" and "parallel.experts.ep=1" in caught.value.hint
