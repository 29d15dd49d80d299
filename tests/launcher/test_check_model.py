"""`efflaunch check-model`: a table and JSON, exit 0 for what is exact, 93 with the parameter or the mistake for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.launcher.cli import main
from efflaunch.model.families.llama import DenseHalf
from efflaunch.tests.model.public_configs import REFUSED, SUPPORTED, write_config
from efflaunch.training.data.builtin import train_tokenizer

SMALL = {**SUPPORTED["Qwen3-0.6B"], "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 128}


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["check-model", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_name_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = checked(capsys, "tiny")
    lines = out.splitlines()
    assert code == 0 and "running this package, streamed" in err
    assert lines[0].startswith("tiny, family llama: layers 0, 1 of ") and "tokens in one pack" in lines[2]
    assert lines[4].split() == ["relative", "difference", "keep", "recompute", "streamed"] and lines[5].startswith("loss ")
    rows = [line.split() for line in lines[6:16]]
    worst = [max(map(float, row[1:])) for row in rows]
    assert all(row[0].startswith(("model.", "lm_head.")) for row in rows) and worst == sorted(worst, reverse=True)
    assert lines[16].startswith("and ") and lines[-1].startswith("proven: ")
    assert len(checked(capsys, "tiny", "--all")[1].splitlines()) > len(lines)


def test_a_directory_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not read is noted, and so is what would extend the model."""
    folder = write_config(tmp_path / "mine", {**SMALL, "auto_map": {"AutoModel": "own.Own"}, "colour": "blue"})
    code, out, err = checked(capsys, folder, "--json", "--max-seq-len", "64K")
    facts = json.loads(out)
    assert code == 0 and not err and facts["exact"] is True
    assert (facts["model"], facts["family"], facts["layers"], facts["of_layers"]) == ("mine", "qwen3", [0, 1], 28)
    assert facts["config"]["num_attention_heads"] == 2 and facts["tolerance"] == 1e-10
    assert {each["name"] for each in facts["parameters"]} > {"model.embed_tokens.weight", "model.layers.1.self_attn.q_norm.weight"}
    assert all(0 <= value <= 1e-10 for each in facts["parameters"] for value in each["difference"].values())
    notes = "\n".join(facts["notes"])
    assert "code beside it (auto_map) is not run" in notes and "no qwen3 layer reads colour" in notes
    assert "64K tokens are beyond the 40K positions the model knows: extend it with model.max_positions=65536" in notes


def test_of_a_model_with_images_the_text_model_alone_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = checked(capsys, write_config(tmp_path, SUPPORTED["gemma-3-4b"]))
    assert code == 0 and "note: config.json: its text model alone is trained; the vision tower is not read" in out


def test_a_difference_is_refused_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def mlp_in(self: DenseHalf, x: Any, graph: bool = False) -> Any:
        gate, up = original(self, x, graph)
        return gate, 2 * up if graph else up

    original = DenseHalf.mlp_in
    monkeypatch.setattr(DenseHalf, "mlp_in", mlp_in)
    code, out, err = checked(capsys, write_config(tmp_path / "mine", SMALL))
    assert code == 93 and out.splitlines()[-1] == "not proven"
    message = err[err.index("efflaunch: ") :]
    assert message.startswith("efflaunch: model mine: found the gradient of model.layers.")
    assert "with recompute; expected at most 1e-10" in message or "with streamed; expected at most 1e-10" in message
    assert f"efflaunch check-model {tmp_path / 'mine'} --all" in message and "model/families/qwen3.py" in message
    code, out, _ = checked(capsys, tmp_path / "mine", "--json")
    assert code == 93 and json.loads(out)["exact"] is False


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_supported_decoder_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, message = REFUSED[name]
    code, out, err = checked(capsys, write_config(tmp_path, config))
    assert code == 93 and not out and message in err and "\n  Try: " in err


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, {**SMALL, "vocab_size": 260})
    train_tokenizer(["a b ab abc abcd bcd cd " * 50], 300, tmp_path)
    code, out, err = checked(capsys, tmp_path)
    assert code == 93 and not out and "expected at most the model's 260" in err


@pytest.mark.parametrize("place", ["meta-llama/Llama-3.1-8B", "pretrained", "./nowhere", "llama3_9b"])
def test_no_hub_is_asked(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    code, out, err = checked(capsys, place)
    assert code == 93 and not out
    assert err.startswith(f"efflaunch: {place}: found no such directory; names on a hub are not looked up here; expected a directory")
    assert "llama3_8b" in err


def test_a_file_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration whose path is a hub name is no directory either."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\npath: someone/model\n")
    code, _, err = checked(capsys, "mine", "--config-dir", tmp_path)
    assert code == 93 and err.startswith("efflaunch: someone/model: found no such directory")


def test_a_length_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = checked(capsys, "tiny", "--max-seq-len", "long")
    assert code == 93 and "'long' is no number of tokens, such as 128K" in err
