"""Two processes: this toolkit against torch.distributed.pipelining, and against a loop by hand.

    python benchmarks/alternatives.py --model resnet20 --batch-size 32 --rounds 8

All train the same network from the same weights on the same mini-batches with the same optimizer,
cut at the same layer, in the same two processes over gloo, one thread each. They take turns,
``--rounds`` times; a period is the mean time between updates in steady state (the slower process
counts), and the table has medians over the rounds, of the periods and of each round's ratios.

- ``bp``, ``ddg``: this toolkit.
- ``by hand``: asynchronous DDG for K=2 in plain torch and dist.isend/irecv, without a schedule.
  Its final weights must equal those of ``ddg`` bit for bit: it does the same work.
- ``GPipe m=4`` and so on: the schedules of torch.distributed.pipelining that run one stage per
  process, with so many micro-batches. With one micro-batch GPipe is backpropagation, and its final
  parameters must equal those of ``bp`` (not the statistics of batch norm, which its inference of
  shapes moves once); with more, batch norm sees smaller batches.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from environment import environment
from random_images import random_images
from scipy.stats import quantile_test
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.func import functional_call

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import dataset_values, run_stages
from ddg_gpu.job import Job, make_stage, network, optimizer_factory
from ddg_gpu.messages import message_buffer
from ddg_gpu.processes import Report, run_together
from ddg_gpu.profile import measured_cuts
from ddg_gpu.validate import too_few_cores
from ddg_sim.methods import method
from ddg_sim.schedule import OpKind

STAGES = 2
#: Iterations at either end of a run that are not timed: the pipeline fills, shapes are agreed on.
FILL, DRAIN = 3, 1
MICRO_BATCHES = (1, 2, 4, 8)
SCHEDULES = {
    "GPipe": pipelining.ScheduleGPipe,
    "1F1B": pipelining.Schedule1F1B,
    "Interleaved1F1B": pipelining.ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": pipelining.ScheduleInterleavedZeroBubble,
}

#: Trains a fresh stage; returns it and the times at which its updates ended.
Contender = Callable[[int], tuple[nn.Module, list[float]]]


class Process:
    """One of the two processes, which runs every contender in turn."""

    def __init__(self, job: Job, dataset: Dataset, rank: int, iterations: int) -> None:
        self.job, self.dataset, self.rank, self.iterations = job, dataset, rank, iterations
        self.batches = Batches(dataset, job.batch_size, job.seed)
        self.parts = network(job, dataset)
        self.optimizer = optimizer_factory(job)

    def module(self) -> nn.Module:
        """This process's stage with the initial weights."""
        return copy.deepcopy(self.parts.modules[self.rank])

    def own(self, name: str) -> tuple[nn.Module, list[float]]:
        """This toolkit's executor."""
        schedule, parts = method(name, STAGES), network(self.job, self.dataset)
        stage = make_stage(self.job, schedule, parts, self.rank)
        buffer = message_buffer(schedule, parts.boundaries, self.batches.size)
        record = run_stages(
            schedule, self.rank, {self.rank: stage}, self.batches, buffer, self.iterations, 60.0
        )
        return stage.module, [end for op, _, end in record.spans if op.kind is OpKind.UPDATE]

    def by_hand(self) -> tuple[nn.Module, list[float]]:
        """Asynchronous DDG, K=2, as tight as a plain loop gets."""
        module, ends = self.module(), list[float]()
        parameters = list(module.parameters())
        optimizer = self.optimizer(parameters)
        shape = (self.job.batch_size, *self.parts.boundaries[0].shape)
        buffers = [torch.empty(shape), torch.empty(shape)]
        receives: list[Any] = [None, None]

        def post(t: int) -> None:
            if t < self.iterations:
                receives[t % 2] = dist.irecv(buffers[t % 2], 1 - self.rank, tag=t)

        def step(gradients: tuple[Tensor, ...]) -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            ends.append(perf_counter())

        sends: list[tuple[Any, Tensor] | None] = [None, None]

        def send(t: int, tensor: Tensor) -> None:
            if (before := sends[t % 2]) is not None:
                before[0].wait()
            sends[t % 2] = (dist.isend(tensor, 1 - self.rank, tag=t), tensor)

        dist.barrier()
        post(0)
        post(1)
        if self.rank == 0:
            # An update overtakes one sample in flight: two copies of the weights take turns.
            names = [name for name, _ in module.named_parameters()]
            copies = [
                {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
                for _ in range(2)
            ]
            flat = [[weights[name] for name in names] for weights in copies]
            roots: list[Tensor | None] = [None, None]
            for t in range(self.iterations + 1):
                if t < self.iterations:
                    output = functional_call(module, copies[t % 2], (self.batches.inputs(t),))
                    roots[t % 2] = output
                    send(t, output.detach())
                if t > 0:
                    slot = (t - 1) % 2
                    receives[slot].wait()
                    step(torch.autograd.grad(roots[slot], flat[slot], buffers[slot]))
                    post(t + 1)
                    with torch.no_grad():
                        torch._foreach_copy_(flat[slot], parameters)
        else:
            losses = []
            for t in range(self.iterations):
                targets = self.batches.targets(t)
                receives[t % 2].wait()
                inputs = buffers[t % 2].requires_grad_()
                loss = nn.functional.cross_entropy(module(inputs), targets)
                losses.append(loss.item())
                *gradients, error = torch.autograd.grad(loss, [*parameters, inputs])
                send(t, error)
                step(tuple(gradients))
                buffers[t % 2] = buffers[t % 2].detach()
                post(t + 2)
        for waiting in sends:
            if waiting is not None:
                waiting[0].wait()
        return module, ends

    def pipelined(self, kind: str, micro_batches: int) -> tuple[nn.Module, list[float]]:
        """torch.distributed.pipelining."""
        module, ends = self.module(), list[float]()
        optimizer = self.optimizer(list(module.parameters()))
        stage = pipelining.PipelineStage(module, self.rank, STAGES, torch.device("cpu"))
        multi = kind.startswith("Interleaved")
        schedule = SCHEDULES[kind](
            [stage] if multi else stage, micro_batches, loss_fn=nn.functional.cross_entropy
        )
        dist.barrier()
        for t in range(self.iterations):
            optimizer.zero_grad()
            if self.rank == 0:
                schedule.step(self.batches.inputs(t), return_outputs=False)
            else:
                losses: list[Tensor] = []
                targets = self.batches.targets(t)
                schedule.step(target=targets, losses=losses, return_outputs=False)
                sum(float(loss.detach()) for loss in losses)
            optimizer.step()
            ends.append(perf_counter())
        return module, ends


def refusal(kind: str, micro_batches: int) -> str | None:
    """Why a schedule does not run so many micro-batches; None if it does."""
    if kind == "1F1B" and micro_batches < STAGES:
        return "needs a micro-batch per stage"
    return None


def contenders(process: Process, wanted: list[str] | None) -> dict[str, Callable[[], Any]]:
    """All of them, by name."""
    found: dict[str, Callable[[], Any]] = {
        "bp": partial(process.own, "bp"),
        "ddg": partial(process.own, "ddg"),
        "by hand": process.by_hand,
    }
    for kind in SCHEDULES:
        for count in MICRO_BATCHES:
            if refusal(kind, count) is None and process.job.batch_size % count == 0:
                found[f"{kind} m={count}"] = partial(process.pipelined, kind, count)
    return {
        name: run
        for name, run in found.items()
        if wanted is None or name in wanted or name.split()[0] in wanted
    }


def task(job: Job, rank: int, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run every contender in turn; per name the period of each round, and the final weights."""
    iterations, rounds = given["iterations"], given["rounds"]
    process = Process(job, Dataset(**given["dataset"]), rank, iterations)
    periods: dict[str, list[float]] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    failed: dict[str, str] = {}
    begin = perf_counter()
    for turn in range(rounds):
        for name, run in contenders(process, given["wanted"]).items():
            if name in failed:
                continue
            try:
                module, ends = run()
            except (ValueError, RuntimeError) as error:
                if turn:
                    raise
                failed[name] = str(error).splitlines()[0]
                continue
            assert len(ends) == iterations, name
            timed = ends[FILL - 1 : iterations - DRAIN]
            periods.setdefault(name, []).append((timed[-1] - timed[0]) / (len(timed) - 1))
            weights[name] = dict(module.state_dict())
            dist.barrier()
            report((turn + 1) * iterations)
        late = torch.tensor(float(perf_counter() - begin > given["seconds"]))
        dist.broadcast(late, 0)  # both stop after the same round
        if late:
            break
    return {"periods": periods, "weights": weights, "failed": failed}


def same(first: dict[str, Tensor], second: dict[str, Tensor], buffers: bool) -> bool:
    """Whether parameters, and where asked batch norm's statistics, agree bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name])
        for name in first
        if buffers or not name.rpartition(".")[2].startswith(("running_", "num_batches"))
    )


def interval(values: list[float]) -> str:
    """95 % interval of the median in milliseconds, or a dash for fewer than six values."""
    found = quantile_test(values, p=0.5).confidence_interval(0.95)
    if not found.low > 0 or not found.high < float("inf"):
        return "-"
    return f"{1e3 * found.low:.1f} to {1e3 * found.high:.1f}"


def main() -> None:
    """Run the rounds, check that the same work was done, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no round after that")
    parser.add_argument("--cuts", type=int, nargs=1, default=None, help="default: measured")
    parser.add_argument("--contenders", nargs="+", default=None, help="names; default: all")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.iterations < FILL + DRAIN + 2:
        parser.error(f"--iterations must be at least {FILL + DRAIN + 2}")
    if warning := too_few_cores(STAGES):
        print(f"warning: {warning}")
    dataset = random_images()
    cuts = None if options.cuts is None else tuple(options.cuts)
    job = Job("bp", STAGES, options.model, iterations=1, batch_size=options.batch_size, cuts=cuts)
    if cuts is None:
        cuts = measured_cuts(job, dataset, 8)
        job = Job(
            "bp", STAGES, options.model, iterations=1, batch_size=options.batch_size, cuts=cuts
        )
    given = {
        "dataset": dataset_values(dataset),
        "iterations": options.iterations,
        "rounds": options.rounds,
        "wanted": options.contenders,
        "seconds": options.seconds,
    }
    workers = run_together(partial(task, job), STAGES, given)
    first, second = workers
    for name, reason in {**first["failed"], **second["failed"]}.items():
        print(f"{name} does not run: {reason}")
    periods = {
        name: [max(pair) for pair in zip(found, second["periods"][name], strict=True)]
        for name, found in first["periods"].items()
        if name in second["periods"]
    }
    for one, other, buffers in (("ddg", "by hand", True), ("bp", "GPipe m=1", False)):
        if one in periods and other in periods:
            equal = all(same(w["weights"][one], w["weights"][other], buffers) for w in workers)
            what = "weights and buffers" if buffers else "weights"
            print(f"final {what} of {one} and {other}: {'equal' if equal else 'DIFFERENT'}")
    rounds = len(next(iter(periods.values())))
    print(f"{environment()}; cut {list(cuts)}; {rounds} rounds")
    print(table(periods))
    if options.output is not None:
        result = {
            "environment": environment(),
            "options": {key: str(value) for key, value in vars(options).items()},
            "cuts": list(cuts),
            "periods": periods,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def table(periods: dict[str, list[float]]) -> str:
    """Periods, and medians of each round's ratios."""
    lines = [
        "| | period, ms | 95 % interval | bp : this | this : ddg |",
        "|---|---|---|---|---|",
    ]

    def ratio(top: str, bottom: str) -> str:
        if top not in periods or bottom not in periods:
            return "-"
        pairs = zip(periods[top], periods[bottom], strict=True)
        return f"{median(a / b for a, b in pairs):.3f}"

    lines.extend(
        f"| {name} | {1e3 * median(found):.1f} | {interval(found)}"
        f" | {ratio('bp', name)} | {ratio(name, 'ddg')} |"
        for name, found in periods.items()
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
