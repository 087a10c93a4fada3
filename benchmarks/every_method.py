"""Every method that trains here: predicted, then measured, on the cores at hand.

    python benchmarks/every_method.py --stages 2 --rounds 6

Profiles, runs and methods take turns, see `ddg_gpu.validate.compare`; medians over the rounds.
With more stages than cores the workers share cores, in the prediction as on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every worker process imports this file: what it does not need would cost it 1 s
    from ddg_gpu.validate import Comparison
    from ddg_sim.timeline import Timeline

#: Variants that the defaults do not show.
VARIANTS = (
    "ddg/barrier",
    "ddg/mailbox",
    "ddg:semantics=current",
    "gpipe:micro_batches=4",
    "gpipe:replay",
    "adl:accumulate=4",
    "pb:spike:predict",
    "pipemare:decay=0.5",
)


def trainable(stages: int, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The methods that the torch backend runs with so many stages, and why it refuses others."""
    from ddg_gpu.stage import refuse
    from ddg_gpu.transport import require_processes
    from ddg_sim.choice import parse_choice
    from ddg_sim.schedule import ScheduleError

    found, refused = [], {}
    for name in names:
        try:
            schedule = parse_choice(name).schedule(stages)
            require_processes(schedule)
            for stage in range(stages):
                refuse(schedule, stage)
            if schedule.method in ("petra", "ouroboros"):
                raise ScheduleError("needs a network of its own")
        except ValueError as error:
            refused[name] = str(error)
        else:
            found.append(name)
    return found, refused


def table(found: list[Comparison]) -> str:
    """The comparison as a Markdown table, seconds per sample."""
    from ddg_cli.output import interval

    lines = [
        "| method | workers | predicted | measured | 95 % interval | error |",
        "|---|---|---|---|---|---|",
    ]
    for item in found:
        n = item.samples
        around = item.measured_interval
        if around is not None:
            around = (around[0] / n, around[1] / n)
        lines.append(
            f"| {item.name} | {len(item.predicted.schedule.workers)}"
            f" | {1e3 * item.predicted_period / n:.1f} ms"
            f" | {1e3 * item.measured_period / n:.1f} ms | {interval(around)}"
            f" | {100 * item.error:+.1f} % |"
        )
    errors = [abs(item.error) for item in found]
    worst = max(found, key=lambda item: abs(item.error))
    lines.append("")
    lines.append(
        f"{len(found)} methods: median |error| {100 * median(errors):.1f} %,"
        f" worst {100 * worst.error:+.1f} % ({worst.name})"
    )
    return "\n".join(lines)


def operations(timeline: Timeline) -> dict[str, float]:
    """Median seconds of the operations of each stage and kind: where an error comes from."""
    found: dict[str, list[float]] = defaultdict(list)
    for span, op in timeline.operations:
        found[f"{op.kind.value}{op.stage}"].append(span.duration)
    return {name: median(seconds) for name, seconds in sorted(found.items())}


def main() -> None:
    """Run the rounds, print the table, and write everything to a JSON file if asked."""
    from environment import environment
    from random_images import random_images

    from ddg_gpu.data import load
    from ddg_gpu.job import Job
    from ddg_gpu.machine import available_cores
    from ddg_gpu.validate import compare
    from ddg_sim.methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--data", default=None, help="path or digits; default: random 3x32x32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16, help="of each run, about")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end before, if it can")
    parser.add_argument("--methods", default=None, help="comma-separated; default: all that train")
    parser.add_argument("--no-variants", action="store_true", help="defaults of all methods only")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    variants = () if options.no_variants else VARIANTS
    names = options.methods.split(",") if options.methods else [*METHODS, *variants]
    names, refused = trainable(options.stages, names)
    dataset = random_images() if options.data is None else load(options.data)
    job = Job("bp", options.stages, options.model, iterations=1, batch_size=options.batch_size)
    profile, found = compare(
        job,
        names,
        dataset,
        rounds=options.rounds,
        samples=options.samples,
        seconds=options.seconds,
    )
    print(f"{options.stages} stages, {available_cores()} cores, cuts {profile.cuts}\n")
    print(table(found))
    for name, reason in refused.items():
        print(f"not run: {name} ({reason})")
    if options.output is not None:
        result = {
            "environment": environment(),
            "options": {key: str(value) for key, value in vars(options).items()},
            "profile": profile.model_dump(),
            "methods": {
                item.name: {
                    "predicted_period": item.predicted_period,
                    "measured_periods": item.measured_periods,
                    "samples_per_iteration": item.samples,
                    "predicted_operations": operations(item.predicted),
                    "measured_operations": operations(item.run.timeline),
                }
                for item in found
            },
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
