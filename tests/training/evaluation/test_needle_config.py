"""Settings of needles that make no sense are refused with what to type."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.training.evaluation.needle_texts import NeedleTask

ON = "eval.needles.lengths=[1K,4K]"


def test_needles_alone_are_an_evaluation() -> None:
    words = ["eval.needles.tasks=[one_key]", "eval.every_steps=5", "train.keep_best=eval/needles/exact_4K"]
    config = compose(["+experiment=quickstart", ON, *words])
    assert config.eval.is_on and config.eval.needles.tasks == [NeedleTask.ONE_KEY] and config.eval.needles.lengths == [1024, 4096]
    assert compose(["+experiment=quickstart"]).eval.needles.tasks == list(NeedleTask)


WRONG = {
    "eval.needles.lengths: found 16K; expected at most data.max_seq_len=8K": ["eval.needles.lengths=[16K]"],
    "eval.needles.lengths: found 64K; expected at most the 32K positions": ["eval.needles.lengths=[64K]"],
    "eval.needles.depths: found none": [ON, "eval.needles.depths=[]"],
    "eval.needles.depths[0]: found 2": [ON, "eval.needles.depths=[2]"],
    "eval.needles.tasks[0]: found the text 'one'": [ON, "eval.needles.tasks=[one]"],
    "eval.corpora: found the name needles": ["eval.corpora={needles: x}"],
    "eval/needles/loss, eval/needles/exact, eval/needles/loss_1K": [ON, "train.keep_best=eval/needles/hits"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_refused(message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["+experiment=quickstart", *WRONG[message]])
    assert message in str(caught.value)
