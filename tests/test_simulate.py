"""The SimPy engine: equal to the max-plus engine, monotone, scalable, and clear about deadlock."""

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import PATIENT, costed, ends_without_draining, quarters

from ddg_sim.costs import PER_LINK, SECONDS, costs
from ddg_sim.cycletime import cycle_time, evaluate
from ddg_sim.methods import bp, ddg
from ddg_sim.schedule import ScheduleError, Sync, backward, forward, staleness, update
from ddg_sim.simulate import SteadyStateError, simulate, steady_period


def scaled(prices, factor):
    return dataclasses.replace(
        prices,
        **{
            name: tuple(value * factor for value in getattr(prices, name))
            for name in (*SECONDS, *PER_LINK)
        },
        barrier=prices.barrier * factor,
    )


def by_identity(timeline):
    found = {(span.lane, span.label, span.op, span.message): span for span in timeline.spans}
    assert len(found) == len(timeline.spans)
    return found


def assert_equal(one, other):
    ours, theirs = by_identity(one), by_identity(other)
    assert ours.keys() == theirs.keys()
    for key, span in ours.items():
        assert span.start == pytest.approx(theirs[key].start, rel=1e-9, abs=1e-9), key
        assert span.end == pytest.approx(theirs[key].end, rel=1e-9, abs=1e-9), key


@settings(max_examples=300, deadline=None)
@given(costed(), st.integers(1, 9), st.booleans())
def test_simulation_is_the_max_plus_recursion(pair, iterations, drain):
    schedule, prices = pair
    assume(drain or ends_without_draining(schedule))
    assert_equal(
        simulate(schedule, prices, iterations, drain),
        evaluate(schedule, prices, iterations, drain),
    )


@pytest.mark.parametrize("sync", list(Sync))
@pytest.mark.parametrize("drain", [True, False])
def test_simulation_is_the_max_plus_recursion_for_ddg(sync, drain):
    prices = costs(5, (1, 2, 1, 3, 1), (2, 3, 2, 2, 4), 0.3, (0.5, 4.0, 0.25, 0.0))
    for iterations in (1, 2, 5, 17):
        run = (ddg(5, sync), prices, iterations, drain)
        assert_equal(simulate(*run), evaluate(*run))


@settings(max_examples=150, deadline=None)
@given(costed(quarters))
def test_simulated_period_is_the_eigenvalue(pair):
    schedule, prices = pair
    expected = cycle_time(schedule, prices).period
    assert steady_period(schedule, prices) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(costed(), st.sampled_from([0.125, 3.0, 1e-6]))
def test_scaling_all_costs_scales_all_times(pair, factor):
    schedule, prices = pair
    slow, fast = simulate(schedule, prices, 4), simulate(schedule, scaled(prices, factor), 4)
    assert fast.makespan == pytest.approx(slow.makespan * factor, rel=1e-9)
    assert cycle_time(schedule, scaled(prices, factor)).period == pytest.approx(
        cycle_time(schedule, prices).period * factor, rel=1e-9
    )


def one_faster(prices, name, data):
    values = getattr(prices, name)
    assume(values)
    place = data.draw(st.integers(0, len(values) - 1))
    return dataclasses.replace(
        prices, **{name: tuple(v / 2 if i == place else v for i, v in enumerate(values))}
    )


@settings(max_examples=100, deadline=None)
@given(costed(), st.data())
def test_making_anything_faster_slows_nothing(pair, data):
    """Marked graphs are monotone; memory and staleness belong to the schedule, not to times."""
    schedule, prices = pair
    name = data.draw(st.sampled_from([*SECONDS, *PER_LINK, "barrier"]))
    if name == "barrier":
        faster = dataclasses.replace(prices, barrier=prices.barrier / 2)
    else:
        faster = one_faster(prices, name, data)
    before, after = simulate(schedule, prices, 5), simulate(schedule, faster, 5)
    ends = {op: span.end for span, op in before.operations}
    for span, op in after.operations:
        assert span.end <= ends[op] * (1 + 1e-12) + 1e-12, op
    assert before.memory == after.memory
    versions = [sorted(map(str, (op for _, op in run.operations))) for run in (before, after)]
    assert versions[0] == versions[1]  # the same samples and versions: the same staleness
    assert cycle_time(schedule, faster).period <= cycle_time(schedule, prices).period * (1 + 1e-12)


def test_staleness_of_a_simulated_run_is_the_schedules():
    run = simulate(ddg(4), costs(4, comm=0.5), 10)
    assert staleness(run.schedule) == (3, 2, 1, 0)
    read, found = {}, [0] * 4
    for _, op in run.operations:
        if op.kind.value == "F":
            read[op.stage, op.sample] = op.version
        elif op.kind.value == "U":
            age = op.version - 1 - read[op.stage, op.sample]
            found[op.stage] = max(found[op.stage], age)
    assert tuple(found) == (3, 2, 1, 0)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_makespan_of_backpropagation(iterations):
    run = simulate(bp(3), costs(3, 1.0, 2.0, comm=0.25), iterations)
    assert run.makespan == pytest.approx(iterations * (3 * 3.0 + 4 * 0.25))


def test_messages_queue_on_a_link_but_overlap_with_compute():
    run = simulate(ddg(2), costs(2, forward=(1, 1), activation_transfer=3.0), 2)
    carried = [(s.start, s.end) for s in run.spans if s.lane == "link 1→2"]
    assert carried == [(1.0, 4.0), (4.0, 7.0)]
    assert [s.start for s, op in run.operations if str(op).startswith("F0")] == [0.0, 1.0]


def test_a_deadlock_says_what_waits_for_what():
    # Legal while it drains; stopped short, stage 1 waits for what stage 2 would do later.
    early = dataclasses.replace(
        bp(2), workers=(bp(2).workers[0], (forward(1, -1), backward(1, -1), update(1, -1)))
    )
    assert simulate(early, costs(2), 3).makespan == 18.0
    with pytest.raises(
        ScheduleError, match=r"deadlock after 1[03] s: worker 0 waits for gradient 1→0 \(2\)$"
    ):
        simulate(early, costs(2), 3, drain=False)


def test_an_invalid_schedule_is_a_deadlock_too():
    mailbox = dataclasses.replace(bp(2), sync=Sync.MAILBOX)
    for engine in (simulate, evaluate):
        with pytest.raises(ScheduleError, match="deadlock: .*waits for"):
            engine(mailbox, costs(2), 3)


def test_no_silent_estimate_when_the_steady_state_is_not_reached():
    # The slow link's backlog takes 4000 iterations to make anybody wait.
    prices = costs(2, forward=(5.0, 0.1), backward=(5.0, 0.1), gradient_transfer=10.01)
    assert cycle_time(PATIENT, prices).period == pytest.approx(10.01)
    with pytest.raises(SteadyStateError, match="no steady state within max_iterations=100"):
        steady_period(PATIENT, prices, max_iterations=100)


def test_zero_iterations_are_an_empty_run():
    run = simulate(ddg(3), costs(3), 0)
    assert run.spans == ()
    assert run.makespan == 0.0
    assert evaluate(ddg(3), costs(3), 0).spans == ()
