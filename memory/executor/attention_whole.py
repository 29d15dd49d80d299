"""Attention over all tokens of the rank at once, all heads together or one group of heads after the other.

Norms, projections and MLP go by pieces of rows. With groups of heads (Untied Ulysses, 2602.21196) only one group's
queries, keys and values exist at a time; attention's output, and its gradient, are whole.

Note: mirrored, moment by moment, in estimate/footprint/live_layer.py (whole_moments), in the order of reads in read_order.py, and in
estimate/timing/{offload,flops}.py (how often rows come back, what is recomputed). A change here is a change there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activation_classes import ATTENTION_OUTPUT, KEY_VALUE, LOG_SUM_EXP, QUERY
from ..config import ActivationPlace
from ..heads import Heads, head_groups, head_runs
from .layer_pass import QKV, Gathered, Inputs, LayerRun
from .sinks import sinks_backward, sinks_of
from .token_local import GradientSums


@dataclass
class HeadGroupState:
    """One head group between its forward and its backward: what attention read, made, and its spec."""

    heads: Heads
    spec: Any
    qkv: QKV | None
    o: Tensor | None
    lse: Tensor | None


def attention_rows(run: LayerRun, inputs: Inputs, *, save: bool) -> Iterator[tuple[int, Tensor]]:
    """(piece, attention's output of its rows) for all pieces in ascending order. Builds no graph."""
    o = None
    for index, state in enumerate(_groups(run)):
        qkv = _project(run, inputs, index, state, save=save)
        part, lse = run.attention.core_forward(qkv, state.spec, sinks_of(run.adapter, state.heads))
        del qkv
        if save and run.attention_stored:
            _save_lse(run, lse, index)
        o = _with_group(o, run.attention.exchange_out(part, state.spec), state.heads, run.spec.num_heads)
        del part
    assert o is not None
    for index in run.indices:
        rows = o[run.rows(index)]
        if save:
            run.save(ATTENTION_OUTPUT, index, [rows], share=True)
        yield index, rows
        run.release()


def _save_lse(run: LayerRun, lse: Tensor, group: int) -> None:
    """Log-sum-exp (T, H of the group) waits where attention's output does: its first rows kept, the others moved."""
    kept, moved = run.policy.attention_output.rows(lse.shape[0])
    if kept or not moved:
        run.saved.put((LOG_SUM_EXP, 0, group), [lse[:kept]], ActivationPlace.KEEP)
    if kept < moved:
        run.saved.put((LOG_SUM_EXP, 1, group), [lse[kept:]], ActivationPlace.HOST)


def _stored_lse(run: LayerRun, group: int) -> Tensor:
    parts = [run.saved.get(key)[0] for key in ((LOG_SUM_EXP, part, group) for part in (0, 1)) if key in run.saved]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def backward(run: LayerRun, dy: Tensor, sums: GradientSums) -> Tensor:
    """dx (T, M), in dy's own memory where it was cut into pieces; parameters' gradients go to `sums`."""
    groups = _groups(run)
    o = _outputs(run, groups)
    do, dx = Gathered(run), Gathered(run)
    if len(run.pieces) > 1:
        dx.whole = [dy]
    for index in reversed(run.indices):
        d_input, d_output = run.after_backward(index, run.input_rows(index), o[run.rows(index)], dy[run.rows(index)], sums)
        run.release()
        dx.put(index, [d_input])
        do.put(index, [d_output])
        del d_input, d_output
    for index, state in enumerate(groups):
        gradients = _attention_backward(run, index, state, o, do.whole[0], sums)
        if index + 1 == len(groups):
            del o
            do.whole.clear()
        for piece in run.indices:
            upstream = [t[run.rows(piece)] for t in gradients]
            part = run.before_backward(piece, run.input_rows(piece), state.heads, upstream, sums)
            run.release()
            dx.put(piece, [part.add_(dx.whole[0][run.rows(piece)])])
    return dx.whole[0]


def _groups(run: LayerRun) -> list[HeadGroupState]:
    spec = run.spec
    heads = head_groups(spec.num_heads, spec.num_kv_heads, most=run.policy.head_groups, ulysses=len(run.attention.member_tokens))
    return [HeadGroupState(part, _part_of(spec, part), None, None, None) for part in heads]


def _part_of(spec: Any, heads: Heads) -> Any:
    if heads.queries is None or heads.keys is None:
        return spec
    return replace(spec, num_heads=len(heads.queries), num_kv_heads=len(heads.keys))


def _project(run: LayerRun, inputs: Inputs, group: int, state: HeadGroupState, *, save: bool = False) -> QKV:
    """Queries, keys and values of one head group, exchanged: stored ones as they are, the others made."""
    made = Gathered(run)
    for index in run.indices:
        q, k, v = run.projected(index, inputs, state.heads, group)
        made.put(index, (q, k, v))
        if save:
            rows = run.rows(index)
            run.save(QUERY, index, [_rows_of(made, 0, q, rows, run)], group, share=True)
            run.save(KEY_VALUE, index, [_rows_of(made, 1, k, rows, run), _rows_of(made, 2, v, rows, run)], group, share=True)
        run.release()
    q, k, v = made.whole
    return run.attention.exchange_in(q, k, v, state.spec)


def _rows_of(made: Gathered, which: int, part: Tensor, rows: slice, run: LayerRun) -> Tensor:
    """A piece as part of the whole where the whole stays, else by itself."""
    kind = QUERY if which == 0 else KEY_VALUE
    return made.whole[which][rows] if run.policy.split(kind).keep == 1.0 else part


def _with_group(o: Tensor | None, part: Tensor, heads: Heads, num_heads: int) -> Tensor:
    """Attention's output with the heads of one more group in it."""
    if heads.queries is None:
        return part
    o = part.new_empty((part.shape[0], num_heads, part.shape[2])) if o is None else o
    runs = head_runs(heads.queries)
    for run, rows in zip(runs, part.split([run.stop - run.start for run in runs], 1), strict=True):
        o[:, run] = rows
    return o


def _of_group(t: Tensor, heads: Heads) -> Tensor:
    """The group's heads of (T, all heads, D), contiguous."""
    if heads.queries is None:
        return t.contiguous()
    runs = [t[:, run] for run in head_runs(heads.queries)]
    return runs[0].contiguous() if len(runs) == 1 else torch.cat(runs, 1)


def _outputs(run: LayerRun, groups: Sequence[HeadGroupState]) -> Tensor:
    """Attention's output of all rows: as stored, or recomputed; one group alone keeps for backward what it read."""
    if run.attention_stored:
        stored = Gathered(run)
        for index in run.indices:
            stored.put(index, [run.get(ATTENTION_OUTPUT, index)[0]])
            run.release()
        return stored.whole[0]
    o = None
    for index, state in enumerate(groups):
        with torch.no_grad():
            qkv = _project(run, run.input_rows, index, state)
            part, state.lse = run.attention.core_forward(qkv, state.spec, sinks_of(run.adapter, state.heads))
            if len(groups) == 1:
                state.qkv, state.o = qkv, part
            o = _with_group(o, run.attention.exchange_out(part, state.spec), state.heads, run.spec.num_heads)
        del qkv, part
    assert o is not None
    return o


def _attention_backward(run: LayerRun, index: int, state: HeadGroupState, o: Tensor, do: Tensor, sums: GradientSums) -> QKV:
    """Gradients of one group's projections, of all rows; those of its sinks go to `sums`."""
    attention, spec, heads = run.attention, state.spec, state.heads
    with torch.no_grad():
        qkv = state.qkv or _project(run, run.input_rows, index, state)
        lse = state.lse if state.lse is not None else _stored_lse(run, index)
        mine = state.o if state.o is not None else attention.exchange_out_backward(_of_group(o, heads), spec)
        dtype = qkv[0].dtype
        upstream = attention.exchange_out_backward(_of_group(do, heads), spec)
        sinks_backward(run.adapter, attention, upstream, mine, lse, sums, heads)
        wide = attention.core_backward(upstream, qkv, mine, lse, spec)
        state.qkv = state.o = state.lse = None
        del qkv, mine, upstream
        run.release()
        return attention.exchange_in_backward(wide, spec, dtype)
