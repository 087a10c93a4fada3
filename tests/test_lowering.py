"""Lowering: every send has its receive, and no buffer is overwritten while it is needed."""

from collections import Counter, defaultdict

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import costed, ends_without_draining, schedules

from ddg_sim.costs import Costs, costs
from ddg_sim.dependencies import BACKWARDS, Relation
from ddg_sim.lowering import Barrier, Receive, Send, channels, instructions, slots
from ddg_sim.methods import bp, ddg
from ddg_sim.schedule import Op, OpKind, Sync
from ddg_sim.simulate import simulate


def lowered(schedule, iterations, drain):
    return [
        list(instructions(schedule, worker, iterations, drain))
        for worker in range(len(schedule.workers))
    ]


@given(schedules(), st.integers(1, 6), st.booleans())
def test_every_send_has_exactly_one_receive(schedule, iterations, drain):
    assume(drain or ends_without_draining(schedule))
    programs = lowered(schedule, iterations, drain)
    sends = Counter((s.message, s.slot) for p in programs for s in p if isinstance(s, Send))
    receives = Counter((r.message, r.slot) for p in programs for r in p if isinstance(r, Receive))
    assert sends == receives
    assert all(count == 1 for count in sends.values())
    assert not drain or len(sends) == iterations * schedule.samples_per_iteration * len(
        {(c.relation, c.source) for c in channels(schedule)}
    )


@given(schedules(), st.integers(1, 5), st.booleans())
def test_lowering_keeps_the_program(schedule, iterations, drain):
    for worker, program in enumerate(lowered(schedule, iterations, drain)):
        ops = [step for step in program if isinstance(step, Op)]
        assert ops == list(schedule.program(worker, iterations, drain))


@given(schedules(), st.integers(1, 4), st.booleans())
def test_all_workers_meet_at_the_same_barriers(schedule, iterations, drain):
    meetings = [
        [step.number for step in program if isinstance(step, Barrier)]
        for program in lowered(schedule, iterations, drain)
    ]
    assert all(numbers == meetings[0] for numbers in meetings)
    assert meetings[0] == list(range(len(meetings[0])))


def test_ddg_of_two_stages_in_full():
    shown = [
        " ".join(
            f"{'!' if isinstance(step, Send) else '?'}{step.message}/{step.slot}"
            if isinstance(step, Send | Receive)
            else str(step)
            for step in program
        )
        for program in lowered(ddg(2), 2, True)
    ]
    assert shown == [
        "F0(0)v0@0 !activation 0→1 (0)/0 F0(1)v0@1 !activation 0→1 (1)/1"
        " ?gradient 1→0 (0)/0 B0(0)v0@1 U0(0)v1@1 ?gradient 1→0 (1)/1 B0(1)v0@2 U0(1)v2@2",
        "?activation 0→1 (0)/0 F1(0)v0@0 B1(0)v0@0 !gradient 1→0 (0)/0 U1(0)v1@0"
        " ?activation 0→1 (1)/1 F1(1)v1@1 B1(1)v1@1 !gradient 1→0 (1)/1 U1(1)v2@1",
    ]


def assert_slots_are_free(schedule, prices, iterations, drain):
    """A slot's next message is not begun before the last one has been used up."""
    made, used = {}, {}
    for span, op in simulate(schedule, prices, iterations, drain).operations:
        if op.kind is OpKind.FORWARD:
            made[Relation.ACTIVATION, op.stage, op.sample] = span.start
            used[Relation.ACTIVATION, op.stage - 1, op.sample] = span.end
        elif op.kind in BACKWARDS:
            made[Relation.GRADIENT, op.stage, op.sample] = span.start
            used[Relation.GRADIENT, op.stage + 1, op.sample] = span.end
    free = defaultdict(float)
    m = schedule.samples_per_iteration
    for program in lowered(schedule, iterations, drain):
        for step in program:
            if isinstance(step, Send):
                message = step.message
                key = (message.relation, message.source, message.sample)
                ring = (message.relation, message.source, message.sample % m, step.slot)
                assert made[key] >= free[ring] - 1e-9, f"{message} overwrites slot {step.slot}"
                free[ring] = used[key]


@settings(max_examples=300, deadline=None)
@given(costed(), st.integers(1, 12), st.booleans())
def test_slots_never_collide(pair, iterations, drain):
    schedule, prices = pair
    assume(drain or ends_without_draining(schedule))
    assert_slots_are_free(schedule, prices, iterations, drain)


def test_regression_warm_up_needs_more_slots_than_steady_state():
    # Steady state needs 2 slots between stages 1 and 2; before stage 1 waits for anything, it has
    # already run K forward passes, which a slow stage 2 must not lose.
    assert_slots_are_free(ddg(3), costs(3, forward=(1.0, 100.0, 1.0)), 8, True)


def test_regression_a_mailbox_is_in_use_until_its_consumer_ends():
    assert_slots_are_free(ddg(2, Sync.MAILBOX), costs(2, backward=(100.0, 1.0)), 8, True)


@pytest.mark.parametrize("sync", list(Sync))
@pytest.mark.parametrize("slow", range(4))
def test_slots_never_collide_with_one_slow_operation(sync, slow):
    for kind in ("forward", "backward", "update"):
        values = {"forward": (1.0,) * 4, "backward": (1.0,) * 4, "update": (0.0,) * 4}
        values[kind] = tuple(50.0 if k == slow else value for k, value in enumerate(values[kind]))
        assert_slots_are_free(ddg(4, sync), Costs(**values), 12, True)


def test_slot_counts():
    def rings(schedule, relation):
        pairs = zip(channels(schedule), slots(schedule), strict=True)
        return [count for channel, count in pairs if channel.relation is relation]

    assert rings(ddg(4), Relation.ACTIVATION) == [4, 3, 2]
    # While draining no forward pass holds the later stages back: they run ahead with gradients.
    assert rings(ddg(4), Relation.GRADIENT) == [4, 3, 2]
    assert rings(ddg(4, Sync.BARRIER), Relation.ACTIVATION) == [1, 1, 1]
    assert rings(bp(4), Relation.ACTIVATION) == rings(bp(4), Relation.GRADIENT) == [1, 1, 1]
