"""Is the prediction true? Profile, predict, run and compare, on the machine at hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from statistics import median
from time import perf_counter

from scipy.stats import quantile_test

from ddg_gpu.data import Dataset
from ddg_gpu.job import Job
from ddg_gpu.machine import Timing, available_cores, time_machine
from ddg_gpu.processes import Progress
from ddg_gpu.profile import measured_cuts, programs, summarise
from ddg_gpu.stage import refuse
from ddg_gpu.timing import StageTimes, time_operations
from ddg_gpu.train import Run, train
from ddg_gpu.transport import require_processes
from ddg_sim.choice import parse_choice
from ddg_sim.contention import contended
from ddg_sim.eventgraph import shares_cores
from ddg_sim.predict import predict
from ddg_sim.profile import Profile, program_text
from ddg_sim.replicate import typical_period
from ddg_sim.timeline import Timeline

#: Samples whose operations are timed before every run.
CHUNK = 6
#: Fewest iterations of a run from which a period can be told.
FEWEST = 6
#: Simulated runs, whose median period is predicted.
RUNS = 64


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method's predicted and measured speed; seconds per iteration.

    Args:
        name: the method with its options, as `parse_choice` reads them.
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


def chosen(job: Job, text: str) -> Job:
    """The same job with a method as `parse_choice` reads it.

    >>> chosen(Job("bp", 2, "mlp", iterations=1), "adl:accumulate=4").options
    {'accumulate': 4}
    """
    choice = parse_choice(text)
    return replace(
        job,
        method=choice.name,
        sync=choice.sync,
        semantics=choice.semantics,
        options=choice.options,
    )


def checked(job: Job, text: str) -> Job:
    """What `chosen` gives, if the torch backend runs it.

    Raises:
        ValueError: for a method, option or value that is unknown or wrong, or is not run here.
    """
    own = chosen(job, text)
    schedule = own.schedule()
    require_processes(schedule)
    for stage in range(own.stages):
        refuse(schedule, stage)
    return own


def compare(
    job: Job,
    methods: Sequence[str],
    dataset: Dataset,
    *,
    profile: Profile | None = None,
    rounds: int = 3,
    samples: int | None = None,
    seconds: float = inf,
    timeout: float = 120.0,
    progress: Progress = lambda done, total: None,
) -> tuple[Profile, list[Comparison]]:
    """Predict each method from a profile, and run it with one process per worker.

    The speed of a machine drifts. So the methods take turns, ``rounds`` times, and the operations
    of each are timed just before its run, the machine before every round: prediction and
    measurement see the same machine. The runs themselves do not enter the profile. Many short
    rounds tell more than few long ones. Where there are fewer cores than workers, predictions are
    for these cores.

    Args:
        job: what to train, but for the method.
        methods: as `parse_choice` reads them.
        dataset: the data.
        profile: costs measured before; None measures them.
        rounds: runs of each method.
        samples: mini-batches, or micro-batches, of each run, about; None: ``job.iterations``.
        seconds: no round is begun that would probably end later than that.
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
    jobs = {text: checked(job, text) for text in methods}  # all, before anything runs
    if samples is not None:
        for text, own in jobs.items():
            each = max(FEWEST, -(-samples // own.schedule().samples_per_iteration))
            jobs[text] = replace(own, iterations=each, epochs=None)
    if profile is not None:
        check_profile(profile, job, dataset.name)
        cuts = tuple(profile.cuts)
    else:
        cuts = job.cuts if job.cuts is not None else measured_cuts(job, dataset, CHUNK)
    job = replace(job, cuts=cuts)
    jobs = {text: replace(own, cuts=cuts) for text, own in jobs.items()}
    needed = programs([job, *jobs.values()])
    plain = next(iter(needed))  # backpropagation
    first = {program_text(own.schedule()) for own in jobs.values()}

    begin = perf_counter()
    timings: list[Timing] = []
    operations: dict[str, list[list[StageTimes]]] = defaultdict(list)
    runs: dict[str, list[Run]] = {text: [] for text in jobs}

    def time(program: str) -> None:
        found = time_operations(needed[program], dataset, CHUNK, waits=program == plain)
        operations[program].append(found)

    for turn in range(rounds * len(jobs)):
        text = list(jobs)[turn % len(jobs)]
        spent, done_rounds = perf_counter() - begin, turn // len(jobs)
        if turn % len(jobs) == 0 and spent * (done_rounds + 1) > seconds * done_rounds > 0:
            break
        if profile is None and turn % len(jobs) == 0:
            timings.append(time_machine(job, dataset))
            for program in [program for program in needed if program not in first]:
                time(program)
        if profile is None:
            time(program_text(jobs[text].schedule()))

        def report(done: int, total: int, turn: int = turn) -> None:
            progress(turn * total + done, rounds * len(jobs) * total)

        run = train(jobs[text], dataset, "distributed", timeout=timeout, progress=report)
        if run is None:
            raise ValueError("a comparison starts its own processes: do not run it under torchrun")
        runs[text].append(run)
    if profile is None:
        profile = summarise(job, dataset, timings, operations)
    return profile, [_comparison(text, profile, runs[text]) for text in jobs]


def _comparison(name: str, profile: Profile, runs: Sequence[Run]) -> Comparison:
    schedule, iterations = runs[0].job.schedule(), runs[0].timeline.iterations
    cores, contention = available_cores(), profile.contention
    costs = contended(schedule, profile.varying_costs(schedule, cores), contention)
    steady = profile.costs(schedule, cores)
    engine = "des" if shares_cores(schedule, steady) else "cycle"
    found = predict(schedule, steady, iterations, engine, contention)
    measured = median(run.timeline.period for run in runs)
    return Comparison(
        name,
        typical_period(schedule, costs, iterations, runs=RUNS),
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
