"""Paths of a configuration: `~`, where relative ones start, and runs that are used from another directory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from efflaunch.errors import ConfigError
from efflaunch.launcher import cli
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.paths import PATH_KEYS, absolute_paths, expand_home
from efflaunch.launcher.config.run_config import Config
from efflaunch.launcher.config.schema import walk_fields
from efflaunch.launcher.rundir.run_dir import RUN_FILE, make_run_dir, read_run, store_config, write_run
from efflaunch.utils.stored_paths import base_of

QUICK = "+experiment=quickstart"
TEXTS = {
    *("experiment", "run.id", "data.builtin", "optim.schedule", "cluster.slurm.partition", "cluster.slurm.account", "cluster.slurm.qos"),
    *("cluster.slurm.constraint", "cluster.slurm.gres", "cluster.slurm.mem", "cluster.slurm.sbatch", "cluster.slurm.prologue"),
    *("cluster.slurm.srun", "launcher.slurm.interface", "launcher.slurm.after", "launcher.slurm.exclude", "launcher.ray.address"),
    *("adapter.targets", "adapter.modules_to_save", "adapter.quantized", "optim.algorithm", "cluster.gpu"),
    *("launcher.ray.exclude", "launcher.ray.interface", "launcher.ray.env", "logging.wandb_project", "train.keep_best"),
}
"""Keys whose values are texts and no paths."""


def test_every_text_of_the_configuration_is_a_path_or_is_not() -> None:
    def holds_text(hint: object) -> bool:
        return hint is str or any(holds_text(inner) for inner in get_args(hint))

    others = {"launcher.nodes", "optim.warmup_steps"}
    texts = {key for key, hint, _ in walk_fields() if holds_text(hint) and not key.endswith(".name") and key not in others}
    assert texts - {key for key in texts if key.split(".")[-1] in ("extra", "rope_scaling", "resources", "zero")} == set(PATH_KEYS) | TEXTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/a", "/home/me/a"),
        ("~", "/home/me"),
        ("[~/a,~/b, ~/c]", "[/home/me/a,/home/me/b, /home/me/c]"),
        ("/a/~b", "/a/~b"),
        ("a~/b", "a~/b"),
        ("'~/a b'", "'~/a b'"),
        ("['~/a',~/b]", "['~/a',/home/me/b]"),
        ("~/a,~/b", "/home/me/a,/home/me/b"),
    ],
)
def test_home_in_what_is_typed(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("data.prefixes", text) == expected
    assert expand_home("logging.wandb_project", text) == text
    assert expand_home("data.sources.web.prefixes", text) == expected


def test_home_is_written_out_by_every_way_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "# Mine.\ndefaults: [indexed]\nname: mine\nprefixes: [~/c]\ntokenizer: ~/t\nmax_seq_len: 8K\nglobal_batch_tokens: 16K\n"
    )
    from_file = compose([QUICK, "data=mine", "run.root=~/runs"], str(tmp_path))
    assert (from_file.data.prefixes, from_file.data.tokenizer, from_file.run.root) == (["/home/me/c"], "/home/me/t", "/home/me/runs")
    quoted = changed(from_file, parse_overrides(["data.prefixes=['~/a b']", "checkpoint.mirror=~/second"]), None)
    assert (quoted.data.prefixes, quoted.checkpoint.mirror) == (["/home/me/a b"], "/home/me/second")
    mixed = changed(from_file, parse_overrides(["data.sources={web: {prefixes: [~/a, b]}}", "data.prefixes=[]"]), None)
    assert mixed.data.sources["web"].prefixes == ["/home/me/a", "b"]
    assert absolute_paths(mixed, tmp_path).data.sources["web"].prefixes == ["/home/me/a", f"{tmp_path}/b"]
    with pytest.raises(ConfigError, match=r"data.tokenizer: found ~nobody-here, and no user nobody-here"):
        compose([QUICK, "data.tokenizer=~nobody-here/t"])
    assert cli._with_home("--config-dir=~/x") == "--config-dir=/home/me/x" and cli._with_home("~/runs/a") == "/home/me/runs/a"
    assert cli._with_home("data.tokenizer=~/t") == "data.tokenizer=~/t"


def _config(*overrides: str) -> Config:
    return compose([QUICK, *overrides])


def test_relative_paths_start_where_the_command_was_typed(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    config = _config("data.tokenizer=tok", "checkpoint.mirror=s3://bucket/run", "launcher.slurm.python=bin/python")
    config = replace(config, model=replace(config.model, path="org/name"))
    made = absolute_paths(config, tmp_path)
    assert made.data.tokenizer == f"{tmp_path}/tok" and made.model.path == "org/name" and made.run.root == f"{tmp_path}/runs"
    assert made.checkpoint.mirror == "s3://bucket/run" and made.launcher.slurm.python == f"{tmp_path}/bin/python"
    assert made.launcher.ray.python == "python" and absolute_paths(made, Path("/elsewhere")) == made


def test_on_ray_nodes_they_start_in_the_directory_of_the_nodes(tmp_path: Path) -> None:
    config = _config("launcher=ray", "launcher.ray.work_dir=/nodes", "parallel.profile=p.yaml", "launcher.ray.code=[mine]")
    made = absolute_paths(config, tmp_path)
    assert (made.parallel.profile, made.launcher.ray.code) == ("/nodes/p.yaml", [f"{tmp_path}/mine"])
    assert made.run.root == f"{tmp_path}/runs"
    assert absolute_paths(replace(config, launcher=_config().launcher), tmp_path).parallel.profile == f"{tmp_path}/p.yaml"


def test_a_run_holds_absolute_paths_and_an_older_one_is_read_as_if(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, run_dir = tmp_path / "place", tmp_path / "place" / "runs" / "a"
    place.mkdir()
    monkeypatch.chdir(place)
    config = compose([QUICK, "run.id=a", "data.builtin=null", "data.prefixes=[corpus]", "memory.offload_dir=./fast"])
    make_run_dir(run_dir)
    store_config(run_dir, config)
    stored = yaml.safe_load((run_dir / RUN_FILE).read_text())
    assert stored["data"]["prefixes"] == [f"{place}/corpus"] and stored["memory"]["offload_dir"] == f"{place}/fast"
    # What an earlier version wrote.
    write_run(run_dir, config, 1)
    monkeypatch.chdir("/")
    assert base_of(run_dir, config.run.root, config.run.id) == place.resolve()
    assert read_run(run_dir).config.data.prefixes == [f"{place.resolve()}/corpus"]
    assert base_of(tmp_path / "moved", config.run.root, config.run.id) is None
    monkeypatch.chdir(place)
    assert store_config(run_dir, config) == (1, []), "the same command in the same directory changes nothing"
    assert os.path.isabs(read_run(Path("runs/a")).config.run.root)
