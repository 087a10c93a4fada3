"""What every operation and every message of a schedule costs, in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ddg_sim.dependencies import Relation
from ddg_sim.schedule import OpKind

PER_STAGE = ("forward", "backward", "update", "recompute", "overhead")
PER_LINK = ("activation_transfer", "gradient_transfer")
MAX_SECONDS = 1e12  # 30 000 years; sums of much larger numbers would overflow


@dataclass(frozen=True, slots=True)
class Costs:
    """Deterministic costs of K stages and of the K-1 links between them, all in seconds.

    Args:
        forward: forward pass, per stage; its length is K.
        backward: backward pass (gradients of weights and of the input), per stage.
        update: weight update, per stage; left out, it costs nothing.
        recompute: second forward pass, per stage; left out, it costs what the first one costs.
        activation_transfer: per link; link k joins stage k and stage k+1; left out, 0.
        gradient_transfer: per link, from stage k+1 to stage k; left out, 0.
        overhead: host seconds that every operation of the stage costs on top; left out, 0.
        barrier: seconds from the last worker's coming to a barrier until all go on.

    Raises:
        ValueError: naming the argument, the value and what to do, for a wrong number of values,
            or a value that is negative, not finite or absurdly large.

    >>> two = Costs(forward=(1.0, 2.0), backward=(2.0, 4.0))
    >>> two.recompute, two.update, two.gradient_transfer
    ((1.0, 2.0), (0.0, 0.0), (0.0,))
    >>> Costs(forward=(1.0, 2.0), backward=(2.0,))
    Traceback (most recent call last):
    ...
    ValueError: backward has 1 value, but there are 2 stages (K=2): give one per stage
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    update: tuple[float, ...] = ()
    recompute: tuple[float, ...] = ()
    activation_transfer: tuple[float, ...] = ()
    gradient_transfer: tuple[float, ...] = ()
    overhead: tuple[float, ...] = ()
    barrier: float = 0.0

    def __post_init__(self) -> None:
        stages = len(self.forward)
        if stages == 0:
            raise ValueError("forward is empty: give the seconds of at least one stage")
        defaults = {
            "update": (0.0,) * stages,
            "recompute": self.forward,
            "activation_transfer": (0.0,) * (stages - 1),
            "gradient_transfer": (0.0,) * (stages - 1),
            "overhead": (0.0,) * stages,
        }
        for name, default in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or default)
        for name in PER_STAGE + PER_LINK:
            _check(name, getattr(self, name), stages)
        _check_seconds("barrier", self.barrier)

    @property
    def num_stages(self) -> int:
        """Number of stages K.

        >>> costs(3).num_stages
        3
        """
        return len(self.forward)

    def duration(self, kind: OpKind, stage: int) -> float:
        """Seconds of one operation of ``stage``, its host overhead included.

        A backward pass that is split into its halves (gradient of the input, gradient of the
        weights) costs half of ``backward`` each.

        Raises:
            ValueError: for an operation that these costs do not cover (an all-reduce).

        >>> costs(2, backward=(2.0, 3.0), overhead=0.25).duration(OpKind.BACKWARD, 1)
        3.25
        """
        match kind:
            case OpKind.FORWARD:
                seconds = self.forward[stage]
            case OpKind.RECOMPUTE:
                seconds = self.recompute[stage]
            case OpKind.BACKWARD:
                seconds = self.backward[stage]
            case OpKind.BACKWARD_INPUT | OpKind.BACKWARD_WEIGHT:
                seconds = self.backward[stage] / 2
            case OpKind.UPDATE:
                seconds = self.update[stage]
            case _:
                raise ValueError(f"no cost is known for operation {kind.name} of stage {stage}")
        return seconds + self.overhead[stage]

    def transfer(self, relation: Relation, source_stage: int, target_stage: int) -> float:
        """Seconds that a message from one stage to its neighbour occupies their link.

        Raises:
            ValueError: if no activation, or gradient, flows between these two stages.

        >>> costs(3, comm=(0.1, 0.2)).transfer(Relation.GRADIENT, 2, 1)
        0.2
        """
        if relation in (Relation.LOCAL, Relation.WEIGHTS, Relation.CREDIT):
            return 0.0  # two workers of one stage share its memory; a credit carries no data
        if relation is Relation.ACTIVATION and target_stage == source_stage + 1:
            return self.activation_transfer[source_stage]
        if relation is Relation.GRADIENT and target_stage == source_stage - 1:
            return self.gradient_transfer[target_stage]
        raise ValueError(f"no {relation.value} flows from stage {source_stage} to {target_stage}")


