"""The schedule language: text, checks, staleness, memory."""

import dataclasses

import pytest
from hypothesis import given
from strategies import candidates, schedules

from ddg_sim.decoupled import dgl
from ddg_sim.dependencies import dependencies, validate
from ddg_sim.lowering import StageMemory, memory, stage_memory
from ddg_sim.methods import Semantics, bp, ddg, method
from ddg_sim.notation import grid, parse, parse_op, render
from ddg_sim.periodic import periodic
from ddg_sim.rule import Activations, Rule
from ddg_sim.schedule import (
    Op,
    OpKind,
    Schedule,
    ScheduleError,
    Sync,
    backward,
    forward,
    staleness,
    update,
)

DDG3 = """\
ddg stages=3 sync={sync} activations=graph jacobian=stashed samples=1
worker 0: F0(t) B0(t-2) U0(t-2)
worker 1: F1(t) B1(t-1) U1(t-1)
worker 2: F2(t) B2(t) U2(t)"""


@pytest.mark.parametrize("sync", list(Sync))
def test_ddg_reads_like_its_paper(sync):
    assert render(ddg(3, sync)) == DDG3.format(sync=sync.value)


def test_bp_golden():
    assert render(bp(2)) == (
        "bp stages=2 sync=none activations=graph jacobian=stashed samples=1\n"
        "worker 0: F0(t) B0(t) U0(t)\n"
        "worker 1: F1(t) B1(t) U1(t)"
    )


def test_bp_and_ddg_of_one_stage_are_the_same_program():
    assert bp(1).workers == ddg(1).workers


def test_ddg_grid_is_the_one_of_the_paper():
    assert grid(ddg(3), iterations=4, drain=False) == (
        "           t=0        t=1        t=2        t=3\n"
        "worker 0   F0         F1         F2 B0 U0   F3 B1 U1\n"
        "worker 1   F0         F1 B0 U0   F2 B1 U1   F3 B2 U2\n"
        "worker 2   F0 B0 U0   F1 B1 U1   F2 B2 U2   F3 B3 U3"
    )


@given(candidates())
def test_text_round_trips(schedule):
    assert parse(render(schedule)) == schedule


@given(schedules())
def test_every_operation_runs_once_per_sample_and_round_trips(schedule):
    iterations = 3
    total = iterations * schedule.samples_per_iteration
    for worker, body in enumerate(schedule.workers):
        ops = list(schedule.program(worker, iterations))
        for op in ops:
            assert parse_op(str(op)) == op
        for stage in {template.stage for template in body}:
            for kind in (OpKind.FORWARD, OpKind.BACKWARD):
                samples = [op.sample for op in ops if (op.kind, op.stage) == (kind, stage)]
                assert samples == list(range(total))
            versions = [op.version for op in ops if (op.kind, op.stage) == (OpKind.UPDATE, stage)]
            assert versions == list(range(1, iterations + 1))


@given(schedules())
def test_sync_changes_neither_samples_nor_versions(schedule):
    other = dataclasses.replace(schedule, sync=Sync.NONE)
    for worker in range(len(schedule.workers)):
        assert list(schedule.program(worker, 3)) == list(other.program(worker, 3))


@pytest.mark.parametrize("stages", [1, 2, 5, 16])
@pytest.mark.parametrize("sync", list(Sync))
def test_staleness_of_ddg_is_its_delay(stages, sync):
    assert staleness(ddg(stages, sync)) == tuple(reversed(range(stages)))
    assert staleness(bp(stages)) == (0,) * stages


def test_ddg_warm_up_applies_nothing_while_t_is_below_the_delay():
    updates = [op for op in ddg(4).program(0, 6, drain=False) if op.kind is OpKind.UPDATE]
    assert [str(op) for op in updates] == ["U0(0)v1@3", "U0(1)v2@4", "U0(2)v3@5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: expected 'METHOD stages=K sync=…', got \[\]"),
        ("nonsense", r"line 1: expected 'METHOD stages=K sync=…', got \['nonsense'\]"),
        (DDG3.format(sync="later"), "line 1: 'later' is not a valid Sync"),
        (
            DDG3.format(sync="none").replace("worker 1", "worker 7"),
            "line 3: expected 'worker 1: …'",
        ),
        (DDG3.format(sync="none").replace("B1(t-1)", "B1(2t)"), r"line 3: 'B1\(2t\)' is no oper"),
        (DDG3.format(sync="none").replace("B1(t-1)", "Z1(t)"), r"line 3: 'Z1\(t\)': unknown kind"),
    ],
)
def test_parse_errors_name_the_line(text, message):
    with pytest.raises(ScheduleError, match=message):
        parse(text)


def test_parse_op_errors():
    with pytest.raises(ScheduleError, match="'F1' is no operation such as"):
        parse_op("F1")


def build(*bodies, stages=None, sync=Sync.NONE, m=1):
    return Schedule("x", stages or len(bodies), tuple(map(tuple, bodies)), sync, Rule(), m)


