"""Is the prediction true? Profile, predict, run and compare, on the machine at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ddg_gpu.data import Dataset
from ddg_gpu.job import Job
from ddg_gpu.train import Run, train
from ddg_sim.cycletime import cycle_time
from ddg_sim.methods import method
from ddg_sim.profile import Profile
from ddg_sim.schedule import Sync
from ddg_sim.simulate import simulate
from ddg_sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method's predicted and measured speed; seconds per iteration.

    Args:
        name: the method, with its synchronisation mode after a slash where it was chosen.
        predicted: simulated timeline.
        run: the training run, with its measured timeline.
        predicted_period: exact steady-state period of the schedule with the profile's costs.
        bound_by: in words, what bounds the predicted period.
    """

    name: str
    predicted: Timeline
    run: Run
    predicted_period: float
    bound_by: str

    @property
    def measured_period(self) -> float:
        """Measured steady-state seconds per iteration."""
        return self.run.timeline.period

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_period / self.measured_period - 1


def parse_method(text: str) -> tuple[str, Sync | None]:
    """Split ``METHOD`` or ``METHOD/SYNC``.

    Raises:
        ValueError: naming an unknown synchronisation mode.

    >>> parse_method("ddg/barrier")
    ('ddg', <Sync.BARRIER: 'barrier'>)
    """
    name, _, sync = text.partition("/")
    if not sync:
        return name, None
    try:
        return name, Sync(sync)
    except ValueError:
        known = ", ".join(mode.value for mode in Sync)
        raise ValueError(f"unknown sync {sync!r} in method {text!r}; known: {known}") from None


def compare(
    job: Job,
    methods: Sequence[str],
    profile: Profile,
    dataset: Dataset,
    *,
    timeout: float = 120.0,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Comparison]:
    """Predict each method from a profile, then run it with one process per stage.

    Args:
        job: what to train, but for the method; its cuts must be the profile's.
        methods: ``METHOD`` or ``METHOD/SYNC``.
        profile: measured costs.
        dataset: the data.
        timeout: seconds that a worker may wait for another.
        progress: called with (method, samples finished, samples in all).

    Raises:
        ValueError: naming an argument that is wrong.
        WorkerError: if a run fails.
    """
    parsed = [parse_method(text) for text in methods]
    for name, sync in parsed:
        method(name, job.stages, sync)  # all names are checked before anything runs
    job = replace(job, cuts=tuple(profile.cuts))
    return [
        _compare(replace(job, method=name, sync=sync), text, profile, dataset, timeout, progress)
        for text, (name, sync) in zip(methods, parsed, strict=True)
    ]


def _compare(
    job: Job,
    name: str,
    profile: Profile,
    dataset: Dataset,
    timeout: float,
    progress: Callable[[str, int, int], None],
) -> Comparison:
    schedule, costs = job.schedule(), profile.costs()
    cycle = cycle_time(schedule, costs)
    run = train(
        job,
        dataset,
        "distributed",
        timeout=timeout,
        progress=lambda done, total: progress(name, done, total),
    )
    if run is None:
        raise ValueError("a comparison starts its own processes: do not run it under torchrun")
    return Comparison(
        name,
        simulate(schedule, costs, run.timeline.iterations),
        run,
        cycle.period,
        cycle.explain(),
    )


def speedups(periods: dict[str, float]) -> dict[str, float | None]:
    """Speedup of each method over backpropagation (``bp``); None where bp was not among them.

    >>> speedups({"bp": 3.0, "ddg": 1.5})
    {'bp': 1.0, 'ddg': 2.0}
    """
    base = periods.get("bp")
    return {name: None if base is None else base / period for name, period in periods.items()}


def too_few_cores(workers: int) -> str | None:
    """A warning if there are fewer cores than workers, or None.

    >>> too_few_cores(1) is None
    True
    """
    cores = available_cores()
    if cores >= workers:
        return None
    return (
        f"only {cores} core{'' if cores == 1 else 's'} for {workers} processes: they take turns,"
        " so a measured speedup means nothing"
    )


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_profile(profile: Profile, job: Job) -> None:
    """Check that a profile is of what is going to run.

    Raises:
        ValueError: naming the first thing that differs.
    """
    wanted = {"model": job.model, "batch_size": job.batch_size, "stages": job.stages}
    found = {
        "model": profile.model,
        "batch_size": profile.batch_size,
        "stages": len(profile.stages),
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"{name} is {value}, but the profile is of {name} {found[name]}")
