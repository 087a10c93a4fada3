"""Does training with delayed gradients still converge, and what does the delay cost?

    python benchmarks/convergence.py --output results/convergence-cpu
    python benchmarks/convergence.py --data ARCHIVE --output results/convergence-cpu

Every trainable method trains the same network on the same mini-batches from the same initial
weights, with the same optimizer (SGD with momentum 0.9, weight decay 5e-4, constant learning rate
0.0125, no tuning per method). A mini-batch has 48 examples; methods with micro-batches cut it. All
runs are of the serial executor, whose weights equal the distributed one's bit for bit. Means over
the seeds have 95 % intervals (Student's t); accuracies lost are paired by seed with those of
backpropagation.

Times are predicted by the simulator for stages cut and costed by counted operations (a backward
pass twice its forward pass, no communication); the unit is backpropagation's iteration.

Every finished run is a small JSON file below ``--output``/runs: a stopped study goes on where it
was. Tables and pictures are made from all that is there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

import torch
from environment import environment
from joblib import Parallel, delayed
from plot import Curve, convergence_curves, delay_curves
from scipy import stats

from ddg_gpu.checkpoint import weights_sha256
from ddg_gpu.data import Batches, DataError, Dataset, load
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, make_stage, network
from ddg_gpu.partition import layer_costs
from ddg_gpu.stage import refuse
from ddg_gpu.train import evaluate, one_thread
from ddg_sim.costs import Costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.files import replacing
from ddg_sim.methods import METHODS, Semantics, method
from ddg_sim.schedule import Op, OpKind, Schedule, staleness

BATCH = 48  # divisible by 1..4 micro-batches
RATE = 0.0125
#: The delays are scaled at this rate too.
SECOND_RATE = 0.05
#: Multiples of DDG's own delays (K-1, ..., 0); 0 is backpropagation.
SCALES = (0, 1, 2, 4, 8)
#: Drawn in the pictures; in the tables are all.
DRAWN = ("bp", "ddg", "ddg semantics=current", "fr", "pipedream", "sideways", "dgl")


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a method's text (``NAME key=value …``), stages, learning rate, seed."""

    model: str
    data: str
    method: str
    stages: int
    rate: float
    seed: int
    epochs: int

    @property
    def file(self) -> str:
        """Name of the run's file."""
        parts = (self.model, self.data, self.method, f"k{self.stages}", f"{self.rate:g}")
        text = "_".join((*parts, f"e{self.epochs}", f"s{self.seed}"))
        return "".join(c if c.isalnum() or c in "._-=," else "-" for c in text) + ".json"

    def schedule(self) -> Schedule:
        """The schedule that is run."""
        name, semantics, options = parse_variant(self.method)
        return method(name, self.stages, semantics=semantics, **options)


def parse_variant(text: str) -> tuple[str, Semantics | None, dict[str, Any]]:
    """Name, semantics and further options of ``NAME key=value …``.

    >>> parse_variant("ddg delays=3,0")
    ('ddg', None, {'delays': (3, 0)})
    """
    name, *rest = text.split()
    options: dict[str, Any] = {}
    for item in rest:
        key, _, value = item.partition("=")
        options[key] = tuple(json.loads(f"[{value}]")) if key == "delays" else value
        if key in ("spike", "predict", "anneal", "decay"):
            options[key] = json.loads(value)
    semantics = options.pop("semantics", None)
    return name, None if semantics is None else Semantics(semantics), options


#: Options that change a method's rule, beside the defaults of all trainable methods.
VARIANTS = (
    "ddg semantics=current",
    "pb spike=true predict=true",
    "pipemare anneal=100 decay=0.1",
)


def trainable(stages: int) -> list[str]:
    """Methods that the torch backend runs with so many stages, with variants."""
    found = []
    for text in (*METHODS, *VARIANTS):
        name, semantics, options = parse_variant(text)
        try:
            schedule = method(name, stages, semantics=semantics, **options)
            for stage in range(stages):
                refuse(schedule, stage)
        except ValueError:  # ScheduleError is one: the backend, or the method, says no
            continue
        if BATCH % schedule.samples_per_iteration == 0:
            found.append(text)
    return found


def scaled_delays(stages: int, scale: int, semantics: str = "") -> str:
    """DDG with its delays times ``scale``."""
    delays = ",".join(str(scale * d) for d in reversed(range(stages)))
    return f"ddg delays={delays}" + (f" semantics={semantics}" if semantics else "")


