"""Everything that is looked at, and for each work a user may want, what of it stands in the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...cluster.config import Device
from ...errors import UserError
from ..hardware import all_gpus, this_machine
from .finding import Finding, State, Work
from .host import gpus, host
from .software import GIVES, environment, software, torch_findings
from .storage import storage
from .torch_probe import TorchFacts, ask_torch

DISTRIBUTION = "efflaunch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What was found, and what can be done with it."""

    findings: tuple[Finding, ...]
    works: tuple[Work, ...]

    @property
    def is_fit(self) -> bool:
        """Whether nothing is broken: what is merely missing is no fault of this machine."""
        return all(each.state is not State.BROKEN for each in self.findings)


def examine(directory: Path, *, num_bytes: int, on_progress: Callable[[str], None]) -> Examination:
    """Look at software, machine, schedulers and the storage of `directory` (one file of `num_bytes` bytes is written there)."""
    on_progress("packages")
    found = [*software(requirements()), *environment(os.environ)]
    on_progress("torch and GPUs, in a process of its own")
    torch = ask_torch()
    machine = this_machine(Device.CUDA)
    found += [*torch_findings(torch), *host(machine), *gpus(all_gpus(), torch)]
    on_progress("schedulers")
    found += [_slurm()]
    on_progress(f"storage at {directory}")
    found += storage(directory, num_bytes)
    return Examination(findings=tuple(found), works=works(found, torch))


def requirements() -> list[str]:
    """Return the requirements of the installed package; none where it runs from a folder that pip does not know."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


def _slurm() -> Finding:
    """Whether jobs can be submitted from here, by asking the controller."""
    from ..slurm.control import controller_words, has_slurm

    def finding(state: State, found: str, hint: str = "") -> Finding:
        return Finding(topic="schedulers", name="SLURM", state=state, found=found, hint=hint)

    if not has_slurm():
        return finding(State.NOTE, "no sbatch on PATH", "launcher=slurm needs a login node; --dry-run prints the script anywhere")
    try:
        return finding(State.OK, controller_words())
    except UserError as error:
        return finding(State.WARNING, error.found, error.hint)


def works(findings: Sequence[Finding], torch: TorchFacts | str) -> tuple[Work, ...]:
    """What can be done here. Pure: judged from the findings and from what torch says alone."""
    by_name = {each.name: each for each in findings}
    broken = [f"{each.name}: {each.found}" for each in findings if each.topic == "software" and each.state is State.BROKEN]
    writing = [f"{each.name}: {each.found}" for each in findings if each.name == "writing"]
    no_gpu = ["no GPU that torch can use"] if isinstance(torch, str) or not torch.gpus else []
    no_nccl = [] if isinstance(torch, str) or not torch.gpus or torch.nccl else ["torch was built without NCCL"]
    plans = [reason for reason in broken if not reason.startswith("torch:")]
    return (
        _work("plan, simulate, explain (no torch needed)", plans),
        _work("train on processors (cluster=local_cpu)", broken, writing),
        _work("train on GPUs (cluster.device=cuda)", broken, writing, no_gpu, no_nccl),
        _work("memory.compile on processors", broken, _lacks(by_name, "C++ compiler")),
        _work("launcher=slurm", _lacks(by_name, "SLURM")),
        *(_work(GIVES[name.removeprefix("extra ")], _lacks(by_name, name)) for name in by_name if name.startswith("extra ")),
    )


def _work(name: str, *missing: Iterable[str]) -> Work:
    return Work(name=name, missing=tuple(reason for reasons in missing for reason in reasons))


def _lacks(by_name: dict[str, Finding], name: str) -> list[str]:
    finding = by_name.get(name)
    if finding is None:
        return [f"{name}: not looked at"]
    return [] if finding.state is State.OK else [f"{name}: {finding.found}"]
