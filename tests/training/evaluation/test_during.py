"""When an evaluation is due, what a stop in it means, and what checkpoints keep of it. The model is a list of losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from efflaunch.checkpoint.files import step_path
from efflaunch.tests.data.corpora import write_corpus
from efflaunch.training.evaluation import during
from efflaunch.training.evaluation.config import EvalConfig
from efflaunch.training.evaluation.during import RunEvaluation
from efflaunch.training.evaluation.pin import is_ours
from efflaunch.utils.heartbeat import Heartbeat, read_beat

STOP = SimpleNamespace(requested=False)


class Scripted:
    """In place of the forward passes: losses one after the other; None is a stop in the middle."""

    def __init__(self, losses):
        self.losses = list(losses)

    def corpus(self, corpus, go_on):
        loss = self.losses.pop(0)
        if loss is None:
            return None
        return SimpleNamespace(metrics=lambda: {f"eval/{corpus.name}/loss": loss}, fields=lambda: {"corpus": corpus.name, "loss": loss})


@pytest.fixture
def make(tmp_path, monkeypatch):
    """(evaluation, events) of a run of ten steps."""
    monkeypatch.setattr(during, "position_of", lambda model: SimpleNamespace(at=lambda phase: None))
    prefix = write_corpus(tmp_path / "held", [[1, 2, 3]])

    def made(losses=(), *, saved=None, keep_best=None, patience=None, **fields):
        config = SimpleNamespace(
            eval=EvalConfig(name="t", corpora={"web": prefix}, **fields),
            train=SimpleNamespace(steps=10, keep_best=keep_best, patience=patience),
            data=SimpleNamespace(max_seq_len=8, global_batch_tokens=8),
        )
        session = SimpleNamespace(
            spec=SimpleNamespace(vocab_size=10),
            source=SimpleNamespace(tokenizer=None),
            topology=SimpleNamespace(rank=0, world=None),
            checkpointer=SimpleNamespace(directory=tmp_path / "checkpoints"),
            model=None,
            device=None,
        )
        events, waits, pulse = [], [], Heartbeat()
        evaluation = RunEvaluation(
            config, session, lambda lengths: SimpleNamespace(predicted_s=sum(lengths)),
            report=lambda event, **fields: events.append((event, fields)), pulse=pulse,
            expected_s=lambda predicted_s: max(predicted_s or 0.0, 7.5), saved=saved,
            timeout=SimpleNamespace(expect=waits.append),
        )  # fmt: skip
        evaluation._evaluator, evaluation.beats, evaluation.waits = Scripted(losses), pulse, waits
        return evaluation, events

    return made


@pytest.mark.parametrize(
    ("fields", "due"),
    [
        ({}, [10]),
        ({"at_end": False}, []),
        ({"at_start": True, "at_end": False}, [0]),
        ({"every_steps": 4}, [4, 8, 10]),
        ({"every_steps": 5, "at_start": True}, [0, 5, 10]),
    ],
)
def test_when_it_is_due(make, fields, due):
    evaluation, events = make([1.0] * 11, **fields)
    assert not evaluation.begin(0, STOP)
    for done in range(1, 11):
        assert not evaluation.after(done, STOP, False)
    assert [event["step"] for kind, event in events if kind == "eval"] == due


def test_a_step_takes_as_long_as_one_of_training(make):
    evaluation, _ = make([1.0], every_steps=1)
    evaluation.after(3, STOP, False)
    beat = read_beat(evaluation.beats._memory)
    assert beat.step == 3 and beat.expected_s == 7.5 and beat.is_long, "the first one is long"


def test_a_larger_step_than_trainings_is_given_its_time(make):
    evaluation, _ = make([1.0], every_steps=1)
    evaluation.after(3, STOP, False)
    assert [evaluation._planned(lengths).predicted_s for lengths in ([2, 3], [20, 4])] == [5, 24] and evaluation.waits == [7.5, 24]
    evaluation.beats.at("forward")
    assert read_beat(evaluation.beats._memory).expected_s == 24


def test_a_run_that_stops_does_not_evaluate_first(make):
    evaluation, events = make(every_steps=5)
    assert evaluation.after(5, STOP, True) and events == []
    assert evaluation.pending(5), "the next start begins with it"


def test_a_stop_in_the_middle_is_begun_anew(make):
    evaluation, events = make([None], every_steps=5)
    assert evaluation.after(5, STOP, False) and events == []
    again, events = make([2.0], every_steps=5, saved=evaluation.state())
    assert not again.begin(5, STOP) and [event["step"] for _, event in events] == [5]
    once, events = make(every_steps=5, saved=again.state())
    assert not once.begin(5, STOP) and events == [], "what is done is not done again"


def test_a_stop_in_the_last_one_leaves_the_run_unfinished(make):
    evaluation, _ = make([None])
    assert evaluation.after(10, STOP, False) and evaluation.is_over(10) and evaluation.pending(10)


def test_the_best_checkpoint_is_pinned_and_kept_in_mind(make, tmp_path):
    paths = {step: step_path(tmp_path / "checkpoints", step) for step in (2, 4, 6)}
    for path in paths.values():
        path.mkdir(parents=True)
    evaluation, events = make([3.0, 2.0, 2.5], every_steps=2, keep_best="eval/web/loss")
    for done in (2, 4, 6):
        evaluation.after(done, STOP, False)
        assert evaluation.is_best(done) == (done < 6)
        evaluation.pin(done)
    assert [step for step, path in paths.items() if is_ours(path)] == [4]
    assert [(event["step"], event["pinned"]) for kind, event in events if kind == "best"] == [(2, True), (4, True)]
    again, events = make([2.2], every_steps=2, keep_best="eval/web/loss", saved=evaluation.state())
    again.begin(6, STOP)
    again.after(8, STOP, False)
    assert not again.is_best(8) and [kind for kind, _ in events] == ["eval"]


def test_a_pin_that_a_crash_prevented_is_made_up_for(make, tmp_path):
    evaluation, _ = make([3.0], every_steps=2, keep_best="eval/web/loss")
    evaluation.after(2, STOP, False)
    path = step_path(tmp_path / "checkpoints", 2)
    path.mkdir(parents=True)
    again, events = make(every_steps=2, keep_best="eval/web/loss", saved=evaluation.state())
    again.begin(2, STOP)
    assert is_ours(path) and [kind for kind, _ in events] == ["best"]


def test_patience_ends_the_run_and_survives_a_resume(make):
    evaluation, events = make([2.0, 3.0, 3.0], every_steps=1, keep_best="eval/web/loss", patience=2)
    for done in (1, 2):
        assert not evaluation.after(done, STOP, False) and not evaluation.is_over(done)
    half = evaluation.state()
    evaluation.after(3, STOP, False)
    assert evaluation.is_over(3) and not evaluation.pending(3)
    (early,) = [event for kind, event in events if kind == "early_stop"]
    assert (early["step"], early["best"], early["best_step"], early["evaluations"]) == (3, 2.0, 1, 2)
    again, _ = make([2.5], every_steps=1, keep_best="eval/web/loss", patience=2, saved=half)
    again.after(3, STOP, False)
    assert again.is_over(3)
    ended, _ = make(every_steps=1, keep_best="eval/web/loss", patience=2, saved=evaluation.state())
    assert ended.is_over(3)
    patient, _ = make(every_steps=1, keep_best="eval/web/loss", patience=3, saved=evaluation.state())
    assert not patient.is_over(3)
