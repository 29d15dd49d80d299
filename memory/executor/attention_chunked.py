"""Attention one chunk of queries at a time, forward and backward: of full length there are keys, values and their gradients only.

Forward: each chunk's queries against the keys so far (a rectangle before the diagonal, a triangle on it, merged by
log-sum-exp). Backward walks the chunks from the last to the first: recompute the chunk, back through MLP and output
projection, then attention block by block with the merged output and log-sum-exp, adding to the keys' and values'
gradients in float32. In that order the gradients of a chunk's own keys are final as soon as its queries are done, so its
projections are differentiated once, and the chunk's gradient takes the place of the one that came in. This is
StreamBP (2506.03077, sec. 3) without projecting the keys of the whole prefix once more for every chunk.

Where Ulysses ranks hold other parts of the same sequences, later queries of a rank are not the latest of all: keys are
final only at the end, and their projections are differentiated in one more pass.

Note: mirrored, moment by moment, in estimate/footprint/live_layer.py (chunked_moments), in the order of reads in read_order.py, and in
estimate/timing/{offload,flops}.py (how often rows come back, what is recomputed). A change here is a change there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..activation_classes import ATTENTION_OUTPUT, KEY_VALUE, QUERY
from ..heads import ALL_HEADS, KEYS, QUERIES, Heads
from .layer_pass import Gathered, Inputs, LayerRun
from .sinks import sinks_backward, sinks_of
from .token_local import GradientSums

KEY_BLOCK_CHUNKS = 4
"""Keys whose gradients one block of backward makes before they are added up, in chunks."""


def attention_rows(run: LayerRun, inputs: Inputs, *, save: bool) -> Iterator[tuple[int, Tensor]]:
    """(piece, attention's output of its rows) for all pieces in ascending order. Builds no graph."""
    attention, spec = run.attention, run.spec
    kv = Gathered(run)
    keys = None if run.alone else _all_keys(run, inputs, save=save)
    for index, rows in enumerate(run.pieces):
        q, *made = run.projected(index, inputs, ALL_HEADS if keys is None else QUERIES)
        if keys is None:
            kv.put(index, made)
            _save_keys(run, kv, index, made, save=save)
        if save:
            run.save(QUERY, index, [q])
        k, v = kv.whole if keys is None else keys
        o, lse = attention.rows_forward(attention.gather_rows(q, rows, spec), k, v, rows, spec, sinks_of(run.adapter))
        o = attention.scatter_rows(o, rows, spec)
        if save:
            run.save(ATTENTION_OUTPUT, index, [o, lse])
        del q, made, lse
        yield index, o
        run.release()


def backward(run: LayerRun, dy: Tensor, sums: GradientSums) -> Tensor:
    """dx (T, M), written over dy; parameters' gradients go to `sums`."""
    attention, spec = run.attention, run.spec
    with torch.no_grad():
        keys = _all_keys(run, run.input_rows)
    # One addition a chunk of queries: in bfloat16 late ones would be lost against the sum.
    wide = torch.promote_types(dy.dtype, torch.float32)
    totals = torch.zeros_like(keys[0], dtype=wide), torch.zeros_like(keys[1], dtype=wide)
    for index in reversed(run.indices):
        _piece_backward(run, index, keys, totals, dy, sums)
        run.release()
    if run.alone:
        return dy
    del keys
    dk, dv = attention.exchange_keys_backward(*totals, spec, dy.dtype)
    del totals
    for index in run.indices:
        rows = run.rows(index)
        dy[rows] += run.before_backward(index, run.input_rows(index), KEYS, (dk[rows], dv[rows]), sums)
        run.release()
    return dy


def _piece_backward(
    run: LayerRun, index: int, keys: tuple[Tensor, Tensor], totals: tuple[Tensor, Tensor], dy: Tensor, sums: GradientSums
) -> None:
    """One chunk: its gradient takes the place of dy's rows, its part of the keys' gradients is added to `totals`."""
    attention, spec, rows, mine = run.attention, run.spec, run.pieces[index], run.rows(index)
    x = run.input_rows(index)
    with torch.no_grad():
        q = attention.gather_rows(run.projected(index, run.input_rows, QUERIES)[0], rows, spec)
        o, gathered_o, lse = _output(run, index, q, keys)
    dx, do = run.after_backward(index, x, o, dy[mine], sums)
    del o
    do = attention.gather_rows(do, rows, spec)
    sinks_backward(run.adapter, attention, do, gathered_o, lse, sums)
    dq = attention.rows_backward(do, (q, *keys), gathered_o, lse, rows, spec, totals, _key_block(run))
    del do, q, gathered_o, lse
    upstream = [attention.scatter_rows(dq.to(dy.dtype), rows, spec)]
    del dq
    heads: Heads = QUERIES
    if run.alone:
        upstream += [total[mine].to(dy.dtype) for total in totals]
        heads = ALL_HEADS
    through = run.before_backward(index, x, heads, upstream, sums)
    torch.add(dx, through, out=dy[mine])


def _key_block(run: LayerRun) -> int:
    chunk = run.policy.chunk_tokens
    return (chunk or max(1, run.num_tokens)) * KEY_BLOCK_CHUNKS


def _output(run: LayerRun, index: int, q: Tensor, keys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's output of a piece before and after its exchange, and the log-sum-exp: as stored, or recomputed."""
    attention, spec, rows = run.attention, run.spec, run.pieces[index]
    if run.has(ATTENTION_OUTPUT, index):
        o, lse = run.get(ATTENTION_OUTPUT, index)
        return o, attention.gather_rows(o, rows, spec), lse
    gathered, lse = attention.rows_forward(q, *keys, rows, spec, sinks_of(run.adapter))
    return attention.scatter_rows(gathered, rows, spec), gathered, lse


def _all_keys(run: LayerRun, inputs: Inputs, *, save: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values of all rows, exchanged: stored ones as they are, the others made."""
    kv = Gathered(run)
    for index in run.indices:
        made = run.projected(index, inputs, KEYS)
        kv.put(index, made)
        _save_keys(run, kv, index, made, save=save)
        run.release()
    return run.attention.exchange_keys(kv.whole[0], kv.whole[1], run.spec)


def _save_keys(run: LayerRun, kv: Gathered, index: int, made: Sequence[Tensor], *, save: bool) -> None:
    if save:
        shared = run.policy.key_value.keep == 1.0
        run.save(KEY_VALUE, index, [t[run.rows(index)] for t in kv.whole] if shared else made, share=True)
