"""What a forward leaves: bytes on the device and with the host store equal the policy's formula, and go when backward is done."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from efflaunch.errors import ConfigError
from efflaunch.memory.config import ActivationPlace, AttentionTiling
from efflaunch.memory.executor.saved import Saved
from efflaunch.memory.executor.tape import Tape
from efflaunch.memory.policy import KEEP_ALL, KEPT, MOVED, MemoryPolicy, Split
from efflaunch.memory.position import Position
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.stage import Tokens
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sequence.clock import BusyClock
from efflaunch.parallel.sequence.layout import group_layout
from efflaunch.parallel.sequence.plan import Group
from efflaunch.parallel.sequence.runtime import sequence_attention
from efflaunch.tests.parity.ranks_side import StrictStore
from efflaunch.tests.parity.reference import BASE, reference_model

LENGTHS = (23, 40, 1)
TOTAL = sum(LENGTHS)
SOME = Split(keep=0.25, host=0.4)
POLICIES = {
    "recompute": MemoryPolicy(),
    "everything moved": MemoryPolicy(
        layer_input=MOVED, attention_output=MOVED, query=MOVED, key_value=MOVED, residual=MOVED, mlp=MOVED, chunk_tokens=9
    ),
    "shares": MemoryPolicy(attention_output=KEPT, query=SOME, key_value=SOME, residual=SOME, mlp=SOME, layer_input=Split(0.5, 0.5)),
    "shares, streamed": MemoryPolicy(
        attention_output=Split(0.3, 0.7), mlp=SOME, key_value=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=11, segment_layers=2
    ),
    "attention in both places": MemoryPolicy(attention_output=Split(0.8, 0.2), chunk_tokens=16),
    "head groups": MemoryPolicy(attention_output=Split(0.3, 0.7), query=SOME, key_value=SOME, head_groups=2, chunk_tokens=16),
}


class Alone:
    stage_rank = 0
    world_size = 1


def micro_batch():
    layout = group_layout(LENGTHS, ulysses=1, ring=1)
    attention = sequence_attention(Alone(), CpuKernel(), Group(0, 1, 1, (0, 1, 2)), layout, BusyClock(torch.device("cpu")))
    ids = torch.arange(TOTAL) % BASE["vocab_size"]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    lengths = torch.cat([torch.full((n,), n) for n in LENGTHS])
    return Tokens(ids, ids.clone(), positions, lengths), attention


def run(policy, monkeypatch):
    """(what each layer saved, the store) just before backward, and a function that runs it."""
    made: list[Saved] = []
    original = Saved.__init__

    def remember(self, store):
        original(self, store)
        made.append(self)

    monkeypatch.setattr(Saved, "__init__", remember)
    model, store = reference_model("llama_deep", torch.float32), StrictStore()
    install(model, policy, loss_chunk_tokens=16, store=store)
    loss = model(*micro_batch(), lambda head: cross_entropy(head, 1.0))
    return made, store, loss


def formula(policy, num_layers=5):
    """Bytes kept and moved by policy.py's widths, float32."""
    hidden, heads = BASE["hidden_size"], BASE["num_attention_heads"]
    queries, keys, inner = hidden, 2 * hidden * BASE["num_key_value_heads"] // heads, 2 * BASE["intermediate_size"]
    widths = {"layer_input": hidden, "query": queries, "key_value": keys, "attention_output": queries, "residual": hidden, "mlp": inner}
    kept = moved = 0
    for name, split in policy.splits.items():
        a, b = split.rows(TOTAL)
        layers = -(-num_layers // policy.segment_layers) if name == "layer_input" else num_layers
        kept, moved = kept + 4 * layers * widths[name] * a, moved + 4 * layers * widths[name] * (b - a)
    # One log-sum-exp a head beside the output.
    a, b = policy.attention_output.rows(TOTAL)
    return kept + 4 * num_layers * heads * a, moved + 4 * num_layers * heads * (b - a)


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_equal_the_formula(name, monkeypatch):
    policy = POLICIES[name]
    saved, store, loss = run(policy, monkeypatch)
    assert len(saved) == 5
    kept, moved = formula(policy)
    tensors = [t for layer in saved for piece in layer._kept.values() for t in piece]
    assert sum(t.nbytes for t in tensors) == kept
    assert sum(rows.nbytes for rows, _, _ in store.parcels.values()) == moved
    # Nothing kept holds more memory alive than it needs.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    whole_inputs = policy.layer_input.keep == 1.0 or all(split.keep in (0.0, 1.0) for split in policy.splits.values())
    assert sum(storages.values()) == kept or whole_inputs
    loss.backward()
    assert not store.parcels and not any(layer._kept or layer._moved or layer._open for layer in saved)


@pytest.mark.parametrize("chunk", [None, 9], ids=["one piece", "pieces"])
@pytest.mark.parametrize("walk", list(AttentionTiling))
@pytest.mark.parametrize("attention", [MemoryPolicy().attention_output, MOVED], ids=["again", "stored"])
def test_a_recomputed_segment_leaves_nothing_on_the_device(chunk, walk, attention, monkeypatch):
    """What was read from the host for it goes before the backward of the layers above begins."""
    policy = MemoryPolicy(
        layer_input=MOVED, attention_output=attention, mlp=MOVED, residual=MOVED, segment_layers=3, chunk_tokens=chunk, attention=walk
    )
    _saved, _, loss = run(policy, monkeypatch)
    original, opened = Tape.restore_input, []

    def restore(self, layer):
        original(self, layer)
        opened.append([key for below in self.saved for key in below._open])

    monkeypatch.setattr(Tape, "restore_input", restore)
    loss.backward()
    assert opened == [[]] * 5


def test_weights_for_a_segment_are_not_gathered_on_the_groups_time(monkeypatch):
    """All ranks meet there: what a group waits for others is not what its work takes (parallel/sequence/clock.py)."""
    inside, gathered = [0], []

    @contextmanager
    def running(self):
        inside[0] += 1
        yield
        inside[0] -= 1

    @contextmanager
    def gather(weights, module):
        gathered.append(inside[0])
        yield

    monkeypatch.setattr(BusyClock, "running", running)
    monkeypatch.setattr("efflaunch.parallel.sharding.engine.PlainWeights.gathered", gather)
    _, _, loss = run(MemoryPolicy(segment_layers=3), monkeypatch)
    loss.backward()
    assert gathered == [0, 0, 0] and inside == [0]


@pytest.mark.parametrize("frozen", [("embed_tokens", "layers.0."), ("model.",)], ids=["first layer", "all but the head"])
@pytest.mark.parametrize("name", ["everything moved", "shares, streamed"])
def test_frozen_layers_below_all_that_is_trained_leave_nothing(name, frozen, monkeypatch):
    def step(policy):
        model, store = reference_model("llama_deep", torch.float32), StrictStore()
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in key for part in frozen))
        install(model, policy, loss_chunk_tokens=16, store=store)
        model(*micro_batch(), lambda head: cross_entropy(head, 1.0)).backward()
        assert not store.parcels
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    ours, plain = step(POLICIES[name]), step(KEEP_ALL)
    for key, gradient in plain.items():
        assert (ours[key] is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_a_forward_without_gradients_leaves_nothing(monkeypatch):
    with torch.no_grad():
        saved, store, _ = run(POLICIES["everything moved"], monkeypatch)
    assert not store.parcels and not any(layer._kept or layer._moved for layer in saved)


def test_autocast_around_the_model_is_refused(monkeypatch):
    """It would hold in forward and not where backward makes things again."""
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ConfigError, match=r"(?s)train.dtype: found torch.autocast.*train.dtype=bfloat16"),
    ):
        run(MemoryPolicy(), monkeypatch)


