"""Speed of the two engines and of the exact period; ratios are taken in one run.

    python benchmarks/simulator.py

Seconds are medians of the repetitions. An event of the SimPy engine is an operation or a transfer
that takes time; what workers wake up for is not counted, so the figure is on the low side.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import simpy
from environment import environment

from ddg_sim.costs import Costs, costs
from ddg_sim.cycletime import completions, cycle_time
from ddg_sim.eventgraph import event_graph
from ddg_sim.methods import ddg
from ddg_sim.simulate import simulate
from ddg_sim.times import LogNormal

STAGES, ITERATIONS, SCENARIOS, REPEATS = 8, 500, 1000, 5


def bare(workers: int, timeouts: int) -> None:
    """What SimPy does at least: workers that only wait."""
    env = simpy.Environment()

    def worker() -> Iterator[simpy.Event]:
        for _ in range(timeouts):
            yield env.timeout(1.0)

    for _ in range(workers):
        env.process(worker())
    env.run()


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        found.append(perf_counter() - start)
    return median(found)


def uneven(stages: int) -> Costs:
    """Costs of which no two are alike."""
    return costs(
        stages,
        forward=[1 + 0.37 * ((7 * k) % 11) / 11 for k in range(stages)],
        backward=[2 + 0.73 * ((5 * k) % 13) / 13 for k in range(stages)],
        update=0.1,
        comm=0.05,
    )


def main() -> None:
    """Measure everything and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--large", action="store_true", help="also 1,000 stages x 1,000 iterations")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    schedule, prices = ddg(STAGES), uneven(STAGES)
    found: dict[str, float] = {}

    timeouts = 3 * ITERATIONS
    found["bare SimPy, timeouts/s"] = STAGES * timeouts / seconds(lambda: bare(STAGES, timeouts))
    run = simulate(schedule, prices, ITERATIONS)
    took = seconds(lambda: simulate(schedule, prices, ITERATIONS))
    found["SimPy engine, operations/s"] = len(run.op_columns) / took
    found["SimPy engine, events/s"] = (len(run.op_columns) + len(run.message_columns)) / took
    found["events/s, engine : bare"] = (
        found["SimPy engine, events/s"] / found["bare SimPy, timeouts/s"]
    )

    random = costs(STAGES, LogNormal(1.0, 0.1), LogNormal(2.0, 0.2), 0.1, 0.05)
    iterations = 100
    one = seconds(lambda: simulate(schedule, random, iterations, drain=False))
    many = seconds(lambda: completions(schedule, random, iterations, runs=range(SCENARIOS)), 3)
    found["random scenario, SimPy engine, ms"] = 1e3 * one
    found["random scenario, max-plus in 1,000s, ms"] = 1e3 * many / SCENARIOS
    found["max-plus : SimPy, per scenario"] = one / (many / SCENARIOS)

    for stages in (16, 64, 256):
        large = ddg(stages)
        event_graph(large)
        found[f"exact period, {stages} stages, ms"] = 1e3 * seconds(
            lambda large=large, stages=stages: cycle_time(large, uneven(stages))
        )
    if options.large:
        start = perf_counter()
        run = simulate(ddg(1000), uneven(1000), 1000)
        found["1,000 stages x 1,000 iterations, s"] = perf_counter() - start
        found["peak memory of this process, GB"] = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        )
    for name, value in found.items():
        print(f"{name:45} {value:12,.3f}" if value < 1000 else f"{name:45} {value:12,.0f}")
    if options.output is not None:
        result = {"environment": environment(), "measured": found}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
