"""Optimizers of libraries on shards against the same library on one process, their checkpoints, and what each stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from efflaunch.errors import ConfigError
from efflaunch.estimate.optimizer_residency import STORED
from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training import muon_side
from efflaunch.tests.training.small import backward, full, plain_model
from efflaunch.training.optimizers.adamw import build_optimizer
from efflaunch.training.optimizers.algorithms import LIBRARY, num_betas
from efflaunch.training.optimizers.config import OptimConfig
from efflaunch.training.optimizers.library import library_class, stored_numbers


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def config(algorithm: str) -> OptimConfig:
    return muon_side.config(algorithm=algorithm, betas=[0.9, 0.95, 0.99][: num_betas(algorithm)])


def alone(algorithm: str) -> dict[str, torch.Tensor]:
    """Weights and states after three steps by the library itself, built as its documentation has it."""
    model = plain_model(torch.float64)
    decayed = [p for n, p in model.named_parameters() if muon_side.is_muons(n, p)]
    others = [p for n, p in model.named_parameters() if not muon_side.is_muons(n, p)]
    kind, betas = library_class(algorithm), tuple(config(algorithm).betas)
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    eps = {"eps": 1e-8} if LIBRARY[algorithm].has_eps else {}
    optimizer = kind(groups, betas=betas, **eps, **LIBRARY[algorithm].arguments)  # type: ignore[call-arg]
    for step, rate in enumerate(muon_side.RATES):
        backward(model, step, scale=3.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    state = {name: full(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        state.setdefault(f"{name}.step", torch.tensor(3.0))
    return state


@pytest.mark.parametrize("algorithm", LIBRARY)
def test_decay_is_decoupled_from_the_gradient(algorithm: str) -> None:
    """As AdamW's: without a gradient a weight shrinks by the learning rate times the decay, and no moment sees it."""
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    model.weight.grad = torch.zeros(4, 4)
    chosen = replace(config(algorithm), lr=0.01, weight_decay=0.1)
    build_optimizer(model, chosen).step()
    torch.testing.assert_close(model.weight.detach(), torch.full((4, 4), 1 - 0.01 * 0.1), rtol=0, atol=2e-6)


def check_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value.double(), rtol=1e-12, atol=1e-13, msg=lambda text, key=name: f"{key}: {text}")


@pytest.mark.parametrize("algorithm", LIBRARY)
def test_three_steps_equal_the_library_on_one_process(pool: RankPool, algorithm: str) -> None:
    expected = alone(algorithm)
    check_equal(muon_side.trained(config(algorithm), 1), expected)
    check_equal(pool.run(muon_side.trained, config(algorithm), 2, ranks=4)[0], expected)


@pytest.mark.parametrize("algorithm", ["adan", "radam"])
def test_a_checkpoint_is_resumed_on_another_world(pool: RankPool, tmp_path: Path, algorithm: str) -> None:
    """Also the count of steps, which pytorch-optimizer keeps for all weights at once and torch with each."""
    pool.run(muon_side.trained, config(algorithm), 1, 2, tmp_path, ranks=2)
    check_equal(pool.run(muon_side.resumed, config(algorithm), 1, tmp_path, ranks=1)[0], alone(algorithm))


@pytest.mark.parametrize("algorithm", LIBRARY)
def test_the_ledger_counts_what_a_step_on_meta_leaves(algorithm: str) -> None:
    optimizer = build_optimizer(nn.Linear(8, 16, device="meta"), config(algorithm))
    assert stored_numbers(optimizer) == STORED[algorithm]


def test_the_ledger_counts_what_adamw_and_muon_leave() -> None:
    assert set(STORED) == {"adamw", "muon", *LIBRARY}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 16, bias=False)])})
    assert stored_numbers(build_optimizer(model, OptimConfig(name="test", lr=1.0))) == STORED["adamw"]
    assert stored_numbers(build_optimizer(model, OptimConfig(name="test", lr=1.0, algorithm="muon"))) == STORED["muon"] - 1


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: Any) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("efflaunch.training.optimizers.library.import_module", missing)
    with pytest.raises(ConfigError, match=r"(?s)lion without pytorch_optimizer.*pip install 'efflaunch\[optimizers\]'"):
        build_optimizer(plain_model(), config("lion"))
