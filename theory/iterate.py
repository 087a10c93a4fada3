"""The NumPy executor: runs a schedule on an analytic problem, all sample paths at once.

It follows the operations and nothing else. Which weights an operation reads is what the operation
says, so stash, current and replay need no case of their own, and no method is written down twice.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ddg_sim.schedule import Op, OpKind, Schedule, steady_iterations
from theory.gradients import align, engine_for, spread
from theory.protocols import FloatArray, IntArray, Problem


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The weights of all stages at the start of every tick t = 0..T, along P sample paths.

    ``distinct[t]`` has one row per group of neighbouring paths that agree on all samples used so
    far; its length R_t divides P, and every row stands for P / R_t paths.
    """

    distinct: tuple[FloatArray, ...]
    num_paths: int

    def at(self, tick: int) -> FloatArray:
        """Return the weights at the start of ``tick``, shape (P, dim)."""
        return spread(self.distinct[tick], self.num_paths)

    @cached_property
    def w(self) -> FloatArray:
        """The weights at the start of every tick, shape (T + 1, P, dim)."""
        return np.stack([self.at(tick) for tick in range(len(self.distinct))])


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
        The trajectory, ``w`` of shape (T + 1, P, dim). What neighbouring paths share (a common
        beginning) is computed once, so enumerating all n^T paths in lexicographic order costs
        about n^T steps, not T n^T.

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
    gammas = require_steps(step_sizes)
    samples = _validate(schedule, problem, np.asarray(paths), gammas)
    engine = engine_for(problem, samples)
    weights = [_Stage([problem.start[None, block]]) for block in problem.blocks]
    done: set[tuple[OpKind, int, int]] = set()
    programs = [
        schedule.program(worker, len(gammas), drain=False)
        for worker in range(len(schedule.workers))
    ]
    for op in _data_driven(programs, done, weights):
        stage = weights[op.stage]
        if op.kind is OpKind.UPDATE:
            stage.apply(gammas[op.iteration], op)
        elif op.kind is OpKind.BACKWARD:
            stage.pending[op.sample] = engine.backward(op, stage.versions[op.version])
        else:
            engine.forward(op, stage.versions[op.version])
        done.add((op.kind, op.stage, op.sample))
    ticks = range(len(gammas) + 1)
    return Trajectory(
        tuple(np.concatenate(align(*(k.at(tick) for k in weights)), axis=1) for tick in ticks),
        num_paths=len(samples),
    )


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
    pending: dict[int, FloatArray] = field(default_factory=dict)  # by sample

    def apply(self, gamma: float, update: Op) -> None:
        """Apply the mean gradient of all samples up to the update's."""
        samples = [sample for sample in sorted(self.pending) if sample <= update.sample]
        newest, *gradients = align(self.versions[-1], *map(self.pending.pop, samples))
        self.versions.append(newest - gamma * (sum(gradients) / len(gradients)))
        self.ticks.append(update.iteration)

    def at(self, tick: int) -> FloatArray:
        return self.versions[bisect_left(self.ticks, tick)]


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
        return op.sample in stage.pending and op.version == len(stage.versions)
    if op.version >= len(stage.versions):
        return False
    if op.kind is OpKind.FORWARD:
        return op.stage == 0 or (op.kind, op.stage - 1, op.sample) in done
    if (OpKind.FORWARD, op.stage, op.sample) not in done:
        return False
    last = op.stage + 1 == len(weights)
    return op.kind is OpKind.RECOMPUTE or last or (op.kind, op.stage + 1, op.sample) in done


_UNDERSTOOD = {OpKind.FORWARD, OpKind.RECOMPUTE, OpKind.BACKWARD, OpKind.UPDATE}


def _validate(
    schedule: Schedule, problem: Problem, paths: npt.NDArray[np.integer], gammas: FloatArray
) -> IntArray:
    if schedule.num_stages != len(problem.blocks):
        raise ValueError(
            f"schedule has {schedule.num_stages} stages, problem {problem.name!r} has "
            f"{len(problem.blocks)} blocks"
        )
    if part := schedule.rule.unusual():
        # Better no answer than one that leaves out a gradient transform.
        raise ValueError(f"schedule {schedule.method!r}: the NumPy executor does not know {part}")
    for template in schedule.templates():
        if template.kind not in _UNDERSTOOD:
            raise ValueError(f"schedule: {template} has no meaning for the NumPy executor")
    return require_paths(problem, paths, len(gammas) * schedule.samples_per_iteration)


def require_steps(step_sizes: npt.ArrayLike) -> FloatArray:
    """Return the step sizes (T,) as an array.

    Raises ValueError unless they are a vector of positive finite numbers.

    >>> require_steps([0.5, 0.25])
    array([0.5 , 0.25])
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    if gammas.ndim != 1 or not gammas.size or not np.all(np.isfinite(gammas) & (gammas > 0)):
        raise ValueError(f"step_sizes must be a vector of positive finite numbers, got {gammas}")
    return gammas


def require_paths(problem: Problem, paths: npt.NDArray[np.integer], length: int) -> IntArray:
    """Return sample paths (P, length) as 64-bit integers.

    Raises ValueError unless they hold samples of the problem and have that length.

    >>> from theory.problems import make
    >>> require_paths(make("kuramoto", 2), np.array([[0, 1]], dtype=np.int8), 2)
    array([[0, 1]])
    """
    if paths.ndim != 2 or paths.shape[1] != length or not paths.size:
        raise ValueError(f"paths must have shape (P >= 1, {length}), got {paths.shape}")
    if not np.issubdtype(paths.dtype, np.integer):
        raise ValueError(f"paths must hold integers, got {paths.dtype}")
    if not 0 <= paths.min() <= paths.max() < problem.num_samples:
        raise ValueError(
            f"paths must hold sample indices in [0, {problem.num_samples}), got "
            f"{paths.min()}..{paths.max()}"
        )
    return paths.astype(np.int64)
