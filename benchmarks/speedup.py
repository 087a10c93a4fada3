"""Decoupled training against backpropagation on the cores at hand: predicted, then measured.

    python benchmarks/speedup.py --model resnet20 --batch-size 32 --rounds 10

The methods take turns, and the stages are timed before every round; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from environment import environment
from random_images import random_images

from ddg_cli.output import interval
from ddg_gpu.data import load
from ddg_gpu.job import Job
from ddg_gpu.validate import Comparison, compare, speedups, too_few_cores

METHODS = ["bp", "ddg/barrier", "ddg/mailbox", "ddg/none"]


def table(found: list[Comparison]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| method | predicted | measured | 95 % interval | error"
        " | predicted speedup | measured speedup |",
        "|---|---|---|---|---|---|---|",
    ]
    predicted = speedups({item.name: item.predicted_period for item in found})
    measured = speedups({item.name: item.measured_period for item in found})
    lines.extend(
        f"| {item.name} | {1e3 * item.predicted_period:.1f} ms"
        f" | {1e3 * item.measured_period:.1f} ms | {interval(item.measured_interval)}"
        f" | {100 * item.error:+.1f} %"
        f" | {predicted[item.name]:.2f}× | {measured[item.name]:.2f}× |"
        for item in found
    )
    return "\n".join(lines)


def main() -> None:
    """Run the rounds, print the table, and write everything to a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default=None, help="path or digits; default: random 3x32x32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if warning := too_few_cores(options.stages):
        print(f"warning: {warning}")
    dataset = random_images() if options.data is None else load(options.data)
    job = Job(
        "bp",
        options.stages,
        options.model,
        iterations=options.iterations,
        batch_size=options.batch_size,
    )
    profile, found = compare(job, METHODS, dataset, rounds=options.rounds)
    print(f"cuts {profile.cuts}")
    print(table(found))
    if options.output is not None:
        result = {
            "environment": environment(),
            "options": {key: str(value) for key, value in vars(options).items()},
            "profile": profile.model_dump(),
            "methods": {
                item.name: {
                    "predicted_period": item.predicted_period,
                    "measured_period": item.measured_period,
                }
                for item in found
            },
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
