"""Checks before a start that need the estimator or the data: what does not fit or cannot be trained on is refused here."""

from __future__ import annotations

from .config.run_config import Config


def check_memory_plan(config: Config) -> None:
    """PlanError where memory is to be solved and nothing fits, or a given policy is over a given host budget.

    A given policy that does not fit otherwise may run: the ledger is an upper bound.
    """
    from ..estimate.suggestions import check_budget, check_fits
    from .config.ledger import plan

    if config.memory.solve or config.memory.host_budget is not None:
        ledger = plan(config)
        check_fits(ledger)
        check_budget(ledger)


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
