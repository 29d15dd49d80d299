"""Which attention kernel a run uses, and why not the faster ones. Pure: what is installed and what the run asks come as values.

From the fastest: FlashAttention 4 and FlashAttention 3 (2407.08608), which torch.nn.attention's registry puts behind torch's own
operators; the flash-attn package (2307.08691); cuDNN's operator; torch's own copy of FlashAttention 2. What a kernel can do is what its
code says: torch's operators pass no softcap on, whatever stands behind them, so softcap is flash-attn's alone. Forward is deterministic
in all of them; backward sums a query's gradient over blocks of keys as they finish, unless it is told not to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...errors import ConfigError
from ..config import AttentionKernel
from .head_parts import INT32, heads_of_call

KEY = "parallel.attention_kernel"
HALF_DTYPES = ("bfloat16", "float16")
MASKED, CPU = "masked", "cpu"
"""Names of kernels that are nobody's choice: plain torch in float32, and torch's flash operator of the CPU."""


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """What the attention of a run asks of its kernel, on one rank."""

    dtype: str
    head_dim: int
    num_heads: int
    """Query heads between the exchanges."""
    rows: int
    """Most rows of one document between the exchanges."""
    softcap: bool = False
    windows: bool = False
    deterministic: bool = False
    """Whether backward is to add in the same order every time (train.deterministic)."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What a machine has of kernels."""

    versions: Mapping[str, str]
    """Versions of fa4, fa3 and fa2, by these names, of those whose functions are there."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability of the GPUs; None: not known, and no reason against anything."""


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What one kernel is, and can do."""

    title: str
    hint: str
    """What to type where it is missing; "": it comes with torch."""
    majors: tuple[int, int]
    """Compute capabilities it runs on, first and last major version."""
    most_head_dim: int
    most_deterministic_head_dim: int
    """The largest whose backward can add in the same order every time; 0: none can."""
    softcap: bool = False
    windows: bool = True


FACTS: Mapping[AttentionKernel, KernelFacts] = MappingProxyType(
    {
        # torch/nn/attention/_fa4.py: capability 9.0 or 10.0. Backward with windows is not relied on yet.
        AttentionKernel.FA4: KernelFacts("FlashAttention 4", "pip install flash-attn-4", (9, 10), 128, 128, windows=False),
        # torch/nn/attention/_fa3.py: capability 9.0; softcap is 0 in every call it makes. hopper/flash_api.cpp: heads above 192 are
        # rounded to 256, which has no deterministic backward.
        AttentionKernel.FA3: KernelFacts("FlashAttention 3", "pip install flash-attn-3, or build flash-attention/hopper", (9, 9), 256, 192),
        AttentionKernel.FA2: KernelFacts("flash-attn", "pip install 'efflaunch[flash-attn]'", (8, 12), 256, 256, softcap=True),
        # torch takes it for not deterministic itself (check_cudnn_deterministic in sdp_utils.cpp).
        AttentionKernel.CUDNN: KernelFacts("cuDNN", "", (9, 12), 128, 0, windows=False),
        AttentionKernel.SDPA: KernelFacts("torch's FlashAttention 2", "", (8, 12), 256, 256),
    }
)
"""From the fastest on."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernel of a run."""

    kernel: str
    """A name of `AttentionKernel`, or `masked` or `cpu`."""
    why: str
    """One line."""
    version: str | None = None
    deterministic: bool = False
    """Whether its backward is told to add in the same order every time."""

    def __str__(self) -> str:
        return f"{self.kernel}{f' {self.version}' if self.version else ''}, {self.why}"

    @property
    def repeats(self) -> bool:
        """Whether the same rows give the same bits every time: plain torch and the CPU's operator need not be told to."""
        return self.deterministic or self.kernel in (MASKED, CPU)

    @property
    def counts_in_int32(self) -> bool:
        """Whether backward counts rows x heads x dim in int32, as FlashAttention 2 did before 2.8; of torch's copy that is not known."""
        return self.kernel in ("sdpa", "cudnn") or (self.kernel == "fa2" and _number(self.version or "0") < (2, 8))


def choose_kernel(asked: AttentionKernel, case: AttentionCase, installed: Installed | None) -> KernelChoice:
    """The kernel for `case`; `installed` None: the ranks compute on the CPU. ConfigError where what was asked for, or anything, cannot."""
    if installed is None:
        return _on_cpu(asked)
    if asked is not AttentionKernel.AUTO:
        reason = _reason(asked, case, installed)
        if reason is not None:
            raise _refused(asked, reason, case, installed)
        return KernelChoice(asked.value, f"asked for by {KEY}", installed.versions.get(asked.value), case.deterministic)
    if case.dtype not in HALF_DTYPES:
        return KernelChoice(MASKED, f"{case.dtype}: plain torch by chunks of queries, for flash kernels are of half precision")
    reasons = {kernel: _reason(kernel, case, installed) for kernel in FACTS}
    best = next((kernel for kernel, reason in reasons.items() if reason is None), None)
    if best is None:
        raise _refused(asked, next(reason for reason in reversed(reasons.values()) if reason is not None), case, installed)
    passed = [f"{kernel.value}: {reason}" for kernel, reason in reasons.items() if reason is not None and _rank(kernel) < _rank(best)]
    why = "the fastest that is here and can do this" + (f" ({'; '.join(passed)})" if passed else "")
    return KernelChoice(best.value, why, installed.versions.get(best.value), case.deterministic)


