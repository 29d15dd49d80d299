"""Has a model proven before it trains: rank 0 compares a tiny copy with plain Hugging Face, once, and all ranks go by its verdict.

A family whose rows in tests/parity/ compare it on ranks is not compared again. Proofs are kept in the run's directory and in the user's
cache, under a digest of what they depend on (model/proof/verdict.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import UserError
from ..model.config import ModelConfig
from ..model.proof.tiny_config import TinyConfig, tiny_config
from ..model.proof.verdict import difference, is_proof, is_proven_by_tests, proof_digest, proof_text
from ..parallel.topology import whole_world
from ..utils.atomic_files import write_atomic

log = logging.getLogger(__name__)
FILE = "proof.json"
"""Of a run's directory: what was compared before its first step."""


def prove_model(config: ModelConfig, run_dir: Path, on_progress: Callable[[str], None] | None = None) -> None:
    """Return once the model is known to be trained as Hugging Face computes it; ConfigError on every rank where it is not. Collective."""
    tiny = tiny_config(config)
    if is_proven_by_tests(tiny):
        return
    payload: list[UserError | str | None] = [None]
    failure: Exception | None = None
    world = whole_world()
    if dist.get_rank(world) == 0:
        try:
            _prove(config, tiny, run_dir, on_progress or (lambda what: None))
        except UserError as error:
            payload[0] = error
        except Exception as error:  # the others wait in the broadcast
            payload[0], failure = f"{type(error).__name__}: {error}", error
    dist.broadcast_object_list(payload, 0, group=world, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if isinstance(payload[0], UserError):
        raise payload[0]
    if isinstance(payload[0], str):
        raise RuntimeError(f"rank 0 could not compare the model with Hugging Face's ({payload[0]}); its log says where")


def cache_folder() -> Path | None:
    """The user's cache of proofs; None for a user without a home, as in some containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "efflaunch" / "proofs"


def _prove(config: ModelConfig, tiny: TinyConfig, run_dir: Path, on_progress: Callable[[str], None]) -> None:
    digest = proof_digest(tiny)
    own, cache = run_dir / FILE, cache_folder()
    shared = None if cache is None else cache / f"{digest}.json"
    for file in filter(None, (own, shared)):
        if is_proof(file, digest):
            log.info("%s is proven already: %s", config.name, file)
            return
    from ..model.proof.compare import TOLERANCE, compare

    on_progress("proving the model")
    agreement = compare(tiny, on_progress=lambda what: on_progress(f"proving the model: {what}"))
    if not agreement.is_exact:
        raise difference(config, tiny, agreement, TOLERANCE)
    text = proof_text(config.name, tiny, agreement)
    write_atomic(own, text)
    log.info("%s is proven: loss and gradients are Hugging Face's, layers %s of %d", config.name, tiny.layers, tiny.spec.num_layers)
    if shared is None:
        return
    try:
        shared.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(shared, text)
    except (OSError, UserError) as error:
        log.warning("the proof of %s is kept in the run's directory alone: %s", config.name, error)
