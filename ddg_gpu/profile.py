"""What every stage and link of a network costs on the machine at hand, as a profile.

No run of a method enters, so what is predicted from a profile is a prediction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, Network, make_stage, network
from ddg_gpu.machine import LinkTimes, Timing, message_bytes, time_machine
from ddg_gpu.partition import balanced_cuts
from ddg_gpu.processes import Progress
from ddg_gpu.timing import WARM_UP, Durations, StageTimes, time_operations
from ddg_gpu.train import one_thread
from ddg_sim.contention import FIELDS
from ddg_sim.profile import LinkProfile, OperationTimes, Profile, StageProfile, program_text
from ddg_sim.schedule import OpKind

#: Samples of each kind of operation that a profile keeps.
KEPT = 64


def measure(
    job: Job,
    dataset: Dataset,
    iterations: int = 20,
    progress: Progress = lambda done, total: None,
    methods: Sequence[Job] = (),
) -> Profile:
    """Measure a profile: medians over ``iterations`` mini-batches, one thread per worker.

    Without ``job.cuts`` the network is cut as `measured_cuts` says; with them, where they say.

    Args:
        job: gives model, number of stages, batch size, optimizer and seed.
        dataset: the data.
        iterations: mini-batches to time, after a warm-up.
        progress: called with (steps finished, steps in all).
        methods: jobs whose methods' own operations the profile is to hold, too.

    Raises:
        ValueError: naming an argument that is wrong.
        WorkerError: if a process fails.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    jobs = programs([job, *methods])
    if job.cuts is None:
        job = replace(job, cuts=measured_cuts(job, dataset, iterations))
    network(job, dataset)  # a wrong argument shows here, not in K processes
    found: dict[str, list[list[StageTimes]]] = {}
    for done, (text, own) in enumerate(jobs.items(), start=1):
        progress(done, len(jobs) + 2)
        own = replace(own, cuts=job.cuts)
        found[text] = [time_operations(own, dataset, iterations, waits=not found)]
    timing = time_machine(job, dataset)
    progress(1, 1)
    return summarise(job, dataset, [timing], found)


def programs(jobs: Sequence[Job]) -> dict[str, Job]:
    """By `program_text`, a job for each different program that a profile of these needs.

    Backpropagation and Features Replay are among them: they give what every profile holds.

    >>> jobs = [Job(name, 2, "mlp", iterations=1) for name in ("bp", "ddg", "pipedream")]
    >>> [job.method for job in programs(jobs).values()]
    ['bp', 'fr', 'ddg']
    """
    plain = replace(jobs[0], sync=None, semantics=None, options={})
    first = [replace(plain, method=name) for name in ("bp", "fr")]
    found: dict[str, Job] = {}
    for job in (*first, *jobs):
        found.setdefault(program_text(job.schedule()), job)
    return found


def measured_cuts(job: Job, dataset: Dataset, iterations: int) -> tuple[int, ...]:
    """Cuts for which the largest stage time (forward + backward + update) is least.

    Every layer is timed as a stage of its own.

    Args:
        job: gives model, number of stages, batch size, optimizer and seed.
        dataset: the data.
        iterations: mini-batches to time, after a warm-up.

    Raises:
        ValueError: if there are more stages than layers.
    """
    layers = len(network(replace(job, stages=1, cuts=None), dataset).model)
    balanced_cuts([1.0] * layers, job.stages)  # says what is wrong before anything is timed
    single = replace(job, stages=layers, cuts=tuple(range(1, layers)))
    seconds = [
        sum(median(times) for times in stage) for stage in _serially(single, dataset, iterations)
    ]
    return tuple(balanced_cuts(seconds, job.stages))


def _serially(job: Job, dataset: Dataset, iterations: int) -> list[list[list[float]]]:
    """Seconds of every operation per stage and kind, all in this process, by backpropagation."""
    job = replace(job, method="bp", sync=None, semantics=None, options={})
    schedule = job.schedule()
    parts = network(job, dataset)
    stages = [make_stage(job, schedule, parts, k) for k in range(job.stages)]
    batches = Batches(dataset, job.batch_size, job.seed)
    with one_thread():
        spans = run_serial(schedule, stages, batches, WARM_UP + iterations).spans
    found: list[dict[OpKind, list[float]]] = [defaultdict(list) for _ in stages]
    for span in spans:
        if span.op is not None and span.op.iteration >= WARM_UP:
            found[span.op.stage][span.op.kind].append(span.duration)
    return [list(stage.values()) for stage in found]


