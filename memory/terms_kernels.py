"""What single operations need for a moment: a chunk's logits, scores under a mask, scratch inside kernels. Pure.

The formulas follow training/loss.py and the masked path of parallel/sequence/attention.py.
"""

from __future__ import annotations

from .setting import Phase, Setting, Term
from .terms_activations import norm_bytes


def loss_chunk(s: Setting) -> Term:
    """Logits of one chunk, in compute precision and in float32, or their gradient beside a part of the head's."""
    chunk, words = min(s.train.loss_chunk_tokens, s.tokens), s.spec.vocab_size
    narrow, wide = s.width * words * chunk, s.master * words * chunk
    bent = 3 * wide * s.spec.has_logit_softcap
    made = wide + bent + narrow * (s.width < s.master)
    most = max(made, narrow + s.width * words * s.spec.hidden_size)
    rows = chunk * s.spec.hidden_size * (norm_bytes(s) + s.width)
    return Term("loss chunk", f"logits of {chunk} tokens x {words}", {Phase.LOSS: most + rows})


def scratch(s: Setting) -> Term:
    """What kernels allocate inside, where no count of tensors sees it: exponentials of a chunk's logits."""
    chunk, words = min(s.train.loss_chunk_tokens, s.tokens), s.spec.vocab_size
    exponentials = s.master * words * chunk
    beside = s.master * words * chunk * (1 + 3 * s.spec.has_logit_softcap)
    counted = loss_chunk(s).by_phase[Phase.LOSS]
    return Term("kernel scratch", "exponentials of the loss chunk's logits", {Phase.LOSS: max(0, exponentials + beside - counted)})


def masked_scores(s: Setting) -> Term:
    """Kernels without the mask that is needed make scores of MASKED_QUERY_CHUNK queries in float32 (parallel/sequence/attention.py)."""
    softcap = s.spec.has_score_softcap
    windows = [window for window in s.spec.windows if window is not None]
    if s.on_gpu and s.width == 2:
        return Term("masked scores", "", {})
    if not (softcap or windows or s.on_gpu):
        return Term("masked scores", "", {})
    length = min(s.data.max_seq_len, s.tokens * s.layout.sp_degree)
    rows = min(length, s.piece_tokens * s.layout.sp_degree) if s.by_chunks else length
    queries = min(MASKED_QUERY_CHUNK, rows)
    several, everything = rows > MASKED_QUERY_CHUNK, s.on_gpu or len(windows) < s.spec.num_layers
    keys = length if everything else min(length, max(windows) + queries * several)
    one = s.master * s.spec.num_heads // s.layout.ulysses * queries * keys
    # A chunk's scores are made while those of the chunk before are still there.
    before = several * (max(0, keys - queries) / keys if everything else 1.0)
    mask = 8 * queries * keys
    forward = max(5 + 3 * before, 6) if softcap else max(2 + 2 * before, 3)
    backward = max(5 + 4 * before, 7) if softcap else max(2 + 3 * before, 5)
    held = dict.fromkeys((Phase.FORWARD, Phase.SEGMENT) if s.segment_layers > 1 else (Phase.FORWARD,), int(forward * one + mask))
    held[Phase.BACKWARD_ATTENTION] = int(backward * one + mask)
    return Term("masked scores", f"{queries} queries x {keys} keys of each head, in float32", held)


MASKED_QUERY_CHUNK = 512
"""Of parallel/sequence/attention.py."""
