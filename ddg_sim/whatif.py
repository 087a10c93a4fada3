"""What would help most: how the exact period answers to each stage, link and delay."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ddg_sim.costs import PER_LINK, Costs
from ddg_sim.cycletime import CycleTime, cycle_time
from ddg_sim.dependencies import validate
from ddg_sim.schedule import OpKind, OpTemplate, Schedule, ScheduleError
from ddg_sim.times import scaled

PASSES = ("forward", "backward", "recompute", "update", "all_reduce")


def sensitivities(bound: CycleTime) -> dict[str, float]:
    """Derivative of the period by each operation's and transfer's seconds.

    An event that occurs n times on the critical cycle, which spans c iterations, moves the period
    by n/c of its own change (derived here: the period is a maximum of such linear functions). Where
    several cycles are critical this holds for slower, and a faster event alone may change nothing.

    Returns:
        Name of the event, as in `CycleTime.critical_cycle`, to seconds per second; what is not on
        the cycle has derivative 0 and is left out.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> sensitivities(cycle_time(ddg(2), costs(2, comm=2.0)))["F1"]
    0.5
    """
    found: dict[str, float] = {}
    for name in bound.critical_cycle:
        found[name] = found.get(name, 0.0) + 1 / bound.tokens
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """A change and the exact period it leads to, in seconds; ``gain`` is the fraction saved."""

    what: str
    period: float
    gain: float


def improvements(schedule: Schedule, costs: Costs, faster: float = 0.1) -> list[Change]:
    """Try one change at a time; the best first, those that gain nothing left out.

    Each stage's computing in less time by the fraction ``faster``, each link's transfers twice as
    fast, and one more iteration of delay for all stages up to each one.

    Args:
        schedule: a valid schedule.
        costs: seconds; means count.
        faster: fraction of its time that a stage saves.

    Raises:
        ValueError: for a fraction outside 0 to 1, or costs of another number of stages.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> for change in improvements(ddg(2), costs(2, comm=2.0)):
    ...     print(f"{change.what}: {change.gain:.0%}")
    one more iteration of delay at stage 1: 33%
    the link between stages 1 and 2 twice as fast: 20%
    stage 1 computing in 10 % less time: 3%
    stage 2 computing in 10 % less time: 3%
    """
    if not 0 < faster < 1:
        raise ValueError(f"faster is {faster}: give a fraction between 0 and 1")
    period = cycle_time(schedule, costs).period
    stages, links = range(schedule.num_stages), range(schedule.num_stages - 1)
    tried: list[tuple[str, Schedule, Costs]] = []
    for stage in stages:
        words = f"stage {stage + 1} computing in {100 * faster:g} % less time"
        tried.append((words, schedule, _scaled(costs, PASSES, stage, 1 - faster)))
    for link in links:
        words = f"the link between stages {link + 1} and {link + 2} twice as fast"
        tried.append((words, schedule, _scaled(costs, PER_LINK, link, 0.5)))
    for stage in links:
        if (later := with_more_delay(schedule, stage)) is not None:
            upto = f"stage {stage + 1}" if stage == 0 else f"stages 1 to {stage + 1}"
            tried.append((f"one more iteration of delay at {upto}", later, costs))
    found = []
    for words, other, prices in tried:
        after = cycle_time(other, prices).period
        if period - after > 1e-9 * period:
            found.append(Change(words, after, 1 - after / period))
    return sorted(found, key=lambda change: -change.gain)


def _scaled(costs: Costs, names: tuple[str, ...], index: int, factor: float) -> Costs:
    changed = {
        name: tuple(
            scaled(time, factor) if place == index else time
            for place, time in enumerate(getattr(costs, name))
        )
        for name in names
    }
    return replace(costs, **changed)  # type: ignore[arg-type]


def with_more_delay(schedule: Schedule, stage: int) -> Schedule | None:
    """The schedule in which stages 0 to ``stage`` run everything but forward an iteration later.

    So the gradient from the next stage has one iteration more to come, and these stages' updates
    are one iteration staler. None if such a schedule cannot run.

    >>> from ddg_sim.methods import ddg
    >>> from ddg_sim.schedule import staleness
    >>> staleness(with_more_delay(ddg(3), 0))
    (3, 1, 0)
    """
    m = schedule.samples_per_iteration

    def later(template: OpTemplate) -> OpTemplate:
        if template.stage > stage or template.kind is OpKind.FORWARD:
            return template
        return replace(template, sample=template.sample - m)

    workers = tuple(tuple(later(template) for template in body) for body in schedule.workers)
    delayed = replace(schedule, workers=workers)
    try:
        validate(delayed)
    except ScheduleError:
        return None
    return delayed
