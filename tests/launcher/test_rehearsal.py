"""Miniatures: for every experiment one that composes, fits and keeps what decides which code runs; what is left out is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.cluster.config import Device
from efflaunch.errors import ConfigError
from efflaunch.estimate.timing.expert_order import expert_order
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.conf_groups import conf_dir
from efflaunch.launcher.config.ledger import plan
from efflaunch.launcher.config.rehearsal import FIRST_STEPS, STEPS, Rehearsal, axes_of, rehearsal
from efflaunch.launcher.config.run_config import Config
from efflaunch.model import model_check
from efflaunch.model.spec import model_spec
from efflaunch.tests.model.public_configs import SUPPORTED, write_config
from efflaunch.training.optimizers.lr_course import first_course, resumed_course

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
FULL = "+experiment=llama8b_1M"


def small(*words: str, ranks: int = 4, tokens: int = 2048) -> tuple[Config, Config, Rehearsal]:
    """The experiment, its miniature's configuration, and what is said of it."""
    full = compose(list(words), None)
    made = rehearsal(full, ranks=ranks, tokens=tokens)
    return full, compose([*words, *made.overrides], None), made


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_one(experiment: str) -> None:
    full, mini, made = small(f"+experiment={experiment}")
    large, spec = model_spec(full.model), model_spec(mini.model)
    assert spec.family is large.family and spec.num_layers <= 4
    assert spec.num_heads * large.num_kv_heads == large.num_heads * spec.num_kv_heads
    assert (spec.experts is None) == (large.experts is None) and spec.max_positions >= 2048
    assert (mini.train.objective, mini.train.dtype, mini.adapter.method) == (full.train.objective, full.train.dtype, full.adapter.method)
    assert (mini.parallel.sequence, mini.parallel.scheme) == (full.parallel.sequence, full.parallel.scheme)
    assert (mini.optim.state_device, mini.optim.update) == (full.optim.state_device, full.optim.update)
    assert [bool(mini.data.prefixes), bool(mini.data.sources), mini.data.builtin is not None] == [False, False, True]
    # The save and the resume behind it.
    assert resumed_course(mini.optim, first_course(mini.optim, FIRST_STEPS), FIRST_STEPS, STEPS)
    ledger, chosen = plan(mini), plan(full).inputs.policy
    assert ledger.fits and mini.cluster.ranks_per_node == min(4, full.cluster.num_nodes * full.cluster.ranks_per_node)
    policy = ledger.inputs.policy
    assert policy.segment_layers == chosen.segment_layers and policy.attention is chosen.attention
    assert (policy.layer_input.host > 0) == (chosen.layer_input.host > 0)
    assert (policy.attention_output.recompute > 0) == (chosen.attention_output.recompute > 0)
    assert len(made.same) >= 4 and any("efflaunch plan" in line for line in made.left_out)


def test_axes_are_kept_two_of_each() -> None:
    words = [
        "+experiment=quickstart_moe",
        "cluster.num_nodes=4",
        "parallel.replicate=4",
        "parallel.experts.ep=2",
        "parallel.sequence=static",
    ]
    _, mini, made = small(*words, ranks=8, tokens=1024)
    assert (mini.parallel.replicate, mini.parallel.experts.ep, mini.cluster.ranks_per_node) == (2, 2, 8)
    assert "experts over 2 ranks" in made.same and "2 copies of the weights" in made.same
    stages = ["parallel.pipeline.stages=4", "parallel.pipeline.order=interleaved", "parallel.pipeline.virtual=4"]
    _, mini, made = small("+experiment=llama70b_512k", *stages, "data.max_seq_len=128K", "memory=recompute")
    assert (mini.parallel.pipeline.stages, mini.parallel.pipeline.virtual, model_spec(mini.model).num_layers) == (2, 2, 4)
    assert "2 pipeline stages, interleaved" in made.same


