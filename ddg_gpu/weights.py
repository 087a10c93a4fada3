"""Weights that are read later than they are written.

An optimizer changes parameters in place, but the backward pass of a sample in flight still needs
the values its forward pass saw. A graph that held the live parameters would then raise, or, with a
fused optimizer, silently compute another gradient. So graphs are built on copies, one per
*version*, shared by all samples that read it; optimizer and module keep the real parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from ddg_sim.rule import Activations, Jacobian, Rule

Weights = dict[str, Tensor]


class VersionStore:
    """The versions of one stage's parameters that something in flight still reads.

    Args:
        stage: the module whose parameters are versioned.
        rule: what the method does to the numbers.
        stale: whether updates happen between a sample's forward and its backward pass. If not, the
            live parameters serve and nothing is copied.
    """

    def __init__(self, stage: nn.Module, rule: Rule, stale: bool) -> None:
        self.newest = 0
        self._parameters: Weights = dict(stage.named_parameters())
        self._copies: dict[int, Weights] = {}
        self._readers: Counter[int] = Counter()
        self._stash = stale and rule.jacobian is Jacobian.STASHED
        overwrite = stale and rule == Rule(Activations.GRAPH, Jacobian.CURRENT)
        self._shared = self._copy() if overwrite else None

    def acquire(self, version: int) -> Weights:
        """Weights to build a graph on, by name; they keep their values until `release`.

        Under `Jacobian.CURRENT` they do not: they follow every update, which is what it means.
        """
        if self._shared is not None:
            return self._shared
        if not self._stash:
            return self._live(version)
        if version not in self._copies:
            self._live(version)
            self._copies[version] = self._copy()
        self._readers[version] += 1
        return self._copies[version]

    def release(self, version: int) -> None:
        """Say that one reader of ``version`` is done with it."""
        if not self._stash:
            return
        self._readers[version] -= 1
        if not self._readers[version]:
            del self._copies[version], self._readers[version]

    def updated(self) -> None:
        """Note that the optimizer has changed the live parameters."""
        self.newest += 1
        if self._shared is not None:
            # Through .data, so that autograd does not refuse the graphs that hold these tensors.
            for name, parameter in self._parameters.items():
                self._shared[name].data.copy_(parameter.data)

    @property
    def count(self) -> int:
        """Versions held now, the newest included."""
        return len(self._copies.keys() | {self.newest})

    def _live(self, version: int) -> Weights:
        if version != self.newest:
            raise RuntimeError(f"version {version} is gone; the newest is {self.newest}")
        return self._parameters

    def _copy(self) -> Weights:
        return {
            name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
            for name, parameter in self._parameters.items()
        }


def call(stage: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Run a module forward on the given weights instead of its own; buffers stay its own.

    >>> import torch
    >>> stage = nn.Linear(1, 1, bias=False)
    >>> call(stage, {"weight": torch.tensor([[3.0]])}, torch.tensor([2.0]))
    tensor([6.])
    """
    output: Tensor = functional_call(stage, dict(weights), (inputs,))
    return output
