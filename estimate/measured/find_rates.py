"""Which measured rates stand in place of a cluster's figures: those of a profile of this kind of machine, whatever its model."""

from __future__ import annotations

import logging
from pathlib import Path

from ...cluster.config import ClusterConfig
from ...cluster.rates import MeasuredRates
from ...errors import ConfigError
from .profile import DEFAULT_FILE, Profile, load_profiles

log = logging.getLogger(__name__)


def find_rates(
    wanted: str | None, cluster: ClusterConfig, hardware: str, offload_dir: str | None, folder: Path | None = None
) -> MeasuredRates | None:
    """Those of the newest entry for `hardware` (empty: any) with as many ranks a node; None where no profile has them.

    Links, disks and memory do not depend on the model, so entries of other models and policies serve as well. Of entries that are
    alike in that, one whose disk is `offload_dir` goes before the others. ConfigError where the file that `wanted` names is no profile.
    """
    path = (folder or Path()) / (wanted or DEFAULT_FILE)
    if not path.exists():
        return None
    try:
        known = load_profiles(path)
    except ConfigError as error:
        if wanted is not None:
            raise
        log.warning("%s is not used: found %s", path, error.found)
        return None
    fitting = [profile for profile in known if _is_of(profile, cluster, hardware)]
    if not fitting:
        return None
    best = max(fitting, key=lambda profile: (_has_disk(profile, offload_dir), profile.taken))
    assert best.rates is not None
    when = f" of {best.taken}" if best.taken else ""
    return MeasuredRates(rates=best.rates, source=f"measured{when} on {best.key.hardware}, {path}")


def _is_of(profile: Profile, cluster: ClusterConfig, hardware: str) -> bool:
    rates = profile.rates
    if rates is None or (rates.device, rates.ranks_per_node) != (cluster.device.value, cluster.ranks_per_node):
        return False
    return not hardware or profile.key.hardware == hardware


def _has_disk(profile: Profile, offload_dir: str | None) -> bool:
    return profile.rates is not None and bool(profile.rates.disk) and profile.rates.directory == offload_dir
