"""All methods: their published grids and delays, their closed forms, and both engines on each."""

import dataclasses
import inspect
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from oracles import Toy, snapshot, toy_stages
from strategies import schedules

from ddg_gpu.execute import run_serial
from ddg_gpu.stage import Stage
from ddg_sim.asynchronous import pipedream, pipedream_2bw, spectrain, xpipe
from ddg_sim.costs import Costs, costs
from ddg_sim.cycletime import cycle_time, evaluate
from ddg_sim.decoupled import (
    adl,
    dgl,
    dsp,
    fdg,
    ouroboros,
    pd_asgd,
    petra,
    pipelined_backprop,
    pipemare,
    sideways,
    stale,
)
from ddg_sim.dependencies import Relation, dependencies, template_at, validate
from ddg_sim.lowering import channels, memory
from ddg_sim.methods import METHODS, Semantics, bp, data_parallel, ddg, dp, fr, method
from ddg_sim.notation import grid, parse, render
from ddg_sim.rule import Jacobian, TransformKind
from ddg_sim.schedule import (
    OpKind,
    Schedule,
    ScheduleError,
    Sync,
    backward,
    backward_input,
    backward_weight,
    forward,
    staleness,
    staleness_levels,
    update,
)
from ddg_sim.simulate import simulate, steady_period
from ddg_sim.synchronous import gpipe, interleaved, one_f_one_b, zb_h1
from theory.iterate import iterate
from theory.problems import make

GOLDEN = Path(__file__).with_name("golden_methods.txt")

#: Per method the schedules whose grids its docstring draws, and the iterations drawn.
DRAWN = {
    "bp": [(bp(2), 3)],
    "dp": [(dp(2), 1)],
    "ddg": [(ddg(3), 4)],
    "fr": [(fr(3), 4)],
    "fdg": [(fdg(3), 6)],
    "adl": [(adl(2, 2), 3)],
    "dsp": [(dsp(3), 5)],
    "dgl": [(dgl(2), 3)],
    "gpipe": [(gpipe(2, 2), 2)],
    "1f1b": [(one_f_one_b(3, 3), 2)],
    "interleaved": [(interleaved(4, 2, 2), 1)],
    "zb-h1": [(zb_h1(3, 3), 1)],
    "pipedream": [(pipedream(3), 4)],
    "pipedream-2bw": [(pipedream_2bw(2, 2), 3)],
    "stale": [(stale(3), 5)],
    "pb": [(pipelined_backprop(3), 5)],
    "spectrain": [(spectrain(3), 4)],
    "xpipe": [(xpipe(2, 2), 3)],
    "pipemare": [(pipemare(2, 2), 3)],
    "sideways": [(sideways(3), 5)],
    "petra": [(petra(3), 5)],
    "ouroboros": [(ouroboros(3), 2)],
    "pd-asgd": [(pd_asgd(2), 3)],
}

#: Options beyond the defaults that are looked at too.
OPTIONS = {
    "ddg": [{"sync": Sync.BARRIER}, {"sync": Sync.MAILBOX}, {"semantics": Semantics.CURRENT}],
    "fr": [{"sync": Sync.BARRIER}, {"sync": Sync.MAILBOX}],
    "fdg": [{"shrink": 0.9}],
    "adl": [{"accumulate": 1}, {"accumulate": 4}],
    "dgl": [{"buffer": 1}, {"buffer": 2}],
    "gpipe": [{"micro_batches": 1}, {"micro_batches": 5, "replay": True}],
    "1f1b": [{"micro_batches": 1}, {"micro_batches": 2}, {"micro_batches": 7}],
    "interleaved": [{"chunks": 1}, {"chunks": 3}],
    "zb-h1": [{"micro_batches": 1}, {"micro_batches": 2}, {"micro_batches": 8}],
    "pipedream": [{"vertical_sync": True}],
    "pipedream-2bw": [{"micro_batches": 7}],
    "pb": [{"spike": True, "predict": True}],
    "xpipe": [{"micro_batches": 1}, {"micro_batches": 2}],
    "pipemare": [{"micro_batches": 3, "anneal": 100.0, "decay": 0.5}],
    "petra": [{"accumulate": 2}],
}


