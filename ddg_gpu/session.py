"""A training run that can be advanced, flushed, saved and resumed; on one process or on many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ddg_gpu.execute import ENDLESS, NOTHING, Before, Execution, Record, Samples, Transport, Watch
from ddg_gpu.stage import Stage
from ddg_sim.schedule import Schedule


class Session:
    """Workers of a schedule in this process, and how far they have come.

    Args:
        schedule: what to run.
        workers: which of its workers are run here.
        stages: their stages, by index.
        samples: the data.
        connect: makes the transport to the other workers.
        watch: called after every operation.
    """

    def __init__(
        self,
        schedule: Schedule,
        workers: Sequence[int],
        stages: Mapping[int, Stage],
        samples: Samples,
        connect: Callable[[], Transport],
        watch: Watch = lambda op, seconds: None,
    ) -> None:
        self.schedule = schedule
        self._workers = workers
        self._stages = stages
        self._samples = samples
        self._connect = connect
        self._watch = watch
        self._execution = self._begin(NOTHING, ENDLESS)
        self._flushed = False

    @property
    def iteration(self) -> int:
        """Iterations that were fed, from the very first on."""
        return self._execution.before.updates + self._execution.fed

    @property
    def fed(self) -> int:
        """Samples that were fed, from the very first on."""
        execution = self._execution
        return execution.before.samples + execution.fed * self.schedule.samples_per_iteration

    @property
    def length(self) -> int:
        """Iterations that were fed since the last flush but for the one that was just done."""
        return self._execution.fed

    @property
    def records(self) -> Mapping[int, Record]:
        """Per worker, what it did since the last flush but for the one that was just done."""
        return self._execution.records

    def begin(self, iterations: int) -> None:
        """Say how many iterations will be fed before the next flush; at the start or after one."""
        before = Before(self.fed, self.iteration) if self._flushed else self._execution.before
        self._execution, self._flushed = self._begin(before, iterations), False

    def advance(self, iterations: int) -> None:
        """Go on until so many iterations were fed, from the very first on.

        Raises:
            ScheduleError: if no worker can go on.
            PeerLostError: if a worker elsewhere is gone, or does not answer in time.
        """
        if self._flushed:
            self.begin(ENDLESS)
        self._execution.advance(iterations - self._execution.before.updates)

    def flush(self) -> None:
        """Use up all samples in flight; what is fed later begins like a new run.

        Raises:
            ScheduleError: if no worker can go on.
            PeerLostError: if a worker elsewhere is gone, or does not answer in time.
        """
        if not self._flushed:
            self._execution.drain()
            self._flushed = True

    def _begin(self, before: Before, iterations: int) -> Execution:
        return Execution(
            self.schedule,
            self._workers,
            self._stages,
            self._samples,
            self._connect(),
            iterations,
            before,
            watch=self._watch,
        )
