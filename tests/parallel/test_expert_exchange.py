"""Rows to the ranks of their experts and back, on real gloo ranks: uneven counts, no rows, and one expert that everybody goes to."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from efflaunch.memory.executor.experts import Routing
from efflaunch.parallel.expert_exchange import ExpertRanks
from efflaunch.parallel.experts.layer_order import LayerOrder, in_order
from efflaunch.parallel.topology import whole_world
from efflaunch.tests.ranks import RankPool

EXPERTS = 8
COUNTS: dict[str, list[list[int]]] = {
    "uneven": [[3, 0, 1, 2, 0, 5, 1, 1], [0, 0, 4, 0, 1, 0, 0, 2], [1, 1, 1, 1, 1, 1, 1, 1], [0, 7, 0, 0, 0, 0, 3, 0]],
    "one rank has no rows": [[0] * EXPERTS, [2, 1, 0, 1, 0, 0, 4, 1], [1] * EXPERTS, [0, 0, 0, 0, 0, 0, 0, 3]],
    "all go to one expert": [[0, 0, 0, 0, 0, 4 + rank, 0, 0] for rank in range(4)],
    "nobody has rows": [[0] * EXPERTS for _ in range(4)],
}
"""Rows of each rank for each expert."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def labels(rank: int, expert: int, count: int) -> list[list[int]]:
    """A rank's rows for one expert: where they are from, whose they are, and which."""
    return [[rank, expert, index] for index in range(count)]


def there_and_back(counts: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """On a rank: rows of its experts, and the rows as they come; that they come back is checked here."""
    rank, size = dist.get_rank(), dist.get_world_size()
    exchange = ExpertRanks(whole_world(), size).exchange(torch.tensor(counts[rank]))
    mine = [row for expert, count in enumerate(counts[rank]) for row in labels(rank, expert, count)]
    rows = torch.tensor(mine, dtype=torch.int64).view(-1, 3)
    here = exchange.dispatch(rows)
    assert torch.equal(exchange.combine(here), rows)
    # Other numbers, of other widths and precisions, come back to the same places.
    for values in (here[:, 2].double() * 0.5, here.to(torch.bfloat16), here.float()[:, :2].t().contiguous().t()):
        back = exchange.combine(values)
        expected = {1: rows[:, 2].double() * 0.5}.get(values.ndim, rows[:, : values.shape[-1]].to(values.dtype))
        assert back.dtype == values.dtype and torch.equal(back, expected)
        assert torch.equal(exchange.dispatch(back), values)
    check_chunks(counts[rank], rows, size)
    return exchange.counts.tolist(), here.tolist()


def check_chunks(counts: list[int], rows: torch.Tensor, size: int) -> None:
    """Chunks of any degree are the same rows: together they lie as one exchange has them, and come back to their places."""
    order = LayerOrder(in_order(4), in_order(3))
    exchange = ExpertRanks(whole_world(), size, order).exchange(torch.tensor(counts))
    whole = exchange.dispatch(rows)
    for degree in (1, 3, 4):
        chunks = exchange.chunks(degree)
        coming = [chunk.begin_dispatch(rows[chunk.mine]) for chunk in chunks]
        back = torch.full_like(rows, -1)
        leaving = []
        for chunk, arrival in zip(chunks, coming, strict=True):
            here = arrival()
            assert torch.equal(here, whole[chunk.here]) and int(chunk.counts.sum()) == len(here)
            leaving.append(chunk.begin_combine(here))
        for chunk, arrival in zip(chunks, leaving, strict=True):
            back[chunk.mine] = arrival()
        assert torch.equal(back, rows) and torch.equal(sum(chunk.counts for chunk in chunks), exchange.counts)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_row_is_at_its_expert_and_comes_back(pool: RankPool, counts: list[list[int]], ranks: int) -> None:
    each = EXPERTS // ranks
    for rank, (here, rows) in enumerate(pool.run(there_and_back, counts[:ranks], ranks=ranks)):
        own = range(rank * each, (rank + 1) * each)
        assert here == [sum(counts[peer][expert] for peer in range(ranks)) for expert in own]
        # In the order of experts, those of one expert in the order of ranks, those of one rank in their own.
        assert rows == [row for expert, peer in product(own, range(ranks)) for row in labels(peer, expert, counts[peer][expert])]


def routed() -> Any:
    """On a rank: the routing of its tokens over all ranks, and which tokens' rows come to its experts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    chosen = torch.tensor([[0, 3], [3, 2], [3, 1]][: rank + 1])
    routing = Routing.of(chosen, 4, ExpertRanks(whole_world(), size))
    tokens = torch.arange(len(chosen)).unsqueeze(1) + 10.0 * rank
    rows = routing.at_experts(tokens)
    assert torch.equal(routing.sum_rows(routing.from_experts(rows)), 2 * tokens)
    return routing.groups.counts.tolist(), rows.flatten().tolist()


def test_a_routing_over_ranks_counts_the_rows_that_are_here(pool: RankPool) -> None:
    # Rank 0 has token 0 of experts 0 and 3, rank 1 tokens 10 of 0 and 3, and 11 of 3 and 2.
    assert pool.run(routed, ranks=2) == [([2, 0], [0.0, 10.0]), ([1, 3], [11.0, 0.0, 10.0, 11.0])]
