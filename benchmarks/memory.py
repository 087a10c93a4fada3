"""How much memory a stage needs, against the least that its schedule allows.

    python benchmarks/memory.py --model resnet8 --batch-size 32

Each stage of each trainable method runs its program alone, on inputs and errors of the right
shapes, while the making and the end of every tensor is watched; the peak counts weights, gradients,
optimizer state, activations, and tensors that are needed for a moment.

The least is made of three figures of plain PyTorch, found in the same way: a training step of the
same layers on one mini-batch (of as many micro-batches as the method has, one after the other;
with a second forward pass, where the method recomputes), plus what one more sample in flight saves
for its backward pass (its input only, where the method recomputes), plus the bytes of one more
version of the weights, as many times as `ddg_sim.lowering.memory` predicts.
"""

from __future__ import annotations

import argparse
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from environment import environment
from random_images import random_images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ddg_gpu import models
from ddg_gpu.boundaries import TensorSpec
from ddg_gpu.job import Job, network
from ddg_gpu.stage import Stage, refuse
from ddg_gpu.step import OptimizerFactory
from ddg_gpu.transport import require_processes
from ddg_sim.lowering import memory
from ddg_sim.methods import METHODS, Semantics, method
from ddg_sim.rule import Activations, Gradient
from ddg_sim.schedule import Op, OpKind, Schedule, staleness

OPTIMIZER = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)
LIMIT = 1.05


@dataclass(frozen=True, slots=True)
class Layers:
    """A stage's layers, and what comes in: shapes of one micro-batch.

    Args:
        body: the layers.
        head: what makes logits of the activation for a local loss; None elsewhere.
        inputs: makes a mini-batch's input; called while allocations are recorded.
        output: shape of the activation.
        first: whether the input needs no gradient.
        last: whether the loss follows.
    """

    body: nn.Module
    head: nn.Module | None
    inputs: Callable[[], Tensor]
    output: torch.Size
    first: bool
    last: bool


class Live(TorchDispatchMode):
    """Inside, counts the bytes of living tensors: every storage, from its making to its end.

    Not seen is what a kernel allocates and frees within one call. (`torch.profiler` sees that too,
    but was found to lose events on a busy machine.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._living: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, found)
        self.peak = max(self.peak, self.now)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return

        def gone(_: object) -> None:
            del self._living[key]
            self.now -= size

        self._living[key] = weakref.ref(storage, gone)
        self.now += size


def peak(run: Callable[[], object]) -> int:
    """Most bytes of tensors that a call made and held at any moment.

    >>> peak(lambda: torch.zeros(100) + torch.zeros(100))
    1200
    """
    with Live() as live:
        run()
    return live.peak


def run_stage(
    schedule: Schedule,
    index: int,
    layers: Layers,
    iterations: int,
    optimizer: OptimizerFactory = OPTIMIZER,
) -> Iterator[tuple[Op, Stage]]:
    """Run one stage's program alone; yields after every operation."""
    stage = Stage(
        copy.deepcopy(layers.body),
        index,
        schedule,
        optimizer,
        head=copy.deepcopy(layers.head),
    )
    program = schedule.program(schedule.worker_of(index), iterations, drain=False)
    for op in program:
        if op.stage != index:
            continue
        if op.kind is OpKind.FORWARD:
            inputs = layers.inputs()
            targets = torch.zeros(len(inputs), dtype=torch.int64) if stage.has_loss else None
            stage.forward(op, inputs, targets)
            del inputs, targets
        elif op.kind is OpKind.RECOMPUTE:
            stage.recompute(op)
        elif op.kind in (OpKind.BACKWARD, OpKind.BACKWARD_INPUT):
            stage.backward(op, None if stage.has_loss else 1e-3 * torch.ones(layers.output))
        elif op.kind is OpKind.BACKWARD_WEIGHT:
            stage.backward(op)
        else:
            stage.update(op)
        yield op, stage


def measured(
    schedule: Schedule, index: int, layers: Layers, optimizer: OptimizerFactory = OPTIMIZER
) -> int:
    """Peak bytes of a stage that runs its program."""
    iterations = 2 * schedule.num_ticks(0) + 3

    def run() -> None:
        for _ in run_stage(schedule, index, layers, iterations, optimizer):
            pass

    return peak(run)


def least(
    schedule: Schedule, index: int, layers: Layers, optimizer: OptimizerFactory = OPTIMIZER
) -> int:
    """The least bytes that the schedule allows, from figures of plain PyTorch."""
    needs = memory(schedule)[index]
    local = schedule.rule.gradient is Gradient.LOCAL
    stored = schedule.rule.activations is Activations.INPUT
    weights = sum(p.numel() * p.element_size() for p in parameters(layers))
    more = saved(layers, local, stored)
    return (
        plain_peak(schedule, layers, optimizer)
        + (needs.activations - 1) * more
        + (needs.weight_versions - 1) * weights
    )


def parameters(layers: Layers) -> list[nn.Parameter]:
    """Of the layers and their head."""
    modules = [layers.body] if layers.head is None else [layers.body, layers.head]
    return [p for module in modules for p in module.parameters()]