@pytest.mark.parametrize("policy", [KEEP_ALL, MemoryPolicy(chunk_tokens=9)], ids=["keep", "chunks"])
def test_frozen_layers_are_the_groups_work_as_well(policy, monkeypatch):
    """Their time counts and reports name them, though nothing of them is left."""
    inside, places = [], []
    original = BusyClock.running

    @contextmanager
    def running(self):
        inside.append(len(places))
        with original(self):
            yield

    monkeypatch.setattr(BusyClock, "running", running)
    model = reference_model("llama_deep", torch.float32)
    model.model.requires_grad_(False)
    install(model, policy, loss_chunk_tokens=16)
    monkeypatch.setattr(Position, "at", lambda _, *place: places.append(place))
    model(*micro_batch(), lambda head: cross_entropy(head, 1.0)).backward()
    assert places == [("embedding",), *(("forward", layer) for layer in range(5)), ("loss",)]
    assert inside == [2, 3, 4, 5, 6, 7]


def test_pieces_come_back_ahead_of_their_use():
    """Two are on their way while one is used, in the order a backward reads them; the next layer's first ones follow."""
    asked, then = [], []

    class Store(StrictStore):
        def prefetch(self, key):
            super().prefetch(key)
            asked.append(self.parcels[key][0][0].item())

    saved = Saved(Store())
    for index in range(5):
        saved.put(("mlp", index, 0), [torch.tensor([float(index)])], ActivationPlace.HOST)
    order = [("mlp", index, 0) for index in reversed(range(5))]
    saved.read_in([("query", 0, 0), *order], lambda: then.append(len(asked)))
    assert asked == [4, 3] and not then
    for index in reversed(range(5)):
        assert saved.get(("mlp", index, 0))[0].item() == index
        saved.release()
    assert list(dict.fromkeys(asked)) == [4, 3, 2, 1, 0] and then
