"""Checks of a small training step: captured or eager, its launch overhead, its bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from ddg_gpu.cuda_partitions import PartitionsUnavailableError
from ddg_gpu.cuda_timing import capture, each_split, event_times, on, start, wall_time
from ddg_gpu.isolated import Record, RefutedError

#: A replayed graph's gradients may differ by this much, relative to their norm (TF32).
TOLERANCE = 1e-2
#: Steps that are timed in a row, and steps after which weights are compared.
REPEATS, STEPS = 50, 10


def small_stage(
    device: str = "cuda",
) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """Weights of a small convolution stage, and its forward and backward pass.

    Returns:
        The weights; a function that returns the gradients of the input and of the weights. The
        same numbers at every call of this function.
    """
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(4):
        convolution = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False)
        layers += [convolution, torch.nn.BatchNorm2d(16), torch.nn.ReLU()]
    stage = torch.nn.Sequential(*layers).to(device)
    x = torch.randn(32, 16, 16, 16, device=device, requires_grad=True)
    error = torch.randn(32, 16, 16, 16, device=device)
    weights: list[torch.Tensor] = list(stage.parameters())
    return weights, lambda: list(torch.autograd.grad(stage(x), [x, *weights], error))


def graphs(stages: list[int], record: Record) -> None:
    """A small stage eagerly and as a graph: the same gradients, in how many seconds."""
    start()
    step = small_stage()[1]
    expected = [gradient.clone() for gradient in step()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    eager = partial(on, stream, step)
    record("seconds eager, by the clock", wall_time([eager], REPEATS) / REPEATS)
    record("seconds eager, by events", _by_events(stream, eager))
    kept: list[torch.Tensor] = []

    def keep() -> None:
        kept[:] = step()

    captured = capture(stream, keep)
    record("seconds graph, by the clock", wall_time([captured.replay], REPEATS) / REPEATS)
    record("seconds graph, by events", median(event_times(captured, REPEATS)))
    for gradient in kept:  # so that a replay that writes nothing shows
        gradient.fill_(float("nan"))
    torch.cuda.synchronize()
    captured.replay()
    torch.cuda.synchronize()
    difference = max(
        float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
        for ours, theirs in zip(kept, expected, strict=True)
    )
    record("largest relative difference", str(difference))  # text: JSON has no NaN
    if not difference < TOLERANCE:
        raise RefutedError(
            f"gradients of a replayed graph differ by {difference:g} from eager ones"
        )
    record("kernels and copies per step", _kernels(eager))


def _by_events(stream: torch.cuda.Stream, step: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    for _ in range(REPEATS):
        step()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / REPEATS


def _kernels(step: Callable[[], object]) -> int | str:
    """How many kernels and copies the profiler sees, or why it sees none; it may lack rights."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        seen = sum(str(event.device_type).endswith("CUDA") for event in profile.events() or [])
    except Exception as error:
        return f"unknown: {error}".splitlines()[0]
    return seen or "unknown: the profiler saw none"


def determinism(stages: list[int], record: Record) -> None:
    """Weights after captured steps: the same graph twice, and graphs on two partitions."""
    start()
    try:
        record("streams", f"two of {stages[0]} partitions")
        each_split(stages[:1], record, lambda count, streams: _same_bits(streams[:2], record))
    except PartitionsUnavailableError:
        record("streams", "two plain ones")
        _same_bits([torch.cuda.Stream() for _ in range(2)], record)


def _same_bits(streams: list[torch.cuda.Stream], record: Record) -> None:
    """Equality by default and with cuDNN's deterministic algorithms; the latter must hold."""
    equal = False
    for name in ("default", "deterministic"):
        torch.backends.cudnn.deterministic = name == "deterministic"
        first, again, *elsewhere = [ends for stream in streams for ends in _train_twice(stream)]
        if not bool(first.isfinite().all()):
            raise RuntimeError(f"the weights are not finite after {STEPS} steps")
        same = {
            "on the same stream": torch.equal(first, again),
            "on the other stream": torch.equal(first, elsewhere[0]),
            "largest difference": max(
                float((ends - first).abs().max()) for ends in (again, *elsewhere)
            ),
        }
        record(f"same bits, {name}", same)
        equal = bool(same["on the same stream"] and same["on the other stream"])
    if not equal:
        raise RefutedError("not the same bits, even with deterministic algorithms of cuDNN")


def _train_twice(stream: torch.cuda.Stream) -> list[torch.Tensor]:
    """The weights after `STEPS` replays of a captured step from the same start, two times."""
    weights, step = small_stage()
    before = [weight.detach().clone() for weight in weights]

    def train() -> None:
        gradients = step()[1:]
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=1e-3)

    captured = capture(stream, train)
    ends = []
    for _ in range(2):
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        torch.cuda.synchronize()
        for _ in range(STEPS):
            captured.replay()
        torch.cuda.synchronize()
        ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
    return ends
