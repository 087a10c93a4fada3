"""What a message between two stages looks like before it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddg_gpu.boundaries import Boundary, TensorSpec
from ddg_gpu.value import Value
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Message
from ddg_sim.rule import Activations
from ddg_sim.schedule import Schedule


def message_buffer(
    schedule: Schedule, boundaries: Sequence[Boundary], size: Callable[[int], int]
) -> Callable[[Message], Value]:
    """Makes empty values for messages to be received into.

    Args:
        schedule: what is run.
        boundaries: what crosses each boundary between two stages.
        size: number of examples of a sample.

    >>> from ddg_sim.methods import ddg
    >>> crossing = [(TensorSpec(torch.Size([3]), torch.float32), TensorSpec(torch.Size([]),
    ...                                                                    torch.int64))]
    >>> make = message_buffer(ddg(2), crossing, lambda sample: 8)
    >>> [tensor.shape for tensor in make(Message(Relation.ACTIVATION, 0, 1, sample=0))]
    [torch.Size([8, 3]), torch.Size([8])]
    >>> len(make(Message(Relation.GRADIENT, 1, 0, sample=0)))  # numbers of type int have none
    1
    >>> from ddg_sim.methods import petra
    >>> make = message_buffer(petra(2), [crossing[0][0]], lambda sample: 8)
    >>> len(make(Message(Relation.GRADIENT, 1, 0, sample=0)))  # the activation, and its gradient
    2
    """
    reconstructs = schedule.rule.activations is Activations.RECONSTRUCT

    def make(message: Message) -> Value:
        boundary = boundaries[min(message.source, message.target)]
        examples = size(message.sample)

        def one(spec: TensorSpec) -> Tensor:
            return torch.empty(spec.batched(examples), dtype=spec.dtype)

        errors = message.relation is Relation.GRADIENT
        if isinstance(boundary, TensorSpec):
            both = errors and reconstructs
            return (one(boundary), one(boundary)) if both else one(boundary)
        return tuple(one(spec) for spec in boundary if spec.carries_error or not errors)

    return make
