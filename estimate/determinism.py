"""Which sums of a run on GPUs may differ in their last bits from one time to the next, and what it costs that they do not. Pure.

Nothing else of a step adds in an order that changes: rows of experts are summed over each token's own places
(memory/executor/experts.py), the embedding's gradient is made from sorted tokens (torch's aten/src/ATen/native/cuda/Embedding.cu), the
loss adds one number a row, and counts are whole numbers.
"""

from __future__ import annotations

from ..cluster.attention_rates import CAPABILITIES, IN_ORDER, multiprocessors
from ..parallel.sequence.kernel_choice import KernelChoice
from ..units import format_bytes
from .footprint.kernels import dq_parts
from .footprint.moment import Widths
from .plan_inputs import PlanInputs

KEY = "train.deterministic"
_HOPPER = 9
"""Compute capability of the first GPUs whose switches add (NVLink SHARP)."""


def unordered_sums(inputs: PlanInputs, choice: KernelChoice) -> tuple[str, ...]:
    """List what of this plan adds in an order that changes, a clause each; () on CPUs and with train.deterministic."""
    if not inputs.on_gpu or inputs.train.deterministic:
        return ()
    lines = []
    if not choice.repeats:
        shared = inputs.spec.num_kv_heads < inputs.spec.num_heads and choice.kernel in ("fa3", "fa4")
        lines.append(f"attention's backward ({choice.kernel}): gradients of queries{', and of shared keys and values' * shared}")
    major = CAPABILITIES.get(inputs.cluster.gpu or "", (_HOPPER, 0))[0]
    if inputs.layout.ranks_per_node > 1 and major >= _HOPPER:
        lines.append("sums over ranks that NCCL makes in the node's switches (NVLS)")
    lines.append("matrix products while copies run beside them, which cuBLAS promises for one stream alone")
    if inputs.memory.compile:
        lines.append("compiled kernels, chosen by how long they took")
    return tuple(lines)


def price_of_order(inputs: PlanInputs) -> str | None:
    """What train.deterministic takes in this plan; None: it asks no kernel to change."""
    if not inputs.sums_in_order:
        return None
    kernel = inputs.attention_kernel
    rate, share = inputs.attention_rate, IN_ORDER[kernel].share
    line = f"{kernel.value}'s backward at {share:.0%} of its speed ({rate.backward / 1e12:.3g} TFLOP/s)"
    widths = Widths.of(inputs, inputs.policy.head_groups)
    parts = dq_parts(inputs, widths)
    if parts == 1:
        return line
    rows = inputs.piece_tokens if inputs.by_chunks else inputs.tokens
    more = format_bytes((parts - 1) * widths.wide * widths.Q * rows)
    sms = f"{multiprocessors(inputs.cluster.gpu)} multiprocessors"
    return f"{line}; queries' gradient in {parts} parts for {sms}, {more} more"


def said_of_order(inputs: PlanInputs, choice: KernelChoice) -> str | None:
    """One line for the log and for plans; None: there is nothing to say."""
    unordered, price = unordered_sums(inputs, choice), price_of_order(inputs)
    if unordered:
        return f"not the same bits every time: {'; '.join(unordered)} ({KEY}=true)"
    return None if price is None else f"{KEY}: {price}"