def variants(stages):
    """All methods with all their options, for that many stages."""
    found = {}
    for name in METHODS:
        for options in ({}, *OPTIONS.get(name, ())):
            if name == "interleaved" and stages % options.get("chunks", 2):
                continue
            words = " ".join(f"{key}={getattr(v, 'value', v)}" for key, v in options.items())
            found[f"{name}-{stages} {words}".strip()] = method(name, stages, **options)
    return found


ALL = {name: schedule for stages in range(1, 7) for name, schedule in variants(stages).items()}
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


def where(condition):
    """Parametrize over those schedules of `ALL` that a test is about."""
    found = {name: schedule for name, schedule in ALL.items() if condition(schedule)}
    return pytest.mark.parametrize("schedule", found.values(), ids=found)


def splits_stages(schedule):
    """Whether forward passes run on a worker of their own."""
    return schedule.worker_of(0, OpKind.FORWARD) != schedule.worker_of(0, OpKind.UPDATE)


def golden():
    """Text, grid, staleness and memory of every method and option, for three or four stages."""
    parts = []
    for name, schedule in {**variants(3), **variants(4)}.items():
        if schedule.num_stages == 4 and not name.startswith("interleaved"):
            continue
        iterations = 6 if schedule.samples_per_iteration == 1 else 2
        kept = [f"{stage.activations}/{stage.weight_versions}" for stage in memory(schedule)]
        levels = [",".join(map(str, levels)) for levels in staleness_levels(schedule)]
        parts += [
            f"--- {name}",
            render(schedule),
            grid(schedule, iterations, drain=False),
            f"staleness {' | '.join(levels)}",
            f"activations/versions {' '.join(kept)}",
            "",
        ]
    return "\n".join(parts)


def test_golden_text():
    """To see a change as a diff: python tests/test_methods.py > tests/golden_methods.txt"""
    assert golden() == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_draws_the_grid(name):
    text = inspect.getdoc(METHODS[name])
    for schedule, iterations in DRAWN[name]:
        drawn = grid(schedule, iterations, drain=False)
        assert "\n".join(f"    {line}".rstrip() for line in drawn.splitlines()) in text


@every
def test_text_round_trips(schedule):
    assert parse(render(schedule)) == schedule


def test_a_header_word_that_nobody_knows_is_named():
    with pytest.raises(ScheduleError, match="line 1: 'colour' is not a valid TransformKind"):
        parse(render(bp(1)).replace("samples=1", "samples=1 colour=1"))
    with pytest.raises(ScheduleError, match="line 1: 'samples' is missing"):
        parse(render(bp(1)).replace(" samples=1", ""))


# --- Versions and staleness ---------------------------------------------------------------------


def counted(schedule, iterations):
    """Operations with versions counted while walking the programs, for stages on one worker."""
    found = []
    for worker in range(len(schedule.workers)):
        newest, read = {}, {}
        for op in schedule.program(worker, iterations):
            lag = next(
                template.version_lag
                for template in schedule.workers[worker]
                if (template.kind, template.stage) == (op.kind, op.stage)
                and (template.sample - op.sample) % schedule.samples_per_iteration == 0
            )
            version = newest.setdefault(op.stage, 0)
            if op.kind is OpKind.FORWARD:
                version = read[op.stage, op.sample] = max(0, version - lag)
            elif op.kind is OpKind.UPDATE:
                version = newest[op.stage] = version + 1
            elif schedule.rule.jacobian is Jacobian.STASHED and op.kind is not OpKind.ALL_REDUCE:
                version = read[op.stage, op.sample]
            found.append((op, version))
    return found


def assert_versions(schedule, iterations=9):
    ages = [[] for _ in range(schedule.num_stages)]
    read = {}
    for op, version in counted(schedule, iterations):
        assert op.version == version, op
        if op.kind is OpKind.FORWARD:
            read[op.stage, op.sample] = version
    m = schedule.samples_per_iteration
    for op, version in counted(schedule, iterations):
        if op.kind is OpKind.UPDATE:
            group = range(op.sample - m + 1, op.sample + 1)
            ages[op.stage].append(tuple(version - 1 - read[op.stage, s] for s in group))
    settled = schedule.num_ticks(0) + 2  # what was read and applied after warm-up, before drain
    for stage, levels in enumerate(staleness_levels(schedule)):
        assert max(ages[stage][: iterations - 1], key=sum) == levels
        assert ages[stage][min(settled, iterations - 1)] == levels


