"""Drawing how long everything in a run takes, for many runs at once.

Each entry of the costs has a stream of uniform numbers of its own, indexed by sample, replica and
run. So the same sample on the same stage meets the same luck in every method (common random
numbers), and more runs or longer ones never change those already drawn.
"""

from __future__ import annotations

import numpy as np

from ddg_sim.costs import PER_LINK, PER_STAGE, Costs
from ddg_sim.dependencies import Relation
from ddg_sim.eventgraph import Event, EventGraph
from ddg_sim.schedule import OpKind, OpTemplate
from ddg_sim.times import Array, Time

NAMES = (*PER_STAGE, *PER_LINK, "barrier")
KINDS = tuple(OpKind)
ENTRY = {
    OpKind.FORWARD: "forward",
    OpKind.RECOMPUTE: "recompute",
    OpKind.BACKWARD: "backward",
    OpKind.BACKWARD_INPUT: "backward",  # both halves of a sample's backward pass share its luck
    OpKind.BACKWARD_WEIGHT: "backward",
    OpKind.UPDATE: "update",
    OpKind.ALL_REDUCE: "all_reduce",
}
#: Runs that are drawn together.
BLOCK = 32


def durations(
    graph: EventGraph,
    costs: Costs,
    iterations: int,
    seed: int = 0,
    runs: range = range(1),
) -> list[float | Array]:
    """How long every event takes in every iteration of every run, in seconds.

    Args:
        graph: the schedule's events.
        costs: numbers or distributions.
        iterations: iterations of samples that are fed.
        seed: of all draws.
        runs: which runs to draw.

    Returns:
        Per event a number, if it never varies, or an array of shape (ticks, runs, replicas).

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.eventgraph import event_graph
    >>> from ddg_sim.methods import ddg
    >>> from ddg_sim.times import Gamma
    >>> found = durations(event_graph(ddg(2)), costs(2, forward=Gamma(1.0, 0.1)), 5, runs=range(3))
    >>> found[0].shape, found[1]
    ((6, 3, 1), 2.0)
    """
    draw = _Draw(graph, costs, iterations, seed, runs)
    return [draw.event(event) if costs.random else event.seconds(costs) for event in graph.events]


class _Draw:
    def __init__(
        self, graph: EventGraph, costs: Costs, iterations: int, seed: int, runs: range
    ) -> None:
        self.costs = costs
        self.seed = seed
        self.runs = runs
        self.replicas = graph.schedule.replicas
        self.m = graph.schedule.samples_per_iteration
        self.total = max(1, iterations * self.m)
        self.ticks = np.arange(graph.schedule.num_ticks(iterations))
        self.drawn: dict[tuple[Time, tuple[int, ...]], Array] = {}  # micro-batches share them

    def event(self, event: Event) -> float | Array:
        if event.template is not None:
            return self._operation(event.template, event.messages)
        samples = self.m * self.ticks + (event.sample or 0)
        if event.message is None:
            return self._time(self.costs.barrier, "barrier", (0,), self.ticks)
        relation, (source, target) = event.message.relation, event.ends
        name = PER_LINK[int(relation is Relation.GRADIENT)]
        time = self.costs.transfer(relation, source, target)
        return self._time(time, name, (min(source, target),), samples)

    def _operation(self, template: OpTemplate, messages: int) -> float | Array:
        costs, stage, kind = self.costs, template.stage, template.kind
        samples = self.m * self.ticks + template.sample
        code = (stage, KINDS.index(kind))
        work = self._time(costs.work(kind, stage), ENTRY[kind], (stage,), samples)
        overhead = self._time(costs.overhead[stage], "overhead", code, samples)
        message = self._time(costs.message[stage], "message", code, samples)
        jitter = self._time(costs.jitter[stage], "jitter", code, samples)
        slowdown = self._time(costs.slowdown[stage], "slowdown", (stage,), 0 * self.ticks)
        # Adding nothing, or multiplying by one, would be a pass over large arrays all the same.
        host, factor = overhead + messages * message, jitter * slowdown
        if not (isinstance(host, float) and host == 0):
            work = work + host
        found: float | Array = work
        if not (isinstance(factor, float) and factor == 1):
            found = work * factor
        if kind is OpKind.ALL_REDUCE and not isinstance(found, float):
            found = np.repeat(found[..., :1], self.replicas, axis=2)  # it ends for all at once
        return found

    def _time(
        self, time: Time, name: str, code: tuple[int, ...], samples: np.ndarray
    ) -> float | Array:
        if isinstance(time, int | float):
            return float(time)
        count = max(self.total, len(self.ticks))
        stream = (NAMES.index(name), *code)
        if (time, stream) not in self.drawn:
            u = uniforms(self.seed, stream, count, self.runs, self.replicas)
            self.drawn[time, stream] = time.quantile(u)
        found: Array = self.drawn[time, stream][np.clip(samples, 0, count - 1)]
        return found


def uniforms(seed: int, code: tuple[int, ...], count: int, runs: range, replicas: int) -> Array:
    """Uniform numbers in [0, 1) of one stream, shape (count, runs, replicas).

    Entry (s, r, p) depends on seed, code, s, r and p only.

    >>> few, many = uniforms(0, (1,), 3, range(2), 1), uniforms(0, (1,), 5, range(40), 2)
    >>> bool((few == many[:3, :2, :1]).all())
    True
    """
    first, last = runs.start // BLOCK, -(-runs.stop // BLOCK)
    found = np.empty((count, (last - first) * BLOCK, replicas))
    # A counter-based generator (Salmon et al. 2011): the key says which stream it is, the counter
    # which part of it.
    packed = sum(number << (20 * place) for place, number in enumerate(code))
    key = np.array([seed, packed], dtype=np.uint64)
    for replica in range(replicas):
        for place, block in enumerate(range(first, last)):
            counter = np.array([0, 0, replica, block], dtype=np.uint64)
            drawn = np.random.Generator(np.random.Philox(key=key, counter=counter))
            found[:, place * BLOCK : (place + 1) * BLOCK, replica] = drawn.random((count, BLOCK))
    return found[:, runs.start - first * BLOCK : runs.stop - first * BLOCK]
