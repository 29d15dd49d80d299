"""Another feed-forward goes through the executor's seam under every policy: what it decides is decided once and kept."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from efflaunch.memory.activation_classes import DENSE, RESIDUAL, activation_classes
from efflaunch.memory.executor.feed_forward import DenseFeedForward
from efflaunch.memory.executor.token_local import FeedForward, GradientSums, LayerSteps, SavedPiece
from efflaunch.memory.policy import KEEP_ALL, MemoryPolicy
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.families.llama import LlamaLayer
from efflaunch.tests.memory.test_saved import POLICIES, TOTAL, micro_batch
from efflaunch.tests.parity.ranks_side import StrictStore
from efflaunch.tests.parity.reference import reference_model

ROUTING = replace(RESIDUAL, name="routing", made_from=(RESIDUAL,), by_token=False, decision=True)


class Router:
    """Decides by the toss of a coin: no pass that decides again comes to the same."""

    def __init__(self, known: list[Tensor] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.known = known
        self.decided: dict[int, list[Tensor]] = {}

    def decide(self, layer: int, rows: Tensor) -> Tensor:
        if self.known is not None:
            return self.known[layer]
        choice = torch.rand(rows.shape[0], generator=self.generator) < 0.5
        self.decided.setdefault(layer, []).append(choice)
        return choice


class Routed:
    """The dense feed-forward, its share of the output turned round for tokens that were routed so."""

    classes = (ROUTING, *DENSE.classes)

    def __init__(self, steps: LayerSteps, layer: int, router: Router) -> None:
        self.dense, self.layer, self.router = DenseFeedForward(steps), layer, router

    def scale(self, rows: Tensor, saved: SavedPiece) -> Tensor:
        stored = saved.get(ROUTING)
        if stored is None:
            stored = (self.router.decide(self.layer, rows),)
            saved.put(ROUTING, stored)
        return torch.where(stored[0], 1.0, -0.5).to(rows.dtype).unsqueeze(1)

    def forward(self, rows: Tensor, saved: SavedPiece) -> Tensor:
        scale = self.scale(rows, saved)
        return rows + scale * (self.dense.forward(rows, saved) - rows)

    def backward(self, rows: Tensor, dy: Tensor, saved: SavedPiece, sums: GradientSums) -> Tensor:
        scale = self.scale(rows, saved)
        return self.dense.backward(rows, scale * dy, saved, sums) + (1 - scale) * dy


def gradients(policy: MemoryPolicy, router: Router, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    model, store = reference_model("llama_deep", torch.float64), StrictStore()

    def feed_forward(adapter: LlamaLayer, steps: LayerSteps) -> FeedForward:
        return Routed(steps, list(model.model.layers).index(adapter.layer), router)

    monkeypatch.setattr(LlamaLayer, "feed_forward", feed_forward)
    install(model, policy, loss_chunk_tokens=16, store=store)
    model(*micro_batch(), lambda head: cross_entropy(head, 1.0)).backward()
    assert not store.parcels
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", POLICIES)
def test_a_routed_feed_forward_decides_once_under_every_policy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    ours = gradients(POLICIES[name], router, monkeypatch)
    decisions = [torch.cat(router.decided[layer]) for layer in range(5)]
    assert [len(choice) for choice in decisions] == [TOTAL] * 5
    # Norms are float32 in Hugging Face's float64 models; a token routed otherwise would differ by as much as the gradient itself.
    plain = gradients(KEEP_ALL, Router(decisions), monkeypatch)
    for key, gradient in plain.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_runs_has_the_classes_that_estimates_count(family: str) -> None:
    model: Any = reference_model(family, torch.float32)
    install(model, MemoryPolicy(), loss_chunk_tokens=16)
    sizes: Any = SimpleNamespace(experts=None)
    for layer in model.model.layers:
        assert activation_classes(sizes)[-1:] == layer.forward.feed_forward.classes