@where(lambda schedule: not splits_stages(schedule))
def test_versions_are_those_counted_on_the_way(schedule):
    """Others: test_pd_asgd_reads_what_the_iteration_before_produced."""
    assert_versions(schedule, iterations=2 * schedule.num_ticks(0) + 4)


@given(schedules())
def test_versions_of_any_schedule_are_those_counted_on_the_way(schedule):
    assert all(op.version == version for op, version in counted(schedule, 7))


def test_pd_asgd_reads_what_the_iteration_before_produced():
    for stages in range(1, 5):
        schedule = pd_asgd(stages)
        assert staleness(schedule) == (1,) * stages
        for op in schedule.program(0, 9):
            assert op.version == max(0, op.iteration - 1)
        done = dict.fromkeys(range(stages), 0)
        for op in schedule.program(1, 9):
            if op.kind is OpKind.UPDATE:
                done[op.stage] += 1
            assert op.version == done[op.stage]


@pytest.mark.parametrize("stages", range(1, 7))
def test_published_delays(stages):
    """k counts from 1 here, as in the papers."""
    levels = range(1, stages + 1)
    delay = tuple(stages - k for k in levels)
    assert staleness(ddg(stages)) == staleness(fr(stages)) == staleness(pipedream(stages)) == delay
    assert staleness(ouroboros(stages)) == staleness(spectrain(stages)) == delay
    late = tuple(2 * (stages - k) - (k < stages) for k in levels)
    assert staleness(fdg(stages)) == late
    twice = tuple(2 * (stages - k) for k in levels)
    for build in (stale, pipelined_backprop, sideways, petra, dsp, lambda k: adl(k, 1)):
        assert staleness(build(stages)) == twice
    assert staleness(pipedream(stages, vertical_sync=True)) == (stages - 1,) * stages
    for m in (stages, stages + 1, 3 * stages):
        assert staleness_levels(pipedream_2bw(stages, m)) == ((1,) * m,) * stages
    for build in (bp, dp, dgl, gpipe, one_f_one_b, zb_h1):
        assert staleness(build(stages)) == (0,) * stages


def test_published_staleness_of_adl():
    assert staleness_levels(adl(3, 2)) == ((2, 2), (1, 1), (0, 0))
    assert staleness_levels(adl(3, 4)) == ((1, 1, 1, 1), (1, 1, 0, 0), (0, 0, 0, 0))


def test_published_example_of_dsp():
    assert dsp(3) == dsp(3, lags=(1, 1, 0), delays=(4, 2, 0))
    assert [str(t) for t in dsp(3).workers[0]] == ["F0(t)", "R0(t-4)", "B0(t-4)", "U0(t-4)"]
    with pytest.raises(ScheduleError, match="deadlock"):
        dsp(3, lags=(1, 1, 0), delays=(1, 4, 0))


def test_predictions_reach_the_update_they_are_for():
    """XPipe's distance is the staleness of its bellwether; SpecTrain's differ by it."""
    for stages, m in itertools.product(range(1, 7), range(1, 8)):
        schedule = xpipe(stages, m)
        (ahead,) = schedule.rule.transforms
        assert ahead.values == staleness(schedule)
        assert all(len(set(levels)) == 1 for levels in staleness_levels(schedule))
        ahead, behind = spectrain(stages).rule.transforms
        assert (ahead.kind, behind.kind) == (
            TransformKind.PREDICT_FORWARD,
            TransformKind.PREDICT_BACKWARD,
        )
        differences = np.subtract(ahead.values, behind.values)
        assert tuple(differences) == staleness(spectrain(stages))


# --- The same program under several names -------------------------------------------------------


@pytest.mark.parametrize("stages", range(1, 7))
def test_methods_that_are_the_same_program(stages):
    assert pipedream(stages) == dataclasses.replace(ddg(stages), method="pipedream")
    assert pipelined_backprop(stages) == dataclasses.replace(stale(stages), method="pb")
    assert stale(stages).workers == sideways(stages).workers == petra(stages).workers
    assert stale(stages).workers == adl(stages, 1).workers == pipemare(stages, 1).workers
    assert fr(stages).workers == ddg(stages, semantics=Semantics.REPLAY).workers
    assert interleaved(stages, 2 * stages, 1).workers == one_f_one_b(stages, 2 * stages).workers
    assert xpipe(stages, 1).workers == pipedream(stages).workers


