"""What real models on real layouts ask of their attention kernel."""

from __future__ import annotations

import json

import pytest

from efflaunch.errors import ConfigError
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.launcher.commands.plan import main
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.hardware import Gpu, Machine
from efflaunch.launcher.machine_checks import check_machine, kernel_here

GEMMA = [
    *("model=tiny", "model.family=gemma2", "model.max_positions=1M", "model.sliding_window=4K"),
    "model.extra={attn_logit_softcapping:50.0}",
]


def kernel_of(*overrides: str) -> str:
    return kernel_here(compose(["+experiment=llama8b_1M", *overrides], None)).kernel


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Kernels that are installed."""
    installed: dict[str, str] = {}
    monkeypatch.setattr("efflaunch.launcher.machine_checks.installed_versions", lambda: installed)
    return installed


def test_a_plain_model_takes_what_there_is(versions: dict[str, str]) -> None:
    assert kernel_of() == "cudnn" and kernel_of("parallel.attention_kernel=sdpa") == "sdpa"
    versions["fa3"] = "3.0"
    assert kernel_of() == "fa3" and kernel_of("train.dtype=float32") == "masked"


def test_a_kernel_that_is_missing_is_refused(versions: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="pip install flash-attn-4"):
        kernel_of("parallel.attention_kernel=fa4")


def test_windows_are_those_shorter_than_the_documents(versions: dict[str, str]) -> None:
    mistral = ["model=mistral_7b", "data.max_seq_len=32K", "data.global_batch_tokens=256K"]
    assert kernel_of(*mistral, "model.sliding_window=4K") == "sdpa"
    assert kernel_of(*mistral, "model.sliding_window=64K") == "cudnn"


def test_a_softcap_without_flash_attn_is_refused_before_a_start(versions: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(["+experiment=llama8b_1M", *GEMMA], None)
    eight = Machine((Gpu("H100", config.cluster.device_memory_bytes),) * 8, 64, 1 << 40)
    versions["fa3"] = "3.0"
    with pytest.raises(ConfigError, match=r"pip install 'efflaunch\[flash-attn\]'"):
        check_machine(config, eight)
    assert main(["+experiment=llama8b_1M", *GEMMA, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["attention_kernel"]["name"] is None and "flash-attn" in planned["attention_kernel"]["why"]
    assert any(note.startswith("attention kernel, by what is installed here: none") for note in planned["notes"])
    versions["fa2"] = "2.8.3"
    check_machine(config, eight)
    assert kernel_here(config).kernel == "fa2"


MISTRAL = ("model=mistral_7b", "data.max_seq_len=32K", "data.global_batch_tokens=256K")


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ((), "cudnn"),
        (("parallel.attention_kernel=fa3",), "fa3"),
        ((*MISTRAL, "model.sliding_window=4K"), "sdpa"),
        ((*MISTRAL, "model.sliding_window=64K"), "cudnn"),
        (GEMMA, "fa2"),
        (("train.dtype=float32",), "sdpa"),
        (("cluster.gpu=a100",), "sdpa"),
        (("cluster.gpu=null", "cluster.attention_efficiency=0.4"), "sdpa"),
        (("cluster.gpu=b200", *MISTRAL, "model.sliding_window=4K"), "sdpa"),
    ],
)
def test_estimates_are_made_for_the_kernel_of_the_case(words: tuple[str, ...], kernel: str) -> None:
    """cuDNN has neither windows nor softcaps; where nothing is published of the kernel its nearest stands in, and says so."""
    inputs = PlanInputs.of(compose(["+experiment=llama8b_1M", *words], None))
    assert inputs.attention_kernel.value == kernel
    assert ("nothing is published of sdpa on b200" in inputs.attention_rate.source) == ("cluster.gpu=b200" in words)


def test_a_plan_names_one_kernel(versions: dict[str, str]) -> None:
    """What the packages here would give, of which there are none, is what the estimate is for, on other GPUs too."""
    for words in ((), (*MISTRAL, "model.sliding_window=4K"), ("cluster.gpu=a100",)):
        config = compose(["+experiment=llama8b_1M", *words], None)
        assert kernel_here(config).kernel == PlanInputs.of(config).attention_kernel.value
