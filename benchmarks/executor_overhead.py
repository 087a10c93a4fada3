"""What the executor costs at K=1, against a plain PyTorch training loop.

    python benchmarks/executor_overhead.py --model resnet20 --batch-size 32

Both train the same network on the same mini-batches in this process, on one thread, in turns of a
few iterations each; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import torch
from random_images import random_images
from torch import nn

from ddg_gpu.data import Batches
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, make_stage, network, optimizer_factory
from ddg_gpu.processes import keep_freed_memory

TURN = 5


def main() -> None:
    """Run both loops in turns and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for both loops, as the executor's processes do
    dataset = random_images()
    job = Job("bp", 1, options.model, iterations=TURN, batch_size=options.batch_size)
    batches = Batches(dataset, job.batch_size, job.seed)
    schedule = job.schedule()

    plain = network(job, dataset).model
    optimizer = optimizer_factory(job)(list(plain.parameters()))

    def plain_turn() -> None:
        for sample in range(TURN):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                plain(batches.inputs(sample)), batches.targets(sample)
            )
            loss.backward()
            optimizer.step()
            loss.item()

    parts = network(job, dataset)

    def executor_turn() -> None:
        stage = make_stage(job, schedule, parts, 0)
        run_serial(schedule, [stage], batches, TURN)

    seconds: dict[str, list[float]] = {"plain PyTorch loop": [], "executor, K=1": []}
    for turn in range(options.turns + 2):
        for found, run in zip(seconds.values(), (plain_turn, executor_turn), strict=True):
            start = perf_counter()
            run()
            if turn >= 2:  # the first two warm up
                found.append((perf_counter() - start) / TURN)
    for name, found in seconds.items():
        print(f"{name}: {1e3 * median(found):.2f} ms per iteration")
    own, other = (median(found) for found in reversed(list(seconds.values())))
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"ratio of medians {own / other:.3f}, median of the turns' ratios {median(ratios):.3f}")


if __name__ == "__main__":
    main()
