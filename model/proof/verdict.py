"""Decides what a comparison means for a run: which families are compared before they train, what a difference is called, and what is kept.

A proof is kept under a digest of all it depends on: the tiny model's fields, the code that computes layers here, the versions of torch and
of transformers. Pure but for reading that code; no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError
from ...utils.text import typed
from ..config import ModelConfig
from ..families import facts_of
from .tiny_config import TinyConfig

PACKAGE = Path(__file__).parents[2]
_COMPUTING = ("model/families", "model/proof", "memory/executor", "parallel/sequence")
"""Folders whose code decides what a layer computes."""
_COMPUTING_FILES = ("model/build.py", "model/stage.py", "model/chunked_loss.py")


class Compared(Protocol):
    """What a verdict needs of a comparison (compare.Agreement)."""

    @property
    def is_exact(self) -> bool: ...
    @property
    def loss_by_policy(self) -> Mapping[str, float]: ...
    @property
    def worst_parameter(self) -> tuple[str, Mapping[str, float]]:
        """Name and differences by policy of the parameter that differs most."""
        ...


def is_proven_by_tests(tiny: TinyConfig) -> bool:
    """Whether the tests compare this family on ranks, so that no run has to by itself."""
    return facts_of(tiny.spec.family).has_parity_rows


def proof_digest(tiny: TinyConfig) -> str:
    """The name of a proof: it changes with everything that the comparison depends on."""
    digest = hashlib.sha256(json.dumps(dict(tiny.fields), sort_keys=True, default=str).encode())
    for name in ("torch", "transformers"):
        digest.update(f"{name} {version(name)};".encode())
    files = [path for folder in _COMPUTING for path in (PACKAGE / folder).glob("*.py")]
    for path in sorted([*files, *(PACKAGE / name for name in _COMPUTING_FILES)]):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def proof_text(name: str, tiny: TinyConfig, agreement: Compared) -> str:
    """What a file of a proof holds."""
    worst, by_policy = agreement.worst_parameter
    facts: dict[str, Any] = {
        "model": name,
        "family": tiny.spec.family.value,
        "layers": list(tiny.layers),
        "worst": {worst: dict(by_policy)},
        "loss_difference": dict(agreement.loss_by_policy),
        "digest": proof_digest(tiny),
    }
    return json.dumps(facts, indent=1) + "\n"


def is_proof(file: Path, digest: str) -> bool:
    """Whether a file holds the proof of this digest; False for none, and for one that is of something else or damaged."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and facts.get("digest") == digest


def difference(config: ModelConfig, tiny: TinyConfig, agreement: Compared, tolerance: float) -> ConfigError:
    """The error for a model that is not trained as Hugging Face computes it."""
    worst, by_policy = agreement.worst_parameter
    what = f"the gradient of {worst}"
    if max(by_policy.values()) <= tolerance:
        by_policy, what = agreement.loss_by_policy, "the loss"
    policy = max(by_policy, key=lambda name: by_policy[name])
    family = tiny.spec.family
    code = "structural" if facts_of(family).structural else family.value
    return ConfigError(
        f"model {config.name}",
        found=f"{what} {by_policy[policy]:.1e} from plain Hugging Face's, relative to its largest entry, with {policy}",
        expected=f"at most {tolerance:.0e}: trained like this it would be another model",
        hint=f"{typed('check-model', config.path or config.name, '--all')}; what computes its layers is model/families/{code}.py",
    )
