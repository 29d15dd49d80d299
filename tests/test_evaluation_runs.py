"""Evaluation as a person has it: runs with and without, stopped in the middle, the best one kept, and the commands around them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from efflaunch.checkpoint.files import list_checkpoints
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.state import read_state
from efflaunch.tests.limits import wait_until
from efflaunch.tests.test_real_runs import BASE, finish, make_corpus, run, start
from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.data.writer import IndexedWriter

SIDE = Path(__file__).resolve().parent / "evaluation_run_side.py"
HELD = "eval.corpora={held: held, seen: corpus}"
EVAL = (HELD, "eval.every_steps=2", "eval.at_start=true", "eval.lengths=[32,128]", "eval.context_tokens=64", "eval.max_tokens=2K")
STEPS = 6


def make_held_out(directory: Path) -> None:
    writer = IndexedWriter(str(directory / "held"), "uint16")
    generator = np.random.default_rng(11)
    for length in (300, 40, 7, 256):
        writer.add(np.cumsum(generator.integers(0, 3, length)) % 97)
    writer.finish()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluation, and both corpora."""
    directory = tmp_path_factory.mktemp("plain")
    make_corpus(directory)
    make_held_out(directory)
    finish(start(directory, "train", *BASE, f"train.steps={STEPS}"), directory)
    return directory


