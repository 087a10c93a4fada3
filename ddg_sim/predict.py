"""What a schedule costs: everything that is predicted about one method, in one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddg_sim.contention import contended
from ddg_sim.costs import Costs
from ddg_sim.cycletime import CycleTime, cycle_time, evaluate
from ddg_sim.lowering import StageMemory, memory
from ddg_sim.methods import bp
from ddg_sim.schedule import Schedule, staleness
from ddg_sim.simulate import SteadyStateError, simulate, steady_period
from ddg_sim.timeline import Timeline

ENGINES = ("des", "cycle")
#: Iterations after which a simulation stops looking for its steady state.
LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a schedule costs with given costs; seconds.

    Args:
        schedule: what was predicted.
        engine: "des" (SimPy) or "cycle" (max-plus).
        period: steady-state seconds per iteration.
        period_is_exact: False if a simulated run ("des") came to no steady state within `LONGEST`
            iterations; its period is then the slope of the timeline.
        bp_period: seconds that backpropagation over as many stages takes for as many samples.
        cycle: the critical cycle.
        utilisation: per worker, fraction of the period in which it computes.
        staleness: per stage, in updates.
        memory: per stage, peak live activations and weight versions.
        timeline: a run from an empty pipeline to a drained one.
    """

    schedule: Schedule
    engine: str
    period: float
    period_is_exact: bool
    bp_period: float
    cycle: CycleTime
    utilisation: tuple[float, ...]
    staleness: tuple[int, ...]
    memory: tuple[StageMemory, ...]
    timeline: Timeline

    @property
    def speedup_over_bp(self) -> float | None:
        """How many times faster than backpropagation; None if nothing takes any time."""
        return self.bp_period / self.period if self.period > 0 else None

    @property
    def bubble(self) -> float:
        """Fraction of the workers' time in which they do not compute, in steady state."""
        return 1.0 - sum(self.utilisation) / len(self.utilisation)


def predict(
    schedule: Schedule,
    costs: Costs,
    iterations: int,
    engine: str = "cycle",
    contention: Sequence[float] | None = None,
) -> Prediction:
    """Predict period, speedup, utilisation, staleness and memory of a schedule.

    Args:
        schedule: what to predict.
        costs: deterministic costs, in seconds.
        iterations: length of the timeline; the period does not depend on it.
        engine: "des" plays the run on SimPy, "cycle" evaluates the max-plus recursion. They agree
            to rounding.
        contention: per stage, how many times longer its operations take while all others compute;
            None: they do not disturb each other.

    Raises:
        ValueError: for another engine, ``iterations`` < 1, or costs of another number of stages.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> found = predict(ddg(4), costs(4), iterations=20)
    >>> found.period, found.speedup_over_bp, found.utilisation
    (3.0, 4.0, (1.0, 1.0, 1.0, 1.0))
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known engines: {', '.join(ENGINES)}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    bp_schedule, bp_costs = bp(schedule.num_stages), costs
    if contention is not None:
        bp_costs = contended(bp_schedule, costs, contention)
        costs = contended(schedule, costs, contention)
    cycle = cycle_time(schedule, costs)
    if engine == "des":
        timeline = simulate(schedule, costs, iterations)
        try:
            period, exact = steady_period(schedule, costs, LONGEST), True
        except SteadyStateError:
            period, exact = timeline.period, False
    else:
        timeline = evaluate(schedule, costs, iterations)
        period, exact = cycle.period, True
    busy = [
        sum(costs.duration(template.kind, template.stage) for template in body)
        for body in schedule.workers
    ]
    return Prediction(
        schedule,
        engine,
        period,
        exact,
        schedule.samples_per_iteration * cycle_time(bp_schedule, bp_costs).period,
        cycle,
        tuple(seconds / period if period > 0 else 0.0 for seconds in busy),
        staleness(schedule),
        memory(schedule),
        timeline,
    )
