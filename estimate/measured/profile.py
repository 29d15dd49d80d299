"""Profile: what a machine was measured to take for one model, fitted to the terms of the cost model. Plain data, no torch.

Legend of a micro-batch's time: every group is busy for `overhead_s + sum over its sequences of (attention_s * n^2 +
(linear_s + exchange_s) * n)`, n tokens; where layers have windows, n^2 is the mean over layers of twice the query-key
pairs. The micro-batch takes the busiest group's time plus `gather_s`, what ranks spend in collectives over all of them,
and at least `empty_s`. Coefficients are of the whole group: already divided by its degree. Ring hops are in all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cluster.rates import MachineRates
from ...errors import ConfigError
from ...utils.decode import decode, set_aside

if TYPE_CHECKING:
    from ...cluster.config import ClusterConfig
    from ...memory.config import MemoryConfig
    from ...model.spec import ModelSpec
    from ...parallel.sequence.cost import CostModel, DegreeCost
    from ...training.config import TrainConfig

log = logging.getLogger(__name__)
DEFAULT_FILE = "profile.yaml"
FORMAT = 2
READABLE = (1, 2)
"""1 knew no rates of links, disks and updates: such profiles still serve for all else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileKey:
    """What a profile is of: one of anything else is not used for a run."""

    hardware: str
    """Hardware of one rank: the GPU's name, or the processor's with its cores."""
    ranks: str
    """`2 nodes x 8 ranks`."""
    model: str
    """Shapes, precision and what is recomputed."""
    versions: str

    def differences(self, other: ProfileKey) -> list[str]:
        """`hardware: A, not B` for each field in which `other` (what is here) differs from what was measured; empty ones match all."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]}, not {theirs[name]}" for name in mine if theirs[name] and mine[name] != theirs[name]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How well a line went through its samples; residuals are relative to the measured time."""

    samples: int
    mean_error: float
    r2: float | None = None
    """None, as the worst error, where a run was measured as it went."""
    worst_error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedDegree:
    """Seconds that a sequence of s tokens keeps a group of `degree` ranks busy: see the module's legend."""

    degree: int
    ulysses: int
    attention_s: float
    """Per squared token of the whole sequence (see the legend for windows)."""
    linear_s: float
    """Per token: one rank's token-local work, divided by the degree."""
    exchange_s: float
    """Per token: what is linear in tokens beyond that; the exchanges and their waiting."""
    fit: Fit


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedCollective:
    """`latency_s + bytes / bytes_per_s`, bytes being what one rank sends."""

    kind: str
    degree: int
    latency_s: float
    bytes_per_s: float
    fit: Fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One machine, one model."""

    key: ProfileKey
    degrees: tuple[FittedDegree, ...]
    overhead_s: float
    """Seconds that a group takes in a micro-batch, whatever it holds."""
    gather_s: float
    """Seconds of a micro-batch for collectives over all ranks, as far as compute did not hide them."""
    empty_s: float
    """Seconds of a micro-batch without tokens: the same collectives with nothing to hide behind."""
    step_s: float
    """Seconds of a step for reductions that are made once, clipping and the optimizer."""
    reduce_s: float = 0.0
    """The reductions' part of step_s."""
    collectives: tuple[FittedCollective, ...] = ()
    taken: str = ""
    """When it was taken, as a date."""
    rates: MachineRates | None = None
    """Rates of the host's links, the disk and the update; None where they were not measured."""

    @property
    def beta_s(self) -> float:
        """Seconds of a micro-batch besides its sequences."""
        return self.overhead_s + self.gather_s

    def degree(self, degree: int, ulysses: int) -> FittedDegree | None:
        """The measured coefficients of groups of this shape; None where none were probed."""
        return next((row for row in self.degrees if (row.degree, row.ulysses) == (degree, ulysses)), None)

    def refine(self, cost: CostModel) -> CostModel:
        """`cost` with what was measured in place of arithmetic; degrees that were not probed keep theirs."""
        degrees = tuple(_refined(modelled, self.degree(modelled.degree, modelled.ulysses)) for modelled in cost.degrees)
        least = max(0.0, self.empty_s - self.beta_s)
        return replace(cost, degrees=degrees, beta_s=self.beta_s, gather_s=least, step_s=self.step_s, source="profile")


