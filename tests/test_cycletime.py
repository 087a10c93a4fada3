"""The exact period: against closed forms, against all simple cycles, and against the recursion."""

import dataclasses
import itertools
import random
import time

import closed_forms
import networkx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import costed, costs_for, ends_without_draining, quarters

from ddg_sim.costs import Costs, costs
from ddg_sim.cycletime import cycle_time, evaluate
from ddg_sim.decoupled import sideways
from ddg_sim.dependencies import Node, barrier_indices, dependencies, template_at
from ddg_sim.eventgraph import event_graph, retiming
from ddg_sim.methods import Semantics, bp, data_parallel, ddg
from ddg_sim.schedule import Schedule, ScheduleError, Sync, backward, forward, update
from ddg_sim.simulate import steady_period

CASES = {
    "bp": (bp, closed_forms.bp),
    "ddg none": (ddg, closed_forms.ddg_none),
    "ddg barrier": (lambda stages: ddg(stages, Sync.BARRIER), closed_forms.ddg_barrier),
    "ddg mailbox": (lambda stages: ddg(stages, Sync.MAILBOX), closed_forms.ddg_mailbox),
}


def heterogeneous(stages, seed, slow_links=False):
    """Costs in eighths of a second; slow links make messages outlast whole iterations."""
    draw = random.Random(f"{stages} {seed}")

    def several(count, most):
        return tuple(draw.randrange(1, most) / 8 for _ in range(count))

    most = 60 * stages if slow_links else 12
    return Costs(
        forward=several(stages, 16),
        backward=several(stages, 40),
        update=several(stages, 8),
        activation_transfer=several(stages - 1, 12),
        gradient_transfer=several(stages - 1, most),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 32, 64])
