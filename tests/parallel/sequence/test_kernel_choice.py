"""The choice of an attention kernel: the fastest that can, what is said of it, and what is refused with which help."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import ConfigError
from efflaunch.parallel.config import AttentionKernel
from efflaunch.parallel.sequence.kernel_choice import FACTS, AttentionCase, Installed, KernelChoice, choose_kernel

AUTO, FA4, FA3, FA2, CUDNN, SDPA = AttentionKernel
PLAIN = AttentionCase(dtype="bfloat16", head_dim=128, num_heads=4, rows=1 << 20)
HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
ALL = {"fa4": "4.0", "fa3": "3.0", "fa2": "2.8.3"}


def chosen(case: AttentionCase = PLAIN, versions: dict[str, str] = ALL, capability: tuple[int, int] | None = HOPPER) -> str:
    return choose_kernel(AUTO, case, Installed(versions, capability)).kernel


def test_auto_takes_the_fastest_that_is_there() -> None:
    kernels = [chosen(versions={name: version for name, version in ALL.items() if name not in missing}) for missing in
               ((), ("fa4",), ("fa4", "fa3"), ("fa4", "fa3", "fa2"))]  # fmt: skip
    assert kernels == ["fa4", "fa3", "fa2", "cudnn"]


def test_auto_minds_what_the_gpu_is() -> None:
    assert [chosen(capability=capability) for capability in (BLACKWELL, HOPPER, AMPERE, None)] == ["fa4", "fa4", "fa2", "fa4"]
    assert [chosen(versions={}, capability=capability) for capability in (HOPPER, AMPERE)] == ["cudnn", "sdpa"]
    assert chosen(versions={"fa3": "3.0"}, capability=BLACKWELL) == "cudnn"


@pytest.mark.parametrize(
    "change, kernel",
    [
        ({"softcap": True}, "fa2"),
        ({"windows": True}, "fa3"),
        ({"head_dim": 256}, "fa3"),
        ({"softcap": True, "windows": True, "head_dim": 256}, "fa2"),
        ({"dtype": "float32"}, "masked"),
        ({"dtype": "float32", "softcap": True, "head_dim": 300}, "masked"),
    ],
)
def test_auto_minds_what_the_model_asks(change: dict[str, object], kernel: str) -> None:
    assert chosen(replace(PLAIN, **change)) == kernel  # type: ignore[arg-type]


def test_what_cannot_be_done_names_the_package() -> None:
    with pytest.raises(ConfigError) as error:
        chosen(replace(PLAIN, softcap=True, windows=True), versions={"fa3": "3.0"})
    assert error.value.hint == "pip install 'efflaunch[flash-attn]'" and "a softcap and windows" in error.value.expected
    with pytest.raises(ConfigError) as error:
        chosen(replace(PLAIN, head_dim=300))
    assert error.value.hint == "train.dtype=float32, in plain torch"
    assert chosen(replace(PLAIN, windows=True), versions={}) == "sdpa", "torch's own has windows"


def test_why_is_said() -> None:
    choice = choose_kernel(AUTO, PLAIN, Installed({"fa2": "2.8.3"}, AMPERE))
    assert str(choice).startswith("fa2 2.8.3, the fastest that is here and can do this (fa4: runs on compute capability 9 to 10, this ")
    assert "fa3: runs on compute capability 9, this GPU" in str(choice) and "cudnn" not in str(choice)
    assert choose_kernel(AUTO, PLAIN, Installed(ALL, HOPPER)).why == "the fastest that is here and can do this"
    masked = choose_kernel(AUTO, replace(PLAIN, dtype="float64"), Installed(ALL, HOPPER))
    assert masked.why.startswith("float64: plain torch by chunks of queries")


@pytest.mark.parametrize("kernel", FACTS)
def test_a_kernel_that_is_asked_for_is_taken(kernel: AttentionKernel) -> None:
    choice = choose_kernel(kernel, PLAIN, Installed(ALL, HOPPER))
    assert (choice.kernel, choice.version) == (kernel.value, ALL.get(kernel.value))


@pytest.mark.parametrize(
    "kernel, case, versions, capability, found, hint",
    [
        (FA4, PLAIN, {}, HOPPER, "fa4: FlashAttention 4 is not installed", "pip install flash-attn-4, or parallel.attention_kernel=auto"),
        (FA2, PLAIN, {"fa2": "2.6.3"}, HOPPER, "fa2: flash-attn is 2.6.3, 2.7 or newer is wanted", "parallel.attention_kernel=cudnn, or parallel.attention_kernel=auto"),  # noqa: E501
        (FA3, PLAIN, ALL, BLACKWELL, "fa3: FlashAttention 3 runs on compute capability 9, this GPU has 10.0", "parallel.attention_kernel=fa4, or parallel.attention_kernel=auto"),  # noqa: E501
        (SDPA, replace(PLAIN, softcap=True), {}, HOPPER, "sdpa: torch's FlashAttention 2 has no softcap", "pip install 'efflaunch[flash-attn]'"),  # noqa: E501
        (SDPA, replace(PLAIN, softcap=True), ALL, HOPPER, "sdpa: torch's FlashAttention 2 has no softcap", "parallel.attention_kernel=fa2, or parallel.attention_kernel=auto"),  # noqa: E501
        (CUDNN, replace(PLAIN, rows=1 << 22), {}, HOPPER, "cudnn: cuDNN has not been tried beyond 2^31 numbers", "parallel.attention_kernel=sdpa, or parallel.attention_kernel=auto"),  # noqa: E501
        (CUDNN, replace(PLAIN, deterministic=True), {}, HOPPER, "cudnn: cuDNN has no deterministic backward", "parallel.attention_kernel=sdpa, or parallel.attention_kernel=auto"),  # noqa: E501
        (FA3, replace(PLAIN, deterministic=True, head_dim=256), ALL, HOPPER, "fa3: FlashAttention 3 adds in the same order for head dims up to 192 alone, this is 256", "parallel.attention_kernel=fa2, or parallel.attention_kernel=auto"),  # noqa: E501
        (FA2, replace(PLAIN, dtype="float32"), ALL, HOPPER, "fa2: flash-attn is of half precision, this is float32", "train.dtype=float32, in plain torch"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_kernel_that_cannot_is_refused(
    kernel: AttentionKernel, case: AttentionCase, versions: dict[str, str], capability: tuple[int, int], found: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as error:
        choose_kernel(kernel, case, Installed(versions, capability))
    assert (error.value.where, error.value.found, error.value.hint) == ("parallel.attention_kernel", found, hint)


def test_auto_takes_what_adds_in_order() -> None:
    """cuDNN is passed over, and heads of 256 go to flash-attn; the choice tells its kernel."""
    ordered = replace(PLAIN, deterministic=True)
    assert [chosen(ordered, versions) for versions in (ALL, {"fa2": "2.8.3"}, {})] == ["fa4", "fa2", "sdpa"]
    assert chosen(replace(ordered, head_dim=256)) == "fa2"
    choices = [choose_kernel(kernel, case, Installed(ALL, HOPPER)) for kernel in (AUTO, FA2) for case in (PLAIN, ordered)]
    assert [(choice.deterministic, choice.repeats) for choice in choices] == [(False, False), (True, True)] * 2
    assert choose_kernel(AUTO, replace(PLAIN, dtype="float32"), Installed(ALL, HOPPER)).repeats
    assert choose_kernel(AUTO, PLAIN, None).repeats


def test_int32() -> None:
    assert [KernelChoice(kernel, "", version).counts_in_int32 for kernel, version in
            (("fa2", "2.7.4.post1"), ("fa2", "2.8.0"), ("fa2", "?"), ("sdpa", None), ("cudnn", None), ("fa3", "3.0"), ("fa4", "4.0"))] == [
        True, False, True, True, True, False, False]  # fmt: skip
    long = replace(PLAIN, rows=17 << 20)
    with pytest.raises(ConfigError, match="counts in int32"):
        choose_kernel(SDPA, long, Installed({}, HOPPER))
    assert chosen(long, versions={"fa2": "2.8.3"}) == "fa2" and chosen(long, versions={"fa2": "2.7.4", "fa3": "3"}) == "fa3"


def test_the_cpu_has_one_kernel() -> None:
    assert choose_kernel(AUTO, PLAIN, None).kernel == "cpu"
    with pytest.raises(ConfigError, match="cluster.device=cpu"):
        choose_kernel(FA2, PLAIN, None)
