"""Estimates from many random runs, with confidence intervals, by common random numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ddg_sim.costs import Costs
from ddg_sim.cycletime import completions, cycle_time
from ddg_sim.draws import BLOCK
from ddg_sim.eventgraph import only_simulated
from ddg_sim.schedule import Schedule
from ddg_sim.simulate import simulate, steady_period
from ddg_sim.steady import robust_period
from ddg_sim.times import Array

#: Longer runs are not tried in search of a steady state.
MOST_ITERATIONS = 3200
#: Runs are added until the intervals are narrow enough, or there are so many.
MOST_RUNS = 4096


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its two-sided confidence interval; ``runs`` is 0 for an exact value.

    >>> Estimate(2.0, 1.9, 2.1, 0.95, 64).relative_width
    0.05
    """

    value: float
    low: float
    high: float
    confidence: float
    runs: int

    @property
    def relative_width(self) -> float:
        """Half the interval's width as a fraction of the value; 0 for a value of 0."""
        half = (self.high - self.low) / 2
        return round(half / abs(self.value), 12) if self.value else 0.0


def exactly(value: float) -> Estimate:
    """A value that is not estimated but computed.

    >>> exactly(3.0).low, exactly(3.0).runs
    (3.0, 0)
    """
    return Estimate(value, value, value, 1.0, 0)


