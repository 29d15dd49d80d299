"""The order in which a layer's passes read what was stored of it, so that it is on its way before it is needed. Pure.

It follows memory/{layer,whole,streamed}.py line by line; tests/memory/test_reads.py holds it against what they really read.
A visit is what is read of one piece before it is let go (`LayerRun.release`): nothing is read twice in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..heads import head_groups
from .saved import Key

if TYPE_CHECKING:
    from .layer_pass import LayerRun

Visit = list[Key]


def backward_reads(run: LayerRun) -> list[Key]:
    """Of a layer's backward."""
    return _in_order(run, _streamed_backward(run) if run.streamed else _whole_backward(run))


def recompute_reads(run: LayerRun) -> list[Key]:
    """Of a layer's forward that runs once more for the next layer's input."""
    if run.attention_stored:
        return _in_order(run, ([*([] if run.has("residual", i) else [_key("attention_output", i)]), *_after(run, i)] for i in run.indices))
    return _in_order(run, _streamed_again(run) if run.streamed else _whole_again(run))


def _in_order(run: LayerRun, visits: Iterable[Visit]) -> list[Key]:
    """The keys of what is stored. One piece alone is not let go before the pass ends: it is read once."""
    stored = [[key for key in dict.fromkeys(visit) if run.has(*key)] for visit in visits]
    keys = [key for visit in stored for key in visit]
    return list(dict.fromkeys(keys)) if len(run.pieces) == 1 else keys


def _key(kind: str, index: int, group: int = 0) -> Key:
    return kind, index, group


def _after(run: LayerRun, index: int) -> Visit:
    """Of the second half, forward: the sum after attention, or what it is made of."""
    start = "residual" if run.has("residual", index) else "layer_input"
    return [_key(start, index), _key("mlp", index)]


def _projections(run: LayerRun, group: int) -> Iterator[Visit]:
    for index in run.indices:
        wanted = [_key("query", index, group), _key("key_value", index, group)]
        yield wanted if all(run.has(*key) for key in wanted) else [*wanted, _key("layer_input", index)]


def _whole_groups(run: LayerRun) -> range:
    spec, ulysses = run.spec, len(run.attention.member_tokens)
    return range(len(head_groups(spec.num_heads, spec.num_kv_heads, most=run.policy.head_groups, ulysses=ulysses)))


def _whole_backward(run: LayerRun) -> Iterator[Visit]:
    groups, stored = _whole_groups(run), run.attention_stored
    if stored:
        yield from ([_key("attention_output", index)] for index in run.indices)
    else:
        for group in groups:
            yield from _projections(run, group)
    yield from ([_key(kind, index) for kind in ("layer_input", "residual", "mlp")] for index in reversed(run.indices))
    for group in groups:
        if stored or len(groups) > 1:
            yield from _projections(run, group)
        yield [_key("log_sum_exp", part, group) for part in (0, 1)]
        yield from ([_key("layer_input", index)] for index in run.indices)


def _whole_again(run: LayerRun) -> Iterator[Visit]:
    for group in _whole_groups(run):
        yield from _projections(run, group)
    yield from (_after(run, index) for index in run.indices)


def _keys(run: LayerRun) -> Iterator[Visit]:
    """Of keys and values of all rows."""
    yield from ([_key("key_value" if run.has("key_value", index) else "layer_input", index)] for index in run.indices)


def _streamed_backward(run: LayerRun) -> Iterator[Visit]:
    yield from _keys(run)
    kinds = ("layer_input", "query", "attention_output", "residual", "mlp")
    yield from ([_key(kind, index) for kind in kinds] for index in reversed(run.indices))
    if not run.alone:
        yield from ([_key("layer_input", index)] for index in run.indices)


def _streamed_again(run: LayerRun) -> Iterator[Visit]:
    if not run.alone:
        yield from _keys(run)
    for index in run.indices:
        wanted = [_key("query", index), *([_key("key_value", index)] if run.alone else [])]
        visit = wanted if all(run.has(*key) for key in wanted) else [*wanted, _key("layer_input", index)]
        yield [*visit, *_after(run, index)]
