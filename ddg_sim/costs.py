"""What every operation and every message of a schedule costs, in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from ddg_sim.dependencies import TRAVELS, Relation
from ddg_sim.network import FREE, Network
from ddg_sim.schedule import OpKind
from ddg_sim.times import Straggler, Time, check_number, mean, scaled

#: Seconds, one entry per stage.
SECONDS = ("forward", "backward", "update", "recompute", "all_reduce", "overhead", "message")
#: Numbers without a unit, one entry per stage.
FACTORS = ("jitter", "slowdown", "input_share")
PER_STAGE = SECONDS + FACTORS
PER_LINK = ("activation_transfer", "gradient_transfer")


@dataclass(frozen=True)
class Costs:
    """Costs of K stages and of the K-1 links between them, all in seconds.

    A time is a number or a distribution (`times`). An operation takes
    ``(work + overhead + messages * message) * jitter * slowdown`` seconds, where work is the
    entry for its kind and messages counts those that it sends and receives.

    Args:
        forward: forward pass, per stage; its length is K.
        backward: backward pass (gradients of weights and of the input), per stage.
        update: weight update, per stage; left out, it costs nothing.
        recompute: second forward pass, per stage; left out, it costs what the first one costs.
        all_reduce: mean of the gradients over all replicas, per stage; left out, it costs nothing.
        activation_transfer: per link; link k joins stage k and stage k+1; left out, 0.
        gradient_transfer: per link, from stage k+1 to stage k; left out, 0.
        overhead: host seconds that every operation of the stage costs on top; left out, 0.
        message: host seconds that an operation spends on each message it sends or receives.
        jitter: factor on every operation, drawn for each anew, per stage; left out, 1.
        slowdown: factor on all operations of a run, drawn once per run, per stage; left out, 1.
        input_share: part of a backward pass that the gradient of the input takes where a schedule
            splits it, per stage, 0 to 1; left out, one half.
        barrier: seconds from the last worker's coming to a barrier until all go on.
        network: how messages travel.
        cores: cores that all workers share, of all replicas; None: each has one of its own.

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

    forward: tuple[Time, ...]
    backward: tuple[Time, ...]
    update: tuple[Time, ...] = ()
    recompute: tuple[Time, ...] = ()
    all_reduce: tuple[Time, ...] = ()
    activation_transfer: tuple[Time, ...] = ()
    gradient_transfer: tuple[Time, ...] = ()
    overhead: tuple[Time, ...] = ()
    message: tuple[Time, ...] = ()
    jitter: tuple[Time, ...] = ()
    slowdown: tuple[Time, ...] = ()
    input_share: tuple[float, ...] = ()
    barrier: Time = 0.0
    network: Network = FREE
    cores: int | None = None

    def __post_init__(self) -> None:
        stages = len(self.forward)
        if stages == 0:
            raise ValueError("forward is empty: give the seconds of at least one stage")
        free = ("update", "all_reduce", "overhead", "message")
        defaults: dict[str, tuple[Time, ...]] = dict.fromkeys(free, (0.0,) * stages)
        defaults |= {"recompute": self.forward, "input_share": (0.5,) * stages}
        defaults |= dict.fromkeys(("jitter", "slowdown"), (1.0,) * stages)
        defaults |= dict.fromkeys(PER_LINK, (0.0,) * (stages - 1))
        for name, default in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or default)
        for name in PER_STAGE + PER_LINK:
            _check(name, getattr(self, name), stages)
        _check_time("barrier", self.barrier)
        if self.cores is not None and self.cores < 1:
            raise ValueError(f"cores must be at least 1, got {self.cores}")
        for name in (*SECONDS, *PER_LINK):
            if any(isinstance(time, Straggler) for time in getattr(self, name)):
                raise ValueError(f"{name} is a straggler, which is a factor: give it as jitter")
        for stage, share in enumerate(self.input_share):
            if not isinstance(share, int | float) or share > 1:
                raise ValueError(f"input_share[{stage}] is {share}: give a fraction, 0 to 1")

    @property
    def num_stages(self) -> int:
        """Number of stages K.

        >>> costs(3).num_stages
        3
        """
        return len(self.forward)

    @cached_property
    def random(self) -> bool:
        """Whether any time varies.

        >>> from ddg_sim.times import Gamma
        >>> costs(2).random, costs(2, forward=Gamma(1.0, 0.1)).random
        (False, True)
        """
        times = [time for name in PER_STAGE + PER_LINK for time in getattr(self, name)]
        return not all(isinstance(time, int | float) for time in (*times, self.barrier))

    def means(self) -> Costs:
        """The same with every distribution replaced by its mean.

        >>> from ddg_sim.times import Gamma
        >>> costs(2, forward=Gamma(1.5, 0.1)).means().forward
        (1.5, 1.5)
        """
        if not self.random:
            return self
        numbers = {
            name: tuple(mean(time) for time in getattr(self, name)) for name in PER_STAGE + PER_LINK
        }
        return replace(self, **numbers, barrier=mean(self.barrier))  # type: ignore[arg-type]

    def work(self, kind: OpKind, stage: int) -> Time:
        """Time of an operation's own work, without overhead, messages and jitter.

        >>> costs(2, backward=(2.0, 3.0)).work(OpKind.BACKWARD_WEIGHT, 1)
        1.5
        """
        match kind:
            case OpKind.FORWARD:
                return self.forward[stage]
            case OpKind.RECOMPUTE:
                return self.recompute[stage]
            case OpKind.BACKWARD:
                return self.backward[stage]
            case OpKind.BACKWARD_INPUT:
                return scaled(self.backward[stage], self.input_share[stage])
            case OpKind.BACKWARD_WEIGHT:
                return scaled(self.backward[stage], 1 - self.input_share[stage])
            case OpKind.UPDATE:
                return self.update[stage]
            case OpKind.ALL_REDUCE:
                return self.all_reduce[stage]

    def duration(self, kind: OpKind, stage: int, messages: int = 0) -> float:
        """Mean seconds of one operation of ``stage``, its host overhead included.

        Args:
            kind: of the operation.
            stage: its stage.
            messages: how many it sends and receives.

        >>> costs(2, backward=(2.0, 3.0), overhead=0.25).duration(OpKind.BACKWARD, 1)
        3.25
        """
        host = mean(self.overhead[stage]) + messages * mean(self.message[stage])
        factor = mean(self.jitter[stage]) * mean(self.slowdown[stage])
        return (mean(self.work(kind, stage)) + host) * factor

    def transfer(self, relation: Relation, source_stage: int, target_stage: int) -> Time:
        """Time that a message from one stage to its neighbour occupies their link.

        Raises:
            ValueError: if no activation, or gradient, flows between these two stages.

        >>> costs(3, comm=(0.1, 0.2)).transfer(Relation.GRADIENT, 2, 1)
        0.2
        """
        if relation not in TRAVELS:
            return 0.0  # two workers of one stage share its memory; a credit carries no data
        if relation is Relation.ACTIVATION and target_stage == source_stage + 1:
            return self.activation_transfer[source_stage]
        if relation is Relation.GRADIENT and target_stage == source_stage - 1:
            return self.gradient_transfer[target_stage]
        raise ValueError(f"no {relation.value} flows from stage {source_stage} to {target_stage}")


