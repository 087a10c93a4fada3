"""What crosses the boundaries between stages, found and checked by a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddg_gpu.dryrun import (
    SIZES,
    SplitError,
    batch_of,
    describe,
    same_bits,
    tensors_of,
    undisturbed,
)
from ddg_gpu.value import Value


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that crosses a boundary.

    Args:
        shape: of one example, without the batch, which is the tensor's first dimension.
        dtype: its type.

    >>> TensorSpec(torch.Size([3, 8]), torch.float32).batched(64)
    torch.Size([64, 3, 8])
    """

    shape: torch.Size
    dtype: torch.dtype

    @property
    def carries_error(self) -> bool:
        """Whether an error comes back for it: integers have no gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    def batched(self, size: int) -> torch.Size:
        """Shape of the tensor for ``size`` examples."""
        return torch.Size((size, *self.shape))


Boundary = TensorSpec | tuple[TensorSpec, ...]
"""What crosses one boundary: a tensor, or a tuple of tensors."""


def boundaries(
    stages: Sequence[nn.Module], example: Value, autocast: torch.dtype | None = None
) -> list[Boundary]:
    """What every stage but the last hands on, for any batch size.

    The stages are run on batches of two sizes, in both modes, without gradients; buffers and
    generators are as before afterwards. The answer is that of evaluation mode.

    Args:
        stages: K modules, each taking what the one before returns.
        example: the first stage's input, a tensor (B, ...) or a tuple of them.
        autocast: lower precision in which the stages will run, if any.

    Returns:
        K-1 entries, a `TensorSpec` where a tensor crosses and a tuple of them where a tuple does.

    Raises:
        SplitError: naming the layer, if anything but a tensor or a flat tuple of tensors crosses,
            if the batch is not the first dimension of each of them and of the outputs, if what
            crosses depends on the mode, or if a stage changes its input in place: the input is
            read again by the backward pass, and may be a message that is still under way.

    >>> stages = [nn.Conv2d(3, 8, 3), nn.Flatten()]
    >>> boundaries(stages, torch.zeros(1, 3, 4, 4))
    [TensorSpec(shape=torch.Size([8, 2, 2]), dtype=torch.float32)]
    """
    evaluating, training = (_dry_run(stages, example, autocast, mode) for mode in (False, True))
    for index, (one, other) in enumerate(zip(evaluating, training, strict=True)):
        if one != other:
            raise SplitError(
                f"what {_between(stages, index)} is {one} in evaluation and {other} in training:"
                " cut elsewhere"
            )
    return evaluating


def _dry_run(
    stages: Sequence[nn.Module], example: Value, autocast: torch.dtype | None, training: bool
) -> list[Boundary]:
    """What crosses in one mode, from batches of two sizes."""
    values: list[Any] = [batch_of(example, size) for size in SIZES]
    found: list[Boundary] = []
    device = pytree.tree_leaves(values)[0].device.type
    low = nullcontext() if autocast is None else torch.autocast(device, autocast)
    with undisturbed(*stages, training=training), torch.no_grad(), low:
        for index, stage in enumerate(stages):
            if index:
                found.append(_specification(stages, index - 1, *values))
            for size, value in enumerate(values):
                with _unchanged(index, stage, tensors_of(value) or ()):
                    values[size] = stage(value)
    for tensor in pytree.tree_leaves(values[0]):
        if isinstance(tensor, Tensor) and tensor.shape[:1] != SIZES[:1]:
            raise SplitError(
                f"the output of stage {len(stages) - 1} {_span(stages[-1])} has shape"
                f" {tuple(tensor.shape)} for {SIZES[0]} examples: its first dimension must be the"
                " batch, so return one row per example, and no loss"
            )
    return found


def _specification(stages: Sequence[nn.Module], index: int, small: Any, large: Any) -> Boundary:
    """Shapes and types at a boundary, from its values for two batch sizes."""
    few, many = tensors_of(small), tensors_of(large)
    if few is None or many is None or len(few) != len(many):
        raise SplitError(
            f"what {_between(stages, index)} is {describe(small)}: only a tensor or a flat tuple of"
            " tensors may cross, so cut elsewhere, or return tensors"
        )
    specs = []
    for first, second in zip(few, many, strict=True):
        if (
            (*first.shape[:1], *second.shape[:1]) != SIZES
            or first.shape[1:] != second.shape[1:]
            or first.dtype != second.dtype
        ):
            raise SplitError(
                f"what {_between(stages, index)} has shapes {tuple(first.shape)} and"
                f" {tuple(second.shape)} for {SIZES[0]} and {SIZES[1]} examples: only the first"
                " dimension may be the batch, and must be, so cut elsewhere"
            )
        specs.append(TensorSpec(first.shape[1:], first.dtype))
    return specs[0] if isinstance(small, Tensor) else tuple(specs)


def compare(model: nn.Module, stages: Sequence[nn.Module], example: Value) -> None:
    """Refuse stages that do not do to the bit what the model does, in both modes.

    Args:
        model: the whole model, taking the tensors of a tuple as arguments of their own.
        stages: what it was cut into; they share its buffers.
        example: the model's one argument, or the tuple of its arguments.

    Raises:
        SplitError: if outputs or buffers differ.
    """
    for training, size in product((True, False), SIZES):
        found = []
        for parts in ([model], stages):
            with undisturbed(model, *stages, training=training), torch.no_grad():
                value = batch_of(example, size)
                if parts[0] is model and not isinstance(value, Tensor):
                    value = model(*value)
                else:
                    for part in parts:
                        value = part(value)
                found.append((value, [buffer.clone() for buffer in model.buffers()]))
        if not same_bits(*found):
            mode = "training" if training else "evaluation"
            raise SplitError(
                f"the stages of this {type(model).__name__} do not compute what it computes in"
                f" {mode}: its forward pass does what tracing cannot see, such as drawing random"
                " numbers or counting outside of a module; move that into a module of its own"
            )


@contextmanager
def _unchanged(index: int, stage: nn.Module, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Refuse a stage that changes its input in place, and name the layer that did.

    Views share the version counter of what they view, so in-place operations on them count.
    """
    before = [tensor._version for tensor in inputs]
    culprits: list[str] = []

    def watch(layer: nn.Module, name: str, hooks: ExitStack) -> None:
        def look(who: str) -> None:
            if not culprits and [tensor._version for tensor in inputs] != before:
                culprits.append(who)

        earlier = f"an operation before layer {name!r} of stage {index}"
        itself = f"layer {name!r} ({type(layer).__name__}) of stage {index}"
        hooks.callback(layer.register_forward_pre_hook(lambda *_: look(earlier)).remove)
        hooks.callback(layer.register_forward_hook(lambda *_: look(itself)).remove)

    with ExitStack() as hooks:
        for name, layer in stage.named_modules():
            if next(layer.children(), None) is None:
                watch(layer, name, hooks)
        yield
    if [tensor._version for tensor in inputs] != before:
        named = culprits[0] if culprits else f"an operation of stage {index} {_span(stage)}"
        raise SplitError(
            f"{named} changes the stage's input in place, which the backward pass reads again:"
            " use inplace=False, or cut elsewhere"
        )


def _between(stages: Sequence[nn.Module], index: int) -> str:
    left, right = list(pairwise(stages))[index]
    return f"stage {index} {_span(left)} passes to stage {index + 1} {_span(right)}"


def _span(stage: nn.Module) -> str:
    """First and last layer of a stage, for messages."""
    names = [name for name, layer in stage.named_modules() if next(layer.children(), None) is None]
    return f"({names[0]!r} to {names[-1]!r})" if names and names[0] else f"({type(stage).__name__})"