def test_with_one_stage_all_are_sgd():
    plain = ("F0(t)", "B0(t)", "U0(t)")
    for name in METHODS:
        options = {"chunks": 1} if name == "interleaved" else {}
        options |= {"accumulate": 1} if name == "adl" else {}
        options |= {"micro_batches": 1} if name == "pipemare" else {}
        options |= {"replicas": 1} if name == "dp" else {}
        schedule = method(name, 1, **options)
        words = [str(t) for t in schedule.templates() if t.kind is not OpKind.RECOMPUTE]
        if name not in ("zb-h1", "pd-asgd", "pipedream-2bw"):  # halves, two workers, staleness 1
            assert tuple(words) == plain, name


# --- Times --------------------------------------------------------------------------------------


def prices_for(stages, seed, free=False, update_time=True):
    """Costs in eighths of a second."""
    draw = random.Random(f"{stages} {seed}")

    def several(count, least=1):
        return tuple(draw.randrange(least, 24) / 8 for _ in range(count))

    links = {} if free else {
        "activation_transfer": several(stages - 1, 0),
        "gradient_transfer": several(stages - 1, 0),
    }  # fmt: skip
    return Costs(
        forward=several(stages),
        backward=several(stages),
        update=several(stages, 0) if update_time else (),
        recompute=several(stages),
        **links,
    )


TIMED = ALL


@pytest.mark.parametrize("schedule", TIMED.values(), ids=TIMED)
def test_the_engines_agree(schedule):
    prices = prices_for(schedule.num_stages, 1)

    def spans(run):
        return sorted((s.lane, s.label, s.start, s.end) for s in run.spans)

    runs = simulate(schedule, prices, 6), evaluate(schedule, prices, 6)
    for ours, theirs in zip(*map(spans, runs), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-9, abs=1e-9)
    for found, bound in zip(runs[0].memory, memory(schedule), strict=True):
        assert found.activations <= bound.activations
        assert found.weight_versions <= bound.weight_versions


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_simulated_period_is_the_eigenvalue(stages):
    for name, schedule in variants(stages).items():
        if schedule.replicas == 1:
            prices = prices_for(stages, name)
            expected = cycle_time(schedule, prices).period
            assert steady_period(schedule, prices) == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("m", [1, 2, 4, 9])
def test_flushing_pipelines_of_equal_stages(stages, m):
    f, b = 1.0, 2.5
    even = costs(stages, f, b)
    for schedule in (gpipe(stages, m), one_f_one_b(stages, m)):
        assert cycle_time(schedule, even).period == (m + stages - 1) * (f + b)
        run = evaluate(schedule, even, 12)
        assert run.bubble == pytest.approx((stages - 1) / (m + stages - 1))


@pytest.mark.parametrize("workers", range(1, 5))
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_interleaving_shrinks_the_bubble(workers, chunks, rounds):
    m = rounds * workers
    schedule = interleaved(workers * chunks, m, chunks)
    run = evaluate(schedule, costs(workers * chunks, 1.0, 2.0), 12)
    assert run.bubble == pytest.approx((workers - 1) / (chunks * m + workers - 1))
    assert run.period == pytest.approx(3.0 * (chunks * m + workers - 1))


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("f", [1.0, 0.5, 1.75])
def test_zb_h1_has_a_third_of_the_bubble(stages, f):
    """(K-1)(f + i - w) seconds with m >= K and f >= w, else (K-1) i."""
    for m in (stages, stages + 1, 3 * stages):
        even = costs(stages, f, 2.0)
        period = cycle_time(zb_h1(stages, m), even).period
        assert period == pytest.approx(m * (f + 2.0) + (stages - 1) * max(f, 1.0))
        if f == 1.0:
            idle, usual = (
                cycle_time(build(stages, m), even).period - 3 * m for build in (zb_h1, one_f_one_b)
            )
            assert idle == pytest.approx(usual / 3)
        held = memory(zb_h1(stages, m))
        assert max(stage.activations for stage in held) == min(stages, m)


