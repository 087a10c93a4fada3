"""Seconds of GPT training on several GPUs: tensor, data and pipeline parallel (1F1B with flush).

Eight constants of the machine, calibrated on some measured iterations, give the costs of every
stage; the iteration time is the period of the 1F1B schedule with these costs. Counts are per GPU,
for 2-byte activations and weights (Narayanan et al. 2021, arXiv 2104.04473, give the same
operations per layer; the bytes are counted here):

- matrix products of a layer, forward: (24 b s h² + 4 b s² h) / t operations;
- activations read and written: 2 b s h (10 + 12/t) bytes around norms, dropout, GELU and
  transposes, and 12 b a s² / t bytes around the attention scores;
- all-reduces of tensor parallelism: two per layer and pass, of 2 b s h bytes, as rings:
  2(t-1) latencies, and 2(t-1)/t of the bytes over the link;
- the host needs some time to launch a layer's kernels; a pass takes what is longer, host or GPU;
- the backward pass costs twice the forward pass and repeats it first (activation checkpointing,
  which these runs used);
- logits and loss on the last stage: 2 b s h V / t operations, slower each than a layer's, because
  the loss passes over them many times; backward twice that; not repeated;
- per iteration: an optimizer step over the stage's parameters, 12 h² per layer and V h for the
  embedding on the first and on the last stage, all divided by t; and a ring all-reduce of their
  gradients among d replicas.

b micro-batch, s sequence, h hidden size, a heads, V vocabulary, t and d degrees of tensor and data
parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ddg_sim.costs import Costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.synchronous import one_f_one_b

VOCABULARY = 50257  # GPT-2's, which vTrain's configurations use
ELEMENT = 2  # bytes of a half-precision number

Vector = NDArray[np.float64]

_schedule = cache(one_f_one_b)  # many runs share one


@dataclass(frozen=True, slots=True)
class GptRun:
    """One configuration of training.

    Args:
        global_batch: sequences per iteration.
        micro_batch: sequences per micro-batch and replica.
        hidden: hidden size.
        heads: attention heads.
        layers: transformer layers, a multiple of ``pipeline``.
        sequence: tokens per sequence.
        tensor: GPUs that share a layer.
        data: replicas.
        pipeline: stages.

    Raises:
        ValueError: for a batch or layers that cannot be divided as asked.

    >>> GptRun(32, 2, 1024, 16, 24, 1024, tensor=2, data=2, pipeline=2).micro_batches
    8
    """

    global_batch: int
    micro_batch: int
    hidden: int
    heads: int
    layers: int
    sequence: int
    tensor: int
    data: int
    pipeline: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} must be at least 1, got {getattr(self, field.name)}"
                )
        if self.global_batch % (self.data * self.micro_batch):
            raise ValueError(
                f"global_batch {self.global_batch} must be a multiple of data x micro_batch"
                f" = {self.data * self.micro_batch}"
            )
        if self.layers % self.pipeline:
            raise ValueError(f"layers {self.layers} must be a multiple of pipeline {self.pipeline}")

    @property
    def micro_batches(self) -> int:
        """Micro-batches per iteration and replica."""
        return self.global_batch // (self.data * self.micro_batch)


@dataclass(frozen=True, slots=True)
class GptMachine:
    """The constants of a machine: where calibration starts, and how fast it cannot be.

    The defaults are roughly half of what an A100 can do; the limits are from NVIDIA's A100 80GB
    data sheet (312 TFLOP/s in half precision, 2039 GB/s, NVLink 300 GB/s per direction).

    Args:
        flop: seconds per operation of a layer's matrix products.
        byte: seconds per byte read or written.
        kernels: seconds of a layer's forward pass that do not depend on any size.
        host: seconds to launch a layer's forward pass; the backward pass takes twice that.
        latency: seconds per step of a ring all-reduce.
        link: seconds per byte sent to another GPU.
        vocabulary: times that an operation on the logits is slower than one on a layer.
        parameter: seconds of the optimizer step per parameter.
    """

    flop: float = 1 / 200e12
    byte: float = 1 / 1.2e12
    kernels: float = 1e-4
    host: float = 1e-3
    latency: float = 2e-5
    link: float = 1 / 150e9
    vocabulary: float = 4.0
    parameter: float = 20 / 1.2e12

    def costs(self, run: GptRun) -> Costs:
        """Seconds of every stage and link of a run, per micro-batch.

        >>> GptMachine().costs(GptRun(4, 1, 1024, 16, 24, 1024, 1, 1, pipeline=2)).num_stages
        2
        """
        found = _seconds(self, _columns([run]))
        inner, links = run.pipeline - 1, run.pipeline - 1
        last, transfer = float(found.outer_update[0]), (float(found.transfer[0]),) * links
        update = (last, *(float(found.inner_update[0]),) * (inner - 1), last)
        return Costs(
            forward=(float(found.forward[0]),) * inner + (float(found.last_forward[0]),),
            backward=(float(found.backward[0]),) * inner + (float(found.last_backward[0]),),
            update=update if inner else (last,),
            activation_transfer=transfer,
            gradient_transfer=transfer,
        )

    def period(self, run: GptRun) -> float:
        """Seconds of one training iteration: the period of the 1F1B schedule.

        >>> round(GptMachine().period(GptRun(4, 1, 1024, 16, 24, 1024, 1, 1, pipeline=2)), 3)
        0.269
        """
        return cycle_time(_schedule(run.pipeline, run.micro_batches), self.costs(run)).period


#: No machine's constant is below these; host, latency and vocabulary have no known limit.
FASTEST = GptMachine(1 / 312e12, 1 / 2.039e12, 0.0, 0.0, 0.0, 1 / 300e9, 0.0, 0.0)


def calibrate(runs: Sequence[GptRun], seconds: Sequence[float]) -> GptMachine:
    """Constants with which the predicted iteration times are nearest, in relative error.

    Least squares of log(predicted / measured) over the logarithms of the constants, which keeps
    them positive. A weak pull towards the defaults (2 % error per factor of e) settles what the
    runs leave open. Inside the fit the period is `closed_period`, which equals the schedule's.

    Args:
        runs: configurations, more than there are constants.
        seconds: measured time of one iteration each.

    Raises:
        ValueError: for too few runs, or times that are not positive, or not one per run.
    """
    measured = np.asarray(seconds, dtype=float)
    names = [field.name for field in fields(GptMachine)]
    if len(runs) != len(measured):
        raise ValueError(f"{len(measured)} seconds for {len(runs)} runs: give one per run")
    if len(runs) <= len(names):
        raise ValueError(f"{len(runs)} runs cannot calibrate {len(names)} constants: give more")
    if not (np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError("seconds must be positive and finite")
    start = np.log(astuple(GptMachine()))
    least = np.log(np.maximum(astuple(FASTEST), 1e-30))

    def errors(logs: Vector) -> Vector:
        machine = GptMachine(*map(float, np.exp(logs)))
        relative = np.log(closed_period(machine, runs) / measured)
        return np.concatenate([relative, 0.02 * (logs - start)])

    found = least_squares(errors, start, bounds=(least, np.inf))
    return GptMachine(*map(float, np.exp(found.x)))


class _Seconds(NamedTuple):
    """Per run: what one micro-batch costs on all stages but the last, and on the last."""

    forward: Vector
    backward: Vector
    last_forward: Vector
    last_backward: Vector
    inner_update: Vector
    outer_update: Vector  # of the first and the last stage, which hold the embedding
    transfer: Vector


def _columns(runs: Sequence[GptRun]) -> dict[str, Vector]:
    table = {
        field.name: np.array([float(getattr(run, field.name)) for run in runs])
        for field in fields(GptRun)
    }
    return table | {"micro_batches": np.array([float(run.micro_batches) for run in runs])}


def _seconds(machine: GptMachine, run: Mapping[str, Vector]) -> _Seconds:
    b, h, s, t, d = (run[name] for name in ("micro_batch", "hidden", "sequence", "tensor", "data"))
    layers = run["layers"] / run["pipeline"]
    operations = (24 * b * s * h**2 + 4 * b * s**2 * h) / t
    message = ELEMENT * b * s * h
    traffic = message * (10 + 12 / t) + 6 * ELEMENT * b * run["heads"] * s**2 / t
    compute = operations * machine.flop + traffic * machine.byte + machine.kernels
    reduce = 2 * (2 * (t - 1) * machine.latency + _ring(t) * message * machine.link)
    forward = np.maximum(compute + reduce, machine.host)
    backward = np.maximum(2 * compute + reduce, 2 * machine.host) + forward
    logits = 2 * b * s * h * VOCABULARY / t * machine.flop * machine.vocabulary
    inner = 12 * h**2 * layers / t
    outer = inner + VOCABULARY * h / t
    per_parameter = machine.parameter + _ring(d) * ELEMENT * machine.link
    return _Seconds(
        layers * forward,
        layers * backward,
        layers * forward + logits,
        layers * backward + 2 * logits,
        inner * per_parameter,
        outer * per_parameter,
        message * machine.link,
    )


def _ring(members: Vector) -> Vector:
    """How often each byte of a ring all-reduce passes a link; never with one member."""
    return 2 * (members - 1) / members


def closed_period(machine: GptMachine, runs: Sequence[GptRun]) -> Vector:
    """Seconds of an iteration, per run, without the schedule; derived here, for the fit only.

    The last stage is the slowest, because of the logits. So the period is the first micro-batch's
    way there, all micro-batches there, the last one's way back, and the first stage's update.
    tests/test_anchors.py compares it with the schedule's.

    >>> run = GptRun(4, 1, 1024, 16, 24, 1024, 1, 1, pipeline=2)
    >>> round(float(closed_period(GptMachine(), [run])[0]), 3)
    0.269
    """
    run = _columns(runs)
    found = _seconds(machine, run)
    way = found.forward + found.backward + 2 * found.transfer
    there = found.last_forward + found.last_backward
    return (run["pipeline"] - 1) * way + run["micro_batches"] * there + found.outer_update