Seconds = float | Iterable[float]


def costs(
    num_stages: int,
    forward: Seconds = 1.0,
    backward: Seconds = 2.0,
    update: Seconds = 0.0,
    comm: Seconds = 0.0,
    *,
    recompute: Seconds | None = None,
    activation_transfer: Seconds | None = None,
    gradient_transfer: Seconds | None = None,
    overhead: Seconds = 0.0,
    barrier: float = 0.0,
) -> Costs:
    """Costs of ``num_stages`` stages; a single number stands for all stages, or all links.

    A backward pass costs twice a forward pass unless said otherwise: it multiplies by the weights
    twice, once for the gradient of the input and once for that of the weights.

    Args:
        num_stages: number of stages K >= 1.
        forward: seconds, one number or K of them; so are the others that are per stage.
        backward: seconds per stage.
        update: seconds per stage.
        comm: seconds per link and direction, one number or K-1 of them.
        recompute: seconds per stage; None costs what forward costs.
        activation_transfer: seconds per link; None takes ``comm``.
        gradient_transfer: seconds per link; None takes ``comm``.
        overhead: host seconds added to every operation, per stage.
        barrier: seconds from the last worker's coming to a barrier until all go on.

    Raises:
        ValueError: see `Costs`; also for ``num_stages`` < 1.

    >>> costs(2, forward=(1, 3), comm=0.5)
    Costs(forward=(1.0, 3.0), backward=(2.0, 2.0), update=(0.0, 0.0), recompute=(1.0, 3.0),
          activation_transfer=(0.5,), gradient_transfer=(0.5,), overhead=(0.0, 0.0), barrier=0.0)
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}")

    def stages(name: str, value: Seconds) -> tuple[float, ...]:
        return _broadcast(name, value, num_stages, num_stages)

    def links(name: str, value: Seconds | None) -> tuple[float, ...]:
        # The name of the argument that was given is the one to complain about.
        return _broadcast(
            *(("comm", comm) if value is None else (name, value)), num_stages - 1, num_stages
        )

    first = stages("forward", forward)
    return Costs(
        forward=first,
        backward=stages("backward", backward),
        update=stages("update", update),
        recompute=first if recompute is None else stages("recompute", recompute),
        activation_transfer=links("activation_transfer", activation_transfer),
        gradient_transfer=links("gradient_transfer", gradient_transfer),
        overhead=stages("overhead", overhead),
        barrier=float(barrier),
    )


def _broadcast(name: str, value: Seconds, count: int, stages: int) -> tuple[float, ...]:
    if isinstance(value, Iterable):
        found = tuple(map(float, value))
        _check(name, found, stages)
        return found
    _check_seconds(name, float(value))  # checked here too: with K=1 no link would hold it
    return (float(value),) * count


def _check(name: str, values: tuple[float, ...], stages: int) -> None:
    per_link = name in PER_LINK or name == "comm"
    expected = stages - 1 if per_link else stages
    if len(values) != expected:
        has = f"{name} has {len(values)} value{'' if len(values) == 1 else 's'}"
        there = f"{expected} {'link' if per_link else 'stage'}{'' if expected == 1 else 's'}"
        verb = "is" if expected == 1 else "are"
        raise ValueError(
            f"{has}, but there {verb} {there} (K={stages}):"
            f" give one per {'link' if per_link else 'stage'}"
        )
    for index, value in enumerate(values):
        _check_seconds(f"{name}[{index}]", value)


def _check_seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}: give a finite number of seconds that is at least 0")
    if value > MAX_SECONDS:
        raise ValueError(f"{name} is {value}: give at most {MAX_SECONDS:g} seconds")