@pytest.fixture(scope="module")
def judged(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with evaluations, its best checkpoint kept."""
    directory = tmp_path_factory.mktemp("judged")
    copy_corpora(plain, directory)
    overrides = (*EVAL, "train.keep_best=eval/held/loss", "checkpoint.keep_last=1", "parallel.sequence=static")
    finish(start(directory, "train", *BASE, f"train.steps={STEPS}", *overrides), directory)
    return directory


def copy_corpora(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.name.startswith(("corpus.", "held.")):
            shutil.copy(path, target)


def events(directory: Path, kind: str) -> list[dict]:
    return [event for event in MetricsFollower(directory / "runs" / "run").read() if event["event"] == kind]


def test_training_is_bit_equal_with_and_without(plain: Path, judged: Path) -> None:
    keys = ("step", "loss", "grad_norm", "lr", "tokens")
    without, with_it = ([[event[key] for key in keys] for event in events(where, "step")] for where in (plain, judged))
    assert without == with_it and len(without) == STEPS


def test_what_a_run_reports(judged: Path) -> None:
    found = events(judged, "eval")
    assert [(event["step"], event["corpus"]) for event in found] == [(step, name) for step in (0, 2, 4, 6) for name in ("held", "seen")]
    first, last = found[0], found[-2]
    assert last["loss"] < first["loss"] and last["targets"] == 300 + 40 + 7 + 256 - 4
    assert [entry["length"] for entry in last["lengths"]] == [32, 128] and last["context"]["tokens"] == 64
    # Both documents of 128 tokens and more have two such windows; the last token of the second predicts nothing.
    assert all(entry["targets"] == 4 * 16 - 1 for entry in last["lengths"])
    text = (judged / "output").read_text()
    assert "note: eval.corpora.seen shares 300 of 300 documents with training" in text and "eval.corpora.held" not in text
    assert "evaluation after step 2: held " in text and "evaluation  held " in text
    steps = events(judged, "step")
    assert all(event["device_tokens_per_s"] > 0 and event["model_flops_per_s"] > 0 and "mfu" not in event for event in steps)
    assert "no peak known" in text


def test_the_best_checkpoint_is_pinned(judged: Path) -> None:
    losses = {event["step"]: event["loss"] for event in events(judged, "eval") if event["corpus"] == "held"}
    best = min(losses, key=lambda step: losses[step])
    pinned = [info.step for info in list_checkpoints(judged / "runs" / "run") if info.is_pinned]
    assert pinned == [best] and events(judged, "best")[-1]["step"] == best


def printed_json(text: str) -> dict:
    """What a command printed on its standard output; what libraries wrote to the other one comes behind it."""
    return json.JSONDecoder().raw_decode(text)[0]


def test_evaluate_agrees_with_the_run_and_with_hugging_face(judged: Path, tmp_path: Path) -> None:
    wanted = next(event for event in events(judged, "eval")[::-1] if event["corpus"] == "held")
    facts = printed_json(run(judged, "evaluate", "runs/run", "eval.corpora={held: held}", "--json"))
    assert facts["step"] == STEPS and facts["place"] == "runs/run"
    (found,) = facts["corpora"]
    assert {key: found[key] for key in ("loss", "targets", "lengths", "positions", "context")} == {
        key: wanted[key] for key in ("loss", "targets", "lengths", "positions", "context")
    }
    run(judged, "export", "runs/run", str(tmp_path / "model"), "--dtype", "float32")
    words = ("evaluate", str(tmp_path / "model"), "eval.corpora={held: held}", "data.max_seq_len=256", "cluster.ranks_per_node=1")
    (alone,) = printed_json(run(judged, *words, "data.global_batch_tokens=1K", "--json"))["corpora"]
    assert alone["loss"] == pytest.approx(plain_loss(tmp_path / "model", judged / "held"), rel=1e-5)
    assert alone["loss"] == pytest.approx(found["loss"], rel=1e-5)
    text = run(judged, "evaluate", "runs/run", "eval.corpora={held: held}", "--step", str(STEPS))
    assert f"held: loss {found['loss']:.4f} over {found['targets']:,} targets" in text and "128 of context" in text


def test_in_stages_it_is_what_one_stage_says(plain: Path, tmp_path: Path) -> None:
    """A run in two stages judges itself; its checkpoint evaluated in stages, and without, says the same to the last bit."""
    copy_corpora(plain, tmp_path)
    stages, words = "parallel.pipeline.stages=2", ("evaluate", "runs/run", "eval.corpora={held: held}", "--json")
    overrides = (*EVAL, "train.keep_best=eval/held/loss", "parallel.sequence=static", stages, "parallel.tokens_per_rank=256")
    finish(start(tmp_path, "train", *BASE, "train.steps=2", *overrides), tmp_path)
    wanted = next(event for event in events(tmp_path, "eval")[::-1] if event["corpus"] == "held")
    (in_stages,), (whole,) = (printed_json(run(tmp_path, *words, more))["corpora"] for more in (stages, "parallel.pipeline.stages=1"))
    for key in ("loss", "targets", "lengths", "positions", "context"):
        assert in_stages[key] == wanted[key]
    assert whole["loss"] == pytest.approx(in_stages["loss"], rel=1e-6) and whole["targets"] == in_stages["targets"]
    assert [info.is_pinned for info in list_checkpoints(tmp_path / "runs" / "run") if info.step == 2] == [True]


@pytest.mark.slow
def test_adapters_are_judged_with_the_weights_beside_them(plain: Path, tmp_path: Path) -> None:
    """Their checkpoint holds no others: those of the model's directory are read; adapters of another model are refused."""
    copy_corpora(plain, tmp_path)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    for name in ("model", "other"):
        # Far from what an initialisation makes: random weights would be seen.
        made = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=97, initializer_range=0.3, **fields))
        made.save_pretrained(tmp_path / name)
    words = [word for word in BASE if not word.startswith("model")]
    own = ("model=pretrained", "model.path=model", "adapter=lora", "adapter.rank=2", "parallel.sequence=static")
    finish(start(tmp_path, "train", *words, *own, "train.steps=2", "eval.corpora={held: held}"), tmp_path)
    (wanted,) = events(tmp_path, "eval")
    (found,) = printed_json(run(tmp_path, "evaluate", "runs/run", "--json"))["corpora"]
    assert found["loss"] == wanted["loss"] and found["positions"] == wanted["positions"]
    assert "trained beside other weights" in run(tmp_path, "evaluate", "runs/run", f"model.path={tmp_path / 'other'}", expect=93)


def plain_loss(model_dir: Path, prefix: Path) -> float:
    """Hugging Face's, over documents cut as training cuts them."""
    model, corpus = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64), IndexedCorpus(str(prefix))
    total, count = 0.0, 0
    for document, length in enumerate(corpus.lengths.tolist()):
        for begin in range(0, length - 1, 256):
            tokens = torch.from_numpy(corpus.tokens(document, begin, min(begin + 257, length)))
            ids = tokens[:-1].unsqueeze(0) if len(tokens) == 257 or begin + 256 >= length else tokens.unsqueeze(0)
            with torch.no_grad():
                logits = model(input_ids=ids, position_ids=torch.arange(ids.shape[1]).unsqueeze(0), use_cache=False).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
            count += len(tokens) - 1
    return total / count


