"""The NumPy executor: runs a schedule on an analytic problem, all sample paths at once.

It follows the operations and the rule's data and nothing else: every method of the catalogue runs
here, and none is written down twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ddg_sim.rule import Gradient
from ddg_sim.schedule import Op, OpKind, Schedule, steady_iterations
from theory.gradients import engine_for
from theory.protocols import FloatArray, IntArray, Problem
from theory.rows import align, columns, spread
from theory.weights import StageWeights, Version, require_meaning, tied_stages

#: Paths that share no beginning are taken in groups, as in `theory.delays`: what an operation makes
#: is still in a core's cache when used, and its memory is used again. Fewer, and Python counts.
GROUP = 8192


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
    *,
    momentum: float = 0.0,
) -> Trajectory:
    """Run T ticks of ``schedule`` on ``problem`` along every sample path, without a drain.

    Args:
        schedule: the training method; as many stages as the problem has blocks.
        problem: a `LayeredProblem` is propagated stage by stage, forward and backward, each at
            the weights its operation reads. Any other problem has no activations to go stale:
            block k is updated with block k of grad f_i at the weights that the sample's forward
            passes read, so the schedule must differentiate at those weights.
        paths: (P, T * samples_per_iteration * replicas) sample indices in [0, num_samples);
            column s R + r is the schedule's sample s on replica r of R.
        step_sizes: (T,) positive; entry t applies to the updates made in tick t. Several
            backward passes before one update are averaged.
        momentum: m in [0, 1) of v <- m v + g, w <- w - gamma v. Predictions extrapolate along v,
            so with m = 0 along the last gradient. An update that is skipped leaves v as it is.

    Tied stages start from the weights of the first of the two, and each has a v of its own. A
    local loss is the problem's own loss at the stage's output.

    Returns:
        The trajectory, ``w`` of shape (T + 1, P, dim). What neighbouring paths share (a common
        beginning) is computed once, so enumerating all n^T paths in lexicographic order costs
        about n^T steps, not T n^T. Many paths that share none have a row each from w^0 on.

    Raises:
        ValueError: if shapes or values disagree (the message names the argument), if it needs
            stages or inverses of stages that the problem does not have, if parts of its rule
            contradict one another, or if it deadlocks.

    >>> import numpy as np
    >>> from ddg_sim.methods import ddg
    >>> from theory.problems import one_sided_cosine
    >>> run = iterate(ddg(2), one_sided_cosine(), np.zeros((1, 3), dtype=int), [0.1, 0.1, 0.1])
    >>> [round(float(w_1), 6) for w_1 in run.w[:, 0, 0]]  # idle in the first tick
    [1.570796, 1.570796, 1.470796, 1.370796]
    """
    gammas = require_steps(step_sizes)
    samples = _validate(schedule, problem, np.asarray(paths), gammas)
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if len(samples) <= GROUP or len(columns(samples[:, :1])[0]) < len(samples):
        stages = _run(schedule, problem, samples, gammas, momentum)
        ticks = range(len(gammas) + 1)
        return Trajectory(
            tuple(np.concatenate(align(*(k.at(tick) for k in stages)), axis=1) for tick in ticks),
            num_paths=len(samples),
        )
    weights = np.empty((len(gammas) + 1, len(problem.start), len(samples)))
    for first in range(0, len(samples), GROUP):
        part = slice(first, first + GROUP)
        stages = _run(schedule, problem, samples[part], gammas, momentum)
        for tick, w in enumerate(weights):
            for stage, block in zip(stages, problem.blocks, strict=True):
                w[block, part] = spread(stage.at(tick), len(samples[part])).T
    return Trajectory(tuple(w.T for w in weights), num_paths=len(samples))


def snapshot_delays(schedule: Schedule, *, replayed: bool = False) -> tuple[int, ...]:
    """Return the fixed delays d_k of a schedule of the form that the theorems are about.

    w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t-d_k)}(w^{t-d_k}): one sample per tick, all stages'
    weights of the tick t - d_k in one gradient, nothing applied while t < d_k. ``replayed``: only
    forward passes must read those; all others may read newer ones, up to those with which their
    own tick started.

    Raises ValueError, saying what deviates, if the schedule does not have this form.

    >>> from ddg_sim.methods import ddg
    >>> snapshot_delays(ddg(4))
    (3, 2, 1, 0)
    """
    if (samples := schedule.samples_per_iteration * schedule.replicas) != 1:
        raise ValueError(f"{samples} samples per update, not one")
    found: list[set[int]] = [set() for _ in range(schedule.num_stages)]
    for worker in range(len(schedule.workers)):
        newest_at: dict[tuple[int, int], int] = {}  # (stage, tick) -> version at the tick's start
        newest = dict.fromkeys((template.stage for template in schedule.workers[worker]), 0)
        tick = -1
        for op in schedule.program(worker, 2 * steady_iterations(schedule), drain=False):
            while tick < op.iteration:
                tick += 1
                newest_at.update(((stage, tick), version) for stage, version in newest.items())
            if op.kind is OpKind.UPDATE:
                newest[op.stage] = op.version
                found[op.stage].add(op.iteration - op.sample)
                continue
            first = last = newest_at.get((op.stage, op.sample))
            if replayed and op.kind is not OpKind.FORWARD:
                last = newest_at[op.stage, op.iteration]
            if first is None or last is None or not first <= op.version <= last:
                until = "" if last == first else f" to {op.iteration}"
                raise ValueError(
                    f"{op} does not read the weights with which tick {op.sample}{until} started"
                )
    for stage, delays in enumerate(found):
        if len(delays) != 1:
            raise ValueError(f"stage {stage} has no fixed delay: {sorted(delays)}")
    return tuple(delays.pop() for delays in found)


def _run(
    schedule: Schedule, problem: Problem, samples: IntArray, gammas: FloatArray, momentum: float
) -> list[StageWeights]:
    """Run the schedule's operations; return the stages with the history of their weights."""
    draws, rule, tied = columns(samples), schedule.rule, tied_stages(schedule)
    engines = [
        engine_for(problem, rule, draws[r :: schedule.replicas]) for r in range(schedule.replicas)
    ]
    stages = [
        StageWeights(k, rule, gammas, momentum, [Version(start)])
        for k, start in enumerate(_starts(problem, tied))
    ]
    done: set[tuple[OpKind, int, int]] = set()
    for op in _data_driven(schedule, len(gammas), done, stages):
        stage = stages[op.stage]
        if op.kind is OpKind.UPDATE:
            made = stage.apply(op)
            if tied and op.stage in tied:
                stages[sum(tied) - op.stage].share(made, op.iteration)
        elif op.kind is OpKind.ALL_REDUCE:
            stage.reduce(op)
        else:
            w_k = stage.read(op)
            for engine in engines:
                if op.kind in (OpKind.FORWARD, OpKind.RECOMPUTE):
                    engine.forward(op, w_k)
                elif (gradient := engine.backward(op, w_k)) is not None:
                    stage.pending.setdefault(op.sample, []).append(gradient)
        done.add((op.kind, op.stage, op.sample))
    return stages


