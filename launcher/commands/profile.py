"""`efflaunch profile`: measure this machine for one configuration, and write what planning then goes by. Imports no torch."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import EXIT_DONE, ConfigError
from ...estimate.timing.bandwidth import gb_per_s
from ...training.reporting.config import Display
from ...units import format_bytes, format_seconds
from ..agent.signals import stop_signals_kept
from ..config.run_config import Config, RunConfig
from ..output import steady_output
from .arguments import SEARCH_S, CommandParser, add_config_arguments, add_json, composed, number_in

if TYPE_CHECKING:
    from rich.table import Table

    from ...cluster.rates import MachineRates
    from ...estimate.measured.profile import Fit, Profile

ENTRY = f"{__package__.partition('.')[0]}.training.profiling.probe:probe"


DESCRIPTION = "Measure this machine with short probes on a configuration's ranks. Takes the arguments of train."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch profile`."""
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("profile.yaml"), metavar="FILE", help="where it goes, beside what is there")
    parser.add_argument("--seconds", type=number_in(float, SEARCH_S), default=60.0, help="about how long the probes may take (60)")
    add_json(parser, "print the profile as JSON")


def main(words: list[str]) -> int:
    """Run `efflaunch profile` and return its exit code."""
    parser = CommandParser("profile", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    config = composed(options)
    if config is None:
        return EXIT_DONE
    return profile(config, options.out, options.seconds, options.json)


def profile(config: Config, out: Path, seconds: float, as_json: bool) -> int:
    """Probe on the ranks of `config` for about `seconds`, put the profile into `out`, show it; the job's exit code."""
    from ...estimate.measured.profile import load_profiles, save_profile
    from ..machine_checks import check_machine

    _check_stages(config)
    unprofiled = replace(config, parallel=replace(config.parallel, profile=None))
    check_machine(unprofiled)
    if out.exists():
        load_profiles(out)  # refuse before the probes what could not be written after them
    with tempfile.TemporaryDirectory(prefix="efflaunch-profile-") as folder:
        code = _probe(unprofiled, Path(folder) / "profile", seconds)
        if code != EXIT_DONE:
            return code
        (profile,) = load_profiles(Path(folder) / "profile" / "profile.yaml")
    save_profile(out, profile)
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(profile), indent=2))
    else:
        show(profile, out)
    return EXIT_DONE


def _check_stages(config: Config) -> None:
    """ConfigError with several stages: what a profile says is of a rank that has all layers."""
    stages = config.parallel.pipeline.stages
    if stages > 1:
        raise ConfigError(
            "parallel.pipeline.stages",
            found=f"{stages} for a profile",
            expected="1: probes are of all layers, and plans of stages go by arithmetic",
            hint="parallel.pipeline.stages=1",
        )


def _probe(config: Config, run_dir: Path, seconds: float) -> int:
    from .. import local
    from ..end_report import print_failure
    from ..rundir.lock import lock_run
    from ..rundir.run_dir import make_run_dir, store_config

    run = RunConfig(root=str(run_dir.parent), id=run_dir.name, private=False)  # inside a private folder already
    logging = replace(config.logging, display=Display.QUIET)
    quiet = replace(config, run=run, logging=logging, launcher=replace(config.launcher, max_restarts=0))
    make_run_dir(run_dir, private=run.private)
    (run_dir / "probe.json").write_text(json.dumps({"seconds": seconds}))
    lock = lock_run(run_dir)
    revision, _ = store_config(run_dir, quiet)
    with steady_output() as output, stop_signals_kept():
        code = local.run(quiet, run_dir, revision=revision, lock=lock, output=output, entry=ENTRY)
    if code != EXIT_DONE:
        print_failure(run_dir)
    return code


def show(profile: Profile, out: Path) -> None:
    """Print what was measured, and how well it fits, as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=120)
    console.print(f"[bold]{profile.key.hardware}[/bold], {profile.key.ranks}; {profile.key.model}; {profile.key.versions}")
    groups = Table("ranks", "Ulysses x ring", "attention", "linear", "exchange", *_FIT, title="a group's time", title_justify="left")
    for row in profile.degrees:
        shape = f"{row.ulysses} x {row.degree // row.ulysses}"
        parts = (f"{row.attention_s * 1e12:.3g} ps/token^2", f"{row.linear_s * 1e6:.3g} us/token", f"{row.exchange_s * 1e6:.3g} us/token")
        groups.add_row(str(row.degree), shape, *parts, *_fit(row.fit))
    links = Table("collective", "ranks", "latency", "bandwidth", *_FIT, title="all groups at once", title_justify="left")
    for link in profile.collectives:
        speed = f"{format_bytes(int(link.bytes_per_s))}/s" if link.bytes_per_s else "unmeasurable"
        links.add_row(link.kind, str(link.degree), f"{link.latency_s * 1e6:.0f} us", speed, *_fit(link.fit))
    console.print(groups)
    console.print(links)
    if profile.rates is not None:
        console.print(_rates(profile.rates))
        device, host = gb_per_s(profile.rates.device_update), gb_per_s(profile.rates.host_update)
        console.print(f"AdamW reads and writes {device} a rank, on the host {host}")
        console.print("estimates and memory=auto take the slowest rank's rates in place of cluster.host_link_bandwidth and the like")
    fixed = f"{format_seconds(profile.beta_s)} (collectives on weights {format_seconds(profile.gather_s)})"
    console.print(f"each micro-batch takes {fixed} besides, each step {format_seconds(profile.step_s)}")
    console.print(f"wrote {out}; plan and train use it where this machine, model and software are theirs")


def _rates(rates: MachineRates) -> Table:
    """Build the table of bandwidths per rank while all ranks of a node copy."""
    from rich.table import Table

    title = f"copies, all {rates.ranks_per_node} ranks of a node at once"
    table = Table("rank", "way", "out", "back", "both at once: out", "back", title=title, title_justify="left")
    for name, rows in (("host memory", rates.link), (f"files in {rates.directory}", rates.disk)):
        for rank, row in enumerate(rows):
            table.add_row(str(rank), name, *(gb_per_s(value) for value in (row.out, row.back, row.both_out, row.both_back)))
    return table


_FIT = ("samples", "r2", "mean error", "worst")


def _fit(fit: Fit) -> tuple[str, str, str, str]:
    worst = "" if fit.worst_error is None else f"{fit.worst_error:.1%}"
    return str(fit.samples), "" if fit.r2 is None else f"{fit.r2:.4f}", f"{fit.mean_error:.1%}", worst
