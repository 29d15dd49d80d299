"""Freezes a run's measured rates at its first start: what is measured later does not change the policy that it resumes with."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.rates import MachineRates, MeasuredRates
from ..estimate.measured.find_rates import find_rates
from ..utils.atomic_files import write_cache
from ..utils.decode import decode, set_aside

if TYPE_CHECKING:
    from .run_settings import RunSettings

RATES_FILE = "rates.json"
log = logging.getLogger(__name__)


def frozen_rates(config: RunSettings, hardware: str, run_dir: Path | None) -> MeasuredRates | None:
    """The rates frozen in RUN_DIR for the same profile file, machine and disk; else those measured by now, which are frozen there.

    None: no profile has any. Without `run_dir` nothing is kept. On one rank only.
    """
    made_for = [config.parallel.profile, hardware, config.cluster.ranks_per_node, config.memory.offload_dir]
    path = None if run_dir is None else run_dir / RATES_FILE
    if path is not None and path.exists():
        try:
            kept = _Kept.parsed(path.read_bytes())
            if kept.made_for == made_for:
                return kept.measured
        except (ValueError, RecursionError) as error:
            log.warning("%s", set_aside(path, error))
    rates = find_rates(config.parallel.profile, config.cluster, hardware, config.memory.offload_dir)
    if path is not None:
        values = {"rates": None, "source": ""} if rates is None else {"rates": asdict(rates.rates), "source": rates.source}
        write_cache(path, json.dumps({"for": made_for, **values}, indent=1), log)
    return rates


@dataclass(frozen=True, slots=True)
class _Kept:
    """What RATES_FILE holds."""

    made_for: Any
    measured: MeasuredRates | None

    @classmethod
    def parsed(cls, text: bytes) -> _Kept:
        """The record in the file's text; raises ValueError where it is not what was written."""
        data = json.loads(text)
        if not isinstance(data, dict) or not {"for", "rates", "source"} <= data.keys() or not isinstance(data["source"], str):
            raise ValueError("it lacks what it is for, the rates or their source")
        rates = data["rates"]
        return cls(data["for"], None if rates is None else MeasuredRates(rates=decode(MachineRates, rates, "rates"), source=data["source"]))