def test_report_and_compare(plain: Path, judged: Path) -> None:
    run(judged, "report", "runs/run", "--out", "report.html")
    page = (judged / "report.html").read_text()
    last = events(judged, "eval")[-2]
    assert f"{last['loss']:.4f}" in page and "<svg" in page
    facts = printed_json(run(judged, "compare", "runs/run", str(plain / "runs" / "run"), "--json"))
    assert facts["runs"][0]["loss"] == facts["runs"][1]["loss"] and "eval.every_steps" in facts["settings"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("evaluate", "nowhere", HELD), "no run.yaml and no config.json"),
        (("evaluate", "runs/run", "eval.corpora={}", "eval.lengths=[]", "eval.at_start=false", "eval.every_steps=null"), "eval.corpora"),
        (("evaluate", "runs/run", "eval.corpora={a: nowhere}"), "nowhere.idx"),
        (("evaluate", "runs/run", "--step", "5"), "checkpoints of steps"),
        (("evaluate", "runs/run", "eval.lengths=[1K]"), "data.max_seq_len=256"),
        (
            ("evaluate", "runs/run", "eval.corpora={held: held}", "model.vocab_size=150"),
            "another model's weights",
        ),
    ],
)
def test_what_evaluate_refuses(judged: Path, words: tuple[str, ...], told: str) -> None:
    assert told in run(judged, *words, expect=93)


def test_a_stop_during_an_evaluation(plain: Path, judged: Path, tmp_path: Path) -> None:
    """It ends after the step it is at, the run saves, and the next start evaluates first; in the end all is as if nothing had happened."""
    copy_corpora(plain, tmp_path)
    process = start(
        tmp_path, "train", *BASE, f"train.steps={STEPS}", *EVAL, "train.keep_best=eval/held/loss", script=SIDE, HOLD_EVALUATION="4"
    )
    wait_until(lambda: (tmp_path / "runs" / "run" / "held-evaluation").exists() or process.poll() is not None)
    assert process.poll() is None, (tmp_path / "output").read_text()
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: read_state(tmp_path / "runs" / "run").state == "stopping", "it was not told")
    (tmp_path / "runs" / "run" / "released-evaluation").touch(0o600)
    finish(process, tmp_path, expect=75)
    assert max(event["step"] for event in events(tmp_path, "step")) == 4
    assert max(event["step"] for event in events(tmp_path, "eval")) == 2
    finish(start(tmp_path, "resume", "runs/run"), tmp_path)
    numbers = {(event["step"], event["corpus"]): event["loss"] for event in events(tmp_path, "eval")}
    assert numbers == {(event["step"], event["corpus"]): event["loss"] for event in events(judged, "eval")}
    assert events(tmp_path, "best")[-1]["step"] == events(judged, "best")[-1]["step"]


def test_a_crash_during_an_evaluation(plain: Path, judged: Path, tmp_path: Path) -> None:
    """The run starts again from its last checkpoint by itself, and in the end all is as if nothing had happened."""
    copy_corpora(plain, tmp_path)
    words = (*BASE, f"train.steps={STEPS}", *EVAL, "train.keep_best=eval/held/loss")
    finish(start(tmp_path, "train", *words, script=SIDE, DIE_EVALUATION="4"), tmp_path)
    assert (tmp_path / "runs" / "run" / "died-evaluation").exists() and len(read_state(tmp_path / "runs" / "run").attempts) == 2
    numbers = {(event["step"], event["corpus"]): event["loss"] for event in events(tmp_path, "eval")}
    assert numbers == {(event["step"], event["corpus"]): event["loss"] for event in events(judged, "eval")}


def test_early_stop(plain: Path, tmp_path: Path) -> None:
    """With a rate of next to nothing nothing gets better: the run ends after its patience, for good."""
    copy_corpora(plain, tmp_path)
    words = ("eval.corpora={held: held}", "eval.every_steps=1", "train.keep_best=eval/held/loss", "train.patience=2", "optim.lr=1e-30")
    finish(start(tmp_path, "train", *BASE, "train.steps=20", *words), tmp_path)
    last = max(event["step"] for event in events(tmp_path, "step"))
    assert last < 20 and events(tmp_path, "early_stop")[-1]["step"] == last
    assert "ending after step" in (tmp_path / "output").read_text()
    finish(start(tmp_path, "resume", "runs/run"), tmp_path)
    assert max(event["step"] for event in events(tmp_path, "step")) == last, "it has ended"
