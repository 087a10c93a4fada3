"""Weights that are read later than they are written, earlier, or elsewhere.

An optimizer changes parameters in place, but the backward pass of a sample in flight still needs
the values its forward pass saw. A graph that held the live parameters would then raise, or, with a
fused optimizer, silently compute another gradient. So graphs are built on something else wherever
an update can overtake a sample; optimizer and module keep the real parameters. There are four
grounds to build on:

- *live*: the parameters themselves, where nothing is overtaken;
- *stashed*: tensors on the storage of the parameters. If samples still read them when the optimizer
  is about to change the parameters, these move to a fresh storage first (copy on write), and the
  old one stays with its readers. So there are as many storages as versions;
- *current*: the same without the move, so that a kept graph is differentiated at the weights of
  now;
- *working*: one copy for all, written anew before an operation that reads other values, under the
  graphs that hold it. So a kept graph is differentiated at predicted or corrected weights. This
  costs one storage more than there are versions.

Moving is ``parameter.data = ...``: the parameter stays the same object to module and optimizer.
Whoever else holds on to ``parameter.data``, or captured its address, is left with an old version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddg_gpu.step import Motion
from ddg_gpu.value import Value
from ddg_sim.rule import Activations, Jacobian, Rule, TransformKind

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Version:
    """The weights, and the update that made them."""

    weights: Weights
    motion: Motion | None


class VersionStore:
    """What one stage's operations read of its parameters, version by version.

    Args:
        module: the stage, whose parameters are versioned.
        rule: what the method does to the numbers.
        stage: whose numbers of the rule's corrections apply.
        stale: whether updates happen between a sample's forward and its backward pass. If not, the
            live parameters serve, unless a correction says otherwise.
        lag: by how many updates the weights of a forward pass may be older than the newest.
        rate: gives the learning rate in force, for predictions.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: Rule,
        stage: int,
        stale: bool,
        lag: int = 0,
        rate: Callable[[], float] = lambda: 0.0,
    ) -> None:
        def number(kind: TransformKind, offset: int = 0) -> float:
            values = rule.values(kind)
            return values[offset + stage] if values else 0.0

        self.newest = 0
        self._parameters: Weights = dict(module.named_parameters())
        self._trained = [name for name, p in self._parameters.items() if p.requires_grad]
        self._held: dict[int, _Version] = {}
        self._readers: Counter[int] = Counter()
        self._motion: Motion | None = None
        self._lag, self._rate = lag, rate
        self._ahead = {
            True: number(TransformKind.PREDICT_FORWARD),
            False: number(TransformKind.PREDICT_BACKWARD),
        }
        self._behind = number(TransformKind.DISCREPANCY, offset=1)
        self._stash = stale and rule.jacobian is Jacobian.STASHED
        self._overtaken = stale and rule.activations is not Activations.INPUT
        corrected = bool(any(self._ahead.values()) or self._behind)
        works = not self._stash and (corrected or lag > 0)
        self._working = self._copy() if works else None
        self._holds: tuple[int, float, float, float] = (0, 0.0, 0.0, 0.0)  # what is written there

    def forward(self, version: int) -> Weights:
        """Weights for a forward pass, by name; stashed, they keep their values until `release`."""
        if self._working is not None:
            return self._write(version, forward=True)
        if not self._stash:
            self._check(version)
            return self._views() if self._overtaken else self._parameters
        if version not in self._held:
            self._hold(version)
        self._readers[version] += 1
        return self._held[version].weights

    def differentiate(self, version: int) -> None:
        """Make graphs that were built before give gradients at what a backward pass reads."""
        if self._working is not None:
            self._write(version, forward=False)

    def again(self, before: int, version: int) -> Weights:
        """Weights for a second forward pass of a sample whose first one read ``before``."""
        if self._working is not None:
            return self._write(version, forward=False)
        weights = self.forward(version)  # first, for it may be the version let go
        self.release(before)
        return weights

    def release(self, version: int) -> None:
        """Say that one reader of ``version`` is done with it."""
        if self._stash:
            self._readers[version] -= 1
            self._forget(self.newest)

    @torch.no_grad()
    def updating(self) -> None:
        """Let the optimizer change the live parameters: what is still read is left as it is."""
        self._forget(self.newest + 1)
        if self._lag and self.newest not in self._held:
            self._hold(self.newest)
        if self.newest in self._held:
            for name in self._trained:
                parameter = self._parameters[name]
                parameter.data = parameter.data.clone()

    def updated(self, motion: Motion | None = None) -> None:
        """Note that the optimizer has changed the live parameters, and how."""
        self.newest += 1
        self._motion = motion

    @property
    def count(self) -> int:
        """Versions held now, the newest included."""
        return len(self._held.keys() | {self.newest})

    def _check(self, version: int) -> None:
        if version != self.newest:
            raise RuntimeError(f"version {version} is gone; the newest is {self.newest}")

    def _hold(self, version: int) -> None:
        self._check(version)
        self._held[version] = _Version(self._views(), self._motion)

    def _views(self) -> Weights:
        """Leaves of new graphs on the storage that the parameters have now.

        Made through .data, so that autograd does not count changes of one as changes of the other.
        """
        return {
            name: p.data.requires_grad_(p.requires_grad) for name, p in self._parameters.items()
        }

    def _forget(self, newest: int) -> None:
        """Drop what nobody reads any more, once the newest version is ``newest``."""
        for version in list(self._held):
            if not self._readers[version] and not newest - self._lag <= version < newest:
                del self._held[version], self._readers[version]

    @torch.no_grad()
    def _write(self, version: int, forward: bool) -> Weights:
        """Put what an operation reads into the working copy, if it holds something else."""
        assert self._working is not None
        ahead = self._ahead[forward]
        behind = 0.0 if forward else self._behind
        wanted = (version, ahead, behind, self._rate() if ahead else 0.0)
        if wanted == self._holds:
            return self._working
        if version not in self._held:
            self._check(version)
        old = self._held.get(version)
        weights = self._parameters if old is None else old.weights
        motion = self._motion if old is None else old.motion
        for name, source in weights.items():
            # Through .data, so that autograd does not refuse the graphs that hold these tensors.
            self._working[name].data.copy_(source.data)
        if motion is not None:
            for index, name in enumerate(self._trained):
                own = self._working[name].data
                if ahead and motion.rate:  # w - s γ v, where γ v was made with an earlier γ
                    own -= (ahead * self._rate() / motion.rate) * motion.step[index]
                if behind and motion.drift is not None:  # w - τ δ
                    own -= behind * motion.drift[index]
        self._holds = wanted
        return self._working

    def _copy(self) -> Weights:
        return {
            name: p.detach().clone().requires_grad_(p.requires_grad)
            for name, p in self._parameters.items()
        }


def call(stage: nn.Module, weights: Mapping[str, Tensor], inputs: Value) -> Any:
    """Run a module forward on the given weights instead of its own; buffers stay its own.

    The module takes one argument: a tuple is passed as one.

    >>> import torch
    >>> stage = nn.Linear(1, 1, bias=False)
    >>> call(stage, {"weight": torch.tensor([[3.0]])}, torch.tensor([2.0]))
    tensor([6.])
    """
    return functional_call(stage, dict(weights), (inputs,))
