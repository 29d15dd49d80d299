"""Problems of pipelines for tests, of unequal layers and micro-batches; and schedules executed by what needs what alone."""

from __future__ import annotations

import random

from efflaunch.parallel.pipeline.pipeline_plan import PipelineSchedule, Unit, UnitKind
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


def runs_to_the_end(schedule: PipelineSchedule, rng: random.Random) -> bool:
    """Execute units one at a time, on a rank chosen at random, by the rules of what needs what alone."""
    queues = [list(order) for order in schedule.orders]
    done: set[tuple[str, int, int, int]] = set()

    def ready(unit: Unit) -> bool:
        stage, m, j = unit.stage, unit.micro_batch, unit.slice
        if unit.kind is UnitKind.FORWARD:
            return (stage == 0 or ("F", stage - 1, m, j) in done) and (j == 0 or ("F", stage, m, j - 1) in done)
        if unit.kind is UnitKind.WEIGHT:
            return ("B", stage, m, j) in done
        behind = stage == schedule.num_stages - 1 or ("B", stage + 1, m, j) in done
        return behind and ("F", stage, m, j) in done and (j == schedule.slices - 1 or ("B", stage, m, j + 1) in done)

    while able := [queue for queue in queues if queue and ready(queue[0])]:
        unit = rng.choice(able).pop(0)
        done.add((unit.kind.value, unit.stage, unit.micro_batch, unit.slice))
    return not any(queues)
