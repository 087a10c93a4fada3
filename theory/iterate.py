"""The NumPy executor: runs a schedule on an analytic problem, all sample paths at once.

It follows the operations and nothing else. Which weights an operation reads is what the operation
says, so stash, current and replay need no case of their own, and no method is written down twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from ddg_sim.schedule import Op, OpKind, Schedule, steady_iterations
from theory.protocols import FloatArray, IntArray, LayeredProblem, Problem


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The weights of all stages: ``w[t]`` (P, dim) at the start of tick t, t = 0..T."""

    w: FloatArray


def iterate(
    schedule: Schedule,
    problem: Problem,
    paths: npt.NDArray[np.integer],
    step_sizes: npt.ArrayLike,
) -> Trajectory:
    """Run T ticks of ``schedule`` on ``problem`` along every sample path, without a drain.

    Args:
        schedule: the training method; as many stages as the problem has blocks.
        problem: a `LayeredProblem` is propagated stage by stage, forward and backward, each at
            the weights its operation reads. Any other problem has no activations to go stale:
            block k is updated with block k of grad f_i at the weights that the sample's forward
            passes read, so the schedule must differentiate at those weights.
        paths: (P, T * samples_per_iteration) sample indices in [0, num_samples); column s is
            sample s of the schedule.
        step_sizes: (T,) positive; entry t applies to the updates made in tick t. Several
            backward passes before one update are averaged.

    Returns:
        The trajectory, ``w`` of shape (T + 1, P, dim).

    Raises:
        ValueError: if shapes or values disagree (the message names the argument), if the schedule
            uses operations that this executor has no meaning for, if it differentiates at other
            weights than its forward pass on a problem without stages, or if it deadlocks.

    >>> import numpy as np
    >>> from ddg_sim.methods import ddg
    >>> from theory.problems import one_sided_cosine
    >>> run = iterate(ddg(2), one_sided_cosine(), np.zeros((1, 3), dtype=int), [0.1, 0.1, 0.1])
    >>> [round(float(w_1), 6) for w_1 in run.w[:, 0, 0]]  # idle in the first tick
    [1.570796, 1.570796, 1.470796, 1.370796]
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    samples = np.asarray(paths).astype(np.int64)
    _validate(schedule, problem, samples, gammas)
    engine: _Engine = (
        _Propagation(problem, samples) if is_layered(problem) else _Snapshots(problem, samples)
    )
    weights = [
        _Stage([np.broadcast_to(problem.start[block], (len(samples), block.stop - block.start))])
        for block in problem.blocks
    ]
    done: set[tuple[OpKind, int, int]] = set()
    programs = [
        schedule.program(worker, len(gammas), drain=False)
        for worker in range(len(schedule.workers))
    ]
    for op in _data_driven(programs, done, weights):
        stage = weights[op.stage]
        if op.kind is OpKind.UPDATE:
            stage.apply(gammas[op.iteration], op.iteration)
        elif op.kind is OpKind.BACKWARD:
            stage.pending.append(engine.backward(op, stage.versions[op.version]))
        else:
            engine.forward(op, stage.versions[op.version])
        done.add((op.kind, op.stage, op.sample))
    w = np.empty((len(gammas) + 1, len(samples), len(problem.start)))
    for block, stage in zip(problem.blocks, weights, strict=True):
        for tick in range(len(gammas) + 1):
            w[tick, :, block] = stage.versions[stage.newest_at(tick)]
    return Trajectory(w)


def is_layered(problem: Problem) -> TypeGuard[LayeredProblem]:
    """Whether the problem has real stages to propagate through.

    >>> from theory.problems import make
    >>> is_layered(make("kuramoto", 2)), is_layered(make("rotation-chain", 2))
    (False, True)
    """
    return all(hasattr(problem, part) for part in ("inputs", "forward", "backward"))


def snapshot_delays(schedule: Schedule) -> tuple[int, ...]:
    """Return the fixed delays d_k of a schedule of the form that the theorems are about.

    w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t-d_k)}(w^{t-d_k}): one sample per tick, all stages'
    weights of the tick t - d_k in one gradient, nothing applied while t < d_k.

    Raises ValueError, saying what deviates, if the schedule does not have this form.

    >>> from ddg_sim.methods import ddg
    >>> snapshot_delays(ddg(4))
    (3, 2, 1, 0)
    """
    if schedule.samples_per_iteration != 1:
        raise ValueError(f"{schedule.samples_per_iteration} samples per update, not one")
    found: list[set[int]] = [set() for _ in range(schedule.num_stages)]
    for worker in range(len(schedule.workers)):
        newest_at: dict[tuple[int, int], int] = {}  # (stage, tick) -> version at the tick's start
        newest = [0] * schedule.num_stages
        tick = -1
        for op in schedule.program(worker, 2 * steady_iterations(schedule), drain=False):
            while tick < op.iteration:
                tick += 1
                newest_at.update(((stage, tick), version) for stage, version in enumerate(newest))
            if op.kind is OpKind.UPDATE:
                newest[op.stage] = op.version
                found[op.stage].add(op.iteration - op.sample)
            elif op.version != newest_at.get((op.stage, op.sample)):
                raise ValueError(
                    f"{op} does not read the weights with which tick {op.sample} started"
                )
    for stage, delays in enumerate(found):
        if len(delays) != 1:
            raise ValueError(f"stage {stage} has no fixed delay: {sorted(delays)}")
    return tuple(delays.pop() for delays in found)


@dataclass(eq=False)
class _Stage:
    """One stage's weights, version by version, and the gradients that wait for its update."""

    versions: list[FloatArray]
    ticks: list[int] = field(default_factory=list)  # in which version 1, 2, … was produced
    pending: list[FloatArray] = field(default_factory=list)

    def apply(self, gamma: float, tick: int) -> None:
        gradient = self.pending[0] if len(self.pending) == 1 else np.mean(self.pending, axis=0)
        self.versions.append(self.versions[-1] - gamma * gradient)
        self.ticks.append(tick)
        self.pending.clear()

    def newest_at(self, tick: int) -> int:
        return sum(produced < tick for produced in self.ticks)