FREE_RUNNING = ("fdg", "dsp", "dgl", "pipedream", "stale", "pb", "sideways", "petra", "fr", "ddg")


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("seed", range(4))
def test_free_running_methods_are_as_fast_as_their_slowest_stage(stages, seed):
    prices = prices_for(stages, seed, free=True)
    parts = prices.forward, prices.backward, prices.update, prices.recompute
    for name in FREE_RUNNING:
        schedule = method(name, stages)
        replays = any(t.kind is OpKind.RECOMPUTE for t in schedule.templates())
        own = max(f + b + u + r * replays for f, b, u, r in zip(*parts, strict=True))
        assert cycle_time(schedule, prices).period == pytest.approx(own, rel=1e-12), name


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("seed", range(4))
def test_accumulating_methods_are_as_fast_as_their_slowest_stage(stages, seed):
    """If updates cost nothing: an update in every m-th turn holds up the neighbours' turns too."""
    prices = prices_for(stages, seed, free=True, update_time=False)
    own = max(f + b for f, b in zip(prices.forward, prices.backward, strict=True))
    for name in ("adl", "pipemare", "pipedream-2bw", "xpipe"):
        schedule = method(name, stages)
        expected = schedule.samples_per_iteration * own
        assert cycle_time(schedule, prices).period == pytest.approx(expected, rel=1e-12), name


@pytest.mark.parametrize("stages", range(1, 7))
def test_methods_with_a_lock_left(stages):
    prices = prices_for(stages, 5, free=True, update_time=False)
    wave, back = sum(prices.forward), prices.backward
    parts = zip(prices.forward, back, prices.recompute, strict=True)
    slowest = max(b + r for _, b, r in parts)
    barrier = cycle_time(fr(stages, Sync.BARRIER), prices).period
    assert barrier == pytest.approx(wave + slowest)
    assert cycle_time(pd_asgd(stages), prices).period == max(wave, sum(back))
    even = costs(stages)
    assert cycle_time(ouroboros(stages), even).period == max(stages + 2, 6 if stages > 1 else 3)


def test_a_buffer_makes_room_for_slow_transfers():
    slow = costs(3, 1.0, 1.0, activation_transfer=1.5)
    assert cycle_time(dgl(3), slow).period == pytest.approx(2.0)
    assert cycle_time(dgl(3), costs(3, 1.0, 1.0, activation_transfer=2.5)).period == 2.5
    tight = dataclasses.replace(dgl(3), queue=1)  # F, transfer and the next F for one activation
    assert cycle_time(tight, slow).period == pytest.approx(1.0 + 1.5 + 1.0)


def test_a_thousand_stages_are_checked_at_once():
    begin = time.process_time()
    for schedule in (ddg(1000), ddg(1000, Sync.BARRIER), fdg(1000), bp(1000)):
        validate(schedule)
        assert len(staleness(schedule)) == 1000
    assert time.process_time() - begin < 4  # eight checks; half a second each, generously


# --- Dependencies -------------------------------------------------------------------------------


def needs(schedule, text):
    """What the operation with that text waits for, beyond program order."""
    m = schedule.samples_per_iteration
    return {
        template_at(schedule, edge.source).text(m)
        for edge in dependencies(schedule)
        if edge.relation is not Relation.PROGRAM
        and template_at(schedule, edge.consumer).text(m) == text
    }


def test_whole_and_split_backward_passes_mix():
    """Regression: only the first kind of producer that was found anywhere was waited for."""
    body = [
        *(forward(0), backward(0), forward(0, 1), backward_input(0, 1), backward_weight(0, 1)),
        update(0, 1),
    ]
    last = [*(forward(1), backward_input(1), backward_weight(1), forward(1, 1), backward(1, 1))]
    mixed = Schedule("mixed", 2, (tuple(body), (*last, update(1, 1))), samples_per_iteration=2)
    validate(mixed)
    assert needs(mixed, "U0(2t+1)") == {"B0(2t)", "W0(2t+1)"}
    assert needs(mixed, "B0(2t)") == {"F0(2t)", "I1(2t)"}
    assert needs(mixed, "I0(2t+1)") == {"F0(2t+1)", "B1(2t+1)"}
    twice = dataclasses.replace(
        mixed, workers=((*body[:3], *body[3:4], backward_weight(0), body[5]), mixed.workers[1])
    )
    with pytest.raises(ScheduleError, match=r"stage 0: W0\(2t\) repeats a whole backward pass"):
        validate(twice)


