"""A mixture of experts under every policy: gradients equal Hugging Face's, and routing is decided once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from efflaunch.memory.activation_classes import activation_classes
from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.executor.layer_pass import layer_run
from efflaunch.memory.executor.mixture import MixtureFeedForward
from efflaunch.memory.policy import KEEP_ALL, MemoryPolicy, Split
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.families.mixture import MixtureHalf
from efflaunch.tests.memory.test_saved import LENGTHS, POLICIES, TOTAL, micro_batch
from efflaunch.tests.parity.ranks_side import StrictStore
from efflaunch.tests.parity.reference import BASE, MIXTURES, lift_to_float64, reference_loss, reference_model

ALL_POLICIES = {"keep": KEEP_ALL, **POLICIES}


def ours(model: Any, policy: MemoryPolicy) -> dict[str, Tensor]:
    """Gradients through the executor; every piece that was moved is gone afterwards."""
    store = StrictStore()
    install(model, policy, loss_chunk_tokens=16, store=store)
    model(*micro_batch(), lambda head: cross_entropy(head, 1.0)).backward()
    assert not store.parcels
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def plain(model: Any) -> dict[str, Tensor]:
    """Gradients of Hugging Face's own model, one document at a time."""
    ids = torch.arange(TOTAL) % BASE["vocab_size"]
    documents = ids.split(LENGTHS)
    (reference_loss(model, documents, documents) * TOTAL).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("policy", ALL_POLICIES)
@pytest.mark.parametrize("family", [*MIXTURES, "qwen3_moe_plain"])
def test_gradients_are_hugging_faces(family: str, policy: str) -> None:
    lift_to_float64()
    expected = plain(reference_model(family, torch.float64))
    for name, gradient in ours(reference_model(family, torch.float64), ALL_POLICIES[policy]).items():
        bound = 1e-10 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("policy", ["recompute", "shares", "shares, streamed"])
def test_ties_in_bfloat16_are_decided_once(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert is as good as every other, and each decision is a toss: gradients are those of the first toss."""
    model = reference_model("qwen3_moe", torch.bfloat16)
    generator, decided = torch.Generator().manual_seed(3), dict[int, list[Tensor]]()

    def toss(half: MixtureHalf, logits: Tensor) -> Tensor:
        assert bool((logits == logits[:, :1]).all()), "all experts tie"
        chosen = torch.rand(logits.shape, generator=generator).topk(half.per_token).indices
        decided.setdefault(id(half.layer), []).append(chosen)
        return chosen

    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    monkeypatch.setattr(MixtureHalf, "choose", toss)
    gradients = ours(model, ALL_POLICIES[policy])
    first = {key: torch.cat(parts) for key, parts in decided.items()}
    assert [len(chosen) for chosen in first.values()] == [TOTAL] * len(model.model.layers)

    monkeypatch.setattr(MixtureHalf, "choose", lambda half, logits: first[id(half.layer)])
    for parameter in model.parameters():
        parameter.grad = None
    for name, gradient in ours(model, KEEP_ALL).items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(gradients[name], gradient, rtol=0.05, atol=0.05 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("wanted", ["one takes everything", "half take nothing"])
def test_extreme_loads_are_exact(wanted: str) -> None:
    lift_to_float64()

    def spoiled() -> Any:
        model = reference_model("mixtral", torch.float64)
        with torch.no_grad():
            for layer in model.model.layers:
                bias = torch.tensor([3.0, 2.0, -2.0, -3.0] if wanted == "one takes everything" else [1.0, 1.0, -9.0, -9.0])
                layer.mlp.gate.weight.copy_(bias.double().unsqueeze(1) * torch.ones(BASE["hidden_size"]) * 0.5)
                layer.post_attention_layernorm.weight.abs_()
        return model

    expected, gradients = plain(spoiled()), ours(spoiled(), POLICIES["shares"])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10 * max(1.0, float(expected[name].abs().max())))


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_a_rank_without_tokens_has_zero_gradients(policy: str) -> None:
    from dataclasses import fields

    model: Any = reference_model("qwen2_moe", torch.float32)
    store = StrictStore()
    install(model, ALL_POLICIES[policy], loss_chunk_tokens=16, store=store)
    tokens, _ = micro_batch()
    from efflaunch.parallel.sequence.attention import CpuKernel
    from efflaunch.parallel.sequence.clock import BusyClock
    from efflaunch.parallel.sequence.runtime import sequence_attention
    from efflaunch.tests.memory.test_saved import Alone

    empty = type(tokens)(*(None if getattr(tokens, f.name) is None else getattr(tokens, f.name)[:0] for f in fields(tokens)))
    attention = sequence_attention(Alone(), CpuKernel(), None, None, BusyClock(torch.device("cpu")))
    model(empty, attention, lambda head: cross_entropy(head, 1.0)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_what_runs_has_the_classes_that_estimates_count() -> None:
    from efflaunch.model.config import Family, ModelConfig
    from efflaunch.model.spec import model_spec

    extra = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    sizes = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 112, "num_heads": 8, "num_kv_heads": 2, "vocab_size": 97}
    spec = model_spec(ModelConfig(name="m", family=Family.QWEN3_MOE, max_positions=512, extra=extra, **sizes))
    assert activation_classes(spec)[-2:] == MixtureFeedForward.classes


@pytest.mark.parametrize("attention", list(AttentionTiling), ids=lambda tiling: tiling.value)
def test_ranks_that_exchange_rows_have_as_many_pieces(attention: AttentionTiling) -> None:
    """Ranks 0 and 1 share sequences by Ulysses, 2 has none, 3 has its own: together they cover what each has, piece after piece."""
    rank_tokens, policy = (40, 12, 0, 17), MemoryPolicy(attention=attention, chunk_tokens=9, query=Split(host=0.5))
    rows = []
    for rank, count in enumerate(rank_tokens):
        members = rank_tokens[:2] if rank < 2 else (count,)
        runtime: Any = SimpleNamespace(
            ring=1, member_tokens=members, ulysses_index=rank if rank < 2 else 0, rank_tokens=rank_tokens, stage_rank=rank
        )
        nothing: Any = None
        run = layer_run(nothing, nothing, policy, runtime, nothing, nothing, count)
        rows.append([(run.rows(index).start, run.rows(index).stop) for index in run.indices])
        assert [row for start, stop in rows[-1] for row in range(start, stop)] == list(range(count))
    assert len({len(each) for each in rows}) == 1
    assert all(any(start < stop for start, stop in piece) for piece in zip(*rows, strict=True)), "a piece that no rank has is none"
