"""What single operations need for a moment: a chunk's logits, scores under a mask, scratch inside kernels. Pure.

The formulas follow model/chunked_loss.py, the masked path of parallel/sequence/attention.py, and what attention kernels allocate for
themselves in backward (flash-attn 2.8 csrc/flash_attn/flash_api.cpp, hopper/flash_api.cpp, cudnn-frontend's attention backward).
"""

from __future__ import annotations

from ...cluster.attention_rates import RatedKernel, multiprocessors
from ..plan_inputs import PlanInputs
from .activations import norm_bytes
from .moment import Widths
from .term import Phase, Term

_HEADS_OF_THEIR_OWN = (RatedKernel.FA3, RatedKernel.FA4)
"""Kernels that sum the gradients of shared keys and values in place, in float32; the others write them for every query head first."""


def loss_chunk(inputs: PlanInputs) -> Term:
    """Logits of one chunk, in compute precision and in float32, or their gradient beside a part of the head's."""
    if not inputs.has_head:
        return Term("loss chunk", "", {Phase.LOSS: 0, Phase.EVALUATION_LOSS: 0})
    chunk, words = min(inputs.train.loss_chunk_tokens, inputs.tokens), inputs.spec.vocab_size
    narrow, wide = inputs.width * words * chunk, inputs.master * words * chunk
    bent = 3 * wide * inputs.spec.has_logit_softcap
    made = wide + bent + narrow * (inputs.width < inputs.master)
    most = max(made, narrow + inputs.width * words * inputs.spec.hidden_size)
    rows = chunk * inputs.spec.hidden_size * (norm_bytes(inputs) + inputs.width)
    return Term("loss chunk", f"logits of {chunk} tokens x {words}", {Phase.LOSS: most + rows, Phase.EVALUATION_LOSS: made + rows})


def row_losses(inputs: PlanInputs) -> Term:
    """What an evaluation keeps of every row of a step: its log-probability; and one micro-batch's in float64 on its way to the host."""
    num_bytes = (inputs.master * inputs.layout.num_micro_batches + 8) * inputs.tokens * inputs.has_head
    return Term("losses of rows", "log-probabilities, in evaluations", {Phase.EVALUATION_LOSS: num_bytes})


def scratch(inputs: PlanInputs) -> Term:
    """What kernels allocate inside, where no count of tensors sees it: exponentials of a chunk's logits."""
    chunk, words = min(inputs.train.loss_chunk_tokens, inputs.tokens), inputs.spec.vocab_size
    exponentials = inputs.master * words * chunk * inputs.has_head
    beside = exponentials * (1 + 3 * inputs.spec.has_logit_softcap)
    counted = loss_chunk(inputs).by_phase
    by_phase = {phase: max(0, exponentials + beside - counted[phase]) for phase in (Phase.LOSS, Phase.EVALUATION_LOSS)}
    return Term("kernel scratch", "exponentials of the loss chunk's logits", by_phase)


def masked_scores(inputs: PlanInputs) -> Term:
    """Kernels without the mask that is needed make scores of MASKED_QUERY_CHUNK queries in float32 (parallel/sequence/attention.py)."""
    softcap = inputs.spec.has_score_softcap
    windows = [window for window in inputs.spec.windows if window is not None]
    if not _is_masked(inputs):
        return Term("masked scores", "", {})
    length = min(inputs.data.max_seq_len, inputs.tokens * inputs.layout.sp_degree)
    rows = min(length, inputs.piece_tokens * inputs.layout.sp_degree) if inputs.by_chunks else length
    queries = min(MASKED_QUERY_CHUNK, rows)
    several, everything = rows > MASKED_QUERY_CHUNK, inputs.on_gpu or (softcap and len(windows) < inputs.spec.num_layers)
    keys = length if everything else min(length, max(windows) + queries * several)
    one = inputs.master * inputs.spec.num_heads // inputs.layout.ulysses * queries * keys
    # A chunk's scores are made while those of the chunk before are still there.
    before = several * (max(0, keys - queries) / keys if everything else 1.0)
    mask = 8 * queries * keys
    forward = max(5 + 3 * before, 6) if softcap else max(2 + 2 * before, 3)
    backward = max(5 + 4 * before, 7) if softcap else max(2 + 3 * before, 5)
    by_phase = dict.fromkeys((Phase.FORWARD, Phase.SEGMENT) if inputs.segment_layers > 1 else (Phase.FORWARD,), int(forward * one + mask))
    by_phase |= {Phase.BACKWARD_ATTENTION: int(backward * one + mask), Phase.EVALUATION: int(forward * one + mask)}
    return Term("masked scores", f"{queries} queries x {keys} keys of each head, in float32", by_phase)


def _is_masked(inputs: PlanInputs) -> bool:
    """Whether some block of attention has a mask, a softcap or a precision that the device's kernel lacks.

    On GPUs only precisions: their kernels have windows in every block, and one without a softcap is refused where one is asked for.
    """
    if inputs.on_gpu:
        return inputs.width != 2
    return inputs.spec.has_score_softcap or any(window is not None for window in inputs.spec.windows)


def attention_workspace(inputs: PlanInputs, w: Widths, key_rows: int = 1) -> float:
    """Bytes of one row of queries that the kernel's backward allocates for itself on CUDA.

    Queries' gradient in float32, in parts where they are added in order; with shared key/value heads theirs for every query head, or
    in float32 once (FlashAttention 3 and 4); cuDNN also one float32 a row and head. `key_rows`: keys of a block, in rows of the
    queries' piece.
    """
    if not inputs.on_gpu:
        return 0.0
    shared = inputs.spec.num_kv_heads < inputs.spec.num_heads
    sums = w.wide * w.X if inputs.attention_kernel in _HEADS_OF_THEIR_OWN else 2 * w.Q
    beside = w.E * (inputs.attention_kernel is RatedKernel.CUDNN)
    return w.wide * w.Q * dq_parts(inputs, w) + sums * key_rows * shared + beside


def dq_parts(inputs: PlanInputs, w: Widths) -> int:
    """Parts of queries' gradient that are held at a time, of heads as `w` has them: 1 where it is added as blocks of keys finish.

    FlashAttention 2 in order makes one for each multiprocessor, shared by the heads of a call (csrc/flash_attn/flash_api.cpp, mha_bwd):
    with documents joined there are fewer, so this is of one. FlashAttention 3 and 4 wait for one another instead.
    """
    if not inputs.sums_in_order or inputs.attention_kernel not in (RatedKernel.FA2, RatedKernel.SDPA):
        return 1
    heads = max(1, w.Q // (inputs.width * inputs.spec.head_dim * inputs.layout.ulysses))
    return -(-multiprocessors(inputs.cluster.gpu) // heads)


MASKED_QUERY_CHUNK = 512
"""Queries of a chunk of masked attention, as in parallel/sequence/attention.py."""