def train(case: Case, dataset: Dataset) -> dict[str, Any]:
    """Train; losses and accuracies by epoch (the last accuracy is that of the drained run)."""
    schedule = case.schedule()
    name, semantics, options = parse_variant(case.method)
    m = schedule.samples_per_iteration
    per_epoch = len(dataset.train_targets) // BATCH
    job = Job(
        name,
        case.stages,
        case.model,
        iterations=case.epochs * per_epoch,
        semantics=semantics,
        options=options,
        batch_size=BATCH // m,
        learning_rate=case.rate,
        seed=case.seed,
    )
    parts = network(job, dataset)
    stages = [make_stage(job, schedule, parts, k) for k in range(job.stages)]
    batches = Batches(dataset, job.batch_size, job.seed)
    accuracies: list[float] = []

    def watch(op: Op, _seconds: float) -> None:
        if op.kind is not OpKind.UPDATE or op.stage < job.stages - 1:
            return
        sample = op.sample
        if (sample + 1) % (per_epoch * m) == 0 and len(accuracies) < case.epochs - 1:
            accuracies.append(evaluate(parts.model, dataset))
            parts.model.train()

    with one_thread():
        run_serial(schedule, stages, batches, case.epochs * per_epoch, watch=watch)
        accuracies.append(evaluate(parts.model, dataset))
    losses = [loss for _, loss in sorted(stages[-1].losses.items())]
    size = per_epoch * m
    means = [fmean(losses[i : i + size]) for i in range(0, len(losses), size)]
    return {
        "case": asdict(case),
        "iterations_per_epoch": per_epoch,
        "losses": [loss if math.isfinite(loss) else None for loss in means],
        "accuracies": accuracies,
        "staleness": list(staleness(schedule)),
        "relative_period": relative_period(job, schedule, dataset),
        "weights_sha256": weights_sha256(parts.model),
        "note": dataset.note,
        "environment": environment(),
    }


def relative_period(job: Job, schedule: Schedule, dataset: Dataset) -> float:
    """Predicted period over that of backpropagation, by counted operations."""
    parts = network(job, dataset)
    each = layer_costs(parts.model, torch.zeros(1, *dataset.input_shape))
    bounds = (0, *parts.cuts, len(each))
    m = schedule.samples_per_iteration
    forward = tuple(
        sum(each[a:b]) / sum(each) / (3 * m) for a, b in zip(bounds, bounds[1:], strict=False)
    )
    costs = Costs(forward, tuple(2 * seconds for seconds in forward))
    return float(cycle_time(schedule, costs).period)


def run(case: Case, dataset: Dataset, folder: Path, deadline: float) -> bool:
    """Train and write the run's file, unless it is there or it is too late to begin."""
    path = folder / case.file
    if path.exists():
        return True
    if monotonic() > deadline:
        return False
    result = train(case, dataset)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result) + "\n")
    return True


def subset(dataset: Dataset, train_count: int, test_count: int) -> Dataset:
    """Random examples, the same for everyone; a multiple of the batch of them for training."""
    generator = torch.Generator().manual_seed(0)
    count = min(train_count, len(dataset.train_targets)) // BATCH * BATCH
    rows = torch.randperm(len(dataset.train_targets), generator=generator)[:count]
    test = torch.randperm(len(dataset.test_targets), generator=generator)[:test_count]
    return replace(
        dataset,
        train_inputs=dataset.train_inputs[rows],
        train_targets=dataset.train_targets[rows],
        test_inputs=dataset.test_inputs[test],
        test_targets=dataset.test_targets[test],
    )


def study(model: str, data: str, epochs: int, options: argparse.Namespace) -> list[Case]:
    """All runs of a study, what matters most first."""
    most = max(options.stages)

    def cases(text: str, stages: int, rate: float = RATE) -> Iterator[Case]:
        for seed in range(options.seeds):
            yield Case(model, data, text, stages, rate, seed, epochs)

    found: list[Case] = [*cases("bp", most)]
    if most > 1:
        for scale in SCALES:
            found += cases(scaled_delays(most, scale), most)
    for wanted in (DRAWN, None):
        for stages in reversed(options.stages):
            for text in trainable(stages):
                if wanted is None or text in wanted:
                    found += cases(text, stages)
    if most > 1:
        for scale in SCALES:
            found += cases(scaled_delays(most, scale), most, SECOND_RATE)
            for semantics in ("current", "replay"):
                found += cases(scaled_delays(most, scale, semantics), most)
    if options.methods is not None:
        found = [case for case in found if case.method.split()[0] in options.methods]
    return list(dict.fromkeys(found))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t); NaN for less than two values."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, math.nan
    if len(set(values)) == 1:
        return mean, 0.0
    found = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return mean, float(found.high - found.low) / 2


