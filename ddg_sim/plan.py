"""Which method, with how many stages, micro-batches and replicas, is fastest on these devices?

Every point of a sweep is a schedule on a placement, cut for its own period by `partition`. A batch
is the samples of one update over all replicas; where a schedule takes m samples per iteration on R
replicas, each of its operations runs on batch/(m R) samples. Seconds and bytes of a layer are
taken as proportional to that number; what the host spends on an operation is not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from itertools import product
from typing import Any

import joblib

from ddg_sim import methods
from ddg_sim.cluster import Cluster, ClusterError
from ddg_sim.dependencies import validate
from ddg_sim.folding import fold
from ddg_sim.layers import LayerGraph
from ddg_sim.placement import TooFewDevicesError, place
from ddg_sim.point import Outcome, Setting, outcomes
from ddg_sim.replicate import Estimate, estimate, exactly, ratio
from ddg_sim.schedule import Schedule, ScheduleError, Sync, staleness
from ddg_sim.times import Time

#: Bytes of gradients and optimizer state per byte of parameters.
OPTIMIZERS = {"sgd": 1.0, "momentum": 2.0, "adam": 3.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One point of a plan.

    Args:
        schedule: what runs; it names the method, stages, synchronisation and replicas.
        devices: how many it uses.
        batch_size: samples per update over all replicas; None where the profile does not say.
        cuts: first layer of stages 1..K-1.
        period: seconds per update.
        throughput: samples per second; batches of the profile, where its size is not known.
        over_bp: speedup over backpropagation on as many devices as one replica has, with the same
            batch; None where that is impossible, this does not fit, or nothing takes any time.
        over_dp: speedup over plain data parallelism on as many devices; likewise, and None where
            the batch has fewer samples than there are devices.
        bp_fits: whether that backpropagation fits into memory.
        dp_fits: whether that data parallelism does.
        staleness: per stage, in updates.
        memory: peak bytes per worker.
        missing: why it does not fit into memory; None if it does.
        bound: in a few words, what bounds the period.
        bound_by: the same in a sentence.
        lower_bound: seconds; no cuts have a shorter period (with mean times).
    """

    schedule: Schedule
    devices: int
    batch_size: int | None
    cuts: tuple[int, ...]
    period: Estimate
    throughput: float
    over_bp: Estimate | None
    over_dp: Estimate | None
    bp_fits: bool
    dp_fits: bool
    staleness: tuple[int, ...]
    memory: tuple[float, ...]
    missing: str | None
    bound: str
    bound_by: str
    lower_bound: float

    @property
    def fits(self) -> bool:
        """Whether every device has the memory."""
        return self.missing is None


@dataclass(frozen=True, slots=True)
class Plan:
    """All points that are possible, the fastest that fits first, and what was left out.

    Args:
        rows: ranked.
        skipped: reason to number of points.
    """

    rows: tuple[Row, ...]
    skipped: dict[str, int]


class EmptyPlanError(ValueError):
    """No point of a sweep is possible; the message says why."""


_Batch = tuple[int | None, float]  # samples per update, and in batches of the profile


