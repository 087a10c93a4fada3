"""The forward pass of a stage, first or again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddg_gpu.flight import InFlight
from ddg_gpu.value import Value, checked, detached, floating, members
from ddg_gpu.weights import Weights, call


class Forward:
    """Runs a stage's layers, and its loss if it has one.

    Args:
        module: the layers.
        head: what makes outputs for the loss of an activation; None where they are the same.
        loss: (outputs, targets) -> scalar; None where the stage has no loss.
        index: which stage it is.
        seed: of the stage's randomness.
        precision: dtype of `torch.autocast`, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        head: nn.Module | None,
        loss: Callable[..., Tensor] | None,
        index: int,
        seed: int,
        precision: torch.dtype | None = None,
    ) -> None:
        self.trained = module if head is None else _Headed(module, head)
        self._headed = head is not None
        self._loss = loss
        self._index = index
        self._seed = seed
        self._precision = precision

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their names in the module; those of a head begin with "head:"."""
        return ((self._outer(name), p) for name, p in self.trained.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The same for buffers."""
        return ((self._outer(name), b) for name, b in self.trained.named_buffers())

    def _outer(self, name: str) -> str:
        if not self._headed:
            return name
        part, _, rest = name.partition(".")
        return rest if part == "body" else f"head:{rest}"

    def __call__(self, sample: InFlight, graph: bool = True, moves: bool = True) -> Value:
        """The first pass: it moves the module's buffers. Returns the activation without a graph.

        Args:
            sample: its ``roots`` are set.
            graph: whether to build the graph; without, only a loss becomes a root.
            moves: whether buffers move; if not, they change on copies that are thrown away.

        Raises:
            ValueError: if the activation is neither a tensor nor a tuple of tensors.
        """
        return self._run(sample, sample.weights if moves else self.spare(sample), graph)

    def again(self, sample: InFlight) -> None:
        """Build the graph on the stored input. Buffers change on copies that are thrown away.

        They begin as the sample's ``buffers``, if it has some, and else as those of now.
        """
        self._run(sample, self.spare(sample), graph=True)

    def spare(self, sample: InFlight) -> Weights:
        """A sample's weights, and copies of its buffers or else of those of now, by name."""
        own = sample.buffers or {}
        buffers = {
            name: own.get(self._outer(name), buffer).clone()
            for name, buffer in self.trained.named_buffers()
        }
        return {**sample.weights, **buffers}

    @contextmanager
    def sound(self) -> Iterator[None]:
        """Inside, a pass moves the buffers; if numbers in them are not finite then, it has not."""
        before = {name: buffer.clone() for name, buffer in self.trained.named_buffers()}
        yield
        now = dict(self.trained.named_buffers())
        if any((own.isfinite() & ~now[name].isfinite()).any() for name, own in before.items()):
            # Through .data, as graphs of samples in flight hold batch norm's, which moves them
            # unseen by autograd, too.
            for name, own in before.items():
                now[name].data.copy_(own)

    def _run(self, sample: InFlight, weights: Weights, graph: bool) -> Value:
        device = members(sample.inputs)[0].device
        mixed = (
            torch.autocast(device.type, dtype=self._precision, cache_enabled=False)
            if self._precision is not None
            else nullcontext()
        )
        with torch.set_grad_enabled(graph):
            with seeded(self._seed, self._index, sample.number, device), mixed:
                found = call(self.trained, weights, sample.inputs)
            output, logits = found if self._headed else (found, found)
            output = checked(output, f"stage {self._index}: the activation")
            sample.roots = floating(output)
            if self._loss is not None:
                if self._precision is not None:
                    logits = _single(logits)
                sample.roots = (self._loss(logits, sample.targets),)
        return detached(output)


class _Headed(nn.Module):
    """A stage with an auxiliary head: gives the activation and what the head makes of it."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs: Value) -> tuple[Any, Any]:
        activation = self.body(inputs)
        return activation, self.head(activation)


def _single(outputs: Any) -> Any:
    """Outputs in at least single precision, for the loss."""
    if isinstance(outputs, tuple):
        return tuple(map(_single, outputs))
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


@contextmanager
def seeded(
    seed: int, stage: int, sample: int, device: torch.device | None = None
) -> Iterator[None]:
    """Key torch's generators by (seed, stage, sample) inside, and restore them afterwards.

    So a stage draws the same dropout mask wherever and whenever it runs the sample.

    Args:
        seed: of the run.
        stage: index of the stage.
        sample: index of the sample.
        device: whose generator is keyed, besides the CPU's.

    >>> with seeded(0, stage=1, sample=2):
    ...     first = torch.rand(1)
    >>> with seeded(0, stage=1, sample=2):
    ...     bool(first == torch.rand(1))
    True
    """
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    key = int(np.random.SeedSequence((seed, stage, sample)).generate_state(1)[0])
    for generator in generators:
        generator.manual_seed(key)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