class _Engine(Protocol):
    """How gradients come about; ``w_k`` is the version that the operation reads."""

    def forward(self, op: Op, w_k: FloatArray) -> None: ...

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray: ...


@dataclass(eq=False)
class _Snapshots:
    """Gradients of a problem without stages: whole, at the concatenation of what F read."""

    problem: Problem
    samples: IntArray
    read: dict[tuple[int, int], tuple[int, FloatArray]] = field(default_factory=dict)
    gradients: dict[int, FloatArray] = field(default_factory=dict)

    def forward(self, op: Op, w_k: FloatArray) -> None:
        if op.kind is OpKind.RECOMPUTE:
            self._require_stashed(op)
        else:
            self.read[op.stage, op.sample] = op.version, w_k

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray:
        self._require_stashed(op)
        if op.sample not in self.gradients:
            # The last stage comes first: now every stage has read its weights for this sample.
            blocks = [self.read[k, op.sample][1] for k in range(len(self.problem.blocks))]
            self.gradients[op.sample] = self.problem.gradients(
                np.concatenate(blocks, axis=1), self.samples[:, op.sample]
            )
        del self.read[op.stage, op.sample]
        whole = self.gradients[op.sample] if op.stage else self.gradients.pop(op.sample)
        return whole[:, self.problem.blocks[op.stage]]

    def _require_stashed(self, op: Op) -> None:
        if op.version != self.read[op.stage, op.sample][0]:
            raise ValueError(
                f"schedule: {op} reads other weights than F{op.stage}({op.sample}) did, and "
                f"problem {self.problem.name!r} has no stages that could tell the two apart; "
                "take rotation-chain, or stashed weights"
            )


