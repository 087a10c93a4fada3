"""Hypothesis strategies: random schedules that can run, and costs for them."""

from hypothesis import strategies as st

from ddg_sim.costs import Costs
from ddg_sim.dependencies import dependencies, validate
from ddg_sim.methods import RULES
from ddg_sim.schedule import (
    Schedule,
    ScheduleError,
    Sync,
    backward,
    forward,
    recompute,
    update,
)


@st.composite
def candidates(draw, max_stages=4):
    """Schedules with random lags, groups of samples and homes of stages; not all can run."""
    stages = draw(st.integers(1, max_stages))
    m = draw(st.integers(1, 3))
    rule = draw(st.sampled_from(list(RULES.values())))
    replay = draw(st.booleans())
    ahead, behind = [draw(st.integers(0, 1))], []
    for _ in range(stages - 1):  # forward lags grow with the stage, in iterations
        ahead.append(ahead[-1] + draw(st.sampled_from((0, 0, 1, 2))))
    behind = [ahead[-1] + draw(st.sampled_from((0, 0, 1)))]
    for _ in range(stages - 1):  # backward lags mostly grow towards the first stage
        behind.insert(0, max(ahead[0], behind[0] + draw(st.sampled_from((-1, 0, 1, 1, 1, 2)))))
    alone = draw(st.booleans())
    home = [stage if alone else draw(st.integers(0, 1)) for stage in range(stages)]
    homes = sorted(set(home))
    bodies = []
    for worker in homes:
        mine = [stage for stage in range(stages) if home[stage] == worker]
        forwards = [[forward(k, j - m * ahead[k]) for k in mine] for j in range(m)]
        backwards = []
        for j in range(m):
            cell = []
            for k in reversed(mine):
                sample = j - m * behind[k]
                cell += [recompute(k, sample)] * replay + [backward(k, sample)]
            backwards.append(cell)
        updates = [update(k, m - 1 - m * behind[k]) for k in mine]
        if draw(st.booleans()):  # one forward, one backward; or all forwards first
            middle = [cell for pair in zip(forwards, backwards, strict=True) for cell in pair]
        else:
            middle = forwards + backwards
        bodies.append(tuple([template for cell in middle for template in cell] + updates))
    sync = draw(st.sampled_from(list(Sync)))
    return Schedule("random", stages, tuple(bodies), sync, rule, m)


def is_valid(schedule):
    try:
        validate(schedule)
    except ScheduleError:
        return False
    return True


def schedules(max_stages=4):
    """Schedules that `validate` accepts."""
    return candidates(max_stages).filter(is_valid)


def ends_without_draining(schedule):
    """Whether no operation needs what a later iteration of another worker produces."""
    return all(edge.tokens >= 0 for edge in dependencies(schedule))


#: Two stages, between which gradients may be four iterations late before anybody waits for them.
PATIENT = Schedule(
    "patient",
    2,
    (
        (forward(0), backward(0, -5), update(0, -5)),
        (forward(1), backward(1), update(1)),
    ),
)


#: Seconds; zero, equal and wildly different durations are all likely.
anything = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 5), st.floats(0, 100))
#: Multiples of 1/4 add up without rounding and settle quickly.
quarters = st.integers(0, 12).map(lambda quarter: quarter / 4)


def costs_for(stages, seconds=anything):
    """Costs of that many stages."""

    def several(count):
        return st.lists(seconds, min_size=count, max_size=count).map(tuple)

    return st.builds(
        Costs,
        forward=several(stages),
        backward=several(stages),
        update=several(stages),
        recompute=several(stages),
        activation_transfer=several(stages - 1),
        gradient_transfer=several(stages - 1),
        overhead=several(stages),
        message=several(stages),
        barrier=seconds,
    )


def costed(seconds=anything, max_stages=4):
    """Pairs of a schedule and costs for it."""
    return schedules(max_stages).flatmap(
        lambda schedule: st.tuples(st.just(schedule), costs_for(schedule.num_stages, seconds))
    )
