"""Delayed gradients with any delays: fixed, changing with time, or drawn for every path.

    w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t - d_k(t))}(w^{t - d_k(t)}),  nothing while t < d_k(t).

Every delay refers to a gradient of the past, and every sample has one: it is computed once, whole,
at the tick whose weights it is taken at, and kept in a ring as long as a delay may ask for it.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from theory.iterate import Trajectory, require_paths, require_steps
from theory.protocols import FloatArray, IntArray, Problem

#: Given (T, K, P), returns the delays of stage k in tick t on path p, of that shape.
DelayLaw: TypeAlias = Callable[[tuple[int, int, int]], npt.NDArray[np.integer]]

#: What a tick does: (t, gamma_t, gradients (dim, P), w^t, where w^{t+1} goes).
Step: TypeAlias = Callable[[int, float, FloatArray, FloatArray, FloatArray], None]

#: Paths are taken in groups: long enough that NumPy's fixed time per operation (0.5 us) counts
#: little, short enough that operands (64 KiB a weight) are still in a core's cache when next used.
GROUP = 8192


def delayed(
    problem: Problem,
    delays: npt.ArrayLike | DelayLaw,
    paths: npt.NDArray[np.integer],
    step_sizes: npt.ArrayLike,
    momentum: float = 0.0,
) -> Trajectory:
    """Run T ticks of delayed gradients on ``problem`` along P sample paths.

    Args:
        problem: K blocks.
        delays: in ticks, at least 0 and at most T: d_k, shape (K,); or d_k(t), shape (T, K); or
            of every path, shape (T, K, P); or a law that returns the latter, such as
            `uniform_delays`. A gradient may be used several times, or never.
        paths: (P, T) sample indices in [0, num_samples).
        step_sizes: (T,) positive; entry t applies to the updates made in tick t.
        momentum: beta in [0, 1); every tick v <- beta v + gradient (if any has come),
            w <- w - gamma_t v.

    Returns:
        The trajectory, ``w`` of shape (T + 1, P, dim).

    Raises:
        ValueError: naming the argument and what is wrong with it.

    >>> from theory.problems import one_sided_cosine
    >>> run = delayed(one_sided_cosine(), [1, 0], np.zeros((1, 3), dtype=int), [0.1, 0.1, 0.1])
    >>> [round(float(w_1), 6) for w_1 in run.w[:, 0, 0]]  # idle in the first tick
    [1.570796, 1.570796, 1.470796, 1.370796]
    """
    gammas = require_steps(step_sizes)
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    samples = require_paths(problem, np.asarray(paths), len(gammas))
    shape = len(gammas), len(problem.blocks), len(samples)
    lags = _require_delays(delays, shape)
    # One array (T + 1, dim, P) and not P rows: a weight's numbers for all paths lie together.
    weights = np.empty((len(gammas) + 1, len(problem.start), len(samples)))
    weights[0] = problem.start[:, None]
    for first in range(0, len(samples), GROUP):
        part = slice(first, first + GROUP)
        mine = lags[:, :, part] if lags.ndim == 3 else lags
        _run(problem, mine, samples[part], gammas, momentum, weights[:, :, part])
    return Trajectory(tuple(w.T for w in weights), num_paths=len(samples))


def uniform_delays(longest: int, seed: int) -> DelayLaw:
    """Return a law of independent delays, uniform on 0..``longest`` (runs must be as long).

    Raises ValueError if ``longest`` is negative.

    >>> uniform_delays(2, seed=0)((1, 2, 4))
    array([[[2, 1, 1, 0],
            [0, 0, 0, 0]]])
    """
    if longest < 0:
        raise ValueError(f"longest must be at least 0, got {longest}")
    return lambda shape: np.random.default_rng(seed).integers(0, longest + 1, shape)


def _run(
    problem: Problem,
    delays: IntArray,
    paths: IntArray,
    gammas: FloatArray,
    beta: float,
    weights: FloatArray,
) -> None:
    """Write w^1, ..., w^T into ``weights``, (T + 1, dim, P), which begins with w^0."""
    draws = np.ascontiguousarray(paths.T)
    if delays.ndim == 2:
        step = _common_delays(delays, problem.blocks)
    else:
        step = _own_delays(delays, problem.blocks)
    velocity = np.zeros_like(weights[0]) if beta else None
    for t, gamma in enumerate(gammas):
        w, new = weights[t], weights[t + 1]
        step(t, gamma, problem.gradients(w.T, draws[t]).T, w, new)
        if velocity is not None:
            new -= gamma * beta * velocity
            velocity = (w - new) / gamma


def _common_delays(delays: IntArray, blocks: tuple[slice, ...]) -> Step:
    """Return what a tick does where all paths have the same delays, (T, K)."""
    past: deque[FloatArray] = deque(maxlen=int(delays.max()) + 1)
    runs = [_runs(row, blocks) for row in delays]

    def step(t: int, gamma: float, gradient: FloatArray, w: FloatArray, new: FloatArray) -> None:
        past.append(gradient)
        for delay, block in runs[t]:
            if delay <= t:
                # Straight into the trajectory: it is the only copy of the weights.
                np.multiply(past[-1 - delay][block], gamma, out=new[block])
                np.subtract(w[block], new[block], out=new[block])
            else:
                new[block] = w[block]

    return step


def _own_delays(delays: IntArray, blocks: tuple[slice, ...]) -> Step:
    """Return what a tick does where every path has delays of its own, (T, K, P)."""
    ticks, _, count = delays.shape
    # A power of two: slots are found without a division.
    size = 1 << min(int(delays.max()), ticks - 1).bit_length()
    # A weight's past numbers lie together: one index finds them in the block's every weight.
    ring = np.zeros((blocks[-1].stop, size, count))
    flat = ring.reshape(len(ring), -1)
    lane, place = np.arange(count), np.empty(count, dtype=np.int64)

    def step(t: int, gamma: float, gradient: FloatArray, w: FloatArray, new: FloatArray) -> None:
        ring[:, t & (size - 1)] = gradient
        for k, block in enumerate(blocks):
            np.subtract(t, delays[t, k], out=place)
            idle = place < 0 if t < size else None
            np.bitwise_and(place, size - 1, out=place)
            np.multiply(place, count, out=place)
            np.add(place, lane, out=place)
            for j in range(block.start, block.stop):
                part = new[j]
                # The mode is for speed: checked indices would be gathered in a copy.
                flat[j].take(place, out=part, mode="clip")
                part *= gamma
                if idle is not None:
                    part[idle] = 0.0
                np.subtract(w[j], part, out=part)

    return step


def _runs(delays: IntArray, blocks: tuple[slice, ...]) -> list[tuple[int, slice]]:
    """Return (delay, weights) with neighbouring stages of the same delay taken together."""
    found: list[tuple[int, slice]] = []
    for delay, block in zip(delays.tolist(), blocks, strict=True):
        if found and found[-1][0] == delay:
            block = slice(found.pop()[1].start, block.stop)
        found.append((delay, block))
    return found


def _require_delays(delays: npt.ArrayLike | DelayLaw, shape: tuple[int, int, int]) -> IntArray:
    """Return the delays as integers, (T, K) or (T, K, P)."""
    found = np.asarray(delays(shape) if callable(delays) else delays)
    ticks, stages, _ = shape
    if found.shape not in {(stages,), (ticks, stages), shape}:
        raise ValueError(
            f"delays must have shape ({stages},), {(ticks, stages)} or {shape}, got {found.shape}"
        )
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"delays must be whole ticks of 64 bits, got {found.dtype}")
    if found.min() < 0:
        raise ValueError(f"delays must be at least 0, got {found.min()}")
    if found.max() > ticks:
        raise ValueError(f"delays must be at most the {ticks} ticks of the run, got {found.max()}")
    result: IntArray = np.broadcast_to(found, (ticks, stages)) if found.ndim == 1 else found
    return result
