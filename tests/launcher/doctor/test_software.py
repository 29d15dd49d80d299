"""Packages against requirements, extras by what they give, variables that change what is computed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from efflaunch.launcher.doctor.finding import State
from efflaunch.launcher.doctor.software import GIVES, environment, software, torch_findings
from efflaunch.launcher.doctor.torch_probe import TorchFacts

ROOT = Path(__file__).resolve().parents[3]
REQUIRES = [
    "torch>=2.11",
    "numpy>=2",
    "tomli; python_version < '3'",
    'ray[default]>=2.50; extra == "ray"',
    'numba>=0.61; extra == "planner"',
    'efflaunch[plot]; extra == "planner"',
    'pytest; extra == "test"',
]
TORCH = TorchFacts(version="2.13.0", cuda="13.0", nccl="2.27.3", backends=["gloo", "nccl"], transformers="5.23.0", gpus=[])


def test_every_extra_for_users_says_what_it_gives() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(GIVES) == set(extras) - {"test", "bench"}


def test_what_is_there() -> None:
    found = software(REQUIRES, {"torch": "2.13.0+cpu", "numpy": "2.4.6", "ray": "2.60.0", "numba": "0.68.1"}.get)
    assert [(each.name, each.state) for each in found] == [
        ("Python", State.OK),
        ("packages", State.OK),
        ("extra ray", State.OK),
        ("extra planner", State.OK),
    ]
    assert found[1].found == "numpy 2.4.6", "torch is looked at by itself, tomli is not for this Python"
    assert found[3].found == "numba 0.68.1"


def test_what_is_missing_or_too_old() -> None:
    found = {each.name: each for each in software(REQUIRES, {"torch": "2.9.0", "ray": "2.10"}.get)}
    assert found["numpy"].state is State.BROKEN and found["numpy"].hint == "pip install 'numpy>=2'"
    assert found["torch"].state is State.BROKEN and found["torch"].found == "torch 2.9.0 is not >=2.11"
    assert found["extra ray"].state is State.NOTE and found["extra ray"].found == "ray 2.10 is not >=2.50"
    assert found["extra planner"].hint == "pip install 'efflaunch[planner]', for the same plans about ten times as fast"


@pytest.mark.parametrize(
    ("torch", "state", "words"),
    [
        (TORCH, State.OK, "2.13.0, built with CUDA 13.0, NCCL 2.27.3; transformers 5.23.0; back ends gloo, nccl"),
        (TorchFacts(version="2.13.0+cpu", cuda=None, nccl=None, backends=["gloo"], transformers="5", gpus=[]), State.OK, "without CUDA"),
        (TorchFacts(version="2.13.0", cuda="13.0", nccl=None, backends=["gloo"], transformers="5", gpus=[]), State.WARNING, "NCCL missing"),
        ("ImportError: libcudnn.so.9: cannot open shared object file", State.BROKEN, "libcudnn.so.9"),
    ],
)
def test_torch(torch: TorchFacts | str, state: State, words: str) -> None:
    (finding,) = torch_findings(torch)
    assert finding.state is state and words in finding.found


def test_variables() -> None:
    found = environment({"CUDA_LAUNCH_BLOCKING": "1", "NCCL_IB_DISABLE": "0", "NCCL_DEBUG": "INFO", "HOME": "/root"})
    assert [(each.name, each.state) for each in found] == [("CUDA_LAUNCH_BLOCKING", State.WARNING), ("environment", State.NOTE)]
    assert found[0].hint == "unset CUDA_LAUNCH_BLOCKING" and found[1].found == "NCCL_DEBUG=INFO, NCCL_IB_DISABLE=0"
    assert environment({"HOME": "/root"}) == []
