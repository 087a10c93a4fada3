"""A model as a chain of layers, between which it may be cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn

from ddg_gpu.dryrun import SplitError


class Chain(Protocol):
    """Layers that, run one after the other, are a model.

    Attributes:
        names: of the layers, as the model knows them.
        crossing: how many tensors enter each layer.
        state: what each layer trains or writes: on two stages, it would be two things.
    """

    names: list[str]
    crossing: list[int]
    state: list[list[Tensor]]

    def find(self, name: str) -> int:
        """The layer that begins where the module or layer ``name`` begins.

        Raises:
            SplitError: if there is none, or if no stage can begin there.
        """
        ...

    def join(self, first: int, last: int) -> nn.Module:
        """Layers first..last-1 as one module, whose parameters have their names in the model."""
        ...


class SequentialChain:
    """An `nn.Sequential`; sequences within it are taken apart, for a stage may begin inside.

    Args:
        model: the sequence; see `is_sequence`.

    >>> chain = SequentialChain(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Tanh()), nn.ReLU()))
    >>> chain.names
    ['0.0', '0.1', '1']
    >>> chain.join(1, 3)
    Sequential(
      (0): Sequential(
        (1): Tanh()
      )
      (1): ReLU()
    )
    """

    def __init__(self, model: nn.Sequential) -> None:
        self._model = model
        self._layers = _leaves(model, ())
        self.names = [".".join(path) for path, _ in self._layers]
        self.crossing = [1] * len(self._layers)
        self.state = [[*layer.parameters(), *layer.buffers()] for _, layer in self._layers]

    def find(self, name: str) -> int:
        """See `Chain`."""
        for index, own in enumerate(self.names):
            if own == name or own.startswith(name + "."):
                return index
        raise SplitError(
            f"cut {name!r} is no layer of the {type(self._model).__name__}: its layers are"
            f" {listed(self.names)}"
        )

    def join(self, first: int, last: int) -> nn.Sequential:
        """See `Chain`."""
        return _rebuilt(self._model, self._layers[first:last], depth=0)


def check(chain: Chain, model: nn.Module, cuts: Sequence[int], tied: Sequence[int] = ()) -> None:
    """Refuse stages that share what they train or write, or have nothing to train.

    Args:
        chain: the layers.
        model: the whole model, for the names of its tensors.
        cuts: first layers of stages 1..K-1.
        tied: two stages that may share parameters.

    Raises:
        SplitError: naming the tensor, or the stage and its layers.
    """
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    home: dict[int, int] = {}
    for stage, (first, last) in enumerate(pairwise([0, *cuts, len(chain.names)])):
        state = [tensor for layer in chain.state[first:last] for tensor in layer]
        for tensor in state:
            other = home.setdefault(id(tensor), stage)
            may = {other, stage} <= set(tied) and isinstance(tensor, nn.Parameter)
            if other != stage and not may:
                raise SplitError(
                    f"stages {other} and {stage} would share"
                    f" {names.get(id(tensor), 'a tensor')!r}: cut so that the layers that use it"
                    " are on one stage; only tied stages may share, as ouroboros' first and last"
                )
        if not any(tensor.requires_grad for tensor in state):
            raise SplitError(
                f"stage {stage} (layers {chain.names[first]!r} to {chain.names[last - 1]!r}) has no"
                " parameters to train: give its layers to a neighbour"
            )


def trainable(chain: Chain, most: int, may_share: bool = False) -> list[int]:
    """Layers at which a stage may begin, so that all parts between have something to train.

    What has nothing to train stays with what comes before it, or with the first that has. Tied
    layers, and those between them, stay together, unless stages may share what they train.

    Args:
        chain: the layers.
        most: tensors that may cross at once.
        may_share: see there.

    >>> linear = nn.Linear(2, 2)
    >>> trainable(SequentialChain(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), linear, linear)), 1)
    [0, 2]
    """
    first: dict[int, int] = {}
    tied: set[int] = set()
    for layer, state in enumerate(chain.state):
        for tensor in state:
            if not may_share:
                tied.update(range(first.setdefault(id(tensor), layer) + 1, layer + 1))
    starts = [i for i in range(1, len(chain.names)) if chain.crossing[i] <= most and i not in tied]
    found: list[int] = []
    for start, end in pairwise([0, *starts, len(chain.names)]):
        if any(tensor.requires_grad for layer in chain.state[start:end] for tensor in layer):
            found.append(start)
    return [0, *found[1:]]


def is_sequence(module: nn.Module) -> bool:
    """Whether a module does nothing but run its children one after the other.

    >>> is_sequence(nn.Sequential()), is_sequence(nn.ModuleList())
    (True, False)
    """
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a message, not too many.

    >>> listed(["a", "b", "c"], most=2)
    'a, b, … (3 in all)'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"


Path = tuple[str, ...]


def _leaves(module: nn.Module, path: Path) -> list[tuple[Path, nn.Module]]:
    found = []
    for name, child in module._modules.items():
        assert child is not None
        own = (*path, name)
        found += _leaves(child, own) if is_sequence(child) and child._modules else [(own, child)]
    return found


def _rebuilt(
    container: nn.Module, layers: Sequence[tuple[Path, nn.Module]], depth: int
) -> nn.Sequential:
    """The part of a sequence that consists of some of its layers, under the same names."""
    part = nn.Sequential()
    part.training = container.training
    groups: dict[str, list[tuple[Path, nn.Module]]] = {}
    for path, layer in layers:
        groups.setdefault(path[depth], []).append((path, layer))
    for name, group in groups.items():
        child = container._modules[name]
        assert child is not None
        whole = group[0][1] is child or len(group) == len(_leaves(child, ()))
        part.add_module(name, child if whole else _rebuilt(child, group, depth + 1))
    return part
