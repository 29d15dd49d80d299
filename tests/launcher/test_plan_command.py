"""`efflaunch plan`: its JSON, its tables, and that it stays light."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from efflaunch.estimate.footprint.term import Phase, Term
from efflaunch.estimate.ledger import Account
from efflaunch.launcher import cli
from efflaunch.launcher.commands.plan import print_plan as main
from efflaunch.launcher.commands.plan_view import _spare
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan
from efflaunch.launcher.config.run_config import Config

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
GIB = 1 << 30


def plan_json(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert main(compose(list(overrides)), True) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def documented_keys() -> set[str]:
    """Keys the table in docs/plan.md names, as `group.key`."""
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "plan.md").read_text(), re.MULTILINE)
    return {name for name in rows if not name.startswith("--")}


def documented_commands() -> list[str]:
    """Every line of the page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "plan.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def flat(value: Any, path: str = "") -> set[str]:
    """Paths of all keys; entries of a list are one `[]`, phases one `*`."""
    if isinstance(value, list) and not value and path in ("solver.prices", "suggestions"):
        return set()
    if isinstance(value, dict):
        if path.endswith(("by_phase", "fixed_terms")):
            return {path}
        return {shown for key, item in value.items() for shown in flat(item, f"{path}.{key}" if path else key)}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {shown for item in value for shown in flat(item, f"{path}[]")}
    return {path}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_a_plan(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan_json(capsys, f"+experiment={experiment}")
    assert shown["experiment"] == experiment
    for account in (shown["device"], shown["host"]):
        assert account["peak_bytes"] == sum(entry["bytes_at_peak"] for entry in account["terms"])
        assert account["fits"] == (account["peak_bytes"] <= account["capacity_bytes"] - account["reserve_bytes"])
        assert all(entry["bytes"] == max(entry["by_phase"].values()) for entry in account["terms"])
    check_head_room(experiment, shown["device"])
    layout = shown["layout"]
    assert layout["replicate"] * layout["shard"] == layout["world_size"] == layout["groups_per_micro_batch"] * layout["sp_degree"]
    parts = ("compute_s", "sequence_s", "sharding_s", "host_s", "update_s")
    assert shown["step"]["time_s"] == pytest.approx(sum(shown["step"][key] for key in parts)) and shown["step"]["update_s"] > 0
    assert shown["fits"] == (shown["device"]["fits"] and shown["host"]["fits"])


def check_head_room(experiment: str, device: dict[str, Any]) -> None:
    """A twentieth of the device stays free, or the experiment's file says in a line of its own why it cannot."""
    words = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
    excused = re.search(r"^\s+reserve: [0-9.]+ +# \w+", words, re.MULTILINE)
    assert device["peak_bytes"] <= 0.95 * device["capacity_bytes"] or excused, "no head-room, and no reason beside cluster.reserve"


def test_the_keys_are_those_the_page_lists(capsys: pytest.CaptureFixture[str]) -> None:
    short = plan_json(capsys, "+experiment=llama8b_1M", "cluster.device_memory_bytes=22GiB")
    assert short["suggestions"] and not short["solver"]["feasible"], "this one must not fit, so that every key is there"
    dear = plan_json(capsys, "+experiment=llama8b_1M", "cluster.device_memory_bytes=40GiB", "cluster.host_memory_bytes=100GiB")
    assert dear["solver"]["prices"], "and in this one memory must be worth something"
    piped = plan_json(capsys, "+experiment=llama8b_1M", "parallel.pipeline.stages=2", "cluster.num_nodes=2")
    # Where one stage is all of the model `pipeline` is null.
    assert (flat(short) | flat(dear) | flat(piped)) - {"pipeline"} == documented_keys()
    assert plan_json(capsys, "+experiment=llama8b_1M", "memory=recompute")["solver"] is None


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_suggestions_compose_and_fit(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(compose([f"+experiment={experiment}"])).report
    assert report is not None, "every experiment is solved"
    small = f"cluster.device_memory_bytes={report.fixed_bytes // 3}"
    shown = plan_json(capsys, f"+experiment={experiment}", small)
    assert not shown["fits"]
    for entry in shown["suggestions"]:
        ledger = plan(compose([f"+experiment={experiment}", small, *entry["overrides"]]))
        assert ledger.fits and ledger.device.peak_bytes == entry["device_peak_bytes"]


def test_tables_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(compose(["+experiment=llama8b_1M", "cluster.device_memory_bytes=22GiB"]), False) == 0
    shown = capsys.readouterr().out
    for part in (
        "llama3_8b, 8.03 billion parameters",
        "ranks       8 = 1 node(s) x 8",
        "layer inputs",
        "does not fit",
        "tokens/s (an estimate)",
        "nothing fits; this policy needs least of what is missing",
        "of each device are there whatever the policy: optimizer states 7.5 GiB",
        "the least that works: cluster.device_memory_bytes=",
        "certificate: at most",
        "cluster.num_nodes=",
    ):
        assert part in shown
    assert main(compose(["+experiment=quickstart"]), False) == 0
    shown = capsys.readouterr().out
    assert "fits: " in shown and "memory policy auto: every activation is kept on the rank; no layer runs again" in shown
    assert main(compose(["+experiment=llama8b_1M"]), False) == 0
    shown = capsys.readouterr().out
    for part in (
        "chunks of 16K tokens",
        "no policy is faster by more than",
        "checked after the first step",
        "if sequences have up to 1M tokens",
    ):
        assert part in shown


def test_a_sequence_beyond_the_models_positions_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan_json(capsys, "+experiment=quickstart", "model.max_positions=4K")
    assert shown["notes"] == ["data.max_seq_len=8K is beyond the 4K positions the model knows: extend it with model.max_positions=8192"]
    assert plan_json(capsys, "+experiment=quickstart")["notes"] == []


def test_idle_groups_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan_json(capsys, "+experiment=quickstart", "data.global_batch_tokens=8K")
    assert ["idle" in note for note in shown["notes"]] == [True]


@pytest.mark.parametrize("memory", ["auto", "alst"])
def test_the_command_never_imports_torch(memory: str) -> None:
    """With memory=auto scipy's HiGHS, which is light beside it, and only where something has to give way."""
    heavy = ("torch", "transformers", "ray", "datasets", *(("numpy",) if memory == "alst" else ()))
    code = (
        "import sys; from efflaunch.launcher.cli import main; "
        f"code = main(['plan', '+experiment=llama8b_1M', 'memory={memory}', '--json']); "
        f"print([m for m in {heavy} if m in sys.modules], code, file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stderr.strip() == "[] 0"
    assert json.loads(out.stdout)["experiment"] == "llama8b_1M"


def test_a_plan_is_a_function_of_the_configuration() -> None:
    config: Config = compose(["+experiment=llama8b_1M"])
    assert plan(config) == plan(config)


@pytest.mark.parametrize("command", documented_commands())
def test_commands_of_the_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    assert words[:2] == ["efflaunch", "plan"]
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("spare_bytes", "words"),
    [
        (0, "fits, only just: 0 MiB to spare on each GPU"),
        (20 << 20, "fits, only just: 20 MiB to spare on each GPU"),
        (799 << 20, "fits, only just: 799 MiB to spare on each GPU"),
        (1 << 30, "fits: 1.00 GiB to spare on each GPU"),
    ],
)
def test_a_narrow_fit_is_called_one(spare_bytes: int, words: str) -> None:
    capacity = 80 * GIB
    entry = Term(name="weights", note="", by_phase={Phase.FORWARD: capacity - spare_bytes})
    device = Account(name="GPU", capacity_bytes=capacity, terms=(entry,))
    assert Text.from_markup(_spare(device)).plain == words
    larger = Account(name="GPU", capacity_bytes=capacity + 4 * GIB, reserve_bytes=4 * GIB, terms=(entry,))
    assert Text.from_markup(_spare(larger)).plain == words, "the reserve is not to spare"
