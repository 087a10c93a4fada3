"""Stages that slow each other down: only where they overlap, and as much as they do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_sim.contention import contended
from ddg_sim.costs import costs
from ddg_sim.methods import bp, ddg
from ddg_sim.predict import predict
from ddg_sim.schedule import OpKind, Sync
from ddg_sim.synchronous import zb_h1


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_without_overlap_nothing_slows_down(num_stages: int) -> None:
    alone = costs(num_stages, forward=1.0, backward=2.0, comm=0.1)
    assert contended(bp(num_stages), alone, [2.0] * num_stages) == alone


@pytest.mark.parametrize("num_stages", [2, 3, 6])
def test_where_everything_overlaps_everything_takes_the_full_factor(num_stages: int) -> None:
    found = contended(ddg(num_stages), costs(num_stages), [1.25] * num_stages)
    assert found.forward == pytest.approx([1.25] * num_stages)
    assert found.backward == pytest.approx([2.5] * num_stages)


def test_both_halves_of_a_backward_pass_slow_down() -> None:
    found = contended(zb_h1(3, 3), costs(3), [1.5] * 3)
    assert 2.5 < min(found.backward) <= max(found.backward) <= 3.0


def test_pairs_of_kinds_have_factors_of_their_own() -> None:
    pairs = {(OpKind.BACKWARD, OpKind.BACKWARD): 1.5, (OpKind.FORWARD, OpKind.BACKWARD): 1.2}
    found = contended(ddg(2, Sync.BARRIER), costs(2), [pairs, pairs])
    assert found.forward == (1.0, 1.0)
    assert found.backward == pytest.approx((3.0, 3.0))


def test_between_barriers_only_the_backward_passes_overlap() -> None:
    found = contended(ddg(2, Sync.BARRIER), costs(2), [1.5, 1.5])
    assert found.forward == (1.0, 1.0)
    assert found.backward == pytest.approx((3.0, 3.0))


def test_partial_overlap_counts_in_proportion() -> None:
    # Between barriers, stage 1's backward pass of 4 s overlaps with stage 0's of 1 s. With c = 2:
    # stage 0 overlaps wholly and takes 2 s; of stage 1's b seconds, 2 overlap: b = 4 (1 + 2/b).
    found = contended(ddg(2, Sync.BARRIER), costs(2, backward=(1.0, 4.0)), [2.0, 2.0])
    b = 2.0 + (4.0 + 8.0) ** 0.5
    assert found.backward[0] == pytest.approx(2.0)
    assert found.backward[1] == pytest.approx(b, rel=0.02)


@given(
    st.lists(st.floats(1.0, 2.0), min_size=3, max_size=3),
    st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3),
    st.sampled_from(Sync),
)
@settings(max_examples=30, deadline=None)
def test_contention_lies_between_alone_and_the_full_factor(
    factors: list[float], forward: list[float], sync: Sync
) -> None:
    alone = costs(3, forward=forward, backward=2.0)
    found = contended(ddg(3, sync), alone, factors)
    for name in ("forward", "backward", "update", "recompute"):
        before, after = getattr(alone, name), getattr(found, name)
        for factor, low, value in zip(factors, before, after, strict=True):
            assert low <= value <= low * factor * (1 + 1e-12)


def test_a_prediction_slows_down_ddg_but_not_its_baseline() -> None:
    free = predict(ddg(4), costs(4), 20)
    slow = predict(ddg(4), costs(4), 20, contention=[1.2] * 4)
    assert slow.bp_period == free.bp_period
    assert slow.period.value == pytest.approx(1.2 * free.period.value)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0], "contention has 1 values, but there are 2 stages"),
        ([1.0, 0.9], "at least 1"),
        ([1.0, float("nan")], "finite"),
    ],
)
def test_wrong_factors_are_refused(factors: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contended(ddg(2), costs(2), factors)