def number(values: Sequence[float], scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
    """``mean ± half width``, in units of 1/scale."""
    mean, half = (scale * value for value in interval(values))
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


Group = tuple[str, str, int, int, float, str]  # model, data, epochs, stages, rate, method


def groups(folder: Path) -> dict[Group, dict[int, dict[str, Any]]]:
    """Finished runs by what they share, then by seed."""
    found: dict[Group, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        item = json.loads(path.read_text())
        case = item["case"]
        keys = ("model", "data", "epochs", "stages", "rate", "method")
        found[tuple(case[key] for key in keys)][case["seed"]] = item  # type: ignore[index]
    return dict(found)


def report(output: Path) -> None:
    """Tables, CSV files and pictures of all finished runs."""
    found = groups(output / "runs")
    notes = {group[1]: runs[min(runs)]["note"] for group, runs in found.items()}
    lines: list[str] = []
    write_csv(output, found)
    for model, data, epochs in sorted({group[:3] for group in found}):
        wanted = (model, data, epochs)
        mine = {group[3:]: runs for group, runs in found.items() if group[:3] == wanted}
        per_epoch = next(iter(mine.values()))
        iterations = epochs * next(iter(per_epoch.values()))["iterations_per_epoch"]
        note = f" ({notes[data]})" if notes[data] else ""
        heading = f"{model} on {data}{note}, {iterations} updates of {BATCH} examples"
        lines += [f"## {heading}", "", *method_table(mine, note), "", *delay_table(mine, note), ""]
        stem = f"{model}-{Path(data).name.partition('.')[0]}"
        draw(mine, heading, output / f"delay-{stem}.png", output / f"curves-{stem}.png")
    text = "\n".join(lines)
    with replacing(output / "tables.md") as temporary:
        temporary.write_text(text)
    print(text)


Mine = Mapping[tuple[int, float, str], dict[int, dict[str, Any]]]


def lost(runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> list[float]:
    """Accuracy of the base less that of the runs, by common seed."""
    return [base[s]["accuracies"][-1] - runs[s]["accuracies"][-1] for s in runs if s in base]


def final_losses(runs: dict[int, dict[str, Any]]) -> list[float]:
    """Mean training loss of the last epoch; of the finite ones."""
    return [r["losses"][-1] for r in runs.values() if r["losses"][-1] is not None]


def method_table(mine: Mine, note: str) -> list[str]:
    """One row per method and number of stages."""
    lines = [
        "| method | K | staleness | seeds | test accuracy, %" + note + " | lost to bp, points"
        " | training loss, last epoch | diverged | predicted time, bp = 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(METHODS)
    for (stages, rate, text), runs in sorted(
        mine.items(), key=lambda item: (order.index(item[0][2].split()[0]), item[0][2], item[0][0])
    ):
        base = mine.get((stages, rate, "bp"))
        if "delays=" in text or rate != RATE:
            continue
        any_run = next(iter(runs.values()))
        losses = final_losses(runs)
        lines.append(
            f"| {text} | {stages} | {', '.join(map(str, any_run['staleness']))} | {len(runs)}"
            f" | {number([r['accuracies'][-1] for r in runs.values()], 100)}"
            f" | {number(lost(runs, base), 100, sign='+') if base else 'no run of bp'}"
            f" | {number(losses, digits=3) if losses else '-'} | {len(runs) - len(losses)}"
            f" | {any_run['relative_period']:.3f} |"
        )
    return lines


def delay_series(mine: Mine) -> dict[str, list[tuple[int, dict[int, dict[str, Any]]]]]:
    """Runs with scaled delays: name of the series -> (largest delay, runs)."""
    found: dict[str, list[tuple[int, dict[int, dict[str, Any]]]]] = defaultdict(list)
    for (stages, rate, text), runs in mine.items():
        _, semantics, options = parse_variant(text)
        if "delays" in options:
            reading = "stash" if semantics is None else semantics.value
            name = f"{reading}, K={stages}, rate {rate:g}"
            found[name].append((options["delays"][0], runs))
    return {name: sorted(items, key=lambda item: item[0]) for name, items in sorted(found.items())}


def delay_table(mine: Mine, note: str) -> list[str]:
    """Accuracy lost by the largest delay; the base is delay 0 of the same series."""
    lines = [
        "| DDG with delays D, …, 0 | D | seeds | test accuracy, %"
        + note
        + " | lost to D = 0, points | training loss, last epoch | diverged |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, items in delay_series(mine).items():
        base = items[0][1] if items[0][0] == 0 else None
        for delay, runs in items:
            losses = final_losses(runs)
            lines.append(
                f"| {name} | {delay} | {len(runs)}"
                f" | {number([r['accuracies'][-1] for r in runs.values()], 100)}"
                f" | {number(lost(runs, base), 100, sign='+') if base else '-'}"
                f" | {number(losses, digits=3) if losses else '-'} | {len(runs) - len(losses)} |"
            )
    return lines


def draw(mine: Mine, heading: str, delays: Path, curves: Path) -> None:
    """Both pictures of a study."""
    series = {}
    for name, items in delay_series(mine).items():
        if items[0][0] == 0 and len(items) > 1:
            base = items[0][1]
            series[name] = [
                (delay, *(100 * x for x in interval(lost(runs, base)))) for delay, runs in items
            ]
    if series:
        delay_curves(series, delays, heading)
    most = max(stages for stages, _, _ in mine)
    # Methods whose runs end with the same weights share a curve.
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for text in DRAWN:
        if runs := mine.get((most, RATE, text)):
            alike[tuple(runs[seed]["weights_sha256"] for seed in sorted(runs))].append(text)
    drawn: dict[str, Curve] = {}
    for names in alike.values():
        items = list(mine[most, RATE, names[0]].values())
        epochs = range(len(items[0]["accuracies"]))
        finite = all(None not in item["losses"] for item in items)
        drawn[" = ".join(names)] = Curve(
            [items[0]["iterations_per_epoch"] * (e + 1) for e in epochs],
            items[0]["relative_period"],
            [interval([item["losses"][e] for item in items]) for e in epochs] if finite else [],
            [interval([100 * item["accuracies"][e] for item in items]) for e in epochs],
        )
    if drawn:
        convergence_curves(drawn, curves, f"{heading}; K={most}")


def write_csv(output: Path, found: dict[Group, dict[int, dict[str, Any]]]) -> None:
    """One line per run and epoch."""
    with replacing(output / "runs.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["model", "data", "epochs", "stages", "rate", "method", "seed", "relative_period"]
            + ["epoch", "training_loss", "test_accuracy"]
        )
        for group, runs in sorted(found.items()):
            for seed, item in sorted(runs.items()):
                pairs = zip(item["losses"], item["accuracies"], strict=True)
                for epoch, (loss, accuracy) in enumerate(pairs, start=1):
                    shown = "" if loss is None else f"{loss:.5f}"
                    period = f"{item['relative_period']:.5f}"
                    writer.writerow([*group, seed, period, epoch, shown, f"{accuracy:.4f}"])


def main() -> None:
    """Run what is missing, then report on all there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("convergence"))
    parser.add_argument("--data", default=None, help="CIFAR-10 for the second study: see README.md")
    parser.add_argument("--models", nargs="+", default=None, help="default: mlp; resnet8 of --data")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=None, help="names; default: all trainable")
    parser.add_argument("--seeds", type=int, default=None, help="default: 5; 3 with --data")
    parser.add_argument("--epochs", type=int, default=None, help="default: 10; 6 with --data")
    parser.add_argument("--train", type=int, default=1920, help="images of --data to train on")
    parser.add_argument("--test", type=int, default=1000, help="images of --data to test with")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that")
    parser.add_argument("--quick", action="store_true", help="a few short runs, to try it out")
    options = parser.parse_args()
    if options.quick:
        options.stages, options.methods = [1, 2], ["bp", "ddg", "fr", "pipedream"]
    options.stages = sorted(options.stages)
    if options.seeds is None:
        options.seeds = 5 if options.data is None and not options.quick else 3
    if options.epochs is None:
        options.epochs = 2 if options.quick else 10 if options.data is None else 6
    print(environment())
    try:
        if options.data is None:
            print(
                "CIFAR-10 is left out: give --data PATH, a folder or tar archive of images"
                " train/CLASS/*.jpg and test/CLASS/*.jpg, or the official batches for Python"
            )
            dataset = subset(load("digits"), 10**9, 10**9)
        else:
            dataset = subset(load(options.data), options.train, options.test)
    except DataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    folder = options.output / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    models = options.models or (["mlp"] if options.data is None else ["resnet8"])
    data = dataset.name if options.data is None else f"{dataset.name} {len(dataset.train_targets)}"
    cases = [c for model in models for c in study(model, data, options.epochs, options)]
    deadline = monotonic() + 60 * options.minutes
    done = Parallel(n_jobs=options.jobs, verbose=0)(
        delayed(run)(case, dataset, folder, deadline) for case in cases
    )
    print(f"{sum(done)} of {len(done)} runs are there\n")
    report(options.output)


if __name__ == "__main__":
    main()
