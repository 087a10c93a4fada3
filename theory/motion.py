"""How the weights move: by a schedule, or by given delays; and which form that motion has."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ddg_sim.rule import Activations, Gradient
from ddg_sim.schedule import Schedule, staleness
from theory.delays import delayed
from theory.iterate import Trajectory, iterate, snapshot_delays
from theory.protocols import IntArray, Problem


@dataclass(frozen=True, eq=False)
class Motion:
    """A schedule, or delays (T, K) in ticks; and the momentum beta of every stage's update.

    The forms that statements are about are asked for by methods that return the delays d_k, or
    raise ValueError saying what deviates.
    """

    schedule: Schedule | None
    delays: IntArray | None
    momentum: float = 0.0

    @property
    def name(self) -> str:
        """What reports call it."""
        if self.schedule is not None:
            found = self.schedule.method
        elif self._constant:
            found = f"delays {','.join(map(str, self.longest))}"
        else:
            found = f"delays that change, at most {','.join(map(str, self.longest))}"
        return found + (f", momentum {self.momentum:g}" if self.momentum else "")

    @property
    def samples_per_iteration(self) -> int:
        """How many samples a tick draws, over all replicas."""
        if self.schedule is None:
            return 1
        return self.schedule.samples_per_iteration * self.schedule.replicas

    @property
    def longest(self) -> tuple[int, ...]:
        """The longest delay of each stage; a schedule's staleness."""
        if self.schedule is not None:
            return staleness(self.schedule)
        assert self.delays is not None
        return tuple(map(int, self.delays.max(axis=0)))

    def run(
        self, problem: Problem, paths: npt.NDArray[np.integer], step_sizes: npt.ArrayLike
    ) -> Trajectory:
        """Run T ticks along every sample path, see `theory.iterate` and `theory.delays`.

        Raises ValueError as those do.
        """
        if self.schedule is not None and not self.momentum:
            return iterate(self.schedule, problem, paths, step_sizes)
        delays = self.delays if self.delays is not None else self.fixed_delays
        return delayed(problem, delays, paths, step_sizes, momentum=self.momentum)

    def until(self, iterations: int) -> "Motion":
        """The first ticks of this motion; a stage that idles throughout has that delay."""
        if self.delays is None:
            return self
        first = np.minimum(self.delays[:iterations], iterations)
        return Motion(None, first, self.momentum)

    @cached_property
    def fixed_delays(self) -> tuple[int, ...]:
        """d_k: block k of grad f_{i(t-d_k)}(w^{t-d_k}) in every tick t >= d_k, idle before."""
        if self.schedule is not None:
            _require_plain(self.schedule)
            return snapshot_delays(self.schedule)
        if not self._constant:
            raise ValueError("the delays change with time")
        return self.longest

    @cached_property
    def once_delays(self) -> tuple[int, ...]:
        """The longest delays if every stage applies every sample once, at most D ticks late."""
        if self.schedule is not None or self._constant:
            return self.fixed_delays
        assert self.delays is not None
        ticks = np.arange(len(self.delays))[:, None]
        used = ticks - self.delays
        longest = int((self.delays * (used >= 0)).max())
        for stage, column in enumerate(used.T):
            samples, times = np.unique(column[column >= 0], return_counts=True)
            if (times > 1).any():
                raise ValueError(
                    f"stage {stage} applies sample {samples[times > 1][0]} more than once"
                )
            due = np.arange(len(used) - longest)
            if missing := sorted(set(due.tolist()) - set(samples.tolist())):
                raise ValueError(f"stage {stage} does not apply sample {missing[0]} in time")
        return self.longest

    @cached_property
    def replayed_delays(self) -> tuple[int, ...]:
        """d_k: stage k applies sample q at tick q + d_k; weights of ticks q..q+d_k go into it.

        The forward pass reads the weights with which tick q began; whatever the backward pass
        reads (those, newer ones, the newest) is no newer than the beginning of its own tick.
        """
        if self.schedule is None:
            return self.fixed_delays
        _require_plain(self.schedule)
        return snapshot_delays(self.schedule, replayed=True)

    @property
    def _constant(self) -> bool:
        assert self.delays is not None
        return bool((self.delays == self.delays[0]).all())


def motion(
    source: Schedule | npt.ArrayLike, iterations: int, momentum: float = 0.0, stages: int = 0
) -> Motion:
    """Return the motion of a schedule, or of delays of shape (K,) or (T, K).

    Args:
        source: schedule or delays, in ticks, each below ``iterations``: later ones never come.
        iterations: T.
        momentum: beta in [0, 1): every stage applies v <- beta v + gradient, w <- w - gamma v.
        stages: how many stages the delays must be for; 0 takes them as they are.

    Raises:
        ValueError: naming the argument and its value.

    >>> motion([2, 1, 0], iterations=5).fixed_delays
    (2, 1, 0)
    >>> motion([5, 1, 0], iterations=5)
    Traceback (most recent call last):
    ValueError: delays must be from 0 to iterations - 1 = 4, or they never end, got 5
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    if isinstance(source, Schedule):
        return Motion(source, None, momentum)
    given = np.asarray(source)
    wanted = stages or (given.shape[-1] if given.ndim else 1)
    if given.shape not in {(wanted,), (iterations, wanted)}:
        raise ValueError(
            f"delays must have shape ({wanted},) or ({iterations}, {wanted}), one per stage (and "
            f"tick), got {given.shape}"
        )
    if not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"delays must be whole ticks of 64 bits, got {given.dtype}")
    if wrong := [int(d) for d in given.flat if not 0 <= d < iterations]:
        raise ValueError(
            f"delays must be from 0 to iterations - 1 = {iterations - 1}, or they never end, got "
            f"{wrong[0]}"
        )
    table = np.broadcast_to(given.astype(np.int64), (iterations, wanted))
    return Motion(None, table, momentum)


def _require_plain(schedule: Schedule) -> None:
    rule = schedule.rule
    if rule.transforms:
        raise ValueError(f"gradients or weights are transformed: {rule.transforms[0]}")
    if rule.gradient is not Gradient.NEXT:
        raise ValueError(f"gradient={rule.gradient.value}: not a gradient of f")
    if rule.activations not in (Activations.GRAPH, Activations.INPUT):
        raise ValueError(f"activations={rule.activations.value}: not those of the sample")
