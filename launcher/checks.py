"""Checks before a start that need the estimator, the data or a checkpoint: what does not fit or cannot be trained on is refused here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import list_checkpoints, read_state
from ..training.optimizers.algorithms import check_same_algorithm
from ..training.optimizers.lr_course import load_course, resumed_course
from .config.run_config import Config

if TYPE_CHECKING:
    from ..training.data.source import DataSource


def check_memory_plan(config: Config) -> None:
    """PlanError where memory is to be solved and nothing fits, a policy is over a given host budget, or a stage takes more than the run.

    A given policy that does not fit otherwise may run: the ledger is an upper bound.
    """
    from ..estimate.stage_plans import check_stage_plans
    from ..estimate.suggestions import check_budget, check_fits
    from ..training.data.train_stages import train_stages
    from .config.ledger import plan

    stages = train_stages(config.train, config.data)
    if config.memory.solve or config.memory.host_budget is not None or stages:
        ledger = plan(config)
        check_fits(ledger)
        check_budget(ledger)
        check_stage_plans(ledger, [stage.data for stage in stages])


def report_model(config: Config) -> None:
    """Say what `efflaunch plan` says of the model; ConfigError where its files do not make one."""
    from .config.checks import model_notes

    for note in model_notes(config):
        print(f"note: {note}", flush=True)


def check_data(config: Config) -> None:
    """DataError where the corpora cannot be trained on. A built-in corpus is made here, where one can say so."""
    from ..model.spec import model_spec
    from ..training.data.source import check_corpora, open_data

    vocab_size = model_spec(config.model).vocab_size
    if config.data.builtin is None:
        check_corpora(config.data, vocab_size, config.train.objective)
        return
    print(f"data: {config.data.builtin}, made once for this machine, in less than a minute", flush=True)
    print(f"data: {open_data(config.data, config.train.seed, vocab_size, config.train.objective).summary()}", flush=True)


def report_evaluation(config: Config) -> None:
    """Say which documents of evaluation are trained on; DataError where corpora cannot be evaluated on."""
    if not config.eval.is_on:
        return
    from ..model.spec import model_spec
    from ..training.data.config import corpus_prefixes
    from ..training.data.indexed import IndexedCorpus
    from ..training.data.source import open_data
    from ..training.evaluation.corpus import check_followed, open_corpora
    from ..training.evaluation.needles import check_needles
    from ..training.evaluation.overlap import overlap_notes

    vocab_size = model_spec(config.model).vocab_size
    corpora = open_corpora(config.eval, max_seq_len=config.data.max_seq_len, vocab_size=vocab_size, tokenizer=config.data.tokenizer)
    check_followed(config.train.keep_best, corpora)
    if config.data.builtin is None:
        training, tokenizer = [IndexedCorpus(prefix) for prefix in corpus_prefixes(config.data)], config.data.tokenizer
    else:
        source = open_data(config.data, config.train.seed, vocab_size, config.train.objective)
        training, tokenizer = source.corpora, source.tokenizer
    check_needles(config.eval, tokenizer, vocab_size)
    for note in overlap_notes([(corpus.name, corpus.corpus) for corpus in corpora], training):
        print(f"note: {note}", flush=True)


def check_resumed(config: Config, run_dir: Path) -> list[str]:
    """List what a resume changes about the learning rate and the data, a line each.

    ConfigError where no schedule reaches the last step or the optimizer is another, DataError where corpora were replaced (data.changed).
    Looks at the newest whole checkpoint of the run directory; the ranks look again at the one they restore.
    """
    newest = _newest_state(run_dir)
    mix = [open_run_data(config, run_dir)[1]] if config.data.sources else []
    if newest is None:
        return []
    step, saved = newest
    check_same_algorithm(saved["metadata"], config.optim, step)
    course = load_course(saved["extra"].get("schedule", {}), config.optim)
    change = None if course is None else resumed_course(config.optim, course, step, config.train.steps)[1]
    replaced = () if config.data.builtin else _check_data(config, saved["metadata"].get("data"), step)
    return [*([] if change is None else [change]), *(line for line in mix if line), *(f"data: {line}" for line in replaced)]


def open_run_data(config: Config, run_dir: Path) -> tuple[DataSource, str | None]:
    """The data of a run as its next start has it, and one line where the mix is another than so far.

    DataError for a source of data.sources that train.steps see too often. The mix goes on where the newest whole checkpoint was.
    """
    from ..model.spec import model_spec
    from ..training.data.source import open_data
    from ..training.data.train_stages import train_stages

    stages = train_stages(config.train, config.data)
    vocab_size = model_spec(config.model).vocab_size
    source = open_data(config.data, config.train.seed, vocab_size, config.train.objective, stages, config.train.learn)
    newest = _newest_state(run_dir) if config.data.sources else None
    step, saved = (0, None) if newest is None else (newest[0], newest[1]["extra"].get("mix"))
    return source, source.resume_mix(saved, step, config.train.steps)


def _newest_state(run_dir: Path) -> tuple[int, dict[str, Any]] | None:
    """Step and state.json of the newest checkpoint that has one; None where there is none."""
    for info in reversed(list_checkpoints(run_dir)):
        try:
            if info.is_whole:
                return info.step, read_state(info.path)
        except (OSError, ValueError, KeyError):
            # The ranks read every byte of it, and say what is damaged.
            continue
    return None


def _check_data(config: Config, saved: Any, step: int) -> tuple[str, ...]:
    from ..training.data.config import corpus_prefixes
    from ..training.data.identity import check_data_changes, data_changes, data_identity, settings_of
    from ..training.data.indexed import IndexedCorpus
    from ..training.data.train_stages import train_stages

    corpora = [IndexedCorpus(prefix) for prefix in corpus_prefixes(config.data)]
    stages = train_stages(config.train, config.data)
    now = data_identity(corpora, settings_of(config.data, config.train.seed, stages, config.train.learn), None)
    changes = data_changes(saved, now)
    check_data_changes(changes, config.data.changed, step)
    return changes.lines