def _on_cpu(asked: AttentionKernel) -> KernelChoice:
    if asked is not AttentionKernel.AUTO:
        expected = "auto: the CPU has one kernel"
        raise ConfigError(KEY, found=f"{asked.value} with cluster.device=cpu", expected=expected, hint=f"{KEY}=auto")
    return KernelChoice(CPU, "torch's flash operator of the CPU")


def _rank(kernel: AttentionKernel) -> int:
    return list(FACTS).index(kernel)


def _reason(kernel: AttentionKernel, case: AttentionCase, installed: Installed) -> str | None:
    """Why `kernel` cannot run `case`; None: it can."""
    facts, version = FACTS[kernel], installed.versions.get(kernel.value)
    if case.dtype not in HALF_DTYPES:
        return f"is of half precision, this is {case.dtype}"
    if case.softcap and not facts.softcap:
        return "has no softcap"
    if case.windows and not facts.windows:
        return "has no windows"
    if case.head_dim % 8 or case.head_dim > facts.most_head_dim:
        return f"has head dims in steps of 8 up to {facts.most_head_dim}, this is {case.head_dim}"
    if case.deterministic and case.head_dim > facts.most_deterministic_head_dim:
        to = f"adds in the same order for head dims up to {facts.most_deterministic_head_dim} alone, this is {case.head_dim}"
        return to if facts.most_deterministic_head_dim else "has no deterministic backward"
    first, last = facts.majors
    if installed.capability is not None and not first <= installed.capability[0] <= last:
        major, minor = installed.capability
        return f"runs on compute capability {first}{f' to {last}' if last > first else ''}, this GPU has {major}.{minor}"
    if facts.hint and version is None:
        return "is not installed"
    if kernel is AttentionKernel.FA2 and version is not None and version[0].isdigit() and _number(version) < (2, 7):
        return f"is {version}, 2.7 or newer is wanted"
    return _too_long(kernel, case, version)


def _too_long(kernel: AttentionKernel, case: AttentionCase, version: str | None) -> str | None:
    """Why the longest document is too long; other kernels cut their calls by heads."""
    if kernel is AttentionKernel.CUDNN and case.rows * case.num_heads * case.head_dim >= INT32:
        return "has not been tried beyond 2^31 numbers"
    if KernelChoice(kernel.value, "", version).counts_in_int32:
        try:
            heads_of_call(case.rows, 1, case.head_dim)
        except ValueError:
            return f"counts in int32, and {case.rows} rows of one head are beyond"
    return None


def _refused(asked: AttentionKernel, reason: str, case: AttentionCase, installed: Installed) -> ConfigError:
    """The error, with the package or the key that helps."""
    others = {kernel: _reason(kernel, case, installed) for kernel in FACTS if kernel is not asked}
    able = next((kernel for kernel, why in others.items() if why is None), None)
    missing = next((FACTS[kernel].hint for kernel, why in others.items() if why == "is not installed"), None)
    name = "every kernel there is" if asked is AttentionKernel.AUTO else FACTS[asked].title
    found = f"{asked.value}: {reason}" if asked is AttentionKernel.AUTO else f"{asked.value}: {name} {reason}"
    if reason == "is not installed":
        hint = FACTS[asked].hint + (f", or {KEY}=auto" if able is not None else "")
    elif asked is not AttentionKernel.AUTO and able is not None:
        hint = f"{KEY}={able.value}, or {KEY}=auto"
    else:
        hint = missing or "train.dtype=float32, in plain torch"
    return ConfigError(KEY, found=found, expected=f"a kernel for {_asked_of(case)}", hint=hint)


def _asked_of(case: AttentionCase) -> str:
    more = ["a softcap"] * case.softcap + ["windows"] * case.windows + ["a deterministic backward"] * case.deterministic
    return f"{case.dtype}, head dim {case.head_dim}" + (f", with {' and '.join(more)}" if more else "")


def _number(version: str) -> tuple[int, int]:
    """Major and minor number; parts that are no numbers count 0."""
    parts = [int(part) if part.isdigit() else 0 for part in (*version.split("."), "0")[:2]]
    return parts[0], parts[1]
