"""Settings of evaluation that make no sense are refused with what to type."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose

ON = "eval.corpora={web: held/web}"
NEEDLES = "eval.needles.lengths=[1K]"


def refused(*overrides):
    with pytest.raises(ConfigError) as caught:
        compose(["+experiment=quickstart", *overrides])
    return str(caught.value)


def test_what_is_right_is_taken():
    config = compose(["+experiment=quickstart", ON, "eval.lengths=[1K,8K]", "eval.every_steps=5", "train.keep_best=eval/web/loss_8K"])
    assert config.eval.lengths == [1024, 8192] and config.eval.corpora == {"web": "held/web"} and config.eval.is_on
    assert not compose(["+experiment=quickstart"]).eval.is_on
    assert compose(["+experiment=quickstart", NEEDLES, "eval.every_steps=5", "eval.context_tokens=4K"]).eval.is_on


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.corpora={'a b': x}"], ["eval.corpora", "'a b'"]),
        (["eval.every_steps=5"], ["eval.every_steps", "no corpora"]),
        (["eval.lengths=[1K]"], ["eval.lengths", "no corpora"]),
        ([NEEDLES, "eval.lengths=[1K]"], ["eval.lengths", "no corpora"]),
        ([NEEDLES, "eval.max_tokens=1K"], ["eval.max_tokens", "no corpora"]),
        ([NEEDLES, "eval.context_tokens=1K"], ["eval.context_tokens", "no corpora"]),
        ([ON, "eval.lengths=[16K]"], ["eval.lengths", "16K", "data.max_seq_len=8K"]),
        ([ON, "eval.lengths=[64K]"], ["eval.lengths", "64K", "32K positions", "model.max_positions="]),
        ([ON, "eval.lengths=[1]"], ["eval.lengths", "2 or more"]),
        ([ON, "eval.every_steps=0"], ["eval.every_steps"]),
        ([ON, "eval.every_steps=5", "train.keep_best=loss"], ["train.keep_best", "eval/web/loss, eval/web/context_gain"]),
        (["train.keep_best=eval/web/loss"], ["train.keep_best", "none: eval.corpora and eval.needles.lengths are empty"]),
        ([ON, "train.keep_best=eval/web/loss"], ["train.keep_best", "eval.every_steps=100"]),
        ([ON, "train.patience=3"], ["train.patience", "train.keep_best=METRIC"]),
        ([ON, "eval.every_steps=5", "train.keep_best=eval/web/loss", "train.patience=0"], ["train.patience"]),
    ],
)
def test_what_is_wrong_is_refused(overrides, words):
    text = refused(*overrides)
    for word in words:
        assert word in text, text


def test_prefixes_are_paths(tmp_path, monkeypatch):
    from efflaunch.launcher.config.paths import absolute_paths

    monkeypatch.setenv("HOME", "/home/somebody")
    config = compose(["+experiment=quickstart", "eval.corpora={web: ~/held, code: here/code}"])
    assert config.eval.corpora["web"] == "/home/somebody/held"
    assert absolute_paths(config, tmp_path).eval.corpora["code"] == str(tmp_path / "here/code")
