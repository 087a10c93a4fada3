"""Stages that slow each other down: only where they overlap, and as much as they do."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_sim.asynchronous import pipedream_2bw
from ddg_sim.contention import LIKE, TURNS, contended
from ddg_sim.costs import Costs, costs
from ddg_sim.cycletime import evaluate
from ddg_sim.decoupled import pd_asgd
from ddg_sim.methods import Semantics, bp, ddg
from ddg_sim.predict import predict
from ddg_sim.schedule import OpKind, Schedule, Sync
from ddg_sim.synchronous import interleaved, zb_h1


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


def slowed_by_pairs(
    schedule: Schedule, alone: Costs, factors: list[dict[tuple[OpKind, OpKind], float]]
) -> Costs:
    """What `contended` promises, from every pair of operations."""
    slowed = alone
    for _ in range(TURNS):
        run = evaluate(schedule, slowed, 3 * schedule.num_ticks(0) + 12)
        lag = schedule.num_ticks(0)
        total: dict[tuple[OpKind, int], float] = defaultdict(float)
        extra: dict[tuple[OpKind, int], float] = defaultdict(float)
        for span, op in run.operations:
            if not lag <= op.iteration < run.iterations - lag:
                continue
            kind = op.kind if op.kind is OpKind.RECOMPUTE else LIKE.get(op.kind, op.kind)
            total[kind, op.stage] += span.duration
            for other, its_op in run.operations:
                common = min(span.end, other.end) - max(span.start, other.start)
                if other.lane != span.lane and common > 0:
                    own, its = (LIKE.get(each, each) for each in (op.kind, its_op.kind))
                    factor = factors[op.stage].get((own, its), 1.0)
                    extra[kind, op.stage] += common * (factor - 1) / (len(schedule.workers) - 1)
        longer = {
            kind.name.lower(): tuple(
                seconds * (1 + extra[kind, stage] / (total[kind, stage] or 1.0))
                for stage, seconds in enumerate(getattr(alone, kind.name.lower()))
            )
            for kind in (OpKind.FORWARD, OpKind.BACKWARD, OpKind.UPDATE, OpKind.RECOMPUTE)
        }
        slowed = replace(alone, **longer)
    return slowed


CASES = [
    ddg(3),
    ddg(3, Sync.BARRIER),
    ddg(2, semantics=Semantics.REPLAY),
    zb_h1(3, 3),
    interleaved(4, 2, 2),
    pd_asgd(3),
    pipedream_2bw(2, 2),
]
KINDS = (OpKind.FORWARD, OpKind.BACKWARD, OpKind.UPDATE)


@pytest.mark.parametrize("schedule", CASES, ids=lambda schedule: schedule.method)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_overlap_is_that_of_all_pairs(schedule: Schedule, data: st.DataObject) -> None:
    stages = schedule.num_stages

    def several(strategy: st.SearchStrategy[float]) -> list[float]:
        return data.draw(st.lists(strategy, min_size=stages, max_size=stages))

    seconds = st.one_of(st.sampled_from((0.5, 1.0)), st.floats(0.1, 3.0))
    alone = costs(
        stages,
        forward=several(seconds),
        backward=several(seconds),
        update=several(st.sampled_from((0.0, 0.25))),
        comm=0.1,
    )
    pairs = {(own, its): 1 + 0.1 * i for i, own in enumerate(KINDS) for its in KINDS}
    factors = [{**pairs, (KINDS[1], KINDS[1]): factor} for factor in several(st.floats(1.0, 2.0))]
    found, expected = (
        method(schedule, alone, factors)  # type: ignore[operator]
        for method in (contended, slowed_by_pairs)
    )
    for name in ("forward", "backward", "update", "recompute"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-12)


def test_contention_of_64_stages_is_found_at_once() -> None:
    """Measured near 1 s; looking at all pairs took 38 s."""
    begin = time.process_time()
    contended(ddg(64), costs(64, forward=[1 + k / 64 for k in range(64)]), [1.2] * 64)
    assert time.process_time() - begin < 8


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
