"""The measured rates of a run, settled at its first start: what is measured later does not change the policy it goes on with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..cluster.rates import MeasuredRates, rates_from
from ..estimate.measured.find_rates import find_rates
from ..utils.atomic_files import write_atomic

if TYPE_CHECKING:
    from .run_settings import RunSettings

RATES_FILE = "rates.json"


def settled_rates(config: RunSettings, hardware: str, run_dir: Path | None) -> MeasuredRates | None:
    """Those in RUN_DIR, where they were settled for the same profile file, machine and disk; else what is found now, put there.

    None: no profile has any. Without `run_dir` nothing is kept. On one rank only.
    """
    made_for = [config.parallel.profile, hardware, config.cluster.ranks_per_node, config.memory.offload_dir]
    path = None if run_dir is None else run_dir / RATES_FILE
    if path is not None and path.exists():
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["for"] == made_for:
            return None if told["rates"] is None else MeasuredRates(rates=rates_from(told["rates"]), source=told["source"])
    found = find_rates(config.parallel.profile, config.cluster, hardware, config.memory.offload_dir)
    if path is not None:
        kept = {"rates": None, "source": ""} if found is None else {"rates": asdict(found.rates), "source": found.source}
        write_atomic(path, json.dumps({"for": made_for, **kept}, indent=1))
    return found