def _starts(problem: Problem, tied: tuple[int, int] | None) -> list[FloatArray]:
    """Return every stage's first weights, shape (1, block); tied stages share the first one's."""
    starts = [problem.start[None, block] for block in problem.blocks]
    if tied is not None:
        sizes = [starts[k].shape[1] for k in tied]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"schedule: tied stages {tied} need blocks of one size, problem has {sizes[0]} "
                f"and {sizes[1]} weights there"
            )
        starts[tied[1]] = starts[tied[0]]
    return starts


def _data_driven(
    schedule: Schedule,
    iterations: int,
    done: set[tuple[OpKind, int, int]],
    stages: list[StageWeights],
) -> Iterator[Op]:
    """Yield the workers' operations in an order in which each finds its inputs."""
    workers = range(len(schedule.workers))
    programs = [schedule.program(worker, iterations, drain=False) for worker in workers]
    heads = [next(program, None) for program in programs]
    local = schedule.rule.gradient is Gradient.LOCAL
    while any(heads):
        progress = False
        for worker, program in enumerate(programs):
            while (op := heads[worker]) is not None and _ready(op, done, stages, local):
                yield op
                heads[worker] = next(program, None)
                progress = True
        if not progress:
            waiting = ", ".join(str(op) for op in heads if op is not None)
            raise ValueError(f"schedule deadlocks: {waiting} wait for each other")


def _ready(
    op: Op, done: set[tuple[OpKind, int, int]], stages: list[StageWeights], local: bool
) -> bool:
    def after(stage: int, *kinds: OpKind) -> bool:
        return any((kind, stage, op.sample) in done for kind in kinds)

    versions = len(stages[op.stage].versions)
    if op.kind in (OpKind.UPDATE, OpKind.ALL_REDUCE):
        # A stage's gradients are computed by the worker that applies them: program order will do.
        return op.sample in stages[op.stage].pending and op.version <= versions
    if op.version >= versions:
        return False
    if op.kind is OpKind.FORWARD:
        return op.stage == 0 or after(op.stage - 1, OpKind.FORWARD)
    if op.kind is OpKind.RECOMPUTE:
        return after(op.stage, OpKind.FORWARD)
    if op.kind is OpKind.BACKWARD_WEIGHT:
        return after(op.stage, OpKind.BACKWARD_INPUT)
    if not after(op.stage, OpKind.FORWARD):
        return False
    last = op.stage + 1 == len(stages)
    return last or local or after(op.stage + 1, OpKind.BACKWARD, OpKind.BACKWARD_INPUT)


def _validate(
    schedule: Schedule, problem: Problem, paths: npt.NDArray[np.integer], gammas: FloatArray
) -> IntArray:
    if schedule.num_stages != len(problem.blocks):
        raise ValueError(
            f"schedule has {schedule.num_stages} stages, problem {problem.name!r} has "
            f"{len(problem.blocks)} blocks"
        )
    require_meaning(schedule)
    samples = schedule.samples_per_iteration * schedule.replicas
    return require_paths(problem, paths, len(gammas) * samples)


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

    Raises ValueError unless they hold samples of the problem and have that length, and where the
    problem's blocks do not share out its weights.

    >>> from theory.problems import make
    >>> require_paths(make("kuramoto", 2), np.array([[0, 1]], dtype=np.int8), 2)
    array([[0, 1]])
    """
    ends = [0, *(block.stop for block in problem.blocks)]
    slices = tuple(map(slice, ends, ends[1:]))
    if problem.blocks != slices or ends[-1] != len(problem.start):
        raise ValueError(
            f"problem {problem.name!r}: blocks must be slices that follow each other from weight 0 "
            f"to {len(problem.start)}, got {problem.blocks}"
        )
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
