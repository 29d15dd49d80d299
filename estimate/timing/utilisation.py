"""How much of the devices' peak a measured step used. Pure.

Model FLOPs count each product once forward and twice backward, and attention causally (only pairs that are computed): what the model
needs whatever is kept or recomputed (MFU of PaLM, arXiv:2204.02311, app. B, which counts all pairs). Hardware FLOPs count what
runs: scores that attention kernels make again in backward, and what the memory policy recomputes (HFU).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..plan_inputs import PlanInputs
from .flops import forward_attention_flops, matrix_parameters, sequence_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilisation:
    """One step's use of each device; rates are per device and second."""

    tokens_per_s: float
    model_flops_per_s: float
    mfu: float | None
    """Share of the device's peak that the model's own work took; None on CPUs, whose peak is a guess."""
    hfu: float | None
    """The same with recomputation in."""

    def fields(self) -> dict[str, float]:
        """Keys of a `step` event; what is not known is left out."""
        shares = {"mfu": self.mfu, "hfu": self.hfu}
        known = {name: value for name, value in shares.items() if value is not None}
        return {"device_tokens_per_s": self.tokens_per_s, "model_flops_per_s": self.model_flops_per_s, **known}


def utilisation(inputs: PlanInputs, lengths: Iterable[int], step_s: float) -> Utilisation:
    """Utilisation of a step that took `step_s` seconds for documents of these lengths."""
    documents = list(lengths)
    seconds = step_s * inputs.layout.world_size
    model = sum(model_flops(inputs, length) for length in documents)
    passes = 2 if inputs.residency.two_passes else 1
    hardware = passes * sum(sum(sequence_flops(inputs, length)) for length in documents)
    peak = inputs.cluster.peak_flops if inputs.on_gpu else None
    return Utilisation(
        tokens_per_s=sum(documents) / seconds,
        model_flops_per_s=model / seconds,
        mfu=None if peak is None else model / seconds / peak,
        hfu=None if peak is None else hardware / seconds / peak,
    )


def model_flops(inputs: PlanInputs, length: int) -> float:
    """FLOPs that one document of `length` tokens needs: 6 a weight and token, and three forward passes of attention."""
    attention = forward_attention_flops(inputs.spec.windows, inputs.spec.query_size, length)
    return 3 * attention + 6.0 * matrix_parameters(inputs) * length
