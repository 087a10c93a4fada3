"""What a schedule costs: everything that is predicted about one method, in one record."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ddg_sim.contention import Contention, contended
from ddg_sim.costs import Costs
from ddg_sim.cycletime import CycleTime, cycle_time, evaluate
from ddg_sim.eventgraph import event_graph, shares_cores
from ddg_sim.lowering import StageMemory, memory
from ddg_sim.methods import bp
from ddg_sim.replicate import Estimate, estimate, exactly, ratio, replicate
from ddg_sim.schedule import Schedule, backward, forward, staleness, update
from ddg_sim.simulate import SteadyStateError, simulate, steady_period
from ddg_sim.timeline import Timeline

ENGINES = ("des", "cycle")
#: Iterations after which a simulation stops looking for its steady state.
LONGEST = 1024
#: Steady iterations of each run where times vary.
STEADY = 100


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a schedule costs with given costs; seconds.

    Args:
        schedule: what was predicted.
        engine: "des" (SimPy) or "cycle" (max-plus).
        period: steady-state seconds per iteration, with its confidence interval where times vary.
        period_is_exact: whether it is the exact value for costs that do not vary. A simulated run
            ("des") that came to no steady state within `LONGEST` iterations gives the slope of its
            timeline instead, and so do workers that share cores.
        bp_period: seconds that backpropagation takes for as many samples, with the same stages on
            the same devices.
        speedup: how many times faster than that; None if nothing takes any time.
        cycle: the critical cycle, with mean times; None where links share a bus. Where workers
            share cores, it is what would bound them on cores of their own.
        cores: cores that the workers share, or None.
        utilisation: per worker, fraction of the period in which it computes.
        staleness: per stage, in updates.
        memory: per stage, peak live activations and weight versions.
        timeline: a run from an empty pipeline to a drained one.
    """

    schedule: Schedule
    engine: str
    period: Estimate
    period_is_exact: bool
    bp_period: float
    speedup: Estimate | None
    cycle: CycleTime | None
    cores: int | None
    utilisation: tuple[float, ...]
    staleness: tuple[int, ...]
    memory: tuple[StageMemory, ...]
    timeline: Timeline

    @property
    def bubble(self) -> float:
        """Fraction of the workers' time in which they do not compute, in steady state."""
        return 1.0 - sum(self.utilisation) / len(self.utilisation)

    @property
    def bound_by(self) -> str:
        """In words, what bounds the period."""
        if self.cycle is None:
            return "shared buses decide from run to run what bounds you"
        if self.cores is None:
            return self.cycle.explain()
        workers = len(self.schedule.workers) * self.schedule.replicas
        cores = f"{self.cores} core{'' if self.cores == 1 else 's'}"
        return f"{workers} workers take turns on {cores}; with a core each, {self.cycle.explain()}"


def predict(
    schedule: Schedule,
    costs: Costs,
    iterations: int,
    engine: str = "cycle",
    contention: Contention | None = None,
    precision: float = 0.01,
    seed: int = 0,
    before: Costs | None = None,
) -> Prediction:
    """Predict period, speedup, utilisation, staleness and memory of a schedule.

    Args:
        schedule: what to predict.
        costs: seconds; where they vary, many runs are made, with the same luck for the method and
            for backpropagation.
        iterations: length of the timeline; the period does not depend on it.
        engine: "des" plays the run on SimPy, "cycle" evaluates the max-plus recursion. They agree
            to rounding.
        contention: per stage, how many times longer its operations take while all others compute;
            None: they do not disturb each other.
        precision: half width of the period's 95 % interval that is aimed at, where times vary, as
            a fraction of the period.
        seed: of the draws.
        before: costs of backpropagation's operations; None: the same. (Where a method's own are
            other ones, by its rule.)

    Raises:
        ValueError: for another engine, ``iterations`` < 1, costs of another number of stages, or
            shared buses or cores with engine "cycle".

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> found = predict(ddg(4), costs(4), iterations=20)
    >>> found.period.value, found.speedup.value, found.utilisation
    (3.0, 4.0, (1.0, 1.0, 1.0, 1.0))
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known engines: {', '.join(ENGINES)}")
    if not precision > 0:
        raise ValueError(f"precision is {precision}: give a positive fraction of the period")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    baseline, baseline_costs = _baseline(schedule), costs if before is None else before
    if contention is not None:
        baseline_costs = contended(baseline, baseline_costs, contention)
        costs = contended(schedule, costs, contention)
    play = simulate if engine == "des" else evaluate
    timeline = play(schedule, costs, iterations, seed=seed)
    cycle = None if costs.network.buses else cycle_time(schedule, replace(costs, cores=None))
    samples = schedule.samples_per_iteration * schedule.replicas
    if costs.random:
        cases = {"this": (schedule, costs), "bp": (baseline, replace(baseline_costs, cores=None))}
        found = replicate(cases, STEADY + 2 * schedule.num_ticks(0), precision, seed=seed)
        period, exact, base = estimate(found["this"]), False, samples * float(found["bp"].mean())
        speedup: Estimate | None = None
        if period.value > 0:
            speedup = ratio(samples * found["bp"], found["this"])
    else:
        value, exact = _period(schedule, costs, engine, timeline)
        period, base = exactly(value), samples * _bp_period(baseline, baseline_costs)
        speedup = exactly(base / value) if value > 0 else None
    # An estimate may lie below what a worker's own operations take; nobody is busier than always.
    whole = max(period.value, cycle.period if cycle is not None else 0.0)
    cores = costs.cores if shares_cores(schedule, costs) else None
    busy = [0.0] * len(schedule.workers)
    for event in event_graph(schedule).events:
        if event.node is not None:
            busy[event.node.worker] += event.seconds(costs)
    return Prediction(
        schedule,
        engine,
        period,
        exact,
        base,
        speedup,
        cycle,
        cores,
        tuple(seconds / whole if whole > 0 else 0.0 for seconds in busy),
        staleness(schedule),
        memory(schedule),
        timeline,
    )


def _baseline(schedule: Schedule) -> Schedule:
    """Backpropagation with the stages where the schedule has them."""
    mine = [
        [stage for stage in range(schedule.num_stages) if schedule.worker_of(stage) == worker]
        for worker in range(len(schedule.workers))
    ]
    bodies = (
        (
            *(forward(stage) for stage in stages),
            *(step(stage) for stage in reversed(stages) for step in (backward, update)),
        )
        for stages in mine
        if stages
    )
    return replace(bp(schedule.num_stages), workers=tuple(bodies))


def _period(
    schedule: Schedule, costs: Costs, engine: str, timeline: Timeline
) -> tuple[float, bool]:
    """The period with costs that do not vary, and whether it is exact."""
    if engine == "cycle":
        return cycle_time(schedule, costs).period, True
    try:
        return steady_period(schedule, costs, LONGEST), not shares_cores(schedule, costs)
    except SteadyStateError:
        return timeline.period, False


def _bp_period(schedule: Schedule, costs: Costs) -> float:
    """Of backpropagation, where nothing overlaps: shared buses and cores make no difference."""
    alone = replace(costs, network=replace(costs.network, buses=()), cores=None)
    return cycle_time(schedule, alone).period