@where(lambda schedule: schedule.replicas == 1)
def test_every_replica_meets_before_it_updates(schedule):
    together = data_parallel(schedule, 3)
    assert parse(render(together)) == together
    assert staleness_levels(together) == staleness_levels(schedule)
    assert memory(together) == memory(schedule)
    assert data_parallel(schedule, 1) == schedule
    m = schedule.samples_per_iteration
    for stage in range(schedule.num_stages):
        (closing,) = (
            t.text(m)[1:]
            for t in together.templates()
            if t.kind is OpKind.UPDATE and t.stage == stage
        )
        gradients = needs(schedule, f"U{closing}")
        assert needs(together, f"A{closing}") == gradients
        assert needs(together, f"U{closing}") == {*gradients, f"A{closing}"}


def test_replicas_without_a_meeting_are_refused():
    with pytest.raises(ScheduleError, match="stage 0: has 0 A operations per iteration, needs 1"):
        validate(dataclasses.replace(bp(1), replicas=2))
    with pytest.raises(ValueError, match="replicas must be at least 1, got 0"):
        data_parallel(bp(1), 0)
    with pytest.raises(ValueError, match="schedule 'bp' has 2 replicas already"):
        data_parallel(data_parallel(bp(1), 2), 2)


def test_data_parallelism_of_one_stage_is_that_of_backpropagation():
    for replicas in (1, 2, 5):
        assert dp(1, replicas).workers == data_parallel(bp(1), replicas).workers


def test_what_crosses_between_the_workers_of_one_stage():
    found = {(c.relation, c.source, c.target) for c in channels(pd_asgd(2))}
    assert found == {
        *((Relation.LOCAL, k, k) for k in (0, 1)),
        *((Relation.WEIGHTS, k, k) for k in (0, 1)),
    }
    assert {c.relation for c in channels(dgl(2))} == {Relation.ACTIVATION, Relation.CREDIT}
    assert ouroboros(3).worker_of(2) == ouroboros(3).worker_of(0) == 0


# --- Executors ----------------------------------------------------------------------------------

PLAIN = (OpKind.FORWARD, OpKind.RECOMPUTE, OpKind.BACKWARD, OpKind.UPDATE)


def iterable(schedule):
    return not schedule.rule.unusual() and all(t.kind in PLAIN for t in schedule.templates())


def versions_oracle(schedule, problem, path, gammas):
    """Weights by version: w_k^{v+1} = w_k^v - γ mean of ∇_k f_s at the weights that s read."""
    stages, m = schedule.num_stages, schedule.samples_per_iteration
    weights = {(k, 0): problem.start[block] for k, block in enumerate(problem.blocks)}
    read, updates = {}, []
    for worker in range(len(schedule.workers)):
        for op in schedule.program(worker, len(gammas), drain=False):
            if op.kind is OpKind.FORWARD:
                read[op.stage, op.sample] = op.version
            elif op.kind is OpKind.UPDATE:
                updates.append(op)
    while updates:
        for op in list(updates):
            group = range(op.sample - m + 1, op.sample + 1)
            wanted = [(k, read[k, s]) for k in range(stages) for s in group]
            if all(place in weights for place in [*wanted, (op.stage, op.version - 1)]):
                gradients = []
                for s in group:
                    w = np.concatenate([weights[k, read[k, s]] for k in range(stages)])
                    gradients.append(problem.gradients(w[None], path[s : s + 1])[0])
                step = gammas[op.iteration] * np.mean(gradients, axis=0)[problem.blocks[op.stage]]
                weights[op.stage, op.version] = weights[op.stage, op.version - 1] - step
                updates.remove(op)
    last = {k: max(v for stage, v in weights if stage == k) for k in range(stages)}
    return np.concatenate([weights[k, last[k]] for k in range(stages)])


STASHING = {
    name: schedule
    for name, schedule in ALL.items()
    if iterable(schedule)
    and schedule.rule.jacobian is Jacobian.STASHED
    and schedule.num_stages in (1, 2, 3, 4)
}


@pytest.mark.parametrize("schedule", STASHING.values(), ids=STASHING)
def test_the_numpy_executor_applies_each_gradient_where_it_was_read(schedule):
    problem = make("rotation-chain", schedule.num_stages)
    draw, ticks = np.random.default_rng(1), schedule.num_ticks(0) + 5
    columns = ticks * schedule.samples_per_iteration
    path = draw.integers(0, problem.num_samples, columns)
    gammas = draw.uniform(0.05, 0.4, ticks)
    run = iterate(schedule, problem, path[None], gammas)
    expected = versions_oracle(schedule, problem, path, gammas)
    np.testing.assert_allclose(run.w[-1, 0], expected, atol=1e-13, rtol=0)