def plan(
    graph: LayerGraph,
    names: Sequence[str],
    stages: Iterable[int],
    *,
    batch_sizes: Sequence[int] | None = None,
    micro_batches: Sequence[int] | None = None,
    replicas: Sequence[int] = (1,),
    syncs: Sequence[Sync] | None = None,
    stages_per_device: Sequence[int] = (1,),
    cluster: Cluster | None = None,
    optimizer: str = "sgd",
    profile_batch_size: int | None = None,
    jitter: Time = 1.0,
    precision: float = 0.01,
    seed: int = 0,
    exact: bool = False,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Predict every combination, and rank them.

    The sweep runs through joblib: inside ``joblib.parallel_config(backend="dask")`` (or "ray") a
    cluster's workers do it. The result does not depend on who does.

    Args:
        graph: layers as measured.
        names: of methods, see `methods.METHODS`. "dp" takes stages x replicas devices as replicas.
        stages: numbers of stages.
        batch_sizes: samples per update over all replicas; None is the profile's batch.
        micro_batches: per update, of the methods that split it; the others do 1 only. None: what
            each method takes by itself.
        replicas: data-parallel copies.
        syncs: synchronisations; None is each method's own.
        stages_per_device: how many consecutive workers of a schedule share a device, see `fold`;
            a worker holds one stage, but for the methods that put several on one.
        cluster: the devices, in their order; None is any number of equal ones with free links.
        optimizer: one of `OPTIMIZERS`.
        profile_batch_size: samples of the batch that ``graph`` was measured with, if known.
        jitter: factor on every operation, drawn anew for each.
        precision: of the periods where times vary: half their 95 % interval, as a fraction.
        seed: of the draws; all points meet the same luck.
        exact: whether to look for the best cuts as long as it takes, see `partition`.
        jobs: processes; None leaves it to joblib's configuration (one, without any).
        progress: called with the points done and all points.

    Raises:
        EmptyPlanError: if no point is possible; says why.
        ValueError: naming an argument that is wrong.

    >>> from ddg_sim.folding import fold
    from ddg_sim.layers import Layer
    >>> layers = tuple(Layer(f"layer{n}", 0.01, 0.02) for n in range(8))
    >>> chain = LayerGraph(layers, tuple((n, n + 1) for n in range(7)))
    >>> for row in plan(chain, ["bp", "ddg"], [2, 4, 16]).rows:
    ...     print(row.schedule.method, row.devices, f"{row.period.value:g} {row.over_bp.value:g}")
    ddg 4 0.06 4
    ddg 2 0.12 2
    bp 2 0.24 1
    bp 4 0.24 1
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
    if batch_sizes is not None and profile_batch_size is None:
        raise ValueError("batch_sizes needs profile_batch_size: the layers do not say theirs")
    for name, values in (
        ("batch_sizes", batch_sizes or ()),
        ("stages", stages := tuple(stages)),
        ("micro_batches", micro_batches or ()),
        ("replicas", replicas),
        ("stages_per_device", stages_per_device),
        ("profile_batch_size", [profile_batch_size] if profile_batch_size is not None else ()),
    ):
        if wrong := [value for value in values if value < 1]:
            raise ValueError(f"{name} holds {wrong[0]}: give numbers of at least 1")
    if isinstance(jitter, int | float) and jitter != 1:
        raise ValueError(f"jitter {jitter} does not vary: give a distribution, or scale the layers")
    for name in names:
        if name not in methods.METHODS:
            known = ", ".join(methods.METHODS)
            raise ValueError(f"unknown method {name!r}; known methods: {known}")
    batches: list[_Batch] = [(profile_batch_size, 1.0)]
    if batch_sizes is not None and profile_batch_size is not None:
        batches = [(size, size / profile_batch_size) for size in dict.fromkeys(batch_sizes)]
    setting = Setting(graph, cluster, OPTIMIZERS[optimizer], jitter, precision, seed, exact=exact)

    points: dict[Schedule, list[_Batch]] = {}
    skipped: Counter[str] = Counter()
    for name, sync, count, micro, copies, share in product(
        dict.fromkeys(names),
        syncs or (None,),
        stages,
        micro_batches or (None,),
        replicas,
        dict.fromkeys(stages_per_device),
    ):
        try:
            schedule = _folded(_schedule(name, sync, count, micro, copies), share)
            _check(schedule, setting)
        except ValueError as error:
            skipped[str(error)] += len(batches)
            continue
        least = schedule.samples_per_iteration * schedule.replicas
        enough = [batch for batch in batches if batch[0] is None or batch[0] >= least]
        if len(enough) < len(batches):
            reason = "fewer samples per update than micro-batches times replicas"
            skipped[reason] += len(batches) - len(enough)
        if enough:
            points[schedule] = enough
    if not points:
        raise EmptyPlanError(f"no point is possible: {_reasons(skipped)}")
    factors = [factor for _, factor in batches]
    wanted: dict[Schedule, dict[float, None]] = {}
    for schedule, enough in points.items():
        wanted.setdefault(_anonymous(schedule), {}).update((f, None) for _, f in enough)
        for baseline in _baselines(schedule):
            wanted.setdefault(baseline, {}).update(dict.fromkeys(factors))
    found = _run(setting, wanted, jobs, progress)
    rows = [row for case in points.items() for row in _rows(*case, found)]
    return Plan(tuple(sorted(rows, key=_rank)), dict(skipped))


def _rank(row: Row) -> tuple[bool, float, int, int]:
    """Fits first, then samples per second; of equal ones the simpler."""
    speed = float(f"{-row.throughput:.9e}")  # the tenth digit is rounding
    return (not row.fits, speed, row.devices, max(row.staleness))


_Found = dict[Schedule, dict[float, Outcome]]


def _run(
    setting: Setting,
    wanted: dict[Schedule, dict[float, None]],
    jobs: int | None,
    progress: Callable[[int, int], None] | None,
) -> _Found:
    """All outcomes; none for a baseline that is impossible."""
    found: _Found = {}
    total, done = sum(map(len, wanted.values())), 0
    # Those that take long come first, so that at the end nobody waits for them.
    order = sorted(wanted, key=lambda schedule: -sum(map(len, schedule.workers)))
    tasks = (
        joblib.delayed(_task)(setting, schedule, index, tuple(wanted[schedule]))
        for index, schedule in enumerate(order)
    )
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    for index, results in parallel(tasks):
        found[order[index]] = results
        done += len(wanted[order[index]])
        if progress is not None:
            progress(done, total)
    return found


def _task(
    setting: Setting, schedule: Schedule, index: int, factors: tuple[float, ...]
) -> tuple[int, dict[float, Outcome]]:
    try:
        return index, dict(zip(factors, outcomes(setting, schedule, factors), strict=True))
    except (ClusterError, ScheduleError):  # of a baseline: points have been checked
        return index, {}


def _schedule(
    name: str, sync: Sync | None, stages: int, micro: int | None, copies: int
) -> Schedule:
    if name == "dp":
        stages, copies = 1, stages * copies
    known = signature(methods.METHODS[name]).parameters
    splits = "micro_batches" in known
    if micro == 1 and not splits:
        micro = None
    if sync not in (None, Sync.NONE) and "sync" not in known:
        raise ValueError(f"{name} knows no synchronisation but none")
    if micro is not None and not splits:
        raise ValueError(f"{name} does not split a batch: it takes 1 micro-batch")
    options: dict[str, Any] = {} if micro is None else {"micro_batches": micro}
    try:
        return methods.method(name, stages, sync, replicas=copies, **options)
    except ValueError as error:  # without the value, the same for many points
        raise ValueError(f"{name}: {re.sub(r', got -?[0-9]+$', '', str(error))}") from None


def _folded(schedule: Schedule, share: int) -> Schedule:
    if share > len(schedule.workers):
        raise ValueError("fewer stages than were to share a device")
    return fold(schedule, share)


def _check(schedule: Schedule, setting: Setting) -> None:
    """Refuse what cannot be run at all, with as few different reasons as possible."""
    layers = len(setting.graph.layers)
    if schedule.num_stages > layers:
        raise ValueError(f"more stages than the network's {layers} layers")
    try:
        placement = place(schedule, setting.cluster)
    except TooFewDevicesError:
        assert setting.cluster is not None
        have = len(setting.cluster.names)
        raise ValueError(f"more devices than the cluster's {have}") from None
    if placement.queue != schedule.queue:
        validate(replace(schedule, queue=placement.queue))


def _baselines(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """Backpropagation on the devices of one replica, and data parallelism on all."""
    workers = len(schedule.workers)
    return _bp(workers, 1), _bp(1, workers * schedule.replicas)


@lru_cache(maxsize=1024)  # points share them
def _bp(stages: int, replicas: int) -> Schedule:
    return _anonymous(methods.data_parallel(methods.bp(stages), replicas))


def _anonymous(schedule: Schedule) -> Schedule:
    """The same without its name: methods that run the same operations are looked at once."""
    return replace(schedule, method="any")


def _rows(schedule: Schedule, batches: list[_Batch], found: _Found) -> Iterator[Row]:
    mine = found[_anonymous(schedule)]
    bp, dp = (found[baseline] for baseline in _baselines(schedule))
    devices = len(schedule.workers) * schedule.replicas
    updates = staleness(schedule)
    for size, factor in batches:
        here, before, beside = mine[factor], bp.get(factor), dp.get(factor)
        if size is not None and size < devices:
            beside = None  # some devices would have no sample
        period = float(here.periods.mean())
        samples = factor if size is None else size
        yield Row(
            schedule=schedule,
            devices=devices,
            batch_size=size,
            cuts=here.cuts,
            period=estimate(here.periods) if len(here.periods) > 1 else exactly(period),
            throughput=samples / period if period > 0 else math.inf,
            over_bp=_speedup(before, here),
            over_dp=_speedup(beside, here),
            bp_fits=before is not None and before.missing is None,
            dp_fits=beside is not None and beside.missing is None,
            staleness=updates,
            memory=here.memory,
            missing=here.missing,
            bound=here.bound,
            bound_by=here.bound_by,
            lower_bound=here.lower_bound,
        )


def _speedup(before: Outcome | None, after: Outcome) -> Estimate | None:
    if before is None or after.missing is not None or not after.periods.any():
        return None
    # Run r of both met the same luck.
    count = min(len(before.periods), len(after.periods))
    if count == 1:
        return exactly(float(before.periods[0] / after.periods[0]))
    return ratio(before.periods[:count], after.periods[:count])


def _reasons(skipped: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common())
