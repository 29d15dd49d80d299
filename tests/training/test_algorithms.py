"""Optimizers by name: what is refused, in whose words, and what a whole command line makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.doctor.software import installed_version
from efflaunch.training.optimizers.algorithms import LIBRARY, REFUSED, algorithms, check_packages, check_same_algorithm, num_betas
from efflaunch.training.optimizers.check import describe
from efflaunch.training.optimizers.config import OptimConfig

QUICK = ["+experiment=quickstart"]
BETAS = {2: [], 3: ["optim.betas=[0.98,0.92,0.99]"]}


@pytest.mark.parametrize("algorithm", algorithms())
def test_every_optimizer_is_a_command_line(algorithm: str) -> None:
    group = algorithm if algorithm in ("adamw", "muon") else "library"
    named = [] if group == algorithm else [f"optim.algorithm={algorithm}"]
    config = compose([*QUICK, f"optim={group}", *named, *BETAS[num_betas(algorithm)]])
    assert config.optim.algorithm == algorithm
    words = {"adamw": "AdamW, ", "muon": "Muon for matrices of decoder layers, AdamW for the rest, "}
    assert describe(config.optim).startswith(words.get(algorithm) or f"{LIBRARY[algorithm].name} of ")


@pytest.mark.parametrize(
    ("typed", "where", "message"),
    [
        (["optim=library"], "optim.algorithm", "no value"),
        (["optim=library", "optim.algorithm=lyon"], "optim.algorithm", "`lyon`; expected one of adamw, muon, lion"),
        (["optim=library", "optim.algorithm=soap"], "optim.algorithm", "turns whole matrices.*optim=muon"),
        (["optim=library", "optim.algorithm=adan"], "optim.betas", "three numbers"),
        (["optim.betas=[0.9,0.95,0.99]"], "optim.betas", "two numbers"),
        (["optim=muon", "optim.state_device=host"], "optim.state_device", "host with optim.algorithm=muon.*minutes"),
        (["optim=muon", "optim.update=backward", "optim.grad_clip=null"], "optim.update", "exchanged in the middle of backward"),
        (["optim=muon", "optim.state_dtype=8bit"], "optim.state_dtype", "optim.state_dtype=float32"),
        (["optim=library", "optim.algorithm=lion", "optim.state_device=host"], "optim.state_device", "counts its steps"),
        (["optim=muon", "adapter=lora"], "optim.algorithm", "thin factors.*adapter=none"),
        (["optim=muon", "optim.muon_steps=0"], "optim.muon_steps", "1 to 99"),
        (["optim=muon", "optim.muon_momentum=1"], "optim.muon_momentum", "0 to below 1"),
        (["optim=muon", "optim.muon_scale=rms"], "optim.muon_scale", "match_rms_adamw"),
        (["optim=muon", "optim.muon_lr_ratio=0"], "optim.muon_lr_ratio", "more than 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(typed: list[str], where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        compose([*QUICK, *typed])
    assert error.value.where == where


@pytest.mark.parametrize(
    ("typed", "package", "version"),
    [
        (["optim=library", "optim.algorithm=lion"], "pytorch-optimizer", "3.9.0"),
        (["optim=library", "optim.algorithm=lion"], "pytorch-optimizer", None),
        (["optim.state_dtype=8bit"], "torchao", None),
    ],
)
def test_a_package_that_is_not_here_is_named_before_anything_starts(typed: list[str], package: str, version: str | None) -> None:
    optim, asked = compose([*QUICK, *typed]).optim, []

    def version_of(name: str) -> str | None:
        asked.append(name)
        return version

    with pytest.raises(ConfigError, match=r"(?s)pip install 'efflaunch\[(optimizers|lowbit)\]', or optim=adamw"):
        check_packages(optim, version_of)
    assert asked == [package]
    check_packages(optim, installed_version)
    check_packages(compose([*QUICK, "optim=library", "optim.algorithm=nadam"]).optim, lambda name: None)


def test_usual_betas_are_the_algorithms_own() -> None:
    for algorithm, known in LIBRARY.items():
        compose([*QUICK, "optim=library", f"optim.algorithm={algorithm}", f"optim.betas={known.betas}"])
    with pytest.raises(ConfigError) as error:
        compose([*QUICK, "optim=library", "optim.algorithm=ademamix"])
    assert error.value.hint == "optim.betas=[0.9,0.999,0.9999]"


def test_states_of_another_optimizer_are_refused() -> None:
    muon = OptimConfig(name="test", lr=1.0, algorithm="muon")
    check_same_algorithm({"config": {"optim": {"algorithm": "muon"}}}, muon, 7)
    check_same_algorithm({}, replace(muon, algorithm="adamw"), 7)
    with pytest.raises(ConfigError, match=r"(?s)muon, and states of adamw in the checkpoint of step 7.*optim\.algorithm=adamw"):
        check_same_algorithm({"config": {"optim": {"lr": 1.0}}}, muon, 7)


def test_whatever_is_refused_by_name_has_a_reason() -> None:
    for algorithm, reason in REFUSED.items():
        with pytest.raises(ConfigError) as error:
            compose([*QUICK, "optim=library", f"optim.algorithm={algorithm}"])
        assert reason in str(error.value)
