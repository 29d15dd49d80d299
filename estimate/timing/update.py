"""Seconds of the optimizer's update at the end of a step, or within backward. Pure.

AdamW computes next to nothing: its time is that of the bytes it reads and writes. Per weight, w bytes wide with moments of m
bytes: the weight and both moments there and back and the gradient once, 2w + 4m + w; the norm reads the gradient once more,
and clipping, where it bites, reads and writes it. On the host there are also gradients down and weights up over the link, and
each passes once through a staging buffer.

Note: what hides. With optim.update=backward a host updates one layer while the device works on the one before it, so only what the
host takes longer than the last micro-batch's backward shows, and the update of the last modules, which nothing follows. The
backward that counts is one without recomputation: then the time does not depend on the memory policy, and is not too short.
Without a GPU the update runs on the cores that compute, and nothing hides.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..footprint.optimizer import adds_up
from ..muon import exchange_s, muon_work, orthogonalise_s
from ..plan_inputs import PlanInputs
from .bandwidth import device_update_rate, gb_per_s, host_link, host_update_rate
from .flops import layer_backward_s


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateTime:
    """One step's update on one rank."""

    busy_s: float
    """Seconds that the processor or the device computes it; 0 where its speed is not known."""
    link_s: float
    """Seconds that move gradients and weights between device and host, both directions one after the other."""
    shown_s: float
    """What the step takes longer."""
    assumption: str
    """The assumptions, as a sentence."""


def update_time(inputs: PlanInputs) -> UpdateTime:
    """Seconds of one step's optimizer update."""
    return _host_update(inputs) if inputs.residency.on_host else _device_update(inputs)


def adam_bytes(master: int, moment: float) -> float:
    """What AdamW reads and writes for one weight."""
    return 3 * master + 4 * moment


def _numbers(inputs: PlanInputs) -> float:
    return inputs.trained_parameters / inputs.layout.shard


def _each(inputs: PlanInputs) -> float:
    """Bytes of one weight's update, measuring and clipping in."""
    clipping = 2 * inputs.master if inputs.residency.clipped else 0
    moments = inputs.residency.state_numbers / 2 * (inputs.residency.moment_bytes or inputs.master)
    return adam_bytes(inputs.master, moments) + inputs.master + clipping


def muon_bytes(master: int) -> int:
    """What Muon reads and writes for one weight but for its product: momentum, what is sent, the weight, twice."""
    return 9 * master + 10


def _device_update(inputs: PlanInputs) -> UpdateTime:
    if inputs.residency.orthogonalise_steps:
        return _muon_update(inputs)
    rate, num_bytes = device_update_rate(inputs), _numbers(inputs) * _each(inputs)
    busy = 0.0 if rate.bytes_per_s is None else num_bytes / rate.bytes_per_s
    return UpdateTime(busy_s=busy, link_s=0.0, shown_s=busy, assumption=_words(inputs, _each(inputs), rate.bytes_per_s, rate.source))


def _muon_update(inputs: PlanInputs) -> UpdateTime:
    """AdamW's bytes for the rest, Muon's for matrices, then the longer of the products and of what travels beside them."""
    rate, work, shard = device_update_rate(inputs), muon_work(inputs), inputs.layout.shard
    more = muon_bytes(inputs.master) - adam_bytes(inputs.master, inputs.master)
    num_bytes = _numbers(inputs) * _each(inputs) + work.parameters / shard * more
    element_wise = 0.0 if rate.bytes_per_s is None else num_bytes / rate.bytes_per_s
    products, travel = orthogonalise_s(inputs), exchange_s(inputs)
    said = f"Newton-Schulz takes {work.flops / 1e12:.3g} TFLOP on the busiest rank, at cluster.gemm_efficiency; matrices travel beside it"
    words = _words(inputs, num_bytes / _numbers(inputs), rate.bytes_per_s, rate.source)
    shown = element_wise + max(products, travel)
    return UpdateTime(busy_s=element_wise + products, link_s=0.0, shown_s=shown, assumption=f"{words}; {said}")


def _host_update(inputs: PlanInputs) -> UpdateTime:
    rate, link, numbers = host_update_rate(inputs), host_link(inputs), _numbers(inputs)
    reductions = inputs.layout.num_micro_batches if adds_up(inputs) else 1
    # Read and written once more on the way to the device, in its precision; sums of micro-batches read two and write one.
    each = _each(inputs) + inputs.master + inputs.width + (reductions - 1) * 3 * inputs.master
    busy = 0.0 if rate.bytes_per_s is None else numbers * each / rate.bytes_per_s
    down, up = numbers * inputs.master / link.out, numbers * inputs.width / link.back
    shown = _shown_beside_gpu(inputs, busy, down, reductions, up) if inputs.on_gpu else reductions * down + busy + up
    words = _words(inputs, each, rate.bytes_per_s, rate.source)
    return UpdateTime(
        busy_s=busy,
        link_s=reductions * down + up,
        shown_s=shown,
        assumption=f"{words}; gradients and weights travel at {gb_per_s(link.out)} down and {gb_per_s(link.back)} up ({link.source})",
    )


def _shown_beside_gpu(inputs: PlanInputs, busy: float, down: float, reductions: int, up: float) -> float:
    backward = inputs.spec.num_layers * layer_backward_s(inputs)
    late = (reductions - 1) * max(0.0, down - backward)
    if not inputs.residency.in_backward:
        return late + max(0.0, down - backward) + max(busy, up)
    layer = inputs.layer_parameters if inputs.trains_all else inputs.trained_layer_parameters
    last = (layer + inputs.trained_root_parameters) / inputs.trained_parameters
    tail, work = last * max(busy, up), max(busy, down, up)
    return late + tail + max(0.0, work - tail - backward)


def _words(inputs: PlanInputs, each: float, bytes_per_s: float | None, source: str) -> str:
    if bytes_per_s is None:
        but = " but that of its copies" if inputs.residency.on_host else ""
        return f"the optimizer's update takes no time{but}: {source.split()[0]} is not given"
    place = "in host memory" if inputs.residency.on_host else f"on the {'GPU' if inputs.on_gpu else 'processor'}"
    low = "; packing and unpacking low-precision moments is not in it" if inputs.residency.moment_bytes is not None else ""
    return f"the update reads and writes {each:.3g} bytes a weight {place} at {gb_per_s(bytes_per_s)} a rank ({source}){low}"