@dataclass(eq=False)
class _Propagation:
    """Gradients of a layered problem: h and delta go from stage to stage, as on devices."""

    problem: LayeredProblem
    samples: IntArray
    kept: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    sent: dict[tuple[OpKind, int, int], FloatArray] = field(default_factory=dict)

    def forward(self, op: Op, w_k: FloatArray) -> None:
        if op.kind is OpKind.RECOMPUTE:
            h_in = self.kept[op.stage, op.sample][0]
        elif op.stage == 0:
            h_in = self.problem.inputs(self.samples[:, op.sample])
        else:
            h_in = self.sent.pop((OpKind.FORWARD, op.stage - 1, op.sample))
        h_out = self.problem.forward(op.stage, w_k, h_in)
        self.kept[op.stage, op.sample] = h_in, h_out
        # A replayed output stays where it is: the next stage has long had the first one.
        if op.kind is OpKind.FORWARD and op.stage + 1 < len(self.problem.blocks):
            self.sent[op.kind, op.stage, op.sample] = h_out

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray:
        h_in, h_out = self.kept.pop((op.stage, op.sample))
        if op.stage + 1 == len(self.problem.blocks):
            delta = self.problem.loss_gradient(h_out, self.samples[:, op.sample])
        else:
            delta = self.sent.pop((OpKind.BACKWARD, op.stage + 1, op.sample))
        gradient, delta = self.problem.backward(op.stage, w_k, h_in, h_out, delta)
        if op.stage:
            self.sent[OpKind.BACKWARD, op.stage, op.sample] = delta
        return gradient


def _data_driven(
    programs: list[Iterator[Op]], done: set[tuple[OpKind, int, int]], weights: list[_Stage]
) -> Iterator[Op]:
    """Yield the workers' operations in an order in which each finds its inputs."""
    heads = [next(program, None) for program in programs]
    while any(heads):
        progress = False
        for worker, program in enumerate(programs):
            while (op := heads[worker]) is not None and _ready(op, done, weights):
                yield op
                heads[worker] = next(program, None)
                progress = True
        if not progress:
            waiting = ", ".join(str(op) for op in heads if op is not None)
            raise ValueError(f"schedule deadlocks: {waiting} wait for each other")


def _ready(op: Op, done: set[tuple[OpKind, int, int]], weights: list[_Stage]) -> bool:
    stage = weights[op.stage]
    if op.kind is OpKind.UPDATE:
        return bool(stage.pending) and op.version == len(stage.versions)
    if op.version >= len(stage.versions):
        return False
    if op.kind is OpKind.FORWARD:
        return op.stage == 0 or (op.kind, op.stage - 1, op.sample) in done
    if (OpKind.FORWARD, op.stage, op.sample) not in done:
        return False
    last = op.stage + 1 == len(weights)
    return op.kind is OpKind.RECOMPUTE or last or (op.kind, op.stage + 1, op.sample) in done


_UNDERSTOOD = {OpKind.FORWARD, OpKind.RECOMPUTE, OpKind.BACKWARD, OpKind.UPDATE}


def _validate(schedule: Schedule, problem: Problem, samples: IntArray, gammas: FloatArray) -> None:
    if schedule.num_stages != len(problem.blocks):
        raise ValueError(
            f"schedule has {schedule.num_stages} stages, problem {problem.name!r} has "
            f"{len(problem.blocks)} blocks"
        )
    for template in schedule.templates():
        if template.kind not in _UNDERSTOOD:
            raise ValueError(f"schedule: {template} has no meaning for the NumPy executor")
    if gammas.ndim != 1 or not np.all(np.isfinite(gammas) & (gammas > 0)):
        raise ValueError(f"step_sizes must be a vector of positive finite numbers, got {gammas}")
    columns = len(gammas) * schedule.samples_per_iteration
    if samples.ndim != 2 or samples.shape[1] != columns:
        raise ValueError(f"paths must have shape (P, {columns}), got {samples.shape}")
    if samples.size and not 0 <= samples.min() <= samples.max() < problem.num_samples:
        raise ValueError(
            f"paths must hold sample indices in [0, {problem.num_samples}), got "
            f"{samples.min()}..{samples.max()}"
        )
