"""`efflaunch explain`: from metrics and without them, as tables, picture and JSON; docs/sequence.md run as it stands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from efflaunch.launcher import cli
from efflaunch.launcher.commands.sequence_plan import explain_plan, plan_name, step_cost
from efflaunch.tests.launcher.planned_run import make_run
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.launcher.test_plan_command import flat
from efflaunch.tests.limits import ENDS_S

PAGE = Path(__file__).parents[2] / "docs" / "sequence.md"
MODES = ["static", "adaptive"]


def explain_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["explain", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_finished_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, recorded: bool) -> None:
    run_dir, config, plans = make_run(tmp_path, f"parallel.sequence={mode}", recorded=recorded)
    cost = step_cost(config)
    for step, plan in ((1, plans[0]), (2, plans[1])):
        shown = explain_json(capsys, str(run_dir), "--step", str(step))
        held = [group for batch in shown["micro_batches"] for group in batch["groups"]]
        expected = [group for batch in plan.micro_batches for group in batch.groups]
        assert [(g["first_rank"], g["degree"], g["ulysses"], sorted(g["sequences"])) for g in held] == [
            (g.first_rank, g.degree, g.ulysses, sorted(g.sequences)) for g in expected
        ]
        for group in held:
            assert group["lengths"] == [plan.lengths[i] for i in group["sequences"]] == sorted(group["lengths"], reverse=True)
            assert group["predicted_s"] == pytest.approx(cost.group_s(group["lengths"], group["degree"]))
            assert group["measured_s"] == (pytest.approx(2 * group["predicted_s"]) if recorded else None)
        assert shown["predicted_s"] == pytest.approx(cost.plan_s(plan)) and shown["measured_s"] == 1.5 * step
        assert shown["source"] == plan.source and shown["tokens"] == sum(plan.lengths) and shown["longest"]["tokens"] == max(plan.lengths)
        assert shown["lower_bound_s"] <= shown["predicted_s"] * (1 + 1e-9) and shown["gap"] >= 0
        assert shown["notes"] == ([] if recorded else ["the metrics hold no groups: the plan was solved again: it is the one the run used"])


def test_the_newest_step_is_explained_and_one_not_yet_run_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, plans = make_run(tmp_path)
    assert explain_json(capsys, str(run_dir))["step"] == 2
    ahead = explain_json(capsys, str(run_dir), "--step", "3")
    assert ahead["tokens"] == sum(plans[2].lengths) and ahead["measured_s"] is None and "planned again" in ahead["notes"][0]


def test_a_plan_made_under_other_settings_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, _ = make_run(tmp_path, recorded=False)
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"plan": "[', '"plan": "[8+'))
    assert "the run used another plan" in explain_json(capsys, str(run_dir))["notes"][0]


def test_lengths_are_read_from_the_data_where_metrics_leave_them_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, _ = make_run(tmp_path)
    whole = explain_json(capsys, str(run_dir), "--step", "1")
    path = run_dir / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        for group in event.get("groups", []):
            del group["lengths"]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert explain_json(capsys, str(run_dir), "--step", "1") == whole


def test_a_step_is_judged_by_the_model_it_was_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, _ = make_run(tmp_path)
    before = explain_json(capsys, str(run_dir))
    path = run_dir / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    events[0]["cost_model"] |= {"beta_s": events[0]["cost_model"]["beta_s"] + 3.0, "source": "profile"}
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    after = explain_json(capsys, str(run_dir))
    assert (
        after["predicted_s"] == pytest.approx(before["predicted_s"] + 3.0 * len(after["micro_batches"]))
        and after["cost_source"] == "profile"
    )


def test_tables_and_words_for_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, plans = make_run(tmp_path, "parallel.sequence=adaptive")
    picture = tmp_path / "step.png"
    assert cli.main(["explain", str(run_dir), "--step", "1", "--out", str(picture)]) == 0
    shown = capsys.readouterr().out
    longest = max(plans[0].lengths)
    for part in (
        "step 1: ",
        "measured 1.50 s",
        "who holds which sequences",
        "micro-batch 1",
        f"The longest sequence, {longest:,} tokens",
        "at most",
        "Other plans of this step: ",
        f"wrote {picture}",
    ):
        assert part in shown, shown
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("mode", "source", "name"),
    [
        ("static", "static", "static plan"),
        ("adaptive", "adaptive", "adaptive plan"),
        ("adaptive", "static", "adaptive plan (the best static one, which no search beat)"),
        ("adaptive", "late", "greedy plan (the planner was late)"),
    ],
)
def test_plans_are_named_by_how_they_came_about(tmp_path: Path, mode: str, source: str, name: str) -> None:
    _, config, plans = make_run(tmp_path, f"parallel.sequence={mode}")
    assert plan_name(explain_plan(config, replace(plans[0], source=source), step_cost(config))) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "0"], "--step: found 0; expected 1 to 3, the steps of this run."),
        (["--step", "9"], "--step: found 9; expected 1 to 3, the steps of this run."),
        (["--out", "step.gif"], "--out: found step.gif; expected a file that ends in .svg, .png, .pdf."),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    run_dir, _, _ = make_run(tmp_path)
    assert cli.main(["explain", str(run_dir), *words]) == 93
    assert message in capsys.readouterr().err


def test_a_run_that_has_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, _ = make_run(tmp_path)
    (run_dir / "metrics.jsonl").unlink()
    assert cli.main(["explain", str(run_dir)]) == 93
    assert "no finished step" in capsys.readouterr().err
    assert explain_json(capsys, str(run_dir), "--step", "1")["measured_s"] is None


@pytest.mark.parametrize("harm", ['"degree": 3', '"first_rank": "x"'])
def test_metrics_that_hold_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str) -> None:
    run_dir, _, _ = make_run(tmp_path)
    path = run_dir / "metrics.jsonl"
    key = harm.partition(":")[0]
    path.write_text(re.sub(rf"{key}: \d+", harm, path.read_text()))
    assert cli.main(["explain", str(run_dir)]) == 93
    assert "found" in capsys.readouterr().err


def test_no_torch_is_imported(tmp_path: Path) -> None:
    run_dir, _, _ = make_run(tmp_path)
    code = (
        f"import sys; from efflaunch.launcher.cli import main; main(['explain', {str(run_dir)!r}, '--step', '3']);"
        "main(['plan', '+experiment=quickstart', '--lengths', 'wikipedia']);"
        "main(['simulate', '+experiment=quickstart', '--lengths', 'wikipedia', '--steps', '1', '--flexsp-steps', '0']);"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=ENDS_S, check=True)
    assert result.stderr.strip().endswith("[]")


def documented_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs/mine, where the page's commands run."""
    directory = tmp_path_factory.mktemp("page")
    make_run(directory, "parallel.sequence=adaptive")
    return directory


@pytest.mark.parametrize("command", documented_commands())
def test_commands_of_the_page(workplace: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    words = shlex.split(command)
    assert words[0] == "efflaunch"
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).stat().st_size > 1000


def documented_keys(table: str) -> set[str]:
    """Keys of the page's table whose first cell names the command."""
    start = PAGE.read_text().index(f"| {table} |")
    rows = PAGE.read_text()[start:].partition("\n\n")[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_keys_are_those_the_page_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, _ = make_run(tmp_path, "parallel.sequence=adaptive")
    shown = flat(explain_json(capsys, str(run_dir)))
    assert cli.main(["plan", "+experiment=quickstart", "--lengths", "wikipedia", "--json"]) == 0
    shown |= flat(json.loads(capsys.readouterr().out))
    # micro_batches[].groups[] is a list inside a list's entries.
    assert shown == documented_keys("key of `explain` and `plan --lengths`")


def test_the_keys_of_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "+experiment=quickstart", "--lengths", "wikipedia", "--steps", "2", "--flexsp-steps", "0", "--json"]
    assert cli.main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    for step in shown["steps"]:
        step["step_s"] = None
    assert flat(shown) == documented_keys("key of `simulate`")
