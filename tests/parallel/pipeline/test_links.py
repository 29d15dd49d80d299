"""Messages between stages on real gloo ranks: any order of use, nothing for no rows, errors that say what was under way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from efflaunch.parallel.pipeline.links import StageLinks, naming
from efflaunch.parallel.pipeline.pipeline_plan import Unit, UnitKind
from efflaunch.parallel.pipeline.place import StagePlace
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.ranks import RankPool

F, B = UnitKind.FORWARD, UnitKind.BACKWARD
ROWS = (3, 0, 5, 1)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def links_of(ranks: int, said: list[str]) -> StageLinks:
    topology = build_topology(replicate=1, device="cpu", stages=ranks)
    assert topology.pipeline is not None
    place = StagePlace((range(topology.stage_index, topology.stage_index + 1),), topology.stage_index, topology.pipeline)
    return StageLinks(place, 2, torch.float32, torch.device("cpu"), said.append)


def there_and_back() -> tuple[list[float], list[str]]:
    """Rank 0 sends four micro-batches on, rank 1 sends each back doubled, in another order."""
    said: list[str] = []
    links = links_of(2, said)
    if dist.get_rank() == 0:
        for number in (3, 1, 0, 2):
            links.post(Unit(B, 1, number), 1, ROWS[number])
        for number, rows in enumerate(ROWS):
            links.send(Unit(F, 0, number), 1, torch.full((rows, 2), float(number + 1)))
        back = [links.take(Unit(B, 1, number), ROWS[number]) for number in range(4)]
        for number in range(4):
            links.release(Unit(F, 0, number))
    else:
        for number, rows in enumerate(ROWS):
            links.post(Unit(F, 0, number), 0, rows)
        came = {number: links.take(Unit(F, 0, number), ROWS[number]) for number in (2, 0, 1, 3)}
        back = [2 * came[number] for number in (3, 1, 0, 2)]
        for number, rows in zip((3, 1, 0, 2), back, strict=True):
            links.send(Unit(B, 1, number), 0, rows)
    links.finish()
    return [float(rows.sum()) for rows in back], said


def test_messages_come_whatever_the_order_of_their_use(pool: RankPool) -> None:
    (back, said), (_, heard) = pool.run(there_and_back, ranks=2)
    assert back == [2.0 * (number + 1) * 2 * rows for number, rows in enumerate(ROWS)]
    assert "receiving gradients of micro-batch 2 from stage 1 on rank 1" in said
    assert "receiving activations of micro-batch 0 from stage 0 on rank 0" in heard
    assert not any("micro-batch 1 " in line for line in said + heard), "a micro-batch without rows is not sent"


def test_errors_of_the_transport_say_what_was_under_way() -> None:
    with pytest.raises(RuntimeError, match="sending gradients of micro-batch 3 from stage 1 to rank 0: closed"), naming(
        "sending gradients of micro-batch 3 from stage 1 to rank 0"
    ):
        raise RuntimeError("closed")
