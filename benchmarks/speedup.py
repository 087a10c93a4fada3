"""Decoupled training against backpropagation on the cores at hand: predicted, then measured.

    python benchmarks/speedup.py --model resnet20 --batch-size 32 --rounds 5

Every round profiles, predicts and runs all methods once, so that they share what the machine was
like; each ratio is taken within a round, and the table shows the medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from environment import environment
from random_images import random_images

from ddg_gpu.data import load
from ddg_gpu.job import Job
from ddg_gpu.profile import measure
from ddg_gpu.validate import Comparison, compare, too_few_cores

METHODS = ["bp", "ddg/barrier", "ddg/mailbox", "ddg/none"]


def table(rounds: list[list[Comparison]]) -> str:
    """Medians over the rounds as a Markdown table; (least..largest) where it matters."""
    lines = [
        "| method | predicted | measured | error | predicted speedup | measured speedup |",
        "|---|---|---|---|---|---|",
    ]
    for place, name in enumerate(METHODS):
        column = [found[place] for found in rounds]
        base = [found[0] for found in rounds]
        errors = [item.error for item in column]
        predicted = [
            b.predicted_period / i.predicted_period for b, i in zip(base, column, strict=True)
        ]
        measured = [
            b.measured_period / i.measured_period for b, i in zip(base, column, strict=True)
        ]
        lines.append(
            f"| {name} | {1e3 * median(i.predicted_period for i in column):.1f} ms"
            f" | {1e3 * median(i.measured_period for i in column):.1f} ms"
            f" | {100 * median(errors):+.1f} % ({100 * min(errors):+.1f}..{100 * max(errors):+.1f})"
            f" | {median(predicted):.2f}×"
            f" | {median(measured):.2f}× ({min(measured):.2f}..{max(measured):.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the rounds, print the table, and write everything to a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default=None, help="path or digits; default: random 3x32x32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
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
    rounds = []
    for number in range(options.rounds):
        profile = measure(job, dataset)
        rounds.append(compare(job, METHODS, profile, dataset))
        print(f"round {number + 1} of {options.rounds}: cuts {profile.cuts}", flush=True)
    print(table(rounds))
    if options.output is not None:
        result = {
            "environment": environment(),
            "options": {key: str(value) for key, value in vars(options).items()},
            "rounds": [
                {
                    item.name: {
                        "predicted_period": item.predicted_period,
                        "measured_period": item.measured_period,
                    }
                    for item in found
                }
                for found in rounds
            ],
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
