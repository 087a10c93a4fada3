"""Stage-updates per second of `delayed` and `iterate` on one core, family by family.

A stage-update is one stage's update in one tick on one path. Seconds are those of the processor:
other processes count only as far as they share caches with this one.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ddg_sim.methods import ddg
from theory.delays import delayed, uniform_delays
from theory.iterate import iterate
from theory.problems import PROBLEMS, make

LONGEST = 16


def rate(run: Callable[[], object], updates: int, rounds: int) -> float:
    """Millions of stage-updates per second, in the best of the rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return updates / best / 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--ticks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| family | stages | weights | fixed delays | changing | drawn per path | iterate |")
    print("|---|---|---|---|---|---|---|")
    for name in PROBLEMS:
        for stages in arguments.stages:
            problem, ticks = make(name, stages), arguments.ticks
            count = 16384 // stages
            paths = rng.integers(0, problem.num_samples, (count, ticks))
            gammas = np.full(ticks, 0.01)
            updates = stages * ticks * count
            laws = (
                rng.integers(0, LONGEST + 1, stages),
                rng.integers(0, LONGEST + 1, (ticks, stages)),
                uniform_delays(LONGEST, seed=0),
            )
            runs = [partial(delayed, problem, law, paths, gammas) for law in laws]
            runs.append(partial(iterate, ddg(stages), problem, paths, gammas))
            shown = " | ".join(f"{rate(run, updates, arguments.rounds):.1f}" for run in runs)
            print(f"| {name} | {stages} | {len(problem.start)} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
