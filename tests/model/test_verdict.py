"""What a comparison means: who is compared, what a difference is called, and when a proof still holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from efflaunch.model.config import ModelConfig
from efflaunch.model.families import FACTS
from efflaunch.model.proof.tiny_config import TinyConfig, tiny_config
from efflaunch.model.proof.verdict import difference, is_proof, is_proven_by_tests, proof_digest, proof_text
from efflaunch.tests.model.public_configs import SUPPORTED, write_config
from efflaunch.tests.parity.reference import FAMILIES


@dataclass(frozen=True)
class Found:
    worst_parameter: tuple[str, dict[str, float]]
    loss_by_policy: dict[str, float]
    is_exact: bool = False


def tiny_of(folder: Path, name: str, **changes: Any) -> tuple[ModelConfig, TinyConfig]:
    config = ModelConfig(name="m", path=str(write_config(folder, {**SUPPORTED[name], **changes})))
    return config, tiny_config(config)


def test_families_that_have_rows_are_those_of_the_table() -> None:
    rows = {case["model_type"] for case in FAMILIES.values()}
    assert {facts.model_type for facts in FACTS.values() if facts.has_parity_rows} == rows - {"gpt_oss_dense"}
    assert not all(facts.has_parity_rows for facts in FACTS.values())


def test_who_is_compared_before_training(tmp_path: Path) -> None:
    assert is_proven_by_tests(tiny_of(tmp_path / "a", "Llama-3.2-1B")[1])
    assert not is_proven_by_tests(tiny_of(tmp_path / "b", "stablelm-3b-4e1t")[1])


def test_a_proof_holds_for_the_same_structure_alone(tmp_path: Path) -> None:
    _, tiny = tiny_of(tmp_path / "a", "stablelm-3b-4e1t")
    _, larger = tiny_of(tmp_path / "b", "stablelm-3b-4e1t", num_hidden_layers=40)
    _, biased = tiny_of(tmp_path / "c", "stablelm-3b-4e1t", use_qkv_bias=True)
    assert proof_digest(tiny) == proof_digest(replace(tiny)) == proof_digest(larger) != proof_digest(biased)
    file = tmp_path / "proof.json"
    assert not is_proof(file, proof_digest(tiny))
    file.write_text(proof_text("m", tiny, Found(("w", {"keep": 1e-15}), {"keep": 0.0}, True)))
    assert is_proof(file, proof_digest(tiny)) and not is_proof(file, proof_digest(biased))
    for damaged in ("", "[]", "{"):
        file.write_text(damaged)
        assert not is_proof(file, proof_digest(tiny))


@pytest.mark.parametrize(("gradient", "what"), [(2e-3, "the gradient of w 2.0e-03"), (1e-15, "the loss 3.0e-06")])
def test_a_difference_names_what_differs_and_the_file(tmp_path: Path, gradient: float, what: str) -> None:
    config, tiny = tiny_of(tmp_path, "stablelm-3b-4e1t")
    error = difference(config, tiny, Found(("w", {"keep": 0.0, "streamed": gradient}), {"keep": 1e-16, "recompute": 3e-6}), 1e-10)
    assert error.found.startswith(f"{what} from plain Hugging Face's") and error.hint.endswith("model/families/structural.py")