BODY = [forward(0), backward(0), update(0)]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (build(stages=0), "at least one stage and one worker"),
        (build(BODY, []), "worker 1 has no operations: leave it out"),
        (build(BODY, m=0), "samples_per_iteration must be at least 1, got 0"),
        (build([*BODY, forward(3)]), r"worker 0, operation 3 \(F3\(t\)\): stage must be in 0..0"),
        (build([forward(0, 1), *BODY[1:]]), r"operation 0 \(F0\(t\+1\)\): its sample has not ent"),
        (build(BODY, [forward(0, -1)]), r"worker 1, .*: stage already lives on worker 0"),
        (build([*BODY, forward(0)]), r"operation 3 .*: repeats worker 0, operation 0 \(F0\(t\)\)"),
        (build(BODY, m=2), r"operation 2 \(U0\(2t\)\): an update must close a group of 2 samples"),
        (build([*BODY[:2], update(0, 1)], m=2), "stage 0: has 1 F operations per iteration, needs"),
        (build(BODY[:2]), "stage 0: has 0 U operations per iteration, needs 1"),
        (build([*BODY, update(0, -1)]), "repeats worker 0, operation 2"),
        (build([forward(0, 0, -1), *BODY[1:]]), "no version is newer than the newest"),
        (
            dataclasses.replace(build(BODY), rule=Rule(Activations.INPUT)),
            "stage 0: has 0 R operations per iteration, needs 1",
        ),
        (build([forward(0), update(0)]), "stage 0: has 0 B operations per iteration, needs 1"),
        (build(BODY[1:]), "stage 0: has 0 F operations per iteration, needs 1"),
        (
            build([backward(0), forward(0), update(0)]),
            "deadlock: worker 0, operation 0 .* waits for worker 0",
        ),
        (build([forward(0), backward(0, -1), update(0)]), "deadlock"),
    ],
)
def test_validate_names_the_cell(schedule, message):
    with pytest.raises(ScheduleError, match=message):
        validate(schedule)


def test_an_update_without_its_gradient_is_named():
    with pytest.raises(ScheduleError, match="stage 0: has 1 B operations"):
        validate(build([forward(0), forward(0, 1), backward(0), update(0, 1)], m=2))


def test_mailboxes_deadlock_backpropagation():
    # The gradient of an iteration would have to be there before its forward pass.
    with pytest.raises(ScheduleError, match=r"deadlock: .*\((activation|gradient|program order)\)"):
        validate(dataclasses.replace(bp(3), sync=Sync.MAILBOX))


def test_a_barrier_after_the_forwards_deadlocks_what_needs_gradients_before_it():
    one_f_one_b = build(
        [forward(0), backward(0), forward(0, 1), backward(0, 1), update(0, 1)],
        [forward(1), forward(1, 1), backward(1), backward(1, 1), update(1, 1)],
        sync=Sync.BARRIER,
        m=2,
    )
    with pytest.raises(ScheduleError, match="deadlock"):
        validate(one_f_one_b)


def test_without_a_way_back_memory_is_unbounded():
    endless = dataclasses.replace(dgl(3), queue=0)
    with pytest.raises(
        ScheduleError,
        match=r"unbounded memory: worker 0, operation 0 \(F0\(t\)\) may run ahead of worker 1",
    ):
        validate(endless)


def test_an_operation_whose_input_nobody_produces_is_named():
    lonely = build([forward(1), backward(1)], stages=2)
    with pytest.raises(ScheduleError, match=r"worker 0, operation 0 \(F1\(t\)\): no F0 produces"):
        dependencies(lonely)


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_memory_of_ddg_grows_with_the_delay(stages):
    assert memory(ddg(stages)) == tuple(StageMemory(k, k) for k in range(stages, 0, -1))
    replay = memory(ddg(stages, semantics=Semantics.REPLAY))
    assert replay == tuple(StageMemory(k, 1) for k in range(stages, 0, -1))


def test_stage_memory_counts_the_versions_that_are_still_needed():
    def op(kind, sample, version):
        return Op(kind, 0, sample, sample, version)

    ops = [
        op(OpKind.FORWARD, 0, 0),
        op(OpKind.FORWARD, 1, 0),
        op(OpKind.BACKWARD, 0, 0),
        op(OpKind.UPDATE, 0, 1),
        op(OpKind.FORWARD, 2, 1),
        op(OpKind.BACKWARD, 1, 0),
        op(OpKind.UPDATE, 1, 2),
    ]
    assert stage_memory(ops, Rule()) == StageMemory(activations=2, weight_versions=2)
    ops[5] = op(OpKind.BACKWARD, 1, 1)  # at the weights of now
    assert stage_memory(ops, Rule()) == StageMemory(activations=2, weight_versions=1)


def test_methods_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        ddg(0)
    with pytest.raises(ValueError, match="unknown method 'sgd'; known methods: bp, ddg, fr, "):
        method("sgd", 2)
    with pytest.raises(ValueError, match="sync 'barrier' does not apply to bp"):
        method("bp", 2, Sync.BARRIER)
    with pytest.raises(ScheduleError, match="deadlock"):
        periodic("x", 2, lambda k: [backward(k), forward(k), update(k)])
