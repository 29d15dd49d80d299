"""`plan`, `train` and `--dry-run` refuse what is wrong with a model's files before anything is written, asked or started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.cli import main
from efflaunch.launcher.config.compose import compose
from efflaunch.model.model_files import is_hub_name, local_folder, read_config_json
from efflaunch.model.spec import model_spec
from efflaunch.tests.model.small import save_model

WAYS = {"plan": ["plan"], "train": ["train"], "dry run": ["train", "--dry-run"], "slurm": ["train", "launcher=slurm", "--dry-run"]}
RUN = ["+experiment=quickstart", "model=pretrained", "data.vocab_size=300", "run.id=a"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pytorch_model.bin alone"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(40)), "model.safetensors: found"),
        (lambda folder: (folder / "config.json").write_text("{"), "no readable config.json"),
    ],
    ids=["pickled", "damaged", "no config"],
)
def test_files_are_looked_at_before_a_run_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str, spoil: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(save_model(tmp_path / "model"))
    first, *rest = WAYS[way]
    assert main([first, *RUN, "model.path=model", *rest]) == 93
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


NAMES = {
    "gpt2": True, "meta-llama/Llama-3.1-8B": True, "a/b.c_d-e": True, "a/b/c": False, "./model": False, "../model": False, "/model": False,
    "~/model": False, "models/": False, "a--b": False, "a..b": False, "model.git": False, "my model": False, "": False, "x" * 97: False,
    ".hidden": False, "a/.b": False, "name-": False, "C:\\model": False, "gs://a/b": False, "caf\u00e9": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "legal"), NAMES.items())
def test_names_the_hub_can_know(name: str, legal: bool) -> None:
    """The hub's own library agrees, but for names it would not be asked for here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    assert is_hub_name(name) == legal
    if legal:
        validate_repo_id(name)
    elif name:
        with pytest.raises((HFValidationError, ValueError)):
            validate_repo_id(name)


@pytest.mark.parametrize("path", ["./model", "models/of/mine", "/nowhere", "~/nothing-here", "a b"])
def test_what_can_only_be_a_path_is_not_looked_up(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="no such directory"):
        read_config_json(path)


def test_the_hub_is_asked_once_and_its_answer_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def answer(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise RuntimeError("404: no such repository")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    with pytest.raises(ConfigError, match="404: no such repository") as caught:
        read_config_json("someone/nothing")
    assert asked == ["someone/nothing"] and str(tmp_path / "someone/nothing") in str(caught.value)


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="found a file") as caught:
        local_folder(str(tmp_path / "model.safetensors"))
    assert caught.value.hint == f"model.path={tmp_path}"


def test_advice_to_extend_a_model_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    save_model(tmp_path)
    words = ["+experiment=quickstart", "model=pretrained", f"model.path={tmp_path}", "data.vocab_size=300"]
    assert main(["plan", "--json", *words]) == 0
    (note,) = [note for note in json.loads(capsys.readouterr().out)["notes"] if "is beyond the 64 positions" in note]
    advice = shlex.split(re.sub(r".*extend it with ", "", note))
    assert main(["plan", "--json", *words, *advice]) == 0
    assert not any("beyond" in note for note in json.loads(capsys.readouterr().out)["notes"])
    config = compose([*words, *advice])
    assert model_spec(config.model).max_positions >= config.data.max_seq_len
    assert dict(config.model.rope_scaling or {})["original_max_position_embeddings"] == 64


def test_a_mapping_replaces_the_presets() -> None:
    config = compose(["+experiment=quickstart", "model=llama3_8b", "model.rope_scaling={rope_type: linear, factor: 2}"])
    assert config.model.rope_scaling == {"rope_type": "linear", "factor": 2}
