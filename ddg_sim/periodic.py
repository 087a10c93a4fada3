"""Building periodic schedules: what the method functions have in common."""

from __future__ import annotations

from collections.abc import Callable

from ddg_sim.dependencies import validate
from ddg_sim.rule import Rule
from ddg_sim.schedule import OpTemplate, Schedule, Sync, backward, forward, recompute, update


def periodic(
    method: str,
    num_stages: int,
    program: Callable[[int], list[OpTemplate]],
    *,
    workers: int | None = None,
    sync: Sync = Sync.NONE,
    rule: Rule | None = None,
    samples: int = 1,
    queue: int = 0,
) -> Schedule:
    """Build and validate the schedule whose worker k runs ``program(k)`` in every iteration.

    Args:
        method: name of the training method, without spaces.
        num_stages: number of stages K >= 1.
        program: loop body of a worker.
        workers: number of workers; None is one per stage.
        sync: what workers wait for beyond data.
        rule: what the method does to the numbers; None is plain differentiation.
        samples: samples (micro-batches) per iteration, >= 1.
        queue: see `Schedule`.

    Raises:
        ValueError: if ``num_stages`` < 1 or ``samples`` < 1.
        ScheduleError: if the schedule cannot be run; names the operation.

    >>> print(periodic("sgd", 1, lambda k: [forward(k), backward(k), update(k)]))
    sgd stages=1 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) B0(t) U0(t)
    """
    at_least("num_stages", num_stages, 1)
    at_least("samples", samples, 1)
    count = num_stages if workers is None else workers
    bodies = tuple(tuple(program(worker)) for worker in range(count))
    schedule = Schedule(
        method, num_stages, bodies, sync, rule or Rule(), samples_per_iteration=samples, queue=queue
    )
    validate(schedule)
    return schedule


def at_least(name: str, value: int, least: int) -> int:
    """Return ``value``, or say by its name that it is too small.

    >>> at_least("micro_batches", 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: micro_batches must be at least 1, got 0
    """
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def round_trip(
    num_stages: int, stage: int, accumulate: int = 1, replay: bool = False
) -> list[OpTemplate]:
    """Loop body of a stage in a pipeline where every hop takes a tick, both ways.

    A sample reaches stage k (0-based) k ticks after it entered, and its error comes back to it
    2 (K-1-k) ticks later. A tick is a forward pass, a backward pass and, if that closes a group of
    ``accumulate`` samples, an update with their mean gradient; an iteration has ``accumulate``
    ticks.

    >>> print(*round_trip(3, 0), *round_trip(3, 1), *round_trip(3, 2))
    F0(t) B0(t-4) U0(t-4) F1(t-1) B1(t-3) U1(t-3) F2(t-2) B2(t-2) U2(t-2)
    """
    body = []
    for tick in range(accumulate):
        sample = tick + stage - 2 * (num_stages - 1)
        body += [forward(stage, tick - stage), *([recompute(stage, sample)] if replay else [])]
        body.append(backward(stage, sample))
        if (sample + 1) % accumulate == 0:
            body.append(update(stage, sample))
    return body
