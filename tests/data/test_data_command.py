"""`efflaunch data`: what it prints, its exit codes, its progress, and docs/data.md run as it stands."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.cli import main
from efflaunch.launcher.commands import data_progress
from efflaunch.launcher.commands.data import main as data_command
from efflaunch.launcher.commands.data import summary_text
from efflaunch.launcher.commands.data_progress import progress_text, show_progress
from efflaunch.launcher.config.compose import compose
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.pages import bash_blocks, run_page
from efflaunch.training.data import prepare as prepare_module
from efflaunch.training.data.prepare import PrepareProgress

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Two texts and a tokenizer in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/a.txt").write_text("the quick brown fox")
    Path("in/b.txt").write_text("x")
    assert main(["data", "tokenizer", "in", "--vocab-size", "280", "--out", "tok"]) == 0
    assert capsys.readouterr().out == "tok: byte-level BPE trained on 2 files\n"
    return tmp_path


def test_the_summary(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "in", "--tokenizer", "tok", "--out", "out/c", "--no-eos"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    tokens = json.loads(Path("out/c.json").read_text())["tokens"]
    assert out.splitlines() == [
        "out/c.bin + .idx",
        f"  1 documents, {tokens} tokens from 2 inputs (20 B)",
        f"  tokens per document: min {tokens}, p50 {tokens}, p90 {tokens}, p99 {tokens}, max {tokens}",
        "  skipped 1: fewer than 2 tokens (first: in/b.txt)",
        f"Train on it: data.prefixes=[out/c] data.tokenizer={inputs}/tok",
    ]


@pytest.mark.parametrize("name", ["my corpus", "a,b", "a[1]", "it's", 'say "x"', "back\\", 'b\\"c', "$HOME", "k=v", "#1"])
def test_what_to_type_is_read_as_it_was_meant(name: str) -> None:
    """By a shell and by Hydra."""
    counts = {"documents": 1, "tokens": 2, "lengths": {}, "inputs": {"files": 1, "bytes": 1}, "skipped": {}, "loss_mask": False}
    summary = summary_text(f"/out/{name}", {**counts, "tokenizer": {"path": f"/tok/{name}"}})
    words = shlex.split(summary.splitlines()[-1])[3:]
    found = compose(["+experiment=quickstart", "data=indexed", "data.vocab_size=null", *words]).data
    assert (list(found.prefixes), found.tokenizer) == ([f"/out/{name}"], f"/tok/{name}")


@pytest.mark.parametrize("out", ["in/", ".", "in/.."])
def test_a_directory_is_no_beginning_of_file_names(inputs: Path, out: str) -> None:
    with pytest.raises(ConfigError, match="found a directory; expected what the names of the corpus's files begin with"):
        data_command(["prepare", "in", "--tokenizer", "tok", "--out", out])
    assert sorted(path.name for path in inputs.rglob("*") if path.suffix in (".bin", ".idx")) == []


def test_the_summary_as_json(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text('{"prompt": "the quick", "completion": " fox"}\n')
    assert main(["data", "prepare", "p.jsonl", "--tokenizer", "tok", "--out", "c", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == {"out": "c", **json.loads(Path("c.json").read_text())}
    assert summary["loss_mask"] and 0 < summary["loss_tokens"] < summary["tokens"]


BAD = [
    ([], "efflaunch data: found the following arguments are required: {prepare,tokenizer}"),
    (
        ["prepare", "in"],
        "efflaunch data prepare: found arguments it does not understand (the following arguments are required: --tokenizer, --out)",
    ),
    (["prepare", "in", "--tokenizer", "tok", "--out", "c", "--workers", "0"], "argument --workers: invalid"),
    (["prepare", "nowhere", "--tokenizer", "tok", "--out", "c"], "input nowhere: found nothing there; expected a file or a directory."),
    (["prepare", "in", "--tokenizer", "./nowhere", "--out", "c"], "tokenizer ./nowhere: found nothing that can be loaded"),
    (["prepare", "in", "--tokenizer", "tok", "--out", "in/a.txt/c"], "file in/a.txt"),
    (["prepare", "in", "--tokenizer", "tok", "--out", "c", "--chat-template", "x"], "--chat-template x: found No such file or directory"),
    (["tokenizer", "in", "--vocab-size", "100", "--out", "new"], "argument --vocab-size: '100' is not a whole number"),
    (["tokenizer", "in", "--vocab-size", "300", "--out", "tok"], "--out tok: found something there already; expected a new directory."),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_mistakes_exit_93_with_one_message(inputs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["data", *arguments]) == 93
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("Try: ") == 1
    assert not list(inputs.glob("c.*")) and not Path("new").exists()


def test_interrupted(inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "encode_all", interrupt)
    arguments = ["data", "prepare", "in", "--tokenizer", "tok", "--out", "c"]
    assert main(arguments) == 75
    assert capsys.readouterr().err == "Stopped. The same command again resumes from here.\n"
    monkeypatch.undo()
    os.chdir(inputs)
    assert main(arguments) == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom efflaunch.launcher.cli import main\n"
        "try:\n    main(['data', 'prepare', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'numpy', 'transformers', 'tokenizers', 'datasets', 'pyarrow', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=ENDS_S)
    assert done.stderr.strip() == "set()"
    assert "--text-field NAME" in done.stdout and "resumes where it was" in done.stdout


def test_what_the_command_line_says_is_kept(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content if loop.last else '' }}<|endoftext|>{% endfor %}"
    Path("t.jinja").write_text(template)
    answer = {"role": "assistant", "content": "the fox"}
    Path("c.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "quick"}, answer]}) + "\n")
    arguments = ["data", "prepare", "c.jsonl", "--tokenizer", "tok", "--out", "c", "--chat-template", "t.jinja", "--date", "2024-02-03"]
    assert main([*arguments, "--turns", "last", "--special-tokens", "text"]) == 93
    assert "renders what is before turn 2 differently" in capsys.readouterr().err
    Path("t.jinja").write_text(template.replace(" if loop.last else ''", "").replace("<|endoftext|>", "."))
    assert main([*arguments, "--turns", "last", "--special-tokens", "text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("  warning, 1 times: the chat template ends the assistant's turn with no special token")
    assert lines[-2] == "  the chat template asks for the date: it was 2024-02-03 (--date)"
    kept = json.loads(Path("c.json").read_text())
    assert kept["chat_template"] == Path("t.jinja").read_text() and kept["tokenizer"]["eos_token"] == "<|endoftext|>"
    assert [kept[name] for name in ("date", "turns", "special_tokens", "end_of_turn")] == ["2024-02-03", "last", "text", None]
    assert main([*arguments, "--date", "soon"]) == 93
    assert "--date: found 'soon'" in capsys.readouterr().err


def test_progress_counts_this_attempt_alone() -> None:
    progress = PrepareProgress(
        done_bytes=600, total_bytes=1000, resumed_bytes=200, resumed_tokens=50, documents=7, tokens=250, elapsed_s=20.0
    )
    assert progress_text(progress) == "7 documents, 250 tokens, 60 %, 10 tokens/s, 20 s to go"


def test_plain_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(data_progress, "_LINE_EVERY_S", 0.0)
    with show_progress(stream) as report:
        report(PrepareProgress(0, 10, 0, 0, 1, 2, 0.0))
    assert stream.getvalue() == "prepare: 1 documents, 2 tokens, 0 %\n"


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with show_progress(stream) as report:
        report(PrepareProgress(10, 10, 0, 0, 3, 400, 2.0))
    assert "prepare" in stream.getvalue() and "3 documents, 400 tokens, 100 %, 200 tokens/s" in stream.getvalue()


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    assert len(bash_blocks("data.md")) == 8
    printed = run_page("data.md", tmp_path)
    shown = re.search(r"^```\n(corpus/texts.*?)^Train", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert shown is not None and shown[1] in printed
    names = {path.name for path in (tmp_path / "work" / "corpus").iterdir()}
    assert {f"{name}.idx" for name in ("texts", "mixed", "rows", "csv", "think", "last", "bare", "open", "about", "some")} <= names
    assert "mixed.mask.bin" in names and "texts.mask.bin" not in names
