"""Data-parallel replicas in one process.

Replicas never differ in their weights, so one stage serves all: it runs every operation once per
replica, and its update takes the mean of all gradients. Sample s of replica r of R is mini-batch
s R + r. Buffers (batch norm) are those of the first replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ddg_gpu.stage import Stage
from ddg_sim.schedule import Op


class _Samples(Protocol):
    def inputs(self, sample: int) -> Any: ...

    def targets(self, sample: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class ReplicaSamples:
    """The mini-batches of a sample on all replicas.

    Args:
        samples: the mini-batches.
        replicas: R.
    """

    samples: _Samples
    replicas: int

    def inputs(self, sample: int) -> list[Any]:
        """Inputs of a sample, one per replica."""
        return [self.samples.inputs(own) for own in self._own(sample)]

    def targets(self, sample: int) -> list[Any]:
        """Labels of a sample, one per replica."""
        return [self.samples.targets(own) for own in self._own(sample)]

    def _own(self, sample: int) -> range:
        return range(sample * self.replicas, (sample + 1) * self.replicas)


@dataclass(frozen=True, slots=True)
class ReplicaStage:
    """A stage of all replicas: where a stage takes and gives a value, a list with one per replica.

    Args:
        stage: made for the schedule with its replicas.
        replicas: R.
    """

    stage: Stage
    replicas: int

    @property
    def is_last(self) -> bool:
        """As of the stage."""
        return self.stage.is_last

    @property
    def has_loss(self) -> bool:
        """As of the stage."""
        return self.stage.has_loss

    def tie(self, stages: Mapping[int, ReplicaStage]) -> None:
        """As of the stage."""
        self.stage.tie({index: other.stage for index, other in stages.items()})

    def forward(self, op: Op, inputs: Sequence[Any], targets: Sequence[Any] | None) -> list[Any]:
        """Run a sample forward on every replica."""
        labels = [None] * self.replicas if targets is None else targets
        each = zip(self._each(op), inputs, labels, strict=True)
        return [self.stage.forward(own, x, y) for own, x, y in each]

    def recompute(self, op: Op) -> None:
        """Run a sample forward again on every replica."""
        for own in self._each(op):
            self.stage.recompute(own)

    def backward(self, op: Op, error: Sequence[Any] | None = None) -> list[Any] | None:
        """Differentiate a sample on every replica."""
        errors = [None] * self.replicas if error is None else error
        found = [
            self.stage.backward(own, part) for own, part in zip(self._each(op), errors, strict=True)
        ]
        return None if found[0] is None else found

    def update(self, op: Op) -> None:
        """Apply the mean gradient of all samples of an update on all replicas."""
        self.stage.update(self._each(op)[-1])

    def _each(self, op: Op) -> list[Op]:
        first = op.sample * self.replicas
        return [replace(op, sample=first + replica) for replica in range(self.replicas)]
