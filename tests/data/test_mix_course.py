"""How far each stream of a mix is: exact shares, and what a change of weights leaves as it is."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from efflaunch.training.data.mix_course import MixCourse, MixSettings, Place, first_course, load_mix_course, resumed_course


def settings(weights: dict[str, int], batch: int = 100, digests: dict[str, str] | None = None) -> MixSettings:
    total = sum(weights.values())
    names = {name: "d" for name in weights} | (digests or {})
    return MixSettings(batch, {name: Fraction(weight, total) for name, weight in weights.items()}, names, dict.fromkeys(weights, 1000))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any), st.integers(1, 1000), st.integers(0, 10**12))
def test_shares_are_exact_to_the_token(weights: list[int], batch: int, step: int) -> None:
    named = {str(index): weight for index, weight in enumerate(weights)}
    segment = first_course(settings(named, batch)).segment(step)
    for name, weight in named.items():
        due = Fraction(weight * batch * step, sum(weights))
        assert 0 <= due - segment.cursor(name, step) < 1
        assert segment.cursor(name, step + 1) >= segment.cursor(name, step)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9)), max_size=4))
def test_cursors_only_move_on_over_changes(changes: list[tuple[int, int, int]]) -> None:
    course, done = first_course(settings({"a": 1, "b": 1})), 0
    for steps, *weights in changes:
        done += steps
        before = {name: course.segment(done).cursor(name, done) for name in "ab"}
        course, _ = resumed_course(settings(dict(zip("ab", weights, strict=True))), stored(course), done)
        assert {name: course.segment(done).cursor(name, done) for name in "ab"} == before
    # What was before a change is still known.
    assert first_course(settings({"a": 1, "b": 1})).segments[0] == course.segments[0]


def stored(course: MixCourse) -> MixCourse:
    """A course as a checkpoint gives it back."""
    loaded = load_mix_course(course.dump())
    assert loaded == course
    return loaded


def test_the_same_mix_is_followed_on() -> None:
    course = first_course(settings({"a": 2, "b": 1}, batch=7))
    assert resumed_course(settings({"a": 4, "b": 2}, batch=7), stored(course), 5) == (course, False)


def test_another_batch_begins_a_segment_where_the_cursors_are() -> None:
    course, is_new = resumed_course(settings({"a": 1, "b": 1}, batch=10), first_course(settings({"a": 1, "b": 1}, batch=100)), 3)
    assert is_new and [course.segment(step).cursor("a", step) for step in (2, 3, 4)] == [100, 150, 155]


def test_a_source_that_comes_later_or_back() -> None:
    course = first_course(settings({"a": 1}))
    course, _ = resumed_course(settings({"a": 1, "b": 3}), course, 4)
    assert [course.segment(8).cursor(name, 8) for name in "ab"] == [500, 300]
    course, _ = resumed_course(settings({"a": 1}), course, 8)
    course, _ = resumed_course(settings({"a": 1, "b": 1}), stored(course), 10)
    assert [course.segment(10).cursor(name, 10) for name in "ab"] == [700, 300]


def test_other_documents_begin_anew_and_what_was_seen_is_kept() -> None:
    course, is_new = resumed_course(settings({"a": 1}, digests={"a": "other"}), first_course(settings({"a": 1})), 5)
    place = course.segment(5).places["a"]
    assert is_new and (place.at, place.tokens_before, place.epochs_before) == (0, 500, 0.5)


def test_other_classes_of_lengths_know_what_was_seen_before() -> None:
    """Streams are named by the lengths at which classes begin: with others they begin anew, and neither tokens nor epochs are lost."""
    course = first_course(settings({"a": 1, "b": 1}))
    course, is_new = resumed_course(settings({"a:0": 1, "a:200": 1, "b": 2}), stored(course), 12)
    places = course.segment(12).places
    assert is_new and places["b"] == Place(600, "d")
    assert (places["a:0"], places["a:200"]) == (Place(0, "d", 600, 0.6), Place(0, "d", 0, 0.6))
    # Of the classes the one that is ahead counts; the tokens are of all of them.
    course, _ = resumed_course(settings({"a:0": 1, "a:500": 1, "b": 2}), stored(course), 16)
    places = course.segment(16).places
    assert (places["a:0"], places["a:500"]) == (Place(0, "d", 800, 0.7), Place(0, "d", 0, 0.7))
    # Away for a while and back with the same ones: they go on where they were.
    course, _ = resumed_course(settings({"b": 1}), stored(course), 16)
    course, _ = resumed_course(settings({"a:0": 1, "a:500": 1, "b": 2}), stored(course), 20)
    assert course.segment(20).places["a:0"] == Place(0, "d", 800, 0.7)
    course, _ = resumed_course(settings({"a": 1, "b": 1}), stored(course), 24)
    last = course.segment(24).places["a"]
    assert (last.at, last.tokens_before) == (0, 1000) and abs(last.epochs_before - 0.8) < 1e-12


def test_a_run_without_sources_so_far_begins_its_mix_where_it_is() -> None:
    course, is_new = resumed_course(settings({"a": 1}), None, 6)
    assert is_new and course.segment(6).cursor("a", 6) == 0 and course.segment(7).cursor("a", 7) == 100
    assert resumed_course(settings({"a": 1}), None, 0) == (first_course(settings({"a": 1})), False)
