"""Cutting a model into stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddg_gpu.boundaries import boundaries, compare
from ddg_gpu.chain import Chain, SequentialChain, check, is_sequence, listed, trainable
from ddg_gpu.dryrun import SplitError, batch_of
from ddg_gpu.exporting import export
from ddg_gpu.graphcut import GraphChain
from ddg_gpu.layertimes import seconds
from ddg_gpu.tracing import trace
from ddg_gpu.value import Value

# On a CPU core, producing one element of an element-wise layer (batch norm, ReLU, addition) takes
# about as long as this many floating-point operations of a convolution. It only ranks layers for
# the default cut, which must not depend on a clock; a measured cut comes from a profile.
FLOPS_PER_ELEMENT = 200

By = str | Sequence[int | str]

Found = TypeVar("Found")


def split(
    model: nn.Module,
    num_stages: int,
    by: By = "time",
    example: Value | None = None,
    tied: Sequence[int] = (),
) -> list[nn.Module]:
    """Cut a model into stages; run one after the other they compute what the model computes.

    The stages share the model's parameters and buffers, under the same names: the union of their
    state_dicts is the model's (without what its forward pass does not use), and training them
    trains the model. Every stage takes one argument, a tensor or a flat tuple of tensors, which is
    what the stage before returns. All that a later stage needs is passed on by those between.

    An `nn.Sequential` is cut between its layers, also inside sequences within it. Any other model
    is looked into, and cut where only tensors cross whose first dimension is the batch:

    - by symbolic tracing (`torch.fx`, see `tracing.trace`), which keeps the layers of torch.nn,
      and modules it cannot look into, as modules: their state, hooks and mode are their own;
    - if that finds too few places, by `torch.export` (see `exporting.export`), which makes single
      operations of layers, whose dropout and normalisation follow the mode of the stage.

    Either way the stages are run beside the model, in both modes, and must agree bit for bit in
    outputs and buffers. Their shapes are those of ``example``, but for the batch size.

    Args:
        model: the whole model. It is left as it is.
        num_stages: K, at least 1.
        by: "time" balances the seconds of forward plus backward pass, measured on this machine, on
            one thread (another run may cut elsewhere: processes that train together must share
            one answer of `cut_names`); "parameters" the number of parameters; or the first
            layers of stages 1..K-1, by name or, in an `nn.Sequential`, by index.
        example: a mini-batch of inputs, a tensor (B, ...), or a tuple of them for a model that
            takes several arguments. Only an `nn.Sequential` that is not cut by time needs none,
            and what crosses is checked only where there is one.
        tied: two stages that may share parameters, where the training method ties them.

    Raises:
        SplitError: if the model cannot be cut so: naming the layer, and what to do. Beside what
            `boundaries` refuses: stages without trainable parameters, and parameters that two
            stages would share.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(),
    ...                       nn.Linear(64, 2))
    >>> [list(stage.state_dict()) for stage in split(model, 2, by="parameters")]
    [['0.weight', '0.bias', '2.weight', '2.bias'], ['4.weight', '4.bias']]
    >>> [len(stage) for stage in split(model, 3, by=["2", "4"], example=torch.zeros(1, 8))]
    [2, 2, 1]
    """
    chain, cuts = _cut(model, num_stages, by, example, tied)
    bounds = [0, *cuts, len(chain.names)]
    stages = [chain.join(first, last) for first, last in pairwise(bounds)]
    if example is not None:
        boundaries(stages, example)
        if not isinstance(chain, SequentialChain):
            compare(model, stages, example)
    return stages


def cut_names(
    model: nn.Module,
    num_stages: int,
    by: By = "time",
    example: Value | None = None,
    tied: Sequence[int] = (),
) -> list[str]:
    """Where `split` cuts: names of the first layers of stages 1..K-1, to be given as its ``by``.

    >>> cut_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 2, "parameters")
    ['2']
    """
    chain, cuts = _cut(model, num_stages, by, example, tied)
    return [chain.names[cut] for cut in cuts]


def layer_names(model: nn.Module, example: Value | None = None) -> list[str]:
    """Names of a model's layers: a stage may begin at each of them.

    Args:
        model: the whole model.
        example: as in `split`.

    Raises:
        SplitError: if the model cannot be looked into.

    >>> layer_names(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)))
    ['0.0', '0.1', '1']
    """
    return _first(model, example, lambda chain: chain.names)


def balanced_cuts(costs: Sequence[float], num_stages: int) -> list[int]:
    """Cuts of contiguous layers into K stages that minimise the largest stage's cost.

    Exact, by dynamic programming; of equally good cuts, the one with the earliest cuts.

    Args:
        costs: cost of each of L layers, in any unit.
        num_stages: K in 1..L.

    Raises:
        ValueError: if there are more stages than layers, or fewer than one.

    >>> balanced_cuts([1, 1, 1, 3, 3], 3)
    [3, 4]
    """
    layers = len(costs)
    if not 1 <= num_stages <= layers:
        raise ValueError(
            f"stages must be between 1 and the model's {layers} layers, got {num_stages}"
        )
    total = [0.0, *accumulate(costs)]
    # best[l] = (largest stage cost, cuts) of the first l layers in as many stages as looked at.
    best: list[tuple[float, list[int]] | None] = [(cost, []) for cost in total]
    best[0] = None
    for _ in range(num_stages - 1):
        best = [
            min(
                (
                    (max(before[0], total[last] - total[cut]), [*before[1], cut])
                    for cut in range(1, last)
                    if (before := best[cut]) is not None
                ),
                default=None,
            )
            for last in range(layers + 1)
        ]
    found = best[layers]
    assert found is not None
    return found[1]


def layer_costs(model: nn.Sequential, example: Tensor) -> list[float]:
    """Estimated forward cost of every layer, in floating-point operations; reads no clock.

    Args:
        model: a sequence of layers; it is run in evaluation mode, its state does not change.
        example: a mini-batch of inputs, shape (B, ...).

    >>> layer_costs(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    [412.0]
    """
    elements = 0

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    was_training = model.training
    model.eval()
    costs = []
    try:
        with torch.no_grad():
            for layer in model:
                elements = 0
                with FlopCounterMode(display=False) as counter:
                    example = layer(example)
                costs.append(float(counter.get_total_flops() + FLOPS_PER_ELEMENT * elements))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return costs


def _chains(model: nn.Module, example: Value | None) -> list[Callable[[], Chain]]:
    """Makers of a model's layers; the next one is for where the one before does not serve."""
    if isinstance(model, nn.Sequential) and is_sequence(model):
        return [lambda: SequentialChain(model)]
    if example is None:
        raise SplitError(
            f"{type(model).__name__} is no nn.Sequential: give an example, a mini-batch of inputs,"
            " so that it can be looked into"
        )
    return [
        lambda: GraphChain(model, trace(model, example), example),
        lambda: GraphChain(model, export(model, example), example),
    ]


def _cut(
    model: nn.Module, num_stages: int, by: By, example: Value | None, tied: Sequence[int]
) -> tuple[Chain, list[int]]:
    """The layers of a model, and which of them are the first of stages 1..K-1."""
    if num_stages < 1:
        raise SplitError(f"num_stages must be at least 1, got {num_stages}")
    if isinstance(by, str) and by not in ("time", "parameters"):
        raise SplitError(f"by={by!r} is unknown: give 'time', 'parameters' or a list of layers")
    if not isinstance(by, str) and len(by) != num_stages - 1:
        raise SplitError(
            f"by must name num_stages - 1 = {num_stages - 1} first layers of stages, got {list(by)}"
        )
    if by == "time" and example is None:
        raise SplitError("by='time' needs an example, a mini-batch of inputs to measure with")
    if example is not None:
        batch_of(example, 1)  # says what is wrong with it

    def cuts(chain: Chain) -> tuple[Chain, list[int]]:
        if isinstance(by, str):
            return chain, _balanced(chain, model, num_stages, by, example, bool(tied))
        return chain, _named(chain, model, by)

    chain, found = _first(model, example, cuts)
    check(chain, model, found, tied)
    return chain, found


def _first(model: nn.Module, example: Value | None, use: Callable[[Chain], Found]) -> Found:
    """What is made of a model's layers, seen in the first way that serves."""
    failures = []
    for make in _chains(model, example):
        try:
            return use(make())
        except SplitError as error:
            failures.append(error)
    raise failures[0]


def _named(chain: Chain, model: nn.Module, by: Sequence[int | str]) -> list[int]:
    """The layers that cuts name."""
    names = list(model._modules)
    cuts = []
    for cut in by:
        if isinstance(cut, str):
            cuts.append(chain.find(cut))
        elif not isinstance(chain, SequentialChain):
            raise SplitError(
                f"cut {cut} of a {type(model).__name__}, which has no numbered layers: give names,"
                f" such as {listed(chain.names)}"
            )
        elif not 0 < cut < len(names):
            raise SplitError(
                f"cuts must be layer indices in 1..{len(names) - 1} in increasing order,"
                f" got {list(by)}"
            )
        else:
            cuts.append(chain.find(names[cut]))
    if any(left >= right for left, right in pairwise([0, *cuts])):
        raise SplitError(f"cuts must be in increasing order, none the first layer, got {list(by)}")
    return cuts


def _balanced(
    chain: Chain,
    model: nn.Module,
    num_stages: int,
    by: str,
    example: Value | None,
    may_share: bool,
) -> list[int]:
    """Cuts that minimise the largest stage's cost, where as few tensors cross as can be."""
    starts: list[int] = []
    for most in sorted(set(chain.crossing[1:])):
        starts = trainable(chain, most, may_share)
        if len(starts) >= num_stages:
            break
    else:
        starts = starts or [0]
        if len(starts) < num_stages:
            layers = listed([chain.names[start] for start in starts])
            raise SplitError(
                f"num_stages={num_stages} is too many for this {type(model).__name__}: the stages"
                f" that train can begin at {len(starts)} of its layers only ({layers}); layers with"
                " nothing to train stay with a neighbour, and layers with shared weights together"
            )
    bounds = list(pairwise([*starts, len(chain.names)]))
    if by == "parameters":
        costs = []
        for first, last in bounds:
            own = {id(t): t for layer in chain.state[first:last] for t in layer}
            costs.append(float(sum(t.numel() for t in own.values() if t.requires_grad)))
    else:
        assert example is not None
        costs = seconds([chain.join(first, last) for first, last in bounds], example)
    return [starts[cut] for cut in balanced_cuts(costs, num_stages)]
