"""The ranks' process group is destroyed at an orderly end and never after an error."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.model.spec import model_spec
from efflaunch.parallel.layout import solve_layout
from efflaunch.parallel.sequence import kernels
from efflaunch.parallel.sequence.kernel_choice import Installed
from efflaunch.training import session
from efflaunch.training.evaluation import alone
from efflaunch.training.profiling import probe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of torch.distributed."""
    made: list[str] = []

    def noted(name: str) -> Any:
        return lambda *args, **kwargs: made.append(name)

    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(session.dist, name, noted(name))
    return made


def test_an_orderly_end_destroys_the_group(calls: list[str]) -> None:
    with session.joined_ranks(compose(["+experiment=quickstart"]).cluster, 60.0) as device:
        assert device.type == "cpu" and calls == ["init_process_group"]
    assert calls == ["init_process_group", "destroy_process_group"]


def test_an_error_leaves_it_alone(calls: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), session.joined_ranks(compose(["+experiment=quickstart"]).cluster, 60.0):
        _ = 1 // 0
    assert calls == ["init_process_group"]


SOFTCAP = (
    "model=tiny", "model.family=gemma2", "model.max_positions=1M", "model.sliding_window=4K", "model.extra={attn_logit_softcapping:50.0}",
)  # fmt: skip


def test_steps_are_not_made_without_a_kernel() -> None:
    assert inspect.signature(session.step_setup).parameters["kernel"].default is inspect.Parameter.empty


@pytest.mark.parametrize("build", [lambda config, device: alone._build(config, device, None, print), probe.Prober.of])
def test_evaluations_and_probes_have_the_sessions_kernel(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softcap that nothing on the machine has is refused there, before any communicator or model is made."""
    monkeypatch.setattr(kernels, "installed_on", lambda device: Installed({"fa3": "3.0"}, (9, 0)))
    with pytest.raises(ConfigError, match="has no softcap"):
        build(compose(["+experiment=llama8b_1M", *SOFTCAP]), torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("module", "build"), [(alone, lambda config, device: alone._build(config, device, None, print)), (probe, probe.Prober.of)]
)
def test_evaluations_and_probes_take_the_plans_order_of_experts(module: Any, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built is of no matter: the order is taken at once behind it."""

    class Taken(Exception):
        pass

    def takes(*given: object) -> None:
        raise Taken(*given)

    inputs = SimpleNamespace(policy=None)
    topology = SimpleNamespace(mesh=None, experts=None)
    stand_ins: dict[str, Any] = {
        "rank_kernel": lambda *given: (None, None),
        "make_groups": lambda *given, **named: topology,
        "agreed_ledger": lambda *given: SimpleNamespace(inputs=inputs, on_host=None),
        "check_update_memory": lambda *given: None,
        "host_store": lambda *given: None,
        "stage_place": lambda *given: None,
        "builder_of": lambda config: lambda *given, **named: SimpleNamespace(model="the model"),
        "take_planned_order": takes,
    }
    for name, stand_in in stand_ins.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, stand_in)
    with pytest.raises(Taken) as taken:
        build(compose(["+experiment=quickstart"]), torch.device("cpu"))
    assert taken.value.args == ("the model", inputs, topology)


def test_a_rank_has_the_kernel_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN has neither windows nor heads of 256, and what is asked for is what is taken."""
    monkeypatch.setattr(kernels, "installed_on", lambda device: Installed({}, (9, 0)))
    monkeypatch.setattr(session.dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(session, "whole_world", lambda: SimpleNamespace())
    mistral = ("model=mistral_7b", "data.max_seq_len=32K", "data.global_batch_tokens=256K")
    for words, kind in (((), "CudnnKernel"), (("parallel.attention_kernel=sdpa",), "TorchFlashKernel"), (mistral, "TorchFlashKernel")):
        config = compose(["+experiment=llama8b_1M", *words, *["model.sliding_window=4K"] * (words is mistral)])
        layout = solve_layout(
            config.parallel, config.cluster, model_spec(config.model), max_seq_len=config.data.max_seq_len,
            global_batch_tokens=config.data.global_batch_tokens,
        )  # fmt: skip
        kernel, choice = session.rank_kernel(config, layout, torch.device("cuda", 0))
        assert type(kernel).__name__ == kind and not choice.deterministic