def test_two_buffered_weights_follow_the_paper():
    """w^{t+1} = w^t - γ ∇f(w^{t-1}) for whole networks, ∇f the mean over m micro-batches."""
    problem, m, ticks = make("rotation-chain", 3), 4, 8
    path = np.random.default_rng(2).integers(0, problem.num_samples, m * ticks)
    run = iterate(pipedream_2bw(3, m), problem, path[None], np.full(ticks, 0.3))
    w = [problem.start, problem.start]  # w^{-1} and w^0
    for t in range(ticks):
        batch = path[t * m : (t + 1) * m]
        mean = np.mean(problem.gradients(np.tile(w[-2], (m, 1)), batch), axis=0)
        w.append(w[-1] - 0.3 * mean)
    last = problem.blocks[2]  # the last stage has applied all; the others are a group behind
    np.testing.assert_allclose(run.w[-1, 0, last], w[-1][last], atol=1e-13, rtol=0)
    np.testing.assert_allclose(run.w[-1, 0, : last.start], w[-2][: last.start], atol=1e-13, rtol=0)


class Pooled(torch.nn.Module):
    """Three classes' outputs for the loss of images: the means over thirds of their pixels."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool1d(images.flatten(1)[:, None], 3)[:, 0]


@where(lambda schedule: schedule.num_stages <= 3)
def test_executors_run_or_refuse(schedule):
    stages = schedule.num_stages
    problem = make("rotation-chain", stages)
    ticks = schedule.num_ticks(0) + 2
    samples = ticks * schedule.samples_per_iteration * schedule.replicas
    path = np.zeros((1, samples), dtype=int)
    assert np.all(np.isfinite(iterate(schedule, problem, path, np.full(ticks, 0.1)).w))
    modules = toy_stages(stages)

    def build():
        return [
            Stage(module, k, schedule, lambda p: torch.optim.SGD(p, lr=0.05), head=Pooled())
            for k, module in enumerate(modules)
        ]

    if schedule.rule.values(TransformKind.TIED):
        with pytest.raises(ScheduleError, match="tied"):
            run_serial(schedule, build(), Toy(), ticks)
        return
    before = snapshot(modules)
    run = run_serial(schedule, build(), Toy(), ticks)
    assert len(run.spans) == sum(
        1 for worker in range(len(schedule.workers)) for _ in schedule.program(worker, ticks)
    )
    changed = [
        not torch.equal(tensor, before[k][name])
        for k, module in enumerate(modules)
        for name, tensor in module.named_parameters()
    ]
    assert sum(changed) > 0.7 * len(changed)  # biases before batch norm have no gradient


# --- The catalogue ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpipe", {"chunks": 2}, "chunks 2 does not apply to gpipe, which takes micro_batches, "),
        ("fdg", {"sync": Sync.BARRIER}, "sync 'barrier' does not apply to fdg, which takes shrink"),
        ("fr", {"semantics": Semantics.STASH}, "semantics 'stash' does not apply to fr"),
        ("adl", {"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ("gpipe", {"micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ("interleaved", {"chunks": 3}, "num_stages must be a multiple of chunks=3, got 4"),
        ("interleaved", {"micro_batches": 3}, "micro_batches must be a multiple of the 2 workers"),
        ("pipedream-2bw", {"micro_batches": 3}, "at least the number of stages, 4, got 3"),
        ("fdg", {"shrink": 1.5}, r"shrink must be in \(0, 1\], got 1.5"),
        ("dsp", {"lags": (1,)}, r"lags must be 4 numbers, at least 0, got \(1,\)"),
        ("dgl", {"buffer": -1}, "buffer must be at least 0, got -1"),
        ("pipemare", {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ("pipemare", {"anneal": -1.0}, "anneal must be at least 0, got -1.0"),
        ("bp", {"replicas": 0}, "replicas must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_apply_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        method(name, 4, **options)


@pytest.mark.parametrize("name", METHODS)
def test_the_catalogue(name):
    assert method(name, 4).method == name
    assert method(name, 4, sync=Sync.NONE, micro_batches=None) == method(name, 4)
    assert method(name, 4, replicas=3).replicas == 3
    with pytest.raises(ValueError, match="num_stages must be .*, got 0"):
        method(name, 0)


if __name__ == "__main__":
    print(golden(), end="")