@pytest.mark.parametrize("slow_links", [False, True])
def test_cycle_time_is_the_closed_form(case, stages, slow_links):
    build, closed_form = CASES[case]
    prices = heterogeneous(stages, 0, slow_links)
    assert cycle_time(build(stages), prices).period == pytest.approx(
        closed_form(prices), rel=1e-9, abs=0
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slow_links", [False, True])
def test_the_simulator_reaches_the_closed_form(case, stages, seed, slow_links):
    build, closed_form = CASES[case]
    prices = heterogeneous(stages, seed, slow_links)
    assert steady_period(build(stages), prices) == pytest.approx(
        closed_form(prices), rel=1e-9, abs=0
    )


@pytest.mark.parametrize("case", CASES)
def test_both_engines_reach_the_closed_form_with_64_stages(case):
    build, closed_form = CASES[case]
    prices = heterogeneous(64, 1)
    expected = pytest.approx(closed_form(prices), rel=1e-9, abs=0)
    assert steady_period(build(64), prices) == expected
    assert evaluate(build(64), prices, 200).period == expected


@settings(deadline=None)
@given(st.integers(1, 6).flatmap(costs_for), st.sampled_from(list(CASES)))
def test_any_costs_give_the_closed_form(prices, case):
    prices = dataclasses.replace(prices, overhead=(), message=(), barrier=0.0)
    build, closed_form = CASES[case]
    found = cycle_time(build(prices.num_stages), prices).period
    assert found == pytest.approx(closed_form(prices), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("stages", [2, 3, 4, 7])
def test_balanced_special_cases(stages):
    f, b = 1.0, 2.5
    forward_all, backward_all = stages * f, stages * b
    even = costs(stages, forward=f, backward=b)
    expected = {
        "bp": forward_all + backward_all,
        "ddg barrier": forward_all + backward_all / stages,
        "ddg none": (forward_all + backward_all) / stages,
        "ddg mailbox": (2 * forward_all + backward_all) / stages,
    }
    for case, seconds in expected.items():
        assert cycle_time(CASES[case][0](stages), even).period == pytest.approx(seconds, rel=1e-12)
    replay = ddg(stages, Sync.BARRIER, Semantics.REPLAY)
    assert cycle_time(replay, even).period == pytest.approx(
        forward_all + (forward_all + backward_all) / stages, rel=1e-12
    )


def test_features_replay_with_a_barrier():
    prices = heterogeneous(5, 3)
    stage = [f + b + u for f, b, u in zip(*closed_forms.names(prices)[:3], strict=True)]
    expected = sum(prices.forward) + sum(prices.activation_transfer) + max(stage)
    found = cycle_time(ddg(5, Sync.BARRIER, Semantics.REPLAY), prices).period
    assert found == pytest.approx(expected, rel=1e-9)


def test_overhead_is_paid_by_every_operation():
    plain = costs(4, 1.0, 2.0, 0.5)
    heavy = costs(4, 1.0, 2.0, 0.5, overhead=0.25)
    assert cycle_time(ddg(4), heavy).period == cycle_time(ddg(4), plain).period + 3 * 0.25
    assert cycle_time(bp(4), heavy).period == cycle_time(bp(4), plain).period + 9 * 0.25


def brute_force(schedule, prices):
    """Largest ratio over all simple cycles of `dependencies` and of barriers, all to all."""
    graph = networkx.DiGraph()
    messages = {}

    def connect(source, target, tokens, seconds):
        known = graph.get_edge_data(source, target, {"tokens": tokens})["tokens"]
        graph.add_edge(source, target, tokens=min(tokens, known), seconds=seconds)

    crossing = [edge for edge in dependencies(schedule) if edge.is_message]

    def seconds(node):
        template = template_at(schedule, node)
        count = sum((edge.source == node) + (edge.consumer == node) for edge in crossing)
        return prices.duration(template.kind, template.stage, count)

    for number, edge in enumerate(dependencies(schedule)):
        if not edge.is_message:
            meets = edge.source.position in barrier_indices(schedule, edge.source.worker)
            extra = prices.barrier if meets else 0.0
            connect(edge.source, edge.target, edge.tokens, seconds(edge.source) + extra)
            continue
        source, target = (template_at(schedule, node) for node in (edge.source, edge.consumer))
        transfer = ("transfer", edge.source.position, number)
        cost = prices.transfer(edge.relation, source.stage, target.stage)
        messages.setdefault((edge.source.worker, edge.target.worker), []).append((transfer, cost))
        connect(edge.source, transfer, 0, seconds(edge.source))
        connect(transfer, edge.target, edge.tokens, cost)
    meetings = [barrier_indices(schedule, worker) for worker in range(len(schedule.workers))]
    for group in zip(*meetings, strict=True):
        for one, other in itertools.permutations(enumerate(group), 2):
            (worker, position), length = other, len(schedule.workers[other[0]])
            target, tokens = Node(worker, (position + 1) % length), int(position + 1 == length)
            connect(Node(*one), target, tokens, seconds(Node(*one)) + prices.barrier)
    for queue in messages.values():
        queue.sort()
        for (one, cost), (other, _) in itertools.pairwise(queue):
            connect(one, other, 0, cost)
        connect(queue[-1][0], queue[0][0], 1, queue[-1][1])
    best = 0.0
    for cycle in networkx.simple_cycles(graph):
        edges = [graph.edges[pair] for pair in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
        tokens = sum(edge["tokens"] for edge in edges)
        assert tokens > 0
        best = max(best, sum(edge["seconds"] for edge in edges) / tokens)
    return best


@settings(max_examples=150, deadline=None)
@given(costed(max_stages=3))
def test_cycle_time_is_the_best_of_all_simple_cycles(pair):
    schedule, prices = pair
    assume(schedule.samples_per_iteration * schedule.num_stages <= 6)
    assert cycle_time(schedule, prices).period == pytest.approx(
        brute_force(schedule, prices), rel=1e-9, abs=1e-12
    )


@settings(max_examples=100, deadline=None)
@given(costed(quarters))
def test_the_critical_cycle_attains_the_period(pair):
    schedule, prices = pair
    found = cycle_time(schedule, prices)
    assert found.tokens >= 1
    assert found.seconds == sum(found.durations)
    graph = event_graph(schedule)
    arcs = {}
    for arc in graph.arcs:
        ends = graph.events[arc.source].name, graph.events[arc.target].name, arc.source, arc.target
        arcs.setdefault(ends, set()).add(arc.tokens)
    where = [graph.events.index(event) for event in found.cycle]
    joined = zip(where, where[1:] + where[:1], strict=True)
    names = [
        (graph.events[source].name, graph.events[target].name, source, target)
        for source, target in joined
    ]
    possible = [sum(choice) for choice in itertools.product(*(arcs[name] for name in names))]
    assert found.tokens in possible
    assert list(found.durations) == [event.seconds(prices) for event in found.cycle]
    assert found.period == pytest.approx(found.seconds / found.tokens, rel=1e-12)
    assert len(set(found.critical_cycle)) == len(found.critical_cycle) or (
        schedule.samples_per_iteration > 1 or schedule.sync is Sync.BARRIER
    )
    assert "bounds you" in found.explain()


@settings(max_examples=100, deadline=None)
@given(costed(quarters))
def test_retiming_leaves_no_negative_tokens(pair):
    graph = event_graph(pair[0])
    rounds = retiming(graph)
    for arc in graph.arcs:
        assert arc.tokens + rounds[arc.target] - rounds[arc.source] >= 0


# A later iteration of stage 1 feeds an earlier one of stage 0: legal, as every cycle has tokens.
EARLY = Schedule(
    "early",
    2,
    (
        (forward(0), backward(0), update(0)),
        (forward(1, -1), backward(1, -1), update(1, -1)),
    ),
)


def test_single_edges_may_carry_negative_tokens():
    assert not ends_without_draining(EARLY)
    prices = heterogeneous(2, 0)
    assert cycle_time(EARLY, prices).period == pytest.approx(closed_forms.bp(prices), rel=1e-12)
    assert steady_period(EARLY, prices) == pytest.approx(closed_forms.bp(prices), rel=1e-12)


def test_what_needs_a_later_iteration_cannot_stop_without_draining():
    with pytest.raises(ScheduleError, match="without draining, B0 of iteration 4 waits for gradie"):
        evaluate(EARLY, costs(2), 5, drain=False)


@pytest.mark.parametrize(
    ("schedule", "prices", "cycle", "words"),
    [
        (
            ddg(4),
            costs(4, forward=(1, 3, 1, 1), update=0.5),
            ("F1", "B1", "U1"),
            "stage 2's own forward + backward + update bounds you: 5.5 s per iteration",
        ),
        (
            ddg(4),
            costs(4),
            ("F0", "B0", "U0"),
            "stage 1's own forward + backward bounds you: 3 s per iteration",
        ),
        (
            ddg(2),
            costs(2, comm=2.0),
            ("F0", "activation 0→1", "F1", "B1", "gradient 1→0", "B0", "U0"),
            "the round trip from stage 1 to stage 2 and back bounds you:"
            " 10 s for 2 iterations, 5 s each, 4 s of it in transfers",
        ),
        (
            ddg(3),
            costs(3, forward=1e-3, backward=1e-3, activation_transfer=(0, 7e-3)),
            ("activation 1→2",),
            "the link that carries the activations from stage 2 to stage 3 bounds you:"
            " 7 ms per iteration",
        ),
        (
            ddg(4, Sync.BARRIER),
            costs(4, backward=(2, 2, 3, 2)),
            None,
            "all forwards, then the slowest backward (stage 3) between barriers bounds you:"
            " 7 s per iteration",
        ),
        (
            ddg(3, Sync.MAILBOX),
            costs(3, forward=(1.5, 2, 1)),
            ("F0", "activation 0→1", "F1", "B1", "gradient 1→0"),
            "the round trip from stage 1 to stage 2 and back bounds you: 5.5 s per iteration",
        ),
        (
            bp(4),
            costs(4),
            None,
            "the round trip from stage 1 to stage 4 and back bounds you: 12 s per iteration",
        ),
    ],
)
def test_explanations(schedule, prices, cycle, words):
    found = cycle_time(schedule, prices)
    assert found.explain() == words
    assert cycle is None or found.critical_cycle == cycle


def test_a_gradient_that_outlasts_an_iteration_is_explained():
    slow = costs(3, gradient_transfer=(0, 9))
    found = cycle_time(ddg(3, Sync.BARRIER), slow)
    assert found.period == closed_forms.ddg_barrier(slow) == 9.0
    assert "the gradients from stage 3 to stage 2" in found.explain()


def test_costs_for_another_number_of_stages_are_refused():
    for engine in (cycle_time, lambda *args: evaluate(*args, 3), steady_period):
        with pytest.raises(ValueError, match="costs are for 3 stages, but schedule 'ddg' has 2"):
            engine(ddg(2), costs(3))


@pytest.mark.parametrize("sync", list(Sync))
@pytest.mark.parametrize("even", [False, True])
def test_large_schedules_are_fast(sync, even):
    """Measured well below 1 s; the bounds leave room for a busy machine.

    With equal stages very many cycles are critical, but for the rounding of their sums.
    """
    schedule, prices = ddg(64, sync), costs(64, comm=0.1) if even else heterogeneous(64, 2)
    begin = time.process_time()
    cycle_time(schedule, prices)
    assert time.process_time() - begin < 2
    begin = time.process_time()
    evaluate(schedule, prices, 200)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_regression_two_critical_cycles_do_not_take_turns_for_ever(replicas):
    prices = Costs(
        forward=(1.5, 1.75, 0.25, 0.0),
        backward=(2.5, 0.0, 1.5, 0.0),
        update=(1.5, 0.0, 0.75, 0.0),
        recompute=(0.0,) * 4,
        activation_transfer=(0.0,) * 3,
        gradient_transfer=(0.0,) * 3,
        message=(1.0, 0.0, 1.25, 0.0),
    )
    schedule = data_parallel(sideways(4), replicas)
    # Two messages in a forward and a backward pass of stage 1; four in stage 3's.
    assert cycle_time(schedule, prices).period == max(1.5 + 2.5 + 1.5 + 2, 0.25 + 1.5 + 0.75 + 5)


@pytest.mark.parametrize("num_stages", [2, 3, 8])
def test_a_barrier_costs_its_time_twice_per_iteration(num_stages):
    prices = costs(num_stages, forward=1.0, backward=2.0, barrier=0.25)
    schedule = ddg(num_stages, Sync.BARRIER)
    assert cycle_time(schedule, prices).period == num_stages + 2.0 + 2 * 0.25
    assert steady_period(schedule, prices) == pytest.approx(num_stages + 2.5, rel=1e-9)
    assert cycle_time(ddg(num_stages), prices).period == 3.0
