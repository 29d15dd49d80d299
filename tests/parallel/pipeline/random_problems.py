"""Problems of pipelines for tests: layers and micro-batches of unequal cost."""

from __future__ import annotations

import random

from efflaunch.parallel.pipeline.solve import PipelineProblem
from efflaunch.parallel.pipeline.work import Batch, LayerLoad, ModelLoad


def random_problem(rng: random.Random, cap_bytes: float = 1e9) -> PipelineProblem:
    ranks = rng.randint(1, 3)
    kinds = [
        LayerLoad(token_s=rng.uniform(1, 2), pair_s=rng.choice((0.0, 0.2)), kept_bytes=8, input_bytes=1, fixed_bytes=5) for _ in range(2)
    ]
    layers = tuple(rng.choice(kinds) for _ in range(rng.randint(ranks, 3 * ranks + 1)))
    batch = Batch(tuple(tuple(rng.randint(4, 12) for _ in range(rng.randint(1, 2))) for _ in range(rng.randint(1, 6))))
    head = LayerLoad(token_s=rng.choice((0.0, 2.0)), kept_bytes=2, input_bytes=1, fixed_bytes=3)
    model = ModelLoad(layers=layers, embedding=LayerLoad(fixed_bytes=3), head=head)
    return PipelineProblem(model=model, batch=batch, ranks=ranks, cap_bytes=(cap_bytes,) * ranks, virtual_stages=(1, 2, 3))
