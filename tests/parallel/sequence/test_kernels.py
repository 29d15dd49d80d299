"""What is put in place for each choice, with stubs for what only CUDA has."""

from __future__ import annotations

import pytest
import torch

from efflaunch.errors import ConfigError
from efflaunch.parallel.config import AttentionKernel
from efflaunch.parallel.sequence import kernels
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sequence.flash import CudnnKernel, FlashAttnKernel, FlashKernel, TorchFlashKernel
from efflaunch.parallel.sequence.kernel_choice import AttentionCase, Installed, KernelChoice

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of torch's registry."""
    asked: list[str] = []
    monkeypatch.setattr(kernels.torch_attention, "activate_flash_attention_impl", asked.append)
    return asked


@pytest.mark.parametrize(
    "name, version, kind, int32, impl",
    [
        ("fa4", "4.0", TorchFlashKernel, False, ["FA4"]),
        ("fa3", "3.0", TorchFlashKernel, False, ["FA3"]),
        ("fa2", "2.8.3", FlashAttnKernel, False, []),
        ("fa2", "2.7.4", FlashAttnKernel, True, []),
        ("cudnn", None, CudnnKernel, True, []),
        ("sdpa", None, TorchFlashKernel, True, []),
        ("masked", None, TorchFlashKernel, False, []),
    ],
)
def test_a_choice_is_put_in_place(
    name: str, version: str | None, kind: type[FlashKernel], int32: bool, impl: list[str], activated: list[str]
) -> None:
    kernel = kernels.block_kernel(CUDA, KernelChoice(name, "", version))
    assert type(kernel) is kind and isinstance(kernel, FlashKernel)
    assert (kernel.int32, activated) == (int32, impl)


def test_flash_attn_adds_in_order_where_the_choice_says_so() -> None:
    kernel = kernels.block_kernel(CUDA, KernelChoice("fa2", "", "2.8.3", deterministic=True))
    assert isinstance(kernel, FlashAttnKernel) and kernel._deterministic


def test_without_a_choice_it_is_what_auto_takes(activated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "installed_versions", lambda: {"fa3": "3.0", "fa2": "2.8.3"})
    assert kernels.installed_on(CUDA) == Installed({"fa3": "3.0", "fa2": "2.8.3"}, (9, 0))
    assert type(kernels.block_kernel(CUDA)) is TorchFlashKernel and activated == ["FA3"]


class Registry:
    """torch's, in which FlashAttention 4 cannot be put in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active: str | None = None
        monkeypatch.setattr(kernels.torch_attention, "activate_flash_attention_impl", self.activate)
        monkeypatch.setattr(kernels.torch_attention, "current_flash_attention_impl", lambda: self.active)
        monkeypatch.setattr(kernels.torch_attention, "restore_flash_attention_impl", lambda: setattr(self, "active", None))

    def activate(self, name: str) -> None:
        if name == "FA4":
            raise ImportError("no cutlass")
        self.active = name


def test_auto_goes_on_where_a_package_cannot_be_put_in_place(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    registry, case = Registry(monkeypatch), AttentionCase("bfloat16", 128, 8, 1 << 17)
    monkeypatch.setattr(kernels, "installed_on", lambda device: Installed({"fa4": "4.0", "fa3": "3.0"}, (9, 0)))
    kernel, choice = kernels.kernel_for(AttentionKernel.AUTO, case, CUDA)
    assert (type(kernel), choice.kernel, registry.active) == (TorchFlashKernel, "fa3", "FA3")
    assert "fa4 is passed over: fa4 4.0, which torch cannot use: no cutlass" in caplog.text
    with pytest.raises(ConfigError, match="no cutlass") as refused:
        kernels.kernel_for(AttentionKernel.FA4, case, CUDA)
    assert refused.value.hint.startswith("parallel.attention_kernel=fa2")


@pytest.mark.parametrize("name, active", [("sdpa", None), ("cudnn", None), ("fa3", "FA3")])
def test_torchs_own_kernel_is_put_back(name: str, active: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch)
    registry.active = "FA3"
    kernels.block_kernel(CUDA, KernelChoice(name, ""))
    assert registry.active == active


def test_the_cpu(activated: list[str]) -> None:
    assert kernels.installed_on(CPU) is None and isinstance(kernels.block_kernel(CPU), CpuKernel)
    assert activated == []


def test_the_registry_has_the_names() -> None:
    assert set(kernels._REGISTRY.values()) <= set(torch.nn.attention.list_flash_attention_impls())