def summarise(
    job: Job,
    dataset: Dataset,
    timings: Sequence[Timing],
    operations: Mapping[str, Sequence[Sequence[StageTimes]]],
) -> Profile:
    """The profile of a job from what was timed: medians over all samples.

    Args:
        job: what was timed.
        dataset: the data.
        timings: what `time_machine` gave, once or more often.
        operations: by `program_text` what `time_operations` gave, once or more often; those of
            `programs`, the first one with waits.
    """
    parts = network(job, dataset)
    sizes = message_bytes(job, parts)
    links = [
        LinkTimes(median(link.transfer for link in same), median(link.host for link in same))
        for same in zip(*(found.links for found in timings), strict=True)
    ]
    bp, fr, *_ = programs([job])
    stages = range(job.stages)
    times = {
        text: [_operation_times([found[k] for found in timed]) for k in stages]
        for text, timed in operations.items()
    }
    again = [stage.recompute for stage in times[fr]]
    return Profile(
        version=1,
        model=job.model,
        data=dataset.name,
        batch_size=job.batch_size,
        device="cpu",
        threads=1,
        torch=str(torch.__version__),
        cuts=list(parts.cuts),
        stages=[
            _stage_profile(
                parts,
                k,
                times[bp][k].model_copy(update={"recompute": again[k]}),
                links,
                _contention([found[k] for timed in operations.values() for found in timed]),
                sizes,
            )
            for k in stages
        ],
        links=[
            LinkProfile(activation=link.transfer, gradient=link.transfer, bytes=size)
            for size, link in zip(sizes, links, strict=True)
        ],
        barrier=median(found.barrier for found in timings),
        programs={text: found for text, found in times.items() if text != bp},
    )


def _contention(timings: Sequence[StageTimes]) -> dict[Any, dict[Any, float]]:
    """One stage's, from what was timed of all methods: that cores disturb each other is no rule's.

    Where few timings are at hand, they tell more together than each by itself.
    """
    found: dict[Any, dict[Any, float]] = defaultdict(dict)
    for kind, name in FIELDS.items():
        beside, waited = (
            [
                (times[kind], alone[kind])
                for times, alone in pairs
                if kind in times and kind in alone
            ]
            for pairs in (
                [(_whole_passes(one.beside), _whole_passes(one.alone)) for one in timings],
                [(one.waited, one.alone) for one in timings],
            )
        )
        if beside:
            found[name] = dict.fromkeys(FIELDS.values(), _ratio(beside))
        if waited:
            found[name]["wait"] = _ratio(waited)
    return found


def _ratio(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """How many times longer the first takes: median over what was timed at about the same time."""
    return max(1.0, median(median(one) / median(other) for one, other in pairs))


def _operation_times(timings: Sequence[StageTimes]) -> OperationTimes:
    """One stage's, from several timings of one program.

    Both halves of a backward pass are told as one and its first half's share.
    """
    alone = [_whole_passes(found.alone) for found in timings]
    times = {kind: _steadied([found[kind] for found in alone]) for kind in alone[0]}
    share = 0.5
    if OpKind.BACKWARD_INPUT in timings[0].alone:
        first, second = (
            median([seconds for found in timings for seconds in found.alone[half]])
            for half in (OpKind.BACKWARD_INPUT, OpKind.BACKWARD_WEIGHT)
        )
        share = first / (first + second)
    samples: dict[Any, list[float]] = {
        FIELDS[kind]: _quantiles(seconds) for kind, seconds in times.items()
    }
    typical = {FIELDS[kind]: median(seconds) for kind, seconds in times.items()}
    return OperationTimes(
        **{"recompute": typical["forward"], **typical},
        samples=samples,
        input_share=share,
    )


def _whole_passes(times: Durations) -> Durations:
    """The same with both halves of a backward pass as one."""
    if OpKind.BACKWARD_INPUT not in times:
        return times
    found = dict(times)
    halves = found.pop(OpKind.BACKWARD_INPUT), found.pop(OpKind.BACKWARD_WEIGHT)
    found[OpKind.BACKWARD] = [sum(both) for both in zip(*halves, strict=False)]
    return found


def _stage_profile(
    parts: Network,
    index: int,
    times: OperationTimes,
    links: Sequence[LinkTimes],
    contention: dict[Any, dict[Any, float]],
    sizes: Sequence[int],
) -> StageProfile:
    own = links[max(0, index - 1) : index + 1]
    module = parts.modules[index]
    return StageProfile(
        **times.model_dump(),
        layers=[type(layer).__name__ for layer in module.children()],
        overhead=0.0,
        message=sum(link.host for link in own) / (2 * max(1, len(own))),  # one sent, one received
        contention=contention if len(parts.modules) > 1 else {},
        output_bytes=sizes[index] if index < len(sizes) else 0,
        parameter_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
    )


def _steadied(chunks: Sequence[Sequence[float]]) -> list[float]:
    """All samples, each chunk's drift removed: its median is moved to that of all.

    What slows a machine for longer than a chunk slows all stages alike. As independent draws it
    would seem that stages wait for one another, which they do not.
    """
    overall = median(time for chunk in chunks for time in chunk)
    return [time * overall / median(chunk) for chunk in chunks for time in chunk]


def _quantiles(times: Sequence[float]) -> list[float]:
    """At most `KEPT` values with the same distribution, so that profiles stay small."""
    if len(times) <= KEPT:
        return sorted(times)
    return [float(value) for value in np.quantile(times, (np.arange(KEPT) + 0.5) / KEPT)]
