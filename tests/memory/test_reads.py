"""What a layer's passes read of what was stored comes in the predicted order, asked for ahead of its use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.executor.saved import Key, Saved
from efflaunch.memory.policy import KEPT, MOVED, RECOMPUTED, MemoryPolicy, Split
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.families.llama import LlamaLayer
from efflaunch.tests.memory.test_saved import micro_batch
from efflaunch.tests.parity.ranks_side import StrictStore
from efflaunch.tests.parity.reference import reference_model

SPLITS = st.sampled_from([KEPT, MOVED, RECOMPUTED, Split(keep=0.3, host=0.4), Split(host=0.5), Split(keep=0.6, host=0.4)])
STORED = st.sampled_from([KEPT, MOVED, Split(keep=0.3, host=0.7)])


@st.composite
def policies(draw: Any) -> MemoryPolicy:
    """Anything that moves something."""
    chunk = draw(st.sampled_from([None, 9, 40, 100]))
    walk = draw(st.sampled_from(list(AttentionTiling))) if chunk else AttentionTiling.WHOLE
    return MemoryPolicy(
        layer_input=draw(STORED),
        attention_output=draw(st.one_of(st.just(RECOMPUTED), STORED)),
        query=draw(SPLITS),
        key_value=draw(SPLITS),
        residual=draw(SPLITS),
        mlp=draw(SPLITS),
        segment_layers=draw(st.integers(1, 3)),
        chunk_tokens=chunk,
        attention=walk,
        head_groups=1 if walk is AttentionTiling.CHUNKS else draw(st.sampled_from([1, 2])),
    )


class Watched:
    """Every pass of every layer: what it said it would read from the host, and what it read."""

    def __init__(self) -> None:
        self.passes: list[tuple[list[Key], list[Key]]] = []
        self.said: dict[Saved, tuple[list[Key], list[Key]]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        read_in, get = Saved.read_in, Saved.get

        def reading(saved: Saved, order: Any, then: Any = None) -> None:
            self.said[saved] = [key for key in order if key in saved._moved], []
            self.passes.append(self.said[saved])
            read_in(saved, order, then)

        def getting(saved: Saved, key: Key) -> Any:
            if key in saved._moved and key not in saved._read:
                self.said[saved][1].append(key)
            return get(saved, key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Saved, "read_in", reading)
            patch.setattr(Saved, "get", getting)
            yield


@seed(11)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(policy=policies())
def test_reads_are_those_predicted(policy: MemoryPolicy) -> None:
    watched, store = Watched(), StrictStore()
    model = reference_model("llama_deep", torch.float32)
    install(model, policy, loss_chunk_tokens=16, store=store)
    with watched.watching():
        model(*micro_batch(), lambda head: cross_entropy(head, 1.0)).backward()
    assert not store.parcels
    recomputed = sum(layer % policy.segment_layers != policy.segment_layers - 1 for layer in range(4))
    assert len(watched.passes) == 5 + recomputed
    for said, read in watched.passes:
        assert read == said


def test_what_is_stored_is_not_projected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a segment that runs again for its inputs: queries, keys and values come from where they are."""
    policy = MemoryPolicy(query=KEPT, key_value=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=11, segment_layers=5)
    model = reference_model("llama_deep", torch.float32)
    install(model, policy, loss_chunk_tokens=16, store=StrictStore())
    calls: list[str] = []
    original = LlamaLayer.project

    def project(self: LlamaLayer, name: str, h: Tensor, heads: Any, graph: bool) -> Tensor:
        if self.layer is model.model.layers[1] and not graph:
            calls.append(name.removeprefix("self_attn."))
        return original(self, name, h, heads, graph)

    monkeypatch.setattr(LlamaLayer, "project", project)
    loss = model(*micro_batch(), lambda head: cross_entropy(head, 1.0))
    assert calls == ["q_proj", "k_proj", "v_proj"] * 6
    loss.backward()
    assert calls == ["q_proj", "k_proj", "v_proj"] * 6