def _refined(modelled: DegreeCost, fitted: FittedDegree | None) -> DegreeCost:
    if fitted is None:
        return modelled
    share = fitted.attention_s / squares_s(modelled)
    return replace(
        modelled,
        attention_s=modelled.attention_s * share,
        windowed_s=tuple((window, pair_s * share) for window, pair_s in modelled.windowed_s),
        linear_s=fitted.linear_s,
        exchange_s=fitted.exchange_s,
        ring_s=0.0,
    )


def attention_units(modelled: DegreeCost, lengths: Any) -> Any:
    """The legend's n^2 of each sequence, by the proportions of full and windowed layers in an arithmetic cost."""
    bare = replace(modelled, linear_s=0.0, exchange_s=0.0, ring_s=0.0)
    return bare.sequence_s(lengths) / squares_s(modelled)


def squares_s(modelled: DegreeCost) -> float:
    """Seconds per n^2 of all layers for sequences no window cuts."""
    return modelled.attention_s + sum(pair_s for _, pair_s in modelled.windowed_s) / 2


def least_squares(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients >= 0 of each column, minimising the squared relative error; the most negative column is left out until none is."""
    import numpy as np

    x, t = np.asarray(rows, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    weighted = x / t[:, None]
    # Columns differ by many orders of magnitude (n^2 against 1).
    scale = np.abs(weighted).max(axis=0)
    active = [column for column in range(x.shape[1]) if scale[column] > 0]
    out = np.zeros(x.shape[1])
    while active:
        solution = np.linalg.lstsq(weighted[:, active] / scale[active], np.ones(len(t)), rcond=None)[0]
        if solution.min() >= 0:
            out[active] = solution / scale[active]
            break
        active.pop(int(solution.argmin()))
    return [float(value) for value in out]


def fit_of(predicted: Any, measured: Any) -> Fit:
    """How far predictions (n,) are from measurements (n,)."""
    import numpy as np

    errors = np.abs(predicted - measured) / measured
    spread = float(((measured - measured.mean()) ** 2).sum())
    r2 = 1.0 - float(((predicted - measured) ** 2).sum()) / spread if spread > 0 else 1.0
    return Fit(samples=len(measured), r2=r2, mean_error=float(errors.mean()), worst_error=float(errors.max()))


def profile_key(spec: ModelSpec, memory: MemoryConfig, train: TrainConfig, cluster: ClusterConfig, hardware: str) -> ProfileKey:
    """The key of a run on `hardware`."""
    kept = _kept(memory)
    heads = f"{spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}"
    shape = f"{spec.family.value}, {spec.num_layers} layers, {spec.hidden_size} wide, {heads}, {spec.intermediate_size} inner"
    dtype = train.dtype.value + ", deterministic" * train.deterministic
    nodes = f"{cluster.num_nodes} node{'s' * (cluster.num_nodes > 1)} x {cluster.ranks_per_node} ranks"
    return ProfileKey(
        hardware=hardware, ranks=nodes, model=f"{shape}, {spec.vocab_size} words, {dtype}; {kept}", versions=_versions()
    )


def _kept(memory: MemoryConfig) -> str:
    """The fields of the policy that times depend on, as the key of a profile has them."""
    from dataclasses import fields
    from enum import Enum

    free = ("name", "solve", "host_budget", "offload_dir", "arena")
    given = ((field.name, getattr(memory, field.name)) for field in fields(memory) if field.name not in free)
    clauses = [f"{name} {value.value if isinstance(value, Enum) else value}" for name, value in given if value is not None]
    return ", ".join(["solved", *clauses] if memory.solve else clauses)


def processor_name() -> str:
    """This machine's processor and how many cores this process may use."""
    import os
    import platform

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "processor")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {cores} core{'s' * (cores > 1)}"


def _versions() -> str:
    from importlib import metadata

    versions = []
    for name in ("torch", "efflaunch"):
        try:
            # `2.9.0+cu128` and `2.9.0+cpu` run different kernels.
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(versions)


