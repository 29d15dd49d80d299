"""Builds what a run asks of Ray: the job that is submitted and what each of its nodes has to have. Pure."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...cluster.config import Device
from ...errors import ConfigError
from ..config.run_config import Config, RayConfig
from ..config.secrets import find_secret, is_secret_name

FOLDER = "ray"
"""Folder of Ray's part of a run, inside the run directory."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HERE = "auto"
"""The address that means: the cluster around this process."""
STOP_MARGIN_S = 30
"""Beyond launcher.grace_s, for ranks that had to be killed and for the word that they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """One submission by Ray's job API, word by word."""

    address: str
    submission_id: str
    entrypoint: str
    env_vars: dict[str, str]
    working_dir: Path
    metadata: dict[str, str]
    driver_cpus: float

    def to_dict(self) -> dict[str, Any]:
        """The arguments of JobSubmissionClient.submit_job."""
        arguments: dict[str, Any] = {
            "entrypoint": self.entrypoint,
            "submission_id": self.submission_id,
            "runtime_env": {"env_vars": self.env_vars, "working_dir": str(self.working_dir)},
            "metadata": self.metadata,
        }
        return arguments | ({"entrypoint_num_cpus": self.driver_cpus} if self.driver_cpus else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Facts about the submitting process that go into a submission."""

    run_dir: Path
    """Absolute, and the same on every node."""
    work_dir: Path
    number: int
    """Number of the submission in this run directory, from 1."""
    variables: Mapping[str, str]
    """Variables that launcher.ray.env names, with their values."""
    version: str
    """efflaunch's."""
    entry: str | None = None
    """Training function in place of the real one, as module:function."""


def job_request(config: Config, caller: Caller, address: str) -> JobRequest:
    """The whole submission. Nothing of the environment goes with it but what was named."""
    ray = config.launcher.ray
    words = [ray.python, "-m", "efflaunch.launcher.ray.driver", str(caller.run_dir), "--work-dir", ray.work_dir or str(caller.work_dir)]
    words += ["--entry", caller.entry] if caller.entry else []
    return JobRequest(
        address=address,
        submission_id=f"efflaunch-{_word(caller.run_dir.name)}-{caller.number}",
        entrypoint=shlex.join(words),
        env_vars={**caller.variables, **job_variables(config)},
        working_dir=caller.run_dir / FOLDER / "upload",
        metadata={"run_dir": str(caller.run_dir), "efflaunch_version": caller.version},
        driver_cpus=ray.driver_cpus,
    )


def job_variables(config: Config) -> dict[str, str]:
    """Return the environment variables of the job's own processes."""
    # `ray job stop` then leaves the time to save, where it would leave 3 s.
    patience_s = math.ceil(config.launcher.grace_s) + STOP_MARGIN_S
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(patience_s)}


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def describe_request(request: JobRequest, files: Mapping[str, int]) -> str:
    """Format the request, and what its working directory would hold, in bytes."""
    import yaml

    text = yaml.safe_dump(request.to_dict(), sort_keys=False, width=160)
    listing = "".join(f"#   {size:>10,} bytes  {name}\n" for name, size in files.items())
    head = f"# to {request.address}, by Ray's job API\n"
    return f"{head}{text}# working_dir has run.yaml as --print-config shows it{', and' if files else ''}\n{listing}"


def demand(config: Config) -> dict[str, float]:
    """Return the bundle that is reserved on each node: what a node has to have free."""
    ray, ranks = config.launcher.ray, config.cluster.ranks_per_node
    bundle = {"CPU": float(ranks if ray.cpus_per_node is None else ray.cpus_per_node)}
    if config.cluster.device is Device.CUDA:
        bundle["GPU"] = float(ranks)
    return bundle | ray.resources


def check_ray(config: Config, server: str | None, variables: Mapping[str, str] | None = None) -> None:
    """ConfigError where the options cannot make a job. `server`: what RAY_API_SERVER_ADDRESS has; `variables`: of this shell, by name."""
    ray = config.launcher.ray
    for error in _mistakes(config, ray, server, variables or {}):
        raise error
    if not ray.local:
        check_address(ray.address or server or "")


def _mistakes(config: Config, ray: RayConfig, server: str | None, variables: Mapping[str, str]) -> Iterator[ConfigError]:
    for index, name in enumerate(ray.env):
        if _VARIABLE.fullmatch(name) is None:
            where, expected = f"launcher.ray.env[{index}]", "the name of a variable"
            yield ConfigError(where, found=repr(name), expected=expected, hint="launcher.ray.env=[HOME]")
    secrets = [name for name in ray.env if is_secret_name(name) or find_secret(variables.get(name, ""), {}) is not None]
    if secrets:
        yield ConfigError(
            "launcher.ray.env",
            found=", ".join(secrets),
            expected="no secrets: everybody who can see the job can read what goes with it",
            hint="set it where Ray's nodes are started, or keep it in a file of theirs such as ~/.netrc",
        )
    if ray.local and ray.address is not None:
        yield ConfigError("launcher.ray.local", found="an address as well", expected="one of the two", hint="launcher.ray.address=null")
    if ray.local and config.cluster.num_nodes > 1:
        nodes = f"cluster.num_nodes={config.cluster.num_nodes}"
        yield ConfigError("launcher.ray.local", found=nodes, expected="one node, this one", hint="launcher.ray.address=http://head:8265")
    if not ray.local and ray.address is None and server is None:
        hint = "launcher.ray.address=http://head:8265, or launcher.ray.local=true to start a cluster here"
        yield ConfigError("launcher.ray.address", found="none, and no RAY_API_SERVER_ADDRESS", expected="a cluster", hint=hint)


def check_address(address: str) -> None:
    """ConfigError for what is no address of a job server, or has a password in it."""
    if address == HERE:
        return
    parts = urlsplit(address)
    hint = "launcher.ray.address=http://head:8265"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("launcher.ray.address", found=repr(address), expected="the address of Ray's job server", hint=hint)
    if parts.username or parts.password or parts.query:
        # Not repeated in the message: it goes to logs.
        expected = "none: Ray reads its token from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token where RAY_AUTH_MODE=token"
        raise ConfigError("launcher.ray.address", found="a name, a password or a query in it", expected=expected, hint=hint)