Seconds = Time | Iterable[Time]


def costs(
    num_stages: int,
    forward: Seconds = 1.0,
    backward: Seconds = 2.0,
    update: Seconds = 0.0,
    comm: Seconds = 0.0,
    *,
    activation_transfer: Seconds | None = None,
    gradient_transfer: Seconds | None = None,
    barrier: Time = 0.0,
    network: Network = FREE,
    cores: int | None = None,
    **others: Seconds,
) -> Costs:
    """Costs of ``num_stages`` stages; a single time stands for all stages, or all links.

    A backward pass costs twice a forward pass unless said otherwise: it multiplies by the weights
    twice, once for the gradient of the input and once for that of the weights.

    Args:
        num_stages: number of stages K >= 1.
        forward: seconds, one time or K of them; so are the others that are per stage.
        backward: seconds per stage.
        update: seconds per stage.
        comm: seconds per link and direction, one time or K-1 of them.
        activation_transfer: seconds per link; None takes ``comm``.
        gradient_transfer: seconds per link; None takes ``comm``.
        barrier: seconds from the last worker's coming to a barrier until all go on.
        network: how messages travel.
        cores: cores that all workers share; None: each has one of its own.
        others: the other entries of `Costs` that are per stage: recompute, all_reduce, overhead,
            message, jitter, slowdown, input_share.

    Raises:
        ValueError: see `Costs`; also for ``num_stages`` < 1.
        TypeError: for an entry that `Costs` lacks.

    >>> costs(2, forward=(1, 3), comm=0.5).gradient_transfer
    (0.5,)
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}")
    if unknown := set(others) - set(PER_STAGE):
        raise TypeError(f"costs has no entry {min(unknown)!r}; entries: {', '.join(PER_STAGE)}")
    per_stage = {"forward": forward, "backward": backward, "update": update, **others}
    per_link = {"activation_transfer": activation_transfer, "gradient_transfer": gradient_transfer}
    found = {
        name: _broadcast(name, value, num_stages, num_stages) for name, value in per_stage.items()
    }
    for name, value in per_link.items():
        # The name of the argument that was given is the one to complain about.
        given = ("comm", comm) if value is None else (name, value)
        found[name] = _broadcast(*given, num_stages - 1, num_stages)
    return Costs(**found, barrier=barrier, network=network, cores=cores)  # type: ignore[arg-type]


def _broadcast(name: str, value: Seconds, count: int, stages: int) -> tuple[Time, ...]:
    if isinstance(value, Iterable):
        found = tuple(value)
        _check(name, found, stages)
        return tuple(float(t) if isinstance(t, int | float) else t for t in found)
    _check_time(name, value)  # checked here too: with K=1 no link would hold it
    return (float(value) if isinstance(value, int | float) else value,) * count


def _check(name: str, values: tuple[Time, ...], stages: int) -> None:
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
        _check_time(f"{name}[{index}]", value)


def _check_time(name: str, value: Time) -> None:
    if isinstance(value, int | float):
        check_number(name, value)
    elif not hasattr(value, "quantile"):  # a distribution has checked itself
        raise ValueError(f"{name} is {value!r}: give one time, a number or a distribution")
