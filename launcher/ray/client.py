"""Ray's job server, and what it answers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, EfflaunchError
from ..env import RAY_SERVER, variables_set
from .request import JobRequest

_TIMEOUT_S = 60.0
ALIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFacts:
    """A job as its server sees it now."""

    job: str
    state: str
    """Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    exit_code: int | None
    start_s: float | None

    @property
    def is_alive(self) -> bool:
        """Waiting or running."""
        return self.state in ALIVE


def check_installed() -> None:
    """ConfigError where this Python has no Ray with its job client. Imports none of it: Ray reads variables as it is imported."""
    # ray[default] brings the last two, ray alone does not.
    missing = [name for name in ("ray", "requests", "aiohttp") if importlib.util.find_spec(name) is None]
    if missing:
        hint = 'pip install "efflaunch[ray]"; --dry-run needs no Ray'
        raise ConfigError("launcher=ray", found=f"no {', '.join(missing)} in this Python", expected="ray[default]", hint=hint)


class JobServer:
    """A connection to the job server of a cluster. Ray's token, where one is needed, is read by Ray itself."""

    def __init__(self, address: str) -> None:
        """ConfigError where nobody answers, the token is not taken, or the cluster has another Ray."""
        check_installed()
        self.address = address
        with _translated(address), variables_set({RAY_SERVER: address}):
            self.client = _client(address)
            self.version = str(self.client._do_request("GET", "/api/version").json()["ray_version"])
        self._check_version()

    def _check_version(self) -> None:
        import ray

        mine = ray.__version__
        if mine.split(".")[:2] != self.version.split(".")[:2]:
            expected = f"the same Ray on both sides; here is {mine}"
            hint = f'pip install "ray[default]=={self.version}"'
            raise ConfigError(f"Ray at {self.address}", found=f"version {self.version}", expected=expected, hint=hint)

    def submit(self, request: JobRequest) -> None:
        """Hand it over; ConfigError with the server's own words where it refuses."""
        with _translated(self.address):
            self.client.submit_job(**request.to_dict())

    def find(self, job: str) -> JobFacts | None:
        """Return the job's facts; None where the server knows no such job: it forgets all of them when the cluster ends."""
        try:
            with _translated(self.address):
                details = self.client.get_job_info(job)
        except ConfigError as error:
            if "404" in error.found:
                return None
            raise
        start_s = details.start_time / 1000 if details.start_time else None
        state, message = str(details.status), details.message or ""
        return JobFacts(job=job, state=state, message=message, exit_code=details.driver_exit_code, start_s=start_s)

    def stop(self, job: str) -> None:
        """SIGTERM to the driver; the job says how long until SIGKILL."""
        with _translated(self.address):
            self.client.stop_job(job)

    def logs(self, job: str) -> str:
        """Return what the driver printed."""
        with _translated(self.address):
            return str(self.client.get_job_logs(job))


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's own waits for ever on a server that took the connection and says nothing."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": _TIMEOUT_S, **options})

    logging.getLogger("ray").setLevel(logging.ERROR)
    return Client(address)


@contextmanager
def _translated(address: str) -> Iterator[None]:
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        said = str(error).strip().splitlines()[0]
        hint = "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=FILE or RAY_AUTH_TOKEN"
        raise ConfigError(f"Ray at {address}", found=said, expected="the cluster's token", hint=hint) from error
    except (ConnectionError, requests.RequestException) as error:
        problem = f"no answer ({type(error).__name__})"
        hint = "launcher.ray.address=http://HEAD:8265; `ray start --head` and the cluster's operator print the dashboard's address"
        raise ConfigError(f"Ray at {address}", found=problem, expected="a running job server", hint=hint) from error
    except RuntimeError as error:
        said = " ".join(str(error).split())[:500]
        raise ConfigError(f"Ray at {address}", found=said, expected="the request to be accepted", hint="mend what it names") from error


def reach(address: str) -> JobServer | EfflaunchError:
    """The server, or why it cannot be asked; for questions whose answer is worth little without one."""
    try:
        return JobServer(address)
    except EfflaunchError as error:
        return error
