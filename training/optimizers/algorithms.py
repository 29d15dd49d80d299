"""Which optimizers there are, what each stores and needs, and which are refused on sharded weights and why. Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from packaging.specifiers import SpecifierSet

from ...errors import ConfigError
from ...model.adapters.config import AdapterConfig
from .config import ADAMW, MUON, OptimConfig, StateDevice, StateDtype, Update

EXTRA = "pip install 'efflaunch[optimizers]'"


@dataclass(frozen=True, slots=True)
class LibraryAlgorithm:
    """An optimizer of a library that works element by element: exact on any part of a weight."""

    module: str
    name: str
    """Its class."""
    num_betas: int = 2
    has_eps: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What it is built with besides lr, betas, eps and weight decay, which is decoupled from the gradient in each."""
    betas: str = "[0.9,0.95]"
    """Usual ones, as typed."""

    @property
    def package(self) -> str | None:
        """The package to install, as pip calls it; None: it comes with torch."""
        return None if self.module.startswith("torch") else self.module.replace("_", "-")


ONE_BY_ONE: Mapping[str, Any] = MappingProxyType({"foreach": False})
"""No lists of whole groups: their temporaries would be as large as all weights together."""
LIBRARY: Mapping[str, LibraryAlgorithm] = MappingProxyType(
    {
        "lion": LibraryAlgorithm("pytorch_optimizer", "Lion", has_eps=False, arguments=ONE_BY_ONE),
        "adan": LibraryAlgorithm("pytorch_optimizer", "Adan", num_betas=3, arguments=ONE_BY_ONE, betas="[0.98,0.92,0.99]"),
        "ademamix": LibraryAlgorithm(
            "pytorch_optimizer", "AdEMAMix", num_betas=3, arguments={"weight_decouple": True, **ONE_BY_ONE}, betas="[0.9,0.999,0.9999]"
        ),
        "nadam": LibraryAlgorithm("torch.optim", "NAdam", arguments={"decoupled_weight_decay": True, **ONE_BY_ONE}),
        "radam": LibraryAlgorithm("torch.optim", "RAdam", arguments={"decoupled_weight_decay": True, **ONE_BY_ONE}),
    }
)
"""Lion (arXiv 2302.06675), Adan (2208.06677), AdEMAMix (2409.03137), NAdam and RAdam (1908.03265)."""
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "lamb": "scales each update by the norms of the whole weight and of its whole update",
        "adafactor": "keeps means over whole rows and columns, and divides by the root mean square of the whole update",
        "came": "keeps means over whole rows and columns",
        "soap": "turns whole matrices into the eigenvectors of their own products",
        "shampoo": "multiplies whole matrices with roots of their own products",
        "galore": "projects whole matrices onto their own singular vectors, and keeps states in that basis",
        "schedulefreeadamw": "evaluates and saves other weights than it trains",
    }
)
"""What cannot run on parts of weights; pytorch-optimizer's own fail on sharded tensors, or would be silently another optimizer on each."""


def algorithms() -> tuple[str, ...]:
    """Values of optim.algorithm."""
    return (ADAMW, MUON, *LIBRARY)


def num_betas(algorithm: str) -> int:
    """Numbers in optim.betas: two, as AdamW has them, unless the algorithm says otherwise."""
    return LIBRARY[algorithm].num_betas if algorithm in LIBRARY else 2


def check_algorithm(optim: OptimConfig, adapter: AdapterConfig) -> None:
    """Raise ConfigError for an optimizer that there is not, and for what AdamW alone can do."""
    algorithm = optim.algorithm
    if algorithm not in algorithms():
        reason = REFUSED.get(algorithm.lower())
        actual = f"{algorithm}, which {reason}: ranks hold parts of each" if reason else f"`{algorithm}`"
        hint = "optim=muon, for an optimizer of whole matrices" if reason else "optim=adamw"
        raise ConfigError("optim.algorithm", found=actual, expected=f"one of {', '.join(algorithms())}", hint=hint)
    if algorithm == ADAMW:
        return
    if algorithm == MUON and adapter.is_trained:
        raise ConfigError(
            "optim.algorithm",
            found="muon with adapter=lora",
            expected="adamw: an adapter is the product of two thin factors, and orthogonal factors make no orthogonal update of it",
            hint="optim=adamw, or adapter=none",
        )
    for key, value, only, reason in _adamws_own(optim):
        raise ConfigError(
            f"optim.{key}", found=f"{value} with optim.algorithm={algorithm}", expected=f"{only}: {reason}", hint=f"optim.{key}={only}"
        )


def check_packages(optim: OptimConfig, version_of: Callable[[str], str | None]) -> None:
    """Raise ConfigError where the package that an optimizer is taken from is not here. `version_of`: of what is installed, None if nothing.

    Of another version the defaults may be others, and with them the update.
    """
    needed: list[tuple[str, str, str, str, str]] = []
    if optim.algorithm in LIBRARY and (package := LIBRARY[optim.algorithm].package) is not None:
        needed.append(("algorithm", optim.algorithm, package, ">=4.1,<5", "optimizers"))
    if optim.state_dtype is not StateDtype.FLOAT32:
        needed.append(("state_dtype", optim.state_dtype.value, "torchao", ">=0.18,<0.19", "lowbit"))
    for key, value, package, wanted, extra in needed:
        version = version_of(package)
        if version is None or not SpecifierSet(wanted).contains(version, prereleases=True):
            raise ConfigError(
                f"optim.{key}",
                found=f"{value} without {package}" if version is None else f"{value} with {package} {version}",
                expected=f"{package}{wanted}, which it is taken from",
                hint=f"pip install 'efflaunch[{extra}]', or optim=adamw",
            )


def check_same_algorithm(metadata: Mapping[str, Any], optim: OptimConfig, step: int) -> None:
    """Raise ConfigError where the checkpoint of `step` (its metadata) holds another optimizer's states: none could go on with them."""
    saved = metadata.get("config", {}).get("optim", {}).get("algorithm", ADAMW)
    if saved != optim.algorithm:
        raise ConfigError(
            "optim.algorithm",
            found=f"{optim.algorithm}, and states of {saved} in the checkpoint of step {step}",
            expected=f"{saved}: no optimizer can go on with another's states",
            hint=f"optim.algorithm={saved}; or a new run from exported weights: efflaunch export, then model.path=...",
        )


def _adamws_own(optim: OptimConfig) -> list[tuple[str, str, str, str]]:
    """(key, value, the one that goes, why), of what is asked for that AdamW alone can do."""
    is_muon = optim.algorithm == MUON
    refused = []
    if optim.state_device is StateDevice.HOST:
        slow = "processors take minutes to orthogonalise what GPUs do in a second, and ranks would exchange matrices beside backward"
        why = slow if is_muon else "the library counts its steps for all weights at once, and the host updates layer by layer"
        refused.append(("state_device", "host", "device", why))
    if optim.update is Update.BACKWARD:
        why = "whole matrices would be exchanged in the middle of backward" if is_muon else "the library counts its steps for all weights"
        refused.append(("update", "backward", "step", why))
    if optim.state_dtype is not StateDtype.FLOAT32:
        refused.append(("state_dtype", optim.state_dtype.value, "float32", "smaller moments are torchao's AdamW"))
    return refused