def save_profile(path: Path, profile: Profile) -> None:
    """Put the profile into the file, whole or not at all; what the file has of other machines and models stays."""
    import yaml

    others = [_plain(other) for other in _kept_profiles(path) if other.key != profile.key]
    text = yaml.safe_dump({"efflaunch_profile": FORMAT, "entries": [*others, _plain(profile)]}, sort_keys=False, width=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


def _kept_profiles(path: Path) -> list[Profile]:
    """What the file has; a damaged one is set aside, for what is put into it can be measured again."""
    if not path.exists():
        return []
    try:
        return load_profiles(path)
    except ConfigError as error:
        if "newer efflaunch" in error.found:
            raise
        log.warning("%s", set_aside(path, error.found))
        return []


def load_profiles(path: Path) -> list[Profile]:
    """All the file has; ConfigError where it is no profile."""
    try:
        return [_checked(decode(Profile, entry, f"entries[{index}]")) for index, entry in enumerate(_read(path))]
    except ValueError as error:
        raise _unreadable(path, f"an entry that cannot be read ({error})") from error


def find_profile(path_given: str | None, key: ProfileKey, folder: Path | None = None) -> tuple[Profile | None, str]:
    """The profile of `key` and where it came from, or None and why there is none.

    `path_given` is parallel.profile: a file the user named must have it (ConfigError names what differs); where no file was
    named, profile.yaml of `folder` is used if it fits, and the reason given if not.
    """
    path = (folder or Path()) / (path_given or DEFAULT_FILE)
    if not path.exists():
        if path_given is not None:
            raise ConfigError("parallel.profile", found=f"no file {path}", expected="a profile of this machine", hint=_make(path))
        return None, "arithmetic on data sheets: nothing was measured here (efflaunch profile does)"
    try:
        stored = load_profiles(path)
    except ConfigError as error:
        if path_given is not None:
            raise
        return None, f"arithmetic on data sheets: {path} is damaged ({error.found}); {_make(path)}"
    match = next((profile for profile in stored if not profile.key.differences(key)), None)
    if match is not None:
        return match, str(path)
    reason = _nearest_difference(stored, key)
    if path_given is not None:
        other = f"a profile of something else ({reason})"
        raise ConfigError(f"parallel.profile={path_given}", found=other, expected="one of this machine and model", hint=_make(path))
    return None, f"arithmetic on data sheets: {path} is of something else ({reason})"


def _nearest_difference(stored: list[Profile], key: ProfileKey) -> str:
    if not stored:
        return "it is empty"
    differences = [list(profile.key.differences(key)) for profile in stored]
    nearest = min(differences, key=len)
    return "; ".join(nearest)


def _make(path: Path) -> str:
    out = "" if path.name == DEFAULT_FILE and path.parent == Path() else f" --out {path}"
    return f"efflaunch profile with the arguments of this run{out}, or parallel.profile=null"


def _read(path: Path) -> list[dict[str, Any]]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _unreadable(path, type(error).__name__) from error
    kind = data.get("efflaunch_profile") if isinstance(data, dict) else None
    if type(kind) is int and kind > FORMAT:
        raise _unreadable(path, f"format {kind}, of a newer efflaunch than this one, which knows up to {FORMAT}")
    if type(kind) is not int or kind not in READABLE or not isinstance(data.get("entries"), list):
        raise _unreadable(path, "another kind of file")
    return list(data["entries"])


def _unreadable(path: Path, found: str) -> ConfigError:
    return ConfigError(f"profile {path}", found=found, expected="a file written by efflaunch profile", hint=_make(path))


def _plain(profile: Profile) -> dict[str, Any]:
    data = asdict(profile)
    rates = data["rates"] and {**data["rates"], "link": list(data["rates"]["link"]), "disk": list(data["rates"]["disk"])}
    return {**data, "degrees": list(data["degrees"]), "collectives": list(data["collectives"]), "rates": rates}


def _checked(profile: Profile) -> Profile:
    """ValueError where a time is negative, or a speed, a degree or a number of ranks is none."""
    times = [profile.overhead_s, profile.gather_s, profile.empty_s, profile.step_s, profile.reduce_s]
    times += [value for row in profile.degrees for value in (row.attention_s, row.linear_s, row.exchange_s)]
    times += [value for row in profile.collectives for value in (row.latency_s, row.bytes_per_s)]
    counts: list[float] = [value for row in profile.degrees for value in (row.degree, row.ulysses)]
    counts += [row.degree for row in profile.collectives]
    if (rates := profile.rates) is not None:
        counts += [rates.ranks_per_node, rates.device_update, rates.host_update]
        counts += [value for copies in (*rates.link, *rates.disk) for value in asdict(copies).values()]
    if min(times, default=0) < 0 or min(counts, default=1) <= 0:
        raise ValueError("a time below zero, or a speed or a count that is not above it")
    return profile
