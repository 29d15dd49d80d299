"""Launches of a decoder layer by policy and pack, which may not grow unnoticed, and what a layer makes the host wait for.

EFFLAUNCH_UPDATE_GOLDEN=1 writes tests/golden/launches.txt anew; read its diff.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.policy import KEEP_ALL, MOVED, MemoryPolicy
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.tests.parallel.sequence.launch_counts import Count, Store, attention_of, rows_of, step_on_fakes, without_exchanges
from efflaunch.tests.parity.reference import reference_model

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "launches.txt"
POLICIES = {
    "keep": KEEP_ALL,
    "recompute": MemoryPolicy(),
    "alst": MemoryPolicy(layer_input=MOVED, chunk_tokens=1),
    "streambp": MemoryPolicy(attention=AttentionTiling.CHUNKS, chunk_tokens=1),
    "upipe": MemoryPolicy(layer_input=MOVED, head_groups=2, chunk_tokens=1),
}
"""Chunks are halves of a rank's tokens."""
PACKS = {1: (1 << 17,), 128: (1024,) * 128, 1024: (1024,) * 1024}
ROWS = [*((policy, packs, 1) for policy in POLICIES for packs in PACKS), ("recompute", 1024, 4), ("upipe", 1024, 4), ("streambp", 128, 4)]
SLOW = {("alst", 1024, 1), ("upipe", 1024, 1), ("upipe", 1024, 4)}
"""Seconds each, and with the launches of 128 documents."""


def step_of(policy: str, lengths: tuple[int, ...], layers: int, ulysses: int) -> Count:
    return step_on_fakes(chunked(policy, sum(lengths) // ulysses), lengths, layers=layers, ulysses=ulysses)


def chunked(policy: str, tokens: int) -> MemoryPolicy:
    """The policy for ranks with so many tokens."""
    made = POLICIES[policy]
    return made if made.chunk_tokens is None else replace(made, chunk_tokens=tokens // 2)


@cache
def a_layer(policy: str, documents: int, ulysses: int) -> tuple[int, int, Counter[str]]:
    """Launches, dispatches and operations of one layer: of two layers less those of one."""
    one, two = (step_of(policy, PACKS[documents], layers, ulysses) for layers in (1, 2))
    return two.launches - one.launches, two.dispatches - one.dispatches, two.names - one.names


def line(policy: str, documents: int, ulysses: int) -> str:
    return f"{policy} {documents} {ulysses}"


def golden() -> dict[str, tuple[int, int]]:
    rows = [row.split() for row in GOLDEN.read_text().splitlines() if not row.startswith("#")]
    return {" ".join(row[:3]): (int(row[3]), int(row[4])) for row in rows}


@pytest.mark.parametrize(
    "policy, documents, ulysses", [pytest.param(*row, marks=pytest.mark.slow) if row in SLOW else row for row in ROWS]
)
def test_a_layer_launches_no_more_than_it_did(policy: str, documents: int, ulysses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchanges(monkeypatch)
    launches, dispatches, _ = a_layer(policy, documents, ulysses)
    if os.environ.get("EFFLAUNCH_UPDATE_GOLDEN"):
        # Rows come one after the other, in the order of ROWS.
        before = "" if (policy, documents, ulysses) == ROWS[0] else GOLDEN.read_text()
        head = "# policy, documents of 1K (one: of 128K), Ulysses ranks: launches and dispatches of a layer, forward and backward\n"
        GOLDEN.write_text((before or head) + f"{line(policy, documents, ulysses)} {launches} {dispatches}\n")
    most_launches, most_dispatches = golden()[line(policy, documents, ulysses)]
    assert launches <= most_launches and dispatches <= most_dispatches


@pytest.mark.parametrize("policy, calls", [("keep", (1, 1)), ("recompute", (2, 1)), ("alst", (2, 1))])
def test_a_pack_is_one_call_of_the_kernel(policy: str, calls: tuple[int, int]) -> None:
    for documents in PACKS if policy != "alst" else (1, 128):
        names = a_layer(policy, documents, 1)[2]
        assert (names["_flash_attention_forward"], names["_flash_attention_backward"]) == calls


def test_short_documents_cost_no_more_launches_than_one_long_one() -> None:
    for policy in POLICIES:
        assert a_layer(policy, 128, 1)[0] <= a_layer(policy, 1, 1)[0]


ALLOWED = {
    "parallel/sequence/flash.py:call_of_documents lift_fresh": "cuts of documents, once for all layers, from pinned memory",
    "model/chunked_loss.py:chunks nonzero": "rows with targets, once a micro-batch, behind the layers",
    "memory/executor/grouped.py:slices tolist": "a product per expert, the CPU's way: on CUDA one kernel reads the counts itself",
}
"""What may wait, and why."""


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_on_fakes_wait_for_nothing(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ulysses ranks are more than the key/value heads, and head groups are no runs of heads."""
    without_exchanges(monkeypatch)
    lengths = (300, 212, 512)
    one, two = (step_of(policy, lengths, layers, 4) for layers in (1, 2))
    assert set(two.waits) <= set(ALLOWED) and two.waits == one.waits, "once a micro-batch, however many layers there are"


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "keep"])
@pytest.mark.parametrize("family", ["gpt_oss", "gemma3", "qwen3_moe"])
def test_real_layers_wait_for_what_is_allowed_alone(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchanges(monkeypatch)
    lengths = (40, 24)
    model = reference_model(family, torch.float32)
    install(model, chunked(policy, 16), loss_chunk_tokens=64, store=Store())  # type: ignore[arg-type]
    attention, tokens = attention_of(lengths, 4, CpuKernel()), rows_of(lengths, 16)
    with Count() as count:
        monkeypatch.setattr(torch.Tensor, "tolist", count.tolist)
        model(tokens, attention, lambda head: cross_entropy(head, 1.0)).backward()
    assert set(count.waits) <= set(ALLOWED)
    assert (family == "gemma3") is not any("grouped" in place for place in count.waits), "the ban sees lists, too"


def test_the_ban_sees_what_it_is_to_see() -> None:
    t = torch.arange(6.0)
    with Count() as count:
        t[torch.tensor([1, 2])]
        t.nonzero()
        t.max().item()
        t[1:3].sum()
        torch.repeat_interleave(t, torch.ones(6, dtype=torch.int64))
        torch.repeat_interleave(t, torch.ones(6, dtype=torch.int64), output_size=6)
    assert sorted(place.split()[1] for place in count.waits) == ["_local_scalar_dense", "lift_fresh", "nonzero", "repeat_interleave"]
