"""Overrides are read by one parser: what train takes, resume takes, with the same meaning; what one refuses, all refuse."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher import cli
from efflaunch.launcher.config.compose import changed, compose, sweep_values
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.run_config import Config

QUICK = "+experiment=quickstart"


@pytest.fixture(scope="module")
def stored() -> Config:
    return compose([QUICK])


ALIKE = [
    ("launcher.ray.resources={a:1,c:1.0}",),
    ("model.extra={rms_norm_eps:1e-6,tie_word_embeddings:false,eos_token_id:[1,2],pad_token_id:null}",),
    ("model.extra.rms_norm_eps=1e-6",),
    ("optim.lr=1e-3", "optim.betas=[0.8,0.9]"),
    ("train.steps=1_000",),
    ("data.prefixes=[/a,'/b c']", "data.builtin=null"),
    ("launcher.nodes=1:1", "launcher=slurm"),
    ("optim.lr=0.5", "optim=adamw"),
    ("memory.offload_dir='/a: b'",),
    ("logging.wandb_project='it is: {odd}, [x] ${not}'".replace("${not}", "\\${not}"),),
    ("logging.wandb_project=2026-01-01",),
    ("logging.wandb=off", "optim.grad_clip=null"),
    ("train.seed=${train.steps}",),
    ("optim.lr=float(1)", "train.z_loss=0"),
    ("+train.seed=3", "++data.max_seq_len=4K"),
]


@pytest.mark.parametrize("words", ALIKE, ids=lambda words: words[0])
def test_read_alike_at_a_start_and_later(stored: Config, words: tuple[str, ...]) -> None:
    first = compose([QUICK, *words])
    assert changed(stored, parse_overrides(list(words)), None) == first
    # Once more on top of itself: what is stored stays what it is.
    assert changed(first, parse_overrides([words[0]]), None) == changed(first, [], None) == first


REFUSED = [
    "train.steps=0x10",
    "train.steps=1,2",
    "train.steps=range(1,3)",
    "train.steps=1e",
    "memory.solve=yes",
    "optim.betas=[0.9,0.95",
    "optim.lr=",
    "model.extra={a:b",
    "logging.wandb_project=a=b",
    "logging.wandb_project=a#b",
    "logging.wandb_project=~x",
    "train.seed=${train.sed}",
    "train.steps=???",
    "train.stps=3",
    "~train.seed",
    "optim=adamx",
]


@pytest.mark.parametrize("word", REFUSED)
def test_refused_alike(stored: Config, word: str) -> None:
    with pytest.raises(ConfigError) as at_start:
        compose([QUICK, word])
    with pytest.raises(ConfigError) as later:
        changed(stored, parse_overrides([word]), None)
    assert str(later.value).partition("Try:")[0] == str(at_start.value).partition("Try:")[0]


def test_an_option_that_lacks_a_value_is_refused_later_too(stored: Config) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: found no value"):
        changed(stored, parse_overrides(["model=pretrained"]), None)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("train.seed=0,1", ["0", "1"]),
        ("optim.lr=1e-3,1e-4", ["1e-3", "1e-4"]),
        ("train.seed=range(0,3)", ["0", "1", "2"]),
        ("train.seed=choice(4,5)", ["4", "5"]),
        ("model.extra={a:b,c:1.0}", None),
        ("model.extra={a:1},{a:2}", ["{a:1}", "{a:2}"]),
        ("logging.wandb_project=a\\,b,c", ["a\\,b", "c"]),
        ("memory=keep,auto", ["keep", "auto"]),
        ("+experiment=quickstart", None),
        ("optim.betas=[0.9,0.95]", None),
    ],
)
def test_a_sweep_takes_apart_what_the_parser_does(argument: str, values: list[str] | None) -> None:
    assert sweep_values(argument) == values


def test_what_a_sweep_cannot_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", QUICK, "train.seed=[0,1"]) == 93
    assert "argument 'train.seed=[0,1'" in capsys.readouterr().err
