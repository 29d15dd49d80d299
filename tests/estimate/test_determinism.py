"""What a plan says of sums whose order changes, and of the price of one order."""

from __future__ import annotations

import json

import pytest

from efflaunch.errors import ConfigError
from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.determinism import price_of_order, said_of_order, unordered_sums
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.launcher.commands.plan import main
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.sequence.kernel_choice import KernelChoice

ONE_MILLION = "+experiment=llama8b_1M"


def inputs(*words: str) -> PlanInputs:
    return PlanInputs.of(compose([ONE_MILLION, "memory=recompute", *words]))


def test_what_changes_from_run_to_run() -> None:
    free = inputs()
    assert [line.partition(":")[0] for line in unordered_sums(free, KernelChoice("fa3", ""))] == [
        "attention's backward (fa3)", "sums over ranks that NCCL makes in the node's switches (NVLS)",
        "matrix products while copies run beside them, which cuBLAS promises for one stream alone",
    ]  # fmt: skip
    assert unordered_sums(free, KernelChoice("fa3", ""))[0].endswith("of queries, and of shared keys and values")
    assert unordered_sums(free, KernelChoice("fa2", ""))[0].endswith("gradients of queries")
    assert len(unordered_sums(free, KernelChoice("masked", ""))) == 2, "plain torch adds in order"
    assert len(unordered_sums(inputs("memory.compile=true"), KernelChoice("fa2", ""))) == 4
    old = inputs("cluster.gpu=a100", "parallel.attention_kernel=fa2")
    assert not any("NVLS" in line for line in unordered_sums(old, KernelChoice("fa2", ""))), "an A100's switches do not add"
    assert unordered_sums(PlanInputs.of(compose(["+experiment=quickstart"])), KernelChoice("cpu", "")) == ()


def test_what_one_order_costs() -> None:
    assert price_of_order(inputs()) is None and price_of_order(inputs("train.deterministic=true", "train.dtype=float32")) is None
    fa3 = price_of_order(inputs("train.deterministic=true", "parallel.attention_kernel=fa3"))
    assert fa3 == "fa3's backward at 62% of its speed (348 TFLOP/s)"
    ordered = inputs("train.deterministic=true", "parallel.attention_kernel=fa2")
    price = said_of_order(ordered, KernelChoice("fa2", "", "2.8.3", True))
    parts = -(-132 // (32 // ordered.layout.ulysses))
    assert price is not None and f"fa2's backward at 52% of its speed (167 TFLOP/s); queries' gradient in {parts} parts for 132" in price


def test_a_plan_has_the_time_and_the_memory_in() -> None:
    """Without cuDNN's operator, which is what torch alone takes otherwise, and with 132 parts shared by a rank's heads."""
    words = [ONE_MILLION, "memory=recompute", "parallel.attention_kernel=fa3"]
    free, ordered = (build_ledger(PlanInputs.of(compose([*words, f"train.deterministic={asked}"]))) for asked in ("false", "true"))
    slower = ordered.timing.compute_s / free.timing.compute_s
    assert 1.1 < slower < 1 / 0.62 and ordered.device.peak_bytes == free.device.peak_bytes
    assert any("backward x 0.62 in order" in line for line in ordered.timing.assumptions)
    assert inputs().attention_kernel.value == "cudnn" and inputs("train.deterministic=true").attention_kernel.value == "sdpa"


@pytest.mark.parametrize(
    ("asked", "begins"), [("false", "not the same bits every time: attention's backward (cudnn)"), ("true", "train.deterministic: sdpa")]
)
def test_plan_says_it(asked: str, begins: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("efflaunch.launcher.machine_checks.installed_versions", dict)
    assert main([ONE_MILLION, "memory=recompute", f"train.deterministic={asked}", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert len([note for note in notes if note.startswith(begins)]) == 1


def test_a_kernel_that_is_not_here_has_its_price_in_the_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("efflaunch.launcher.machine_checks.installed_versions", dict)
    words = [ONE_MILLION, "memory=recompute", "train.deterministic=true", "parallel.attention_kernel=fa3", "--json"]
    assert main(words) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [note for note in notes if note.startswith("train.deterministic: fa3's backward at 62% of its speed")]


def test_cudnn_and_one_order_are_refused_on_whatever_machine() -> None:
    with pytest.raises(ConfigError) as refused:
        compose([ONE_MILLION, "parallel.attention_kernel=cudnn", "train.deterministic=true"])
    assert (refused.value.where, refused.value.expected) == ("train.deterministic", "one of fa4, fa3, fa2, sdpa")
    assert "parallel.attention_kernel=auto" in refused.value.hint
