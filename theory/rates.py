"""Which learning rate a training method bears: what is stable, and what the theorems allow."""

import math
from dataclasses import dataclass

import numpy as np

from ddg_sim.rule import Activations, Gradient, Jacobian, TransformKind
from ddg_sim.schedule import Schedule, staleness_levels
from theory.iterate import snapshot_delays
from theory.stability import stable_limit

#: What a rule may do and leave the recursion on a quadratic as it is, or weaken its gradients.
_KEPT = (Activations.GRAPH, Activations.INPUT)


@dataclass(frozen=True)
class Allowed:
    """What one theorem says about the rate.

    ``largest`` is infinite where any rate is allowed. ``best`` minimises the theorem's bound on
    the mean of E||grad f||^2, and ``bound`` is that minimum; None where it needs constants that
    were not given.
    """

    statement: str
    largest: float
    best: float | None
    bound: float | None


@dataclass(frozen=True)
class Rates:
    """Learning rates for a schedule on an L-smooth loss.

    ``stable``: every smaller rate is stable on every quadratic with curvature in [0, L];
    ``attained``: on some such quadratic the rate ``stable`` is the first that is not.
    ``suggested``: 1/((2D + 1) L), which minimises the bound of Theorem D; with momentum the same
    share of the stable range, a rule of thumb.
    ``largest_delay`` is D, in updates. ``assumptions`` are sentences for the reader.
    """

    method: str
    largest_delay: int
    momentum: float
    stable: float
    attained: bool
    suggested: float
    allowed: tuple[Allowed, ...]
    assumptions: tuple[str, ...]


def rates(
    schedule: Schedule,
    smoothness: float,
    momentum: float = 0.0,
    *,
    gap: float | None = None,
    iterations: int | None = None,
    second_moment: float | None = None,
    variance: float | None = None,
) -> Rates:
    """Return which learning rates a training method bears.

    A stage's gradient of sample s is taken at weights that are sigma_j updates old in stage j.
    Counted in updates, w_k^{s+1} = w_k^s - gamma grad_k f(w_1^{s-sigma_1}, ..., w_K^{s-sigma_K}).
    On a quadratic u_j^s = w_j^{s-sigma_j} follows the recursion of `theory.stability` with delays
    sigma_j, so its limit for D = max sigma_j holds; means over samples of different staleness and
    gradients that are shrunk are covered by the same proof (they stay in its convex hull, with 0).

    Args:
        schedule: the training method.
        smoothness: L, the Lipschitz constant of grad f.
        momentum: beta in [0, 1) of heavy ball; the theorems are about beta = 0.
        gap: f(w^0) - f*, together with ``iterations``, for the best rate of a theorem.
        iterations: the number T of iterations.
        second_moment: M of Theorem A, a bound on E||grad f_i||^2.
        variance: s^2 of Theorem V, a bound on E||grad f_i - grad f||^2.

    Raises:
        ValueError: naming the argument, if it is out of range or the method's rule changes the
            recursion in a way that nothing is known about.

    >>> from ddg_sim.methods import ddg
    >>> found = rates(ddg(4), smoothness=2.0)
    >>> print(found.largest_delay, round(found.stable, 6), round(found.suggested, 6))
    3 0.222521 0.071429
    """
    _positive("smoothness", smoothness)
    for name, value in (("gap", gap), ("iterations", iterations), ("variance", variance)):
        _positive(name, value)
    _positive("second_moment", second_moment)
    assumptions = ["gradients at the weights that the sample's forward passes read"]
    assumptions += _beyond_stash(schedule)
    levels = staleness_levels(schedule)
    depth = max(max(stage) for stage in levels)
    shrunk = bool(schedule.rule.transforms)
    if schedule.samples_per_iteration > 1:
        assumptions.append("L is that of the mean over an update's micro-batches")
    # The most delayed stage attains the limit if all that it averages is that late, in full size.
    attained = any(set(stage) == {depth} for stage in (levels[-1:] if shrunk else levels))
    limit = float(stable_limit(depth, momentum)) / smoothness
    proved = 1.0 / ((2 * depth + 1) * smoothness)
    share = proved * smoothness / float(stable_limit(depth))
    if momentum:
        assumptions.append("momentum: the theorems do not cover it, the suggestion is heuristic")
    return Rates(
        method=schedule.method,
        largest_delay=depth,
        momentum=momentum,
        stable=limit,
        attained=attained,
        suggested=share * limit if momentum else proved,
        allowed=()
        if momentum or not _in_theorems(schedule)
        else _theorems(depth, smoothness, gap, iterations, second_moment, variance),
        assumptions=tuple(assumptions),
    )


def _beyond_stash(schedule: Schedule) -> list[str]:
    """Sentences on what differs from stashed weights; ValueError where nothing is known."""
    rule = schedule.rule
    unknown = [t for t in rule.transforms if t.kind is not TransformKind.SHRINK]
    if rule.gradient is not Gradient.NEXT:
        raise ValueError(f"schedule {schedule.method!r}: local losses are no gradients of one f")
    if unknown or rule.activations not in _KEPT or rule.jacobian is Jacobian.PREDICTED:
        part = str(unknown[0]) if unknown else rule.unusual()
        raise ValueError(f"schedule {schedule.method!r}: no stable rate is known for {part}")
    found = []
    if rule.transforms:
        found.append("shrunk gradients may bear a larger rate than this one")
    if rule.jacobian is Jacobian.CURRENT:
        found.append(
            "Jacobians at newer weights count as if stashed: near a minimum without residual they "
            "change the gradient in second order only"
        )
    return found


def _in_theorems(schedule: Schedule) -> bool:
    try:
        snapshot_delays(schedule)
    except ValueError:
        return False
    return schedule.rule.jacobian is Jacobian.STASHED and not schedule.rule.transforms


def _theorems(
    depth: int,
    smoothness: float,
    gap: float | None,
    iterations: int | None,
    second_moment: float | None,
    variance: float | None,
) -> tuple[Allowed, ...]:
    start = None if gap is None or iterations is None else gap / iterations
    odd = 2 * depth + 1
    return (
        _best("theorem-a", math.inf, start, smoothness, second_moment, depth**2),
        _best("theorem-v", 1.0 / (2.0 * smoothness * odd), start, smoothness, variance, 2 * depth),
        Allowed(
            "theorem-d",
            2.0 / (odd * smoothness),
            1.0 / (odd * smoothness),
            None if start is None else 2.0 * odd * smoothness * start,
        ),
    )


def _best(
    statement: str,
    largest: float,
    start: float | None,
    smoothness: float,
    noise: float | None,
    second_order: int,
) -> Allowed:
    """Minimise 2 start/gamma + gamma L noise (1 + gamma L second_order) over gamma <= largest."""
    if start is None or noise is None:
        return Allowed(statement, largest, None, None)
    slope = smoothness * noise
    cubic = [2.0 * smoothness * slope * second_order, slope, 0.0, -2.0 * start]
    roots = np.roots(cubic)
    # Of the derivative times gamma^2, which grows with gamma: one positive root.
    free = float(np.max(roots.real[np.abs(roots.imag) <= 1e-9 * np.abs(roots)]))
    best = min(largest, free)
    bound = 2.0 * start / best + best * slope * (1.0 + best * smoothness * second_order)
    return Allowed(statement, largest, best, bound)


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