def test_chunks_of_rows_to_experts_are_rehearsed_where_the_plan_has_some() -> None:
    words = ["+experiment=qwen3_30b_a3b_1M", "parallel.experts.ep=8"]
    full, mini, made = small(*words)
    assert full.parallel.experts.degree is None and not expert_order(plan(full).inputs).order.is_plain
    assert mini.parallel.experts.degree == 2 and not expert_order(plan(mini).inputs).order.is_plain
    assert any(line.startswith("rows to experts in chunks") for line in made.same)
    assert any(line.startswith("the chosen order of rows to experts: forward ") for line in made.left_out)
    _, mini, made = small(*words, "parallel.experts.degree=1")
    assert mini.parallel.experts.degree == 1 and not any("rows to experts" in line for line in (*made.same, *made.left_out))


def test_a_sequence_keeps_its_share_of_the_ranks() -> None:
    full = compose([FULL], None)
    assert axes_of(full, 4).group == 4, "all ranks share one"
    half = compose([FULL, "data.max_seq_len=512K", "data.global_batch_tokens=64M"], None)
    axes = axes_of(half, 8)
    assert (axes.group, axes.micro_batches) == (4, 4)
    assert axes_of(compose(["+experiment=llama8b_lora_1M_1gpu"], None), 4).ranks == 1, "no more ranks than there will be"


@pytest.mark.parametrize("name", ["gemma-3-4b", "Qwen3-0.6B", "gpt-oss-20b"])
def test_a_directory_is_read_for_its_sizes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Weights of that size are not made here."""
    monkeypatch.setattr(model_check, "check_weights", lambda *given: None)
    if name not in SUPPORTED:
        pytest.skip("no such config among the tests' own")
    path = write_config(tmp_path / "model", SUPPORTED[name])
    words = [FULL, "model=pretrained", f"model.path={path}", "data.max_seq_len=4K", "parallel.tokens_per_rank=1K", "memory=recompute"]
    full, mini, made = small(*words)
    assert mini.model.path is None and model_spec(mini.model).family is model_spec(full.model).family
    assert model_spec(mini.model).windows[0] == (None if model_spec(full.model).windows[0] is None else 11)
    assert any(str(path) in line for line in made.left_out)
    assert json.loads((path / "config.json").read_text()) == SUPPORTED[name]


def test_schedules_of_every_shape_and_a_device_that_was_typed(tmp_path: Path) -> None:
    for schedule in ("constant", "linear", "cosine", "wsd"):
        words = [f"optim.schedule={schedule}", "optim.min_lr_ratio=0", *(["optim.decay_steps=50"] if schedule == "wsd" else [])]
        _, mini, _ = small(FULL, *words, "memory=recompute", "cluster.device=cuda")
        assert resumed_course(mini.optim, first_course(mini.optim, FIRST_STEPS), FIRST_STEPS, STEPS)
        assert mini.cluster.device is Device.CPU


def test_what_stays_behind_is_said(tmp_path: Path) -> None:
    _, mini, made = small(FULL, "eval.needles.lengths=[8K]", "eval.every_steps=5")
    assert made.left_out[-1] == "evaluation on eval.needles" and not mini.eval.is_on
    words = [FULL, "launcher=slurm", f"checkpoint.mirror={tmp_path}", "train.objective=dpo", "data.prefixes=[a,b]", "logging.wandb=online"]
    _, mini, made = small(*words)
    said = "\n".join(made.left_out)
    assert "launcher=slurm: --dry-run" in said and "checkpoint.mirror: not written to" in said
    assert f"the corpora ({Path.cwd() / 'a'}" in said or "the corpora (a, b): random answers stand for them" in said
    assert mini.checkpoint.mirror is None and mini.logging.wandb.value == "offline" and mini.data.builtin is None


@pytest.mark.parametrize(
    ("words", "ranks", "tokens", "message"),
    [
        ([FULL], 3, 2048, "--ranks: found 3; expected a power of two"),
        ([FULL], 4, 100, "--tokens: found 100; expected a multiple of the 4 ranks that share a sequence, from 256 on"),
        ([FULL, "parallel.pipeline.stages=2", "data.max_seq_len=512K"], 1, 2048, "--ranks: found 1; expected a multiple of 2: 2 stages x "),
    ],
)
def test_mistakes(words: list[str], ranks: int, tokens: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rehearsal(compose(words, None), ranks=ranks, tokens=tokens)
