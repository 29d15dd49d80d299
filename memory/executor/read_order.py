"""The order in which a layer's passes read what was stored of it, so that it is on its way before it is needed. Pure.

It follows {layer,layer_pass,attention_whole,attention_chunked}.py line by line;
tests/memory/test_reads.py holds it against what they really read.
A visit is what is read of one piece before it is let go (`LayerRun.release`): nothing is read twice in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..activation_classes import ATTENTION_OUTPUT, KEY_VALUE, LAYER_INPUT, LOG_SUM_EXP, QUERY, RESIDUAL, ActivationClass
from ..heads import head_groups
from .saved import Key

if TYPE_CHECKING:
    from .layer_pass import LayerRun

Visit = list[Key]


def backward_reads(run: LayerRun) -> list[Key]:
    """Reads of a layer's backward, in order."""
    return _in_order(run, _chunked_backward(run) if run.chunked else _whole_backward(run))


def recompute_reads(run: LayerRun) -> list[Key]:
    """Reads of a layer's forward that runs once more for the next layer's input."""
    if run.attention_stored:
        return _in_order(run, (_after(run, index, RESIDUAL.made_from) for index in run.indices))
    return _in_order(run, _chunked_recompute(run) if run.chunked else _whole_recompute(run))


def _in_order(run: LayerRun, visits: Iterable[Visit]) -> list[Key]:
    """The keys of what is stored. One piece alone is not let go before the pass ends: it is read once."""
    stored = [[key for key in dict.fromkeys(visit) if key in run.saved] for visit in visits]
    keys = [key for visit in stored for key in visit]
    return list(dict.fromkeys(keys)) if len(run.pieces) == 1 else keys


def _keys_of(kinds: Iterable[ActivationClass], index: int, group: int = 0) -> Visit:
    return [(kind.name, index, group) for kind in kinds]


def _after(run: LayerRun, index: int, sources: Sequence[ActivationClass] = (LAYER_INPUT,)) -> Visit:
    """Reads of the second half, forward: the sum after attention, or what of its `sources` attention has not just made."""
    start = (RESIDUAL,) if run.has(RESIDUAL, index) else sources
    return _keys_of((*start, *run.feed_forward.classes), index)


def _projected(run: LayerRun, kinds: Sequence[ActivationClass], index: int, group: int = 0) -> Visit:
    """Reads of queries, keys and values: what is stored of them, and the layer input where something is not."""
    inputs = () if all(run.has(kind, index, group) for kind in kinds) else _keys_of((LAYER_INPUT,), index)
    return [*_keys_of(kinds, index, group), *inputs]


def _projections(run: LayerRun, group: int) -> Iterator[Visit]:
    yield from (_projected(run, (QUERY, KEY_VALUE), index, group) for index in run.indices)


def _whole_groups(run: LayerRun) -> range:
    spec, ulysses = run.spec, len(run.attention.member_tokens)
    return range(len(head_groups(spec.num_heads, spec.num_kv_heads, most=run.policy.head_groups, ulysses=ulysses)))


def _whole_backward(run: LayerRun) -> Iterator[Visit]:
    groups, stored = _whole_groups(run), run.attention_stored
    if stored:
        yield from (_keys_of((ATTENTION_OUTPUT,), index) for index in run.indices)
    else:
        for group in groups:
            yield from _projections(run, group)
    yield from (_keys_of((LAYER_INPUT, RESIDUAL, *run.feed_forward.classes), index) for index in reversed(run.indices))
    for group in groups:
        if stored or len(groups) > 1:
            yield from _projections(run, group)
        yield [(LOG_SUM_EXP, part, group) for part in (0, 1)]
        yield from (_keys_of((LAYER_INPUT,), index) for index in run.indices)


def _whole_recompute(run: LayerRun) -> Iterator[Visit]:
    for group in _whole_groups(run):
        yield from _projections(run, group)
    yield from (_after(run, index) for index in run.indices)


def _keys(run: LayerRun) -> Iterator[Visit]:
    """Reads of keys and values of all rows."""
    yield from (_keys_of((KEY_VALUE if run.has(KEY_VALUE, index) else LAYER_INPUT,), index) for index in run.indices)


def _chunked_backward(run: LayerRun) -> Iterator[Visit]:
    yield from _keys(run)
    kinds = (LAYER_INPUT, QUERY, ATTENTION_OUTPUT, RESIDUAL, *run.feed_forward.classes)
    yield from (_keys_of(kinds, index) for index in reversed(run.indices))
    if not run.alone:
        yield from (_keys_of((LAYER_INPUT,), index) for index in run.indices)


def _chunked_recompute(run: LayerRun) -> Iterator[Visit]:
    if not run.alone:
        yield from _keys(run)
    for index in run.indices:
        kinds = (QUERY, KEY_VALUE) if run.alone else (QUERY,)
        yield [*_projected(run, kinds, index), *_after(run, index)]
