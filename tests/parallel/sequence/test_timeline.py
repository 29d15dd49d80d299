"""The timeline of a plan against the cost model's own total, and the picture made from it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import ConfigError
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.picture import Caption, colour, draw, make_figure, short
from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan, check_plan
from efflaunch.parallel.sequence.timeline import Timeline, timeline


def model(world: int, **fields: float) -> CostModel:
    degrees = tuple(
        DegreeCost(degree=1 << i, ulysses=1 << i, attention_s=1e-8 / (1 << i), linear_s=1e-5 / (1 << i), exchange_s=1e-6 * i)
        for i in range(world.bit_length())
    )
    return CostModel(world_size=world, tokens_per_rank=4096, degrees=degrees, **fields)  # type: ignore[arg-type]


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Any aligned groups over eight ranks, some ranks idle."""
    lengths: list[int] = []
    batches = []
    for _ in range(draw(st.integers(1, 4))):
        groups, at = [], 0
        while at < 8:
            degree = draw(st.sampled_from([d for d in (1, 2, 4, 8) if at % d == 0 and at + d <= 8]))
            count = draw(st.integers(0, 3))
            if count:
                groups.append(Group(at, degree, degree, tuple(range(len(lengths), len(lengths) + count))))
                lengths += [draw(st.integers(1, 5000)) for _ in range(count)]
            at += degree
        batches.append(MicroBatch(tuple(groups)))
    return StepPlan(8, tuple(lengths), tuple(batches))


@given(plan=plans(), beta=st.floats(0, 1), gather=st.floats(0, 0.2), step=st.floats(0, 1), barrier_free=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_end_of_the_timeline_is_the_modelled_step(plan: StepPlan, beta: float, gather: float, step: float, barrier_free: bool) -> None:
    check_plan(plan)
    cost = model(8, beta_s=beta, gather_s=gather, step_s=step)
    line = timeline(plan, cost, barrier_free=barrier_free)
    assert line.step_s == pytest.approx(cost.plan_s(plan, barrier_free=barrier_free), rel=1e-9)
    held = [(index, sequence) for bar in line.bars for index, sequence in zip(bar.lengths, bar.group.sequences, strict=True)]
    assert sorted(held) == sorted((length, index) for index, length in enumerate(plan.lengths))
    for rank in range(8):
        spans = sorted((bar.start_s, bar.stop_s) for bar in line.bars if 0 <= rank - bar.group.first_rank < bar.group.degree)
        assert all(stop <= start + 1e-9 for (_, stop), (start, _) in zip(spans, spans[1:], strict=False)), "a rank is in two groups at once"
    shares = (line.busy_share, line.waiting_share, line.gather_share, line.overhead_share)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)
    assert line.step_s == 0 or sum(shares) == pytest.approx(1)
    assert gather > 0 or line.gather_share == pytest.approx(0)


def two_batches() -> Timeline:
    batches = (
        MicroBatch((Group(0, 2, 2, (0, 3)), Group(2, 1, 1, (1,)))),
        MicroBatch((Group(0, 4, 4, (2,)),)),
    )
    plan = StepPlan(4, (6000, 3000, 900, 40), batches)
    return timeline(plan, model(4, beta_s=0.01), measured={(0, 0): 0.2, (1, 0): 0.02})


def test_a_known_plan() -> None:
    line = two_batches()
    cost = model(4, beta_s=0.01)
    first, second, third = line.bars
    assert (first.lengths, first.group.sequences, first.measured_s) == ((6000, 40), (0, 3), 0.2)
    assert first.sequence_s == pytest.approx((6000**2 * 5e-9 + 6000 * 6e-6, 40**2 * 5e-9 + 40 * 6e-6), rel=1e-12)
    assert second.measured_s is None and second.start_s == first.start_s == 0.01
    slowest = max(cost.group_s([6000, 40], 2), cost.group_s([3000], 1))
    assert third.start_s == pytest.approx(0.01 + slowest + 0.01, rel=1e-12) == pytest.approx(line.shelves[1].start_s + 0.01, rel=1e-12)
    assert line.longest is first and first.tokens == 6040


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_the_picture_shows_groups_lengths_and_the_bound() -> None:
    from matplotlib.collections import PatchCollection

    line = two_batches()
    figure = make_figure(line, Caption(title="step 3", subtitle="four sequences", lower_bound_s=line.step_s * 0.9, bound="staircase"))
    step, lengths = figure.axes
    (boxes,) = [item for item in step.collections if isinstance(item, PatchCollection)]
    corners = [(path.vertices[:, 0].min(), path.vertices[:, 1].min(), path.vertices[:, 1].max()) for path in boxes.get_paths()]
    assert corners == [(bar.start_s, bar.group.first_rank, bar.group.first_rank + bar.group.degree) for bar in line.bars]
    written = texts(figure)
    assert {"step 3", "four sequences", "5.9K", "2.9K", "900", "measured end", "2 ranks: 1 group"} <= set(written)
    assert any("(staircase bound)" in text for text in written)
    # Bars of the lower panel add up to the tokens there are.
    assert sum(bar.get_height() for bar in lengths.patches) == pytest.approx(6000 + 3000 + 900 + 40)


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_the_same_plan_gives_the_same_file(tmp_path: Path, ending: str) -> None:
    first, second = tmp_path / f"a/one{ending}", tmp_path / f"two{ending}"
    for path in (first, second):
        draw(two_batches(), Caption(title="step"), path)
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 1000


def test_a_thousand_ranks_and_a_barrier_free_step_can_be_drawn(tmp_path: Path) -> None:
    lengths = tuple(int(n) for n in np.linspace(10, 4000, 2048))
    batches = tuple(MicroBatch(tuple(Group(rank, 1, 1, (base + rank,)) for rank in range(1024))) for base in (0, 1024))
    line = timeline(StepPlan(1024, lengths, batches), model(1024, beta_s=0.1), barrier_free=True)
    draw(line, Caption(title="many"), tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 1000


def test_the_legend_of_eleven_degrees_stays_inside() -> None:
    groups = [Group(1 << i, 1 << i, 1, (i,)) for i in range(10)]
    plan = StepPlan(1024, tuple([5000] * 10 + [9000]), (MicroBatch(tuple(groups)), MicroBatch((Group(0, 1024, 1, (10,)),))))
    figure = make_figure(timeline(plan, model(1024)), Caption(title="all"))
    figure.draw_without_rendering()
    for legend in figure.legends:
        assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert {"1 rank: 1 group", "2: 1", "1024: 1"} <= set(texts(figure))


def test_endings_and_a_missing_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.svg, \.png, \.pdf"):
        draw(two_batches(), Caption(title="x"), tmp_path / "x.gif")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'efflaunch\[plot\]'"):
        draw(two_batches(), Caption(title="x"), tmp_path / "x.svg")


def test_names_and_colours() -> None:
    assert [short(n) for n in (7, 1023, 1024, 1536, 10_000, 262_144, 1 << 20, 3 << 19)] == [
        "7",
        "1023",
        "1K",
        "1.5K",
        "9.8K",
        "256K",
        "1M",
        "1.5M",
    ]
    assert len({colour(1 << i) for i in range(11)}) == 11
