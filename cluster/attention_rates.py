"""How fast attention kernels run on a kind of GPU: published FLOP/s, forward and backward apart. Plain data, no torch.

FLOPs are counted as the sources and timing/flops.py count them: 4 a query-key pair and query number forward, half of the pairs where the
mask is causal, and 2.5 times as many backward. Head dim 128 and long sequences; other head dims are slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Protocol

from ..errors import ConfigError


class RatedKernel(Enum):
    """Kernels that estimates know."""

    FA4 = "fa4"
    FA3 = "fa3"
    FA2 = "fa2"
    CUDNN = "cudnn"
    SDPA = "sdpa"
    """The flash operators that torch brings, which are FlashAttention 2's."""


@dataclass(frozen=True, slots=True)
class AttentionRate:
    """FLOP/s of one GPU in attention, and where they are from."""

    forward: float
    backward: float
    source: str

    @property
    def both(self) -> float:
        """FLOP/s of a forward and its backward together."""
        return 3.5 / (1.0 / self.forward + 2.5 / self.backward)


class Processor(Protocol):
    """Facts of a rank's device that its speed follows from (cluster/config.py)."""

    @property
    def gpu(self) -> str | None: ...

    @property
    def peak_flops(self) -> float: ...

    @property
    def attention_efficiency(self) -> float | None: ...


_FA3_PAPER = "arXiv 2407.08608, figures 5 and 6"  # 16K tokens, head dim 128; forward causal, backward published without a mask alone
_FA4_SLOWER = 1.3
"""Times as fast as cuDNN that FlashAttention 4 is at most by its paper (arXiv 2603.05451)."""
_HOPPER = {
    RatedKernel.FA2: AttentionRate(335e12, 322e12, _FA3_PAPER),
    RatedKernel.CUDNN: AttentionRate(539e12, 516e12, _FA3_PAPER),
    RatedKernel.FA3: AttentionRate(616e12, 561e12, _FA3_PAPER),
}
_BLACKWELL = {
    # Causal, 8K tokens, head dim 128, two thread blocks a tile backward.
    RatedKernel.FA4: AttentionRate(1418e12, 1208e12, "github.com/Dao-AILab/flash-attention/pull/2280"),
    RatedKernel.CUDNN: AttentionRate(1418e12 / _FA4_SLOWER, 1208e12 / _FA4_SLOWER, "FlashAttention 4's over 1.3, arXiv 2603.05451"),
}
RATES: Mapping[str, Mapping[RatedKernel, AttentionRate]] = MappingProxyType(
    {
        # Forward up to 73 % of the peak, backward up to 63 %.
        "a100": {RatedKernel.FA2: AttentionRate(0.73 * 312e12, 0.63 * 312e12, "arXiv 2307.08691, section 4.1")},
        "h100": _HOPPER,
        # The H100's compute.
        "h200": _HOPPER,
        "b200": _BLACKWELL,
    }
)
"""By kind of GPU (cluster.gpu) and kernel."""
CAPABILITIES: Mapping[str, tuple[int, int]] = MappingProxyType({"a100": (8, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)})
"""CUDA compute capability by kind of GPU, which decides the kernels it runs."""
_MULTIPROCESSORS: Mapping[str, int] = MappingProxyType({"a100": 108, "h100": 132, "h200": 132, "b200": 148})
"""Streaming multiprocessors of the SXM boards, by kind of GPU (NVIDIA's architecture papers)."""


@dataclass(frozen=True, slots=True)
class SumsInOrder:
    """What a kernel's backward keeps of its speed where it adds in the same order every time."""

    share: float
    source: str


_OF_FA2 = SumsInOrder(0.52, "166 TFLOP/s, github.com/Dao-AILab/flash-attention/pull/1893, of 322, arXiv 2407.08608; H100, 8K to 16K tokens")
_OF_FA3 = SumsInOrder(0.62, "up to 37.9 % slower, arXiv 2601.21824; 63 to 82 % by flash-attention's pull request 1893")
IN_ORDER: Mapping[RatedKernel, SumsInOrder] = MappingProxyType(
    {
        RatedKernel.FA4: SumsInOrder(0.62, "FlashAttention 3's, arXiv 2601.21824; nothing is published of FlashAttention 4"),
        RatedKernel.FA3: _OF_FA3,
        RatedKernel.FA2: _OF_FA2,
        RatedKernel.SDPA: _OF_FA2,
    }
)
"""By kernel; cuDNN's operator has no such backward."""


def multiprocessors(gpu: str | None) -> int:
    """Streaming multiprocessors of a kind of GPU; the most there are where it is not known."""
    return _MULTIPROCESSORS.get(gpu or "", max(_MULTIPROCESSORS.values()))


def in_order(rate: AttentionRate, kernel: RatedKernel) -> AttentionRate:
    """`rate` with a backward that adds in the same order every time."""
    slower = IN_ORDER[kernel]
    source = f"{rate.source}; backward x {slower.share:g} in order: {slower.source}"
    return AttentionRate(rate.forward, rate.backward * slower.share, source)


def check_gpu(gpu: str | None, *, has_own_rate: bool) -> None:
    """ConfigError for a GPU without published rates, and where neither cluster.gpu nor cluster.attention_efficiency is given."""
    kinds = ", ".join(sorted(RATES))
    if gpu is None and not has_own_rate:
        hint = "cluster.gpu=h100, or cluster.attention_efficiency=0.4 where no figures are published"
        raise ConfigError("cluster.gpu", found="nothing that tells how fast attention is", expected=f"one of {kinds}", hint=hint)
    if gpu is not None and gpu not in RATES:
        hint = "cluster.gpu=null cluster.attention_efficiency=0.4, as measured or assumed"
        raise ConfigError("cluster.gpu", found=repr(gpu), expected=f"one of {kinds}, whose rates are published", hint=hint)


def attention_rate(cluster: Processor, kernel: RatedKernel, *, or_nearest: bool = False) -> AttentionRate:
    """FLOP/s of one rank in attention with `kernel`. ConfigError where nothing is published of the kernel on this kind of GPU.

    `or_nearest`: the slowest that is published instead, and the source says so.
    """
    if cluster.attention_efficiency is not None:
        rate = cluster.peak_flops * cluster.attention_efficiency
        return AttentionRate(rate, rate, "cluster.attention_efficiency")
    rates = RATES[cluster.gpu or ""]
    same = RatedKernel.FA2 if kernel is RatedKernel.SDPA else kernel
    found = rates.get(same)
    if found is None and or_nearest:
        nearest = min(rates, key=lambda name: rates[name].both)
        source = f"{nearest.value}'s, nothing is published of {kernel.value} on {cluster.gpu}; {rates[nearest].source}"
        return replace(rates[nearest], source=source)
    if found is None:
        known = f"a kernel with published rates: {', '.join(sorted(each.value for each in rates))}"
        hint = "cluster.attention_efficiency=0.4, as measured or assumed"
        raise ConfigError("cluster.gpu", found=f"{kernel.value} on {cluster.gpu}", expected=known, hint=hint)
    return found
