"""Compares installed packages with what efflaunch asks for, extra by extra. Pure but for the list of what is installed."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata

from packaging.requirements import Requirement

from .finding import Finding, State
from .torch_probe import TorchFacts

TOPIC = "software"
GIVES = {
    "deepspeed": "engine=deepspeed",
    "ray": "launcher=ray",
    "flash-attn": "faster attention on GPUs, windows and softcaps",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
    "plot": "pictures of efflaunch report and explain",
    "lowbit": "optim.state_dtype=bfloat16 and 8bit",
    "optimizers": "optim=library",
    "planner": "the same plans about ten times as fast",
    "watch": "native stacks of ranks that hang",
}
"""What each extra of this package is for; those for its own tests and benchmarks are left out."""
Installed = Callable[[str], str | None]
"""The installed version of a package; None where it is not installed."""


def installed_version(name: str) -> str | None:
    """Return the version of a package as pip knows it; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def software(requires: Iterable[str], installed: Installed = installed_version) -> list[Finding]:
    """Judge Python and every required package, then each extra. `requires`: lines as `importlib.metadata.requires` gives them."""
    parsed = [Requirement(line) for line in requires]
    core = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    by_extra = {extra: [each for each in parsed if each not in core and _is_of(each, extra)] for extra in GIVES}
    python = Finding(topic=TOPIC, name="Python", state=State.OK, found=f"{platform.python_version()} at {sys.executable}")
    needed = [_required(each, installed) for each in core]
    return [python, *_together(needed), *(_extra(extra, found, installed) for extra, found in by_extra.items() if found)]


def _is_of(requirement: Requirement, extra: str) -> bool:
    return requirement.name != "efflaunch" and requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def fault(requirement: Requirement, installed: Installed) -> str | None:
    """Return why an installed package does not do, as `torch is not installed`; None where it does."""
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {requirement.specifier}"
    return None


def _required(requirement: Requirement, installed: Installed) -> Finding:
    wrong = fault(requirement, installed)
    words = f"{requirement.name}{requirement.specifier}"
    return Finding(
        topic=TOPIC,
        name=requirement.name,
        state=State.BROKEN if wrong else State.OK,
        found=wrong or str(installed(requirement.name)),
        hint=f"pip install '{words}'" if wrong else "",
    )


def _together(required: Sequence[Finding]) -> list[Finding]:
    """Each package that does not do, and one line for all that do but torch, which is looked at by itself."""
    good = [each for each in required if each.state is State.OK and each.name != "torch"]
    bad = [each for each in required if each.state is not State.OK]
    return [*bad, Finding(topic=TOPIC, name="packages", state=State.OK, found=", ".join(f"{each.name} {each.found}" for each in good))]


def _extra(extra: str, requirements: Sequence[Requirement], installed: Installed) -> Finding:
    faults = [wrong for each in requirements if (wrong := fault(each, installed))]
    versions = ", ".join(f"{each.name} {installed(each.name)}" for each in requirements)
    return Finding(
        topic=TOPIC,
        name=f"extra {extra}",
        state=State.NOTE if faults else State.OK,
        found=", ".join(faults) if faults else versions,
        hint=f"pip install 'efflaunch[{extra}]', for {GIVES[extra]}" if faults else "",
    )


def torch_findings(torch: TorchFacts | str) -> list[Finding]:
    """Judge what torch says of itself (a text: why it says nothing)."""
    if isinstance(torch, str):
        hint = "reinstall it in a fresh environment: pip install torch"
        return [Finding(topic=TOPIC, name="torch", state=State.BROKEN, found=torch, hint=hint)]
    built = f"built with CUDA {torch.cuda}, NCCL {torch.nccl or 'missing'}" if torch.cuda else "a build without CUDA"
    state = State.WARNING if torch.cuda and not torch.nccl else State.OK
    words = f"{torch.version}, {built}; transformers {torch.transformers}; back ends {', '.join(torch.backends)}"
    return [Finding(topic=TOPIC, name="torch", state=state, found=words)]


def environment(variables: Mapping[str, str]) -> list[Finding]:
    """Warn of environment variables that change what is computed or how fast."""
    found = []
    for name, (bad, why) in _VARIABLES.items():
        if variables.get(name, "").strip().lower() in bad:
            found.append(Finding(topic=TOPIC, name=name, state=State.WARNING, found=f"{variables[name]}: {why}", hint=f"unset {name}"))
    shown = [f"{name}={value}" for name, value in sorted(variables.items()) if name.startswith(_SHOWN)]
    if shown:
        found.append(Finding(topic=TOPIC, name="environment", state=State.NOTE, found=", ".join(shown)))
    return found


_YES = ("1", "true", "yes", "on")
_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": (_YES, "every kernel is waited for"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (_YES, "matrix products of float32 keep ten bits"),
    "NCCL_P2P_DISABLE": (_YES, "GPUs of a node exchange through host memory"),
    "NCCL_IB_DISABLE": (_YES, "nodes exchange over TCP"),
    "TORCHDYNAMO_DISABLE": (_YES, "memory.compile does nothing"),
    "PYTHONDONTWRITEBYTECODE": (_YES, "every start compiles Python's files again"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (_YES, "every allocation asks the driver"),
}
_SHOWN = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_", "NCCL_", "TORCH_NCCL_", "PYTORCH_CUDA_ALLOC", "PYTORCH_ALLOC", "OMP_NUM_THREADS", "GLOO_")
