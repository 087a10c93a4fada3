"""Is the prediction true? Profile, predict, run and compare, on the machine at hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import median

from scipy.stats import quantile_test

from ddg_gpu.data import Dataset
from ddg_gpu.job import Job
from ddg_gpu.processes import Progress
from ddg_gpu.profile import measured_cuts, summarise
from ddg_gpu.timing import Timing, time_job
from ddg_gpu.train import Run, train
from ddg_sim.contention import contended
from ddg_sim.predict import predict
from ddg_sim.profile import Profile
from ddg_sim.replicate import typical_period
from ddg_sim.schedule import Sync
from ddg_sim.timeline import Timeline

#: Mini-batches to time per stage before every round.
CHUNK = 16


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method's predicted and measured speed; seconds per iteration.

    Args:
        name: the method, with its synchronisation mode after a slash where it was chosen.
        predicted_period: median period of simulated runs as long as the measured ones, with the
            profile's costs, which vary as its samples do.
        measured_periods: steady-state period of every run.
        bound_by: in words, what bounds the predicted period.
        predicted: simulated timeline with median costs, as long as a run.
        run: the run whose period is nearest to the median; all runs end with the same weights.
    """

    name: str
    predicted_period: float
    measured_periods: tuple[float, ...]
    bound_by: str
    predicted: Timeline
    run: Run

    @property
    def measured_period(self) -> float:
        """Median over the runs."""
        return median(self.measured_periods)

    @property
    def measured_interval(self) -> tuple[float, float] | None:
        """Where the median lies with 95 % confidence, whatever the distribution of the runs.

        None if there are too few runs to say (fewer than six).
        """
        found = quantile_test(self.measured_periods, p=0.5).confidence_interval(0.95)
        return (float(found.low), float(found.high)) if isfinite(found.low + found.high) else None

    @property
    def samples(self) -> int:
        """Mini-batches, or micro-batches, of an iteration: speeds are compared per sample."""
        return self.run.job.schedule().samples_per_iteration

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
    dataset: Dataset,
    *,
    profile: Profile | None = None,
    rounds: int = 3,
    timeout: float = 120.0,
    progress: Progress = lambda done, total: None,
) -> tuple[Profile, list[Comparison]]:
    """Predict each method from a profile, and run it with one process per stage.

    The speed of a machine drifts. So the methods take turns, ``rounds`` times, and the stages are
    timed before every round: prediction and measurement see the same machine. The runs themselves
    do not enter the profile. Many short rounds tell more than few long ones.

    Args:
        job: what to train, but for the method.
        methods: ``METHOD`` or ``METHOD/SYNC``.
        dataset: the data.
        profile: costs measured before; None measures them.
        rounds: runs of each method.
        timeout: seconds that a worker may wait for another.
        progress: called with (samples finished, samples in all).

    Returns:
        The profile that the predictions come from, and a comparison per method.

    Raises:
        ValueError: naming an argument that is wrong.
        WorkerError: if a run fails.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    jobs = {
        name: replace(job, method=method, sync=sync)
        for name, (method, sync) in ((text, parse_method(text)) for text in methods)
    }
    for own in jobs.values():
        own.schedule()  # all names are checked before anything runs
    if profile is not None:
        check_profile(profile, job, dataset.name)
        cuts = tuple(profile.cuts)
    else:
        cuts = job.cuts if job.cuts is not None else measured_cuts(job, dataset, CHUNK)
    jobs = {name: replace(own, cuts=cuts) for name, own in jobs.items()}

    timings: list[Timing] = []
    runs: dict[str, list[Run]] = {name: [] for name in jobs}
    turns = [name for _ in range(rounds) for name in jobs]
    for turn, name in enumerate(turns):
        if profile is None and turn % len(jobs) == 0:
            timings.append(time_job(jobs[name], dataset, CHUNK))

        def report(done: int, total: int, turn: int = turn) -> None:
            progress(turn * total + done, len(turns) * total)

        run = train(jobs[name], dataset, "distributed", timeout=timeout, progress=report)
        if run is None:
            raise ValueError("a comparison starts its own processes: do not run it under torchrun")
        runs[name].append(run)
    if profile is None:
        profile = summarise(replace(job, cuts=cuts), dataset, timings)
    return profile, [_comparison(name, profile, runs[name]) for name in jobs]


def _comparison(name: str, profile: Profile, runs: Sequence[Run]) -> Comparison:
    schedule, iterations = runs[0].job.schedule(), runs[0].timeline.iterations
    costs = contended(schedule, profile.varying_costs(), profile.contention)
    found = predict(schedule, profile.costs(), iterations, contention=profile.contention)
    measured = median(run.timeline.period for run in runs)
    return Comparison(
        name,
        typical_period(schedule, costs, iterations),
        tuple(run.timeline.period for run in runs),
        found.bound_by,
        found.timeline,
        min(runs, key=lambda run: abs(run.timeline.period - measured)),
    )


def speedups(periods: dict[str, float]) -> dict[str, float | None]:
    """Speedup of each method over backpropagation (``bp``); None where bp was not among them.

    Args:
        periods: seconds per sample, by method.

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


def check_profile(profile: Profile, job: Job, data: str) -> None:
    """Check that a profile is of what is going to run.

    Args:
        profile: what was measured.
        job: what is going to run.
        data: name of the dataset.

    Raises:
        ValueError: naming the first thing that differs.
    """
    wanted: dict[str, object] = {
        "model": job.model,
        "data": data,
        "batch_size": job.batch_size,
        "stages": job.stages,
    }
    if job.cuts is not None:
        wanted["cuts"] = list(job.cuts)
    found = {
        "model": profile.model,
        "data": profile.data,
        "cuts": profile.cuts,
        "batch_size": profile.batch_size,
        "stages": len(profile.stages),
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"{name} is {value}, but the profile is of {name} {found[name]}")