def forward(layers: Layers, local: bool, inputs: Tensor) -> Tensor:
    """Activation, or loss where the stage has one, with a graph."""
    if not layers.first and not local:
        inputs.requires_grad_()
    output: Tensor = layers.body(inputs)
    if layers.head is not None:
        output = layers.head(output)
    if layers.last or layers.head is not None:
        targets = torch.zeros(len(inputs), dtype=torch.int64)
        return nn.functional.cross_entropy(output, targets)
    return output


def plain_peak(schedule: Schedule, layers: Layers, make: OptimizerFactory) -> int:
    """Peak bytes of plain training steps of the layers, weights and optimizer included."""
    local = schedule.rule.gradient is Gradient.LOCAL
    stored = schedule.rule.activations is Activations.INPUT
    halves = OpKind.BACKWARD_INPUT in {template.kind for template in schedule.templates()}

    def run() -> None:
        mine = Layers(
            copy.deepcopy(layers.body),
            copy.deepcopy(layers.head),
            layers.inputs,
            layers.output,
            layers.first,
            layers.last,
        )
        optimizer = make(parameters(mine))
        for _ in range(2):
            for _ in range(schedule.samples_per_iteration):
                inputs = mine.inputs()
                if stored:
                    with torch.no_grad():
                        forward(mine, True, inputs)
                root = forward(mine, local, inputs)
                error = None if root.dim() == 0 else 1e-3 * torch.ones(mine.output)
                if halves and inputs.requires_grad:
                    torch.autograd.grad(root, inputs, error, retain_graph=True)
                root.backward(error)
                del inputs, root, error
            optimizer.step()
            optimizer.zero_grad()

    return peak(run)


def saved(layers: Layers, local: bool, stored: bool) -> int:
    """Bytes that one sample in flight keeps, beyond the weights: plain autograd's saved tensors."""
    body, head = copy.deepcopy(layers.body), copy.deepcopy(layers.head)
    mine = Layers(body, head, layers.inputs, layers.output, layers.first, layers.last)
    known = {p.untyped_storage().data_ptr() for p in parameters(mine)}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = mine.inputs()
    if stored:
        return inputs.untyped_storage().nbytes()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        root = forward(mine, local, inputs)
    keep(inputs)
    del root
    return sum(found.values())


def layers_of(job: Job, schedule: Schedule) -> list[Layers]:
    """The stages of a job's network, as plain layers."""
    parts = network(job, random_images(64))
    crossing = [b.shape for b in parts.boundaries if isinstance(b, TensorSpec)]
    shapes = [torch.Size((3, 32, 32)), *crossing, torch.Size((parts.classes,))]
    local = schedule.rule.gradient is Gradient.LOCAL
    return [
        Layers(
            module,
            models.head(shapes[k + 1], parts.classes) if local and k < job.stages - 1 else None,
            partial(torch.zeros, job.batch_size, *shapes[k]),
            torch.Size((job.batch_size, *shapes[k + 1])),
            first=k == 0,
            last=k == job.stages - 1,
        )
        for k, module in enumerate(parts.modules)
    ]


def trainable(stages: int) -> Iterator[tuple[str, Schedule]]:
    """All methods that the torch backend runs, with DDG's three readings."""
    for name in [*METHODS, "ddg/current", "ddg/replay"]:
        base, _, semantics = name.partition("/")
        try:
            reading = Semantics(semantics) if semantics else None
            schedule = method(base, stages, semantics=reading)
            for stage in range(stages):
                refuse(schedule, stage)
                require_processes(schedule)
        except ValueError:
            continue
        if schedule.rule.activations is not Activations.RECONSTRUCT:  # which needs its own layers
            yield name, schedule


def main() -> None:
    """Print a row per method, for all stages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--batch-size", type=int, default=32, help="examples per sample")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(environment())
    print(
        f"| {options.model}, {options.batch_size} examples, K={options.stages} | staleness"
        " | samples in flight | versions | peak MiB | least MiB | ratio per stage |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, schedule in trainable(options.stages):
        if options.methods is not None and name not in options.methods:
            continue
        job = Job(
            schedule.method,
            options.stages,
            options.model,
            iterations=1,
            batch_size=options.batch_size,
        )
        pairs = [
            (measured(schedule, k, layers), least(schedule, k, layers))
            for k, layers in enumerate(layers_of(job, schedule))
        ]
        needs = memory(schedule)
        shown = [f"{a / b:.3f}" if a / b <= LIMIT else f"**{a / b:.3f}**" for a, b in pairs]
        print(
            f"| {name} | {', '.join(map(str, staleness(schedule)))}"
            f" | {', '.join(str(n.activations) for n in needs)}"
            f" | {', '.join(str(n.weight_versions) for n in needs)}"
            f" | {', '.join(f'{a / 2**20:.2f}' for a, _ in pairs)}"
            f" | {', '.join(f'{b / 2**20:.2f}' for _, b in pairs)} | {', '.join(shown)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