def estimate(values: Array, confidence: float = 0.95) -> Estimate:
    """Mean of independent values, with Student's t interval.

    Raises:
        ValueError: for fewer than two values, or a confidence outside 0 to 1.

    >>> found = estimate(np.array([1.0, 2.0, 3.0]))
    >>> found.value, round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a number between 0 and 1")
    if len(values) < 2:
        raise ValueError(f"values has {len(values)} entries: an interval needs at least 2")
    mean = float(values.mean())
    reach = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    half = float(reach * values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half, confidence, len(values))


def ratio(numerators: Array, denominators: Array, confidence: float = 0.95) -> Estimate:
    """Ratio of two means from paired runs (delta method); pairs that move together cancel.

    >>> base = np.array([2.0, 4.0, 6.0])
    >>> ratio(2 * base, base).high
    2.0
    """
    if not denominators.mean() > 0:
        raise ValueError("denominators have mean 0: there is no ratio")
    mean = float(numerators.mean() / denominators.mean())
    residuals = (numerators - mean * denominators) / float(denominators.mean())
    around = estimate(residuals, confidence)
    return Estimate(mean, mean + around.low, mean + around.high, confidence, around.runs)


def periods(
    schedule: Schedule, costs: Costs, iterations: int, seed: int = 0, runs: range = range(BLOCK)
) -> Array:
    """Seconds per iteration of each of many random runs: the slope over their second half.

    The first half is warm-up: queues need longer to fill than the schedule says.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: length of a run, warm-up included; must exceed it by at least 2.
        seed: of the draws.
        runs: which runs.

    Raises:
        ValueError: if ``iterations`` leaves no steady ones.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> periods(ddg(2), costs(2), 20, runs=range(2)).tolist()
    [3.0, 3.0]
    """
    first = schedule.num_ticks(0)
    if iterations < first + 2:
        raise ValueError(
            f"iterations is {iterations}, of which {first} are warm-up: give at least {first + 2}"
        )
    done = completed(schedule, costs, iterations, seed, runs)
    return _slopes(done, max(first, iterations // 2), iterations - 1)


def _slopes(done: Array, first: int, last: int) -> Array:
    found: Array = (done[last] - done[first]) / (last - first)
    return found


def settled_iterations(
    schedule: Schedule, costs: Costs, iterations: int, precision: float, seed: int = 0
) -> int:
    """Iterations, doubled until both halves of a run agree, so that no warm-up is left.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: where to begin.
        precision: relative difference that does not matter.
        seed: of the draws.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> settled_iterations(ddg(2), costs(2), 20, 0.01)
    20
    """
    while iterations < MOST_ITERATIONS:
        done = completed(schedule, costs, iterations, seed, range(BLOCK))
        middle = max(schedule.num_ticks(0), iterations // 2)
        early = _slopes(done, middle // 2, middle)
        late = _slopes(done, middle, iterations - 1)
        change = estimate(late - early)
        noise = (change.high - change.low) / 2
        if abs(change.value) <= max(precision * float(late.mean()), noise):
            return iterations
        iterations *= 2
    return iterations


def completed(schedule: Schedule, costs: Costs, iterations: int, seed: int, runs: range) -> Array:
    """`cycletime.completions`, or the same by simulation where buses or cores are shared.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> completed(ddg(2), costs(2), 3, 0, range(1))[:, 0].tolist()
    [4.0, 7.0, 10.0]
    """
    if not only_simulated(schedule, costs):
        return completions(schedule, costs, iterations, seed, runs)
    found = np.zeros((iterations, len(runs)))
    for column, run in enumerate(runs):
        table = simulate(schedule, costs, iterations, seed=seed, run=run).op_columns
        table = table[table["iteration"] < iterations]
        np.maximum.at(found[:, column], table["iteration"], table["end"])
    return found


def typical_period(
    schedule: Schedule, costs: Costs, iterations: int, seed: int = 0, runs: int = 256
) -> float:
    """Median over runs of what a clock would show: the period as measured runs define it.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: iterations of samples that are fed, as in the runs to compare with.
        seed: of the draws.
        runs: how many.

    Raises:
        ValueError: if ``iterations`` leaves fewer than two steady ones.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> typical_period(ddg(2), costs(2), 20)
    3.0
    """
    count = runs if costs.random else 1
    done = completed(schedule, costs, iterations, seed, range(count))[schedule.num_ticks(0) :]
    found = [robust_period(column) for column in done.T]
    if any(period is None for period in found):
        raise ValueError(f"iterations is {iterations}: give more, for a steady state")
    return float(np.median(np.array(found, dtype=float)))


def exact_period(schedule: Schedule, costs: Costs) -> float:
    """Period with mean times: exact, or, where buses or cores are shared, of a long simulation.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> exact_period(ddg(2), costs(2))
    3.0
    """
    if not only_simulated(schedule, costs):
        return cycle_time(schedule, costs).period
    return steady_period(schedule, costs.means())


def replicate(
    cases: Mapping[str, tuple[Schedule, Costs]],
    iterations: int,
    precision: float = 0.01,
    confidence: float = 0.95,
    seed: int = 0,
    most_runs: int = MOST_RUNS,
) -> dict[str, Array]:
    """Periods of several methods under the same luck, run until all are known well enough.

    Args:
        cases: name to schedule and costs.
        iterations: length of a run, see `periods`.
        precision: widest half interval that is wanted, as a fraction of the mean.
        confidence: of the interval.
        seed: of the draws.
        most_runs: where to stop at the latest.

    Returns:
        Per case the period of every run, in seconds: run r of all cases met the same luck. Feed
        them to `estimate` and `ratio`. Without any randomness, one exact value per case.

    Raises:
        ValueError: naming an argument that is wrong.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import bp, ddg
    >>> from ddg_sim.times import Gamma
    >>> found = replicate({m.method: (m, costs(2, Gamma(1.0, 0.2))) for m in (bp(2), ddg(2))}, 50)
    >>> faster = ratio(found["bp"], found["ddg"])
    >>> 1.8 < faster.low < faster.high < 2.0
    True
    """
    if not precision > 0:
        raise ValueError(f"precision is {precision}: give a positive fraction of the mean")
    if not any(costs.random for _, costs in cases.values()):
        return {name: np.array([exact_period(*case)]) for name, case in cases.items()}
    iterations = max(
        settled_iterations(*case, iterations, precision, seed) for case in cases.values()
    )
    # The expected period is at least that of the mean times: less has not seen what is rare.
    least = {
        name: 0.0 if only_simulated(*case) else cycle_time(*case).period * (1 - 1e-9)
        for name, case in cases.items()
    }
    found: dict[str, Array] = {name: np.empty(0) for name in cases}
    start, stop = 0, min(BLOCK, max(2, most_runs))
    while True:
        for name, case in cases.items():
            more = periods(*case, iterations, seed, range(start, stop))
            found[name] = np.concatenate([found[name], more])
        known = {name: estimate(values, confidence) for name, values in found.items()}
        widest = max(now.relative_width for now in known.values())
        missed = any(now.high < least[name] for name, now in known.items())
        if stop >= most_runs or (widest <= precision and not missed):
            return found
        if missed:
            widest = max(widest, 2 * precision)
        # As many more as the interval's width asks for, but never more than three times as many.
        wanted = math.ceil(stop * min(4.0, (widest / precision) ** 2) / BLOCK) * BLOCK
        start, stop = stop, min(max(wanted, stop + BLOCK), most_runs)
