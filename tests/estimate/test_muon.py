"""Muon in the estimates: matrices counted by hand and against real models, bytes against live ones, seconds by their parts."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.estimate.footprint.host import state_bytes
from efflaunch.estimate.footprint.optimizer import moment_numbers, optimizer_states, whole_matrices
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.muon import BYTES, _live, exchange_s, muon_work, orthogonalise_s
from efflaunch.estimate.optimizer_residency import Residency
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.suggestion_moves import SETTINGS
from efflaunch.estimate.timing.update import update_time
from efflaunch.launcher.config.compose import compose
from efflaunch.model.spec import model_spec
from efflaunch.parallel.sharding.matrix_plan import is_matrix, orthogonalise_flops
from efflaunch.tests.memory.settings import LLAMA_8B, cluster, make_ledger
from efflaunch.tests.model.small import of, save_model
from efflaunch.tests.ranks import RankPool
from efflaunch.training.optimizers.config import OptimConfig
from efflaunch.training.optimizers.muon import Muon

K = 1024
MUON = Residency(algorithm="muon", orthogonalise_steps=5)


def setting(residency: Residency = MUON) -> PlanInputs:
    """Llama 8B on 8 ranks of one node, 128K tokens."""
    machines = cluster(device_memory_bandwidth=3e12)
    made = make_ledger(LLAMA_8B, length=128 * K, tokens_per_rank=16 * K, machines=machines).inputs
    return replace(made, residency=residency)


def test_matrices_have_one_number_the_rest_two() -> None:
    inputs = setting()
    matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert muon_work(inputs).parameters == matrices
    assert moment_numbers(inputs) == 2 * inputs.parameters - matrices
    assert optimizer_states(inputs).num_bytes == 4 * (2 * inputs.parameters - matrices) // 8
    assert state_bytes(inputs) == 4 * (3 * inputs.parameters - matrices) // 8
    assert muon_work(setting(Residency())).parameters == 0 and whole_matrices(setting(Residency())).num_bytes == 0


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2_moe", "gpt_oss", "dots1", "phi3", "glm4"])
def test_the_count_is_that_of_the_model_itself(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    real = sum(p.numel() for name, p in model.named_parameters() if is_matrix(name, p.shape))
    assert muon_work(replace(setting(), spec=model_spec(of(folder)))).parameters == real


def test_seconds_are_those_of_the_busiest_rank_and_of_what_travels() -> None:
    inputs, plain = setting(), setting(Residency())
    even = sum(orthogonalise_flops(shape, 5) for shape in 32 * [*2 * [(4096, 4096)], *2 * [(1024, 4096)], *3 * [(4096, 14336)]]) / 8
    assert muon_work(inputs).flops == pytest.approx(even), "32 layers over 8 ranks: as much for each"
    assert orthogonalise_s(inputs) == pytest.approx(even / (0.33 * 1e15))
    sent = 2 * muon_work(inputs).parameters / 8 * 7 / 8
    assert exchange_s(inputs) == pytest.approx(sent * 2 / 450e9)
    update = update_time(inputs)
    assert update.shown_s > update_time(plain).shown_s + orthogonalise_s(inputs)
    assert "Newton-Schulz" in update.assumption


def test_experts_of_equal_numbers_do_not_travel() -> None:
    spread = {}
    for ranks in (8, 3):
        config = compose(["+experiment=qwen3_30b_a3b_1M", "optim=muon"])
        inputs = replace(PlanInputs.of(config), residency=MUON)
        spread[ranks] = muon_work(replace(inputs, layout=replace(inputs.layout, shard=ranks)))
    assert spread[8].parameters == spread[3].parameters and spread[8].sent < 0.1 * spread[3].sent
    assert spread[8].flops == pytest.approx(spread[3].flops * 3 / 8, rel=0.05)


def test_what_muon_cannot_do_is_not_suggested() -> None:
    typed = [text for make in SETTINGS for change in make(setting()) for text in change.overrides]
    assert not [text for text in typed if text.startswith("optim.")]
    assert [text for make in SETTINGS for change in make(setting(Residency())) for text in change.overrides if text.startswith("optim.")]


class LiveBytes(TorchDispatchMode):
    """The most bytes at one time of tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in given | self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


def live_bytes(width: int) -> int:
    """Of a second step of Muon on square matrices in four rounds."""
    torch.set_num_threads(1)
    matrices = [torch.nn.Linear(width, width, bias=False) for _ in range(4 * dist.get_world_size())]
    layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(matrices)})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in matrices:
        fully_shard(layer, mesh=mesh)
    named = [(name, p) for name, p in layers.named_parameters()]
    optimizer = Muon([{"params": named, "name": "muon", "weight_decay": 0.1}], OptimConfig(name="test", lr=0.1))
    for measured in (False, True):
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        with LiveBytes() as live:
            optimizer.step()
        if measured:
            return live.most
    raise AssertionError


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_live_bytes_are_no_more_than_the_ledger_has(ranks: int) -> None:
    with RankPool() as pool:
        most = max(pool.run(live_bytes, 256, ranks=ranks))
    predicted = BYTES * _live((256, 256), ranks > 1)
    assert 0.95 * predicted <= most <= 1.01 * predicted
    assert whole_matrices(setting()).by_phase == {Phase.OPTIMIZER: BYTES * _live((4096, 14336), travels=True)}
