"""Being connected to a Ray cluster: to the one around this process, or to one that is started here for as long as it is needed."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...cluster.config import Device
from ...errors import ConfigError
from ..config.run_config import Config
from ..env import home_variables, ray_mode, ray_quiet_variables, variables_set
from .client import check_installed
from .request import demand

LOOPBACK = "127.0.0.1"
NO_CLOUD = "provider:\n  type: local\n"
"""Provider setting of a head: without a word on who provides its machines, a head asks the metadata servers of the clouds."""


@contextmanager
def joined() -> Iterator[None]:
    """Connected to the cluster around this process, as a job's driver is; ConfigError where there is none."""
    check_installed()
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        hint = "run it on a node of the cluster, or name its job server: launcher.ray.address=http://head:8265"
        raise ConfigError("launcher.ray.address=auto", found=said, expected="a Ray cluster around this process", hint=hint) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def started(config: Config) -> Iterator[dict[str, str]]:
    """A cluster of this machine, which ends with the block; yields variables that its agents need.

    Nobody else is let in (a token of its own), and nobody is called unless launcher.ray.usage_stats says so.
    """
    check_installed()
    home = Path(tempfile.mkdtemp(prefix="ray-"))
    try:
        (home / "ray_bootstrap_config.yaml").write_text(NO_CLOUD)
        values = {"HOME": str(home)}
        if not config.launcher.ray.usage_stats:
            values |= ray_quiet_variables()
        # Ray makes 127.0.0.1 the machine's outer address again, and then listens on all of them, unless told that there are no others.
        values["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if ray_mode() is None:
            values |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        own = home_variables()
        with variables_set(values):
            import ray

            private: dict[str, Any] = {"_temp_dir": str(home / "t"), "_node_ip_address": LOOPBACK, "include_dashboard": False}
            ray.init(address="local", **_size(config), **private, log_to_driver=False)
            try:
                yield own
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _size(config: Config) -> dict[str, Any]:
    bundle = demand(config)
    rest = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    gpus = {} if config.cluster.device is Device.CUDA else {"num_gpus": 0}
    # Ranks talk to each other and not through Ray's objects, which get the least that Ray takes.
    return {
        "num_cpus": max(1, round(bundle["CPU"])),
        "resources": rest,
        "object_store_memory": 80 << 20,
        "logging_level": logging.ERROR,
        **gpus,
    }
