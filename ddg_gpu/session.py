"""A training run that can be advanced, flushed, saved and resumed; on one process or on many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddg_gpu.execute import NOTHING, Before, Execution, Record, Samples, Transport, Watch
from ddg_gpu.stage import Stage
from ddg_gpu.state import StageState, Tree
from ddg_gpu.value import Value, members
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Message
from ddg_sim.schedule import Schedule


class Session:
    """Workers of a schedule in this process, and how far they have come.

    Args:
        schedule: what to run.
        workers: which of its workers are run here.
        stages: their stages, by index.
        samples: the data.
        connect: makes the transport to the other workers, given how many samples were fed before:
            from there the samples of its messages count.
        watch: called after every operation.
    """

    def __init__(
        self,
        schedule: Schedule,
        workers: Sequence[int],
        stages: Mapping[int, Stage],
        samples: Samples,
        connect: Callable[[int], Transport],
        watch: Watch = lambda op, seconds: None,
    ) -> None:
        self.schedule = schedule
        self._workers = workers
        self._stages = stages
        self._samples = samples
        self._connect = connect
        self._watch = watch
        self._execution = self._begin(NOTHING)
        self._flushed = False

    @property
    def iteration(self) -> int:
        """Iterations that were fed, from the very first on."""
        return self._execution.before.updates + self._execution.fed

    @property
    def fed(self) -> int:
        """Samples that were fed, to all replicas together, from the very first on."""
        execution = self._execution
        each = self.schedule.samples_per_iteration * self.schedule.replicas
        return execution.before.samples + execution.fed * each

    @property
    def length(self) -> int:
        """Iterations that were fed since the last flush but for the one that was just done."""
        return self._execution.fed

    @property
    def records(self) -> Mapping[int, Record]:
        """Per worker, what it did since the last flush but for the one that was just done."""
        return self._execution.records

    def advance(self, iterations: int) -> None:
        """Go on until so many iterations were fed, from the very first on.

        Raises:
            ScheduleError: if no worker can go on.
            PeerLostError: if a worker elsewhere is gone, or does not answer in time.
        """
        if self._flushed:
            self._execution = self._begin(Before(self.fed, self.iteration))
            self._flushed = False
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

    def state(self) -> dict[str, Tree]:
        """Everything that the stages of this process hold, and where the run is.

        Returns:
            ``position`` (the same in all processes), and for every stage k here ``stage k``, as
            plain nested data: see `ddg_gpu.state.flatten`. The tensors are the run's own: copy
            what is to be kept beyond the next step.

        Raises:
            PeerLostError: if another process is gone, or does not answer in time.
        """
        execution = self._execution
        messages = {} if self._flushed else execution.messages()
        found: dict[str, Tree] = {
            "position": {
                "samples": self.fed if self._flushed else execution.before.samples,
                "updates": self.iteration if self._flushed else execution.before.updates,
                "tick": 0 if self._flushed else execution.tick,
                "flushed": self._flushed,
            }
        }
        for index, stage in self._stages.items():
            own = stage.state()
            found[f"stage {index}"] = {
                "trained": own.trained,
                "flight": own.flight,
                "messages": [
                    [key.relation.value, key.source, key.target, key.sample, _plain(value)]
                    for key, value in messages.items()
                    if key.target == index
                ],
                "values": [
                    [relation.value, stage_index, sample, _plain(value)]
                    for (relation, stage_index, sample), value in execution.values.items()
                    if stage_index == index
                ],
            }
        return found

    def restore(self, state: Mapping[str, Tree]) -> None:
        """Go on from what `state` gave, of the same schedule.

        Whatever was in flight here before is forgotten.

        Args:
            state: of all stages of this process, and the position.
        """
        position = state["position"]
        before = Before(position["samples"], position["updates"])
        self._execution = self._begin(before, position["tick"])
        self._flushed = False
        messages, values = {}, {}
        for index, stage in self._stages.items():
            own = state[f"stage {index}"]
            stage.restore(StageState(own["trained"], own["flight"]))
            for relation, source, target, sample, value in own["messages"]:
                messages[Message(Relation(relation), source, target, sample)] = _value(value)
            for relation, stage_index, sample, value in own["values"]:
                values[Relation(relation), stage_index, sample] = _value(value)
        self._execution.restore(messages, values)

    def take_over(self, trained: Mapping[int, Tree], position: Mapping[str, Any]) -> None:
        """Go on from a flushed run of other stages or by another method; of a new session only.

        Args:
            trained: per stage here, what `state` gave of its parameters and buffers.
            position: of the other run.
        """
        before = Before(position["samples"], position["updates"])
        for index, stage in self._stages.items():
            stage.load(trained[index], before.samples, before.updates)
        self._execution = self._begin(before)

    def _begin(self, before: Before, start: int = 0) -> Execution:
        return Execution(
            self.schedule,
            self._workers,
            self._stages,
            self._samples,
            self._connect(before.samples),
            before=before,
            start=start,
            watch=self._watch,
        )


def _plain(value: Value) -> Tree:
    return {"tuple": isinstance(value, tuple), "tensors": list(members(value))}


def _value(plain: Any) -> Value:
    tensors = tuple(plain["tensors"])
    return tensors if plain["tuple"] else tensors[0]
