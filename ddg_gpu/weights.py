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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


@dataclass(frozen=True, slots=True)
class Reading:
    """Values that a forward pass has read, kept because they will be overwritten.

    Args:
        key: the same for the same values.
        values: the trained weights.
    """

    key: tuple[float, ...]
    values: list[Tensor]


class VersionStore:
    """What one stage's operations read of its parameters, version by version.

    Args:
        module: the stage, whose parameters are versioned.
        rule: what the method does to the numbers.
        stage: whose numbers of the rule's corrections apply.
        stale: whether updates happen between a sample's forward and its backward pass. If not, the
            live parameters serve, unless a correction says otherwise.
        lag: by how many updates the weights of a forward pass may be older than the newest.
        tied: whether another stage updates some of the parameters too. Its updates count as
            versions, see `shared`.
        rate: gives the learning rate in force, for predictions.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: Rule,
        stage: int,
        stale: bool,
        lag: int = 0,
        tied: bool = False,
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
        #: How the last update moved the weights, if it tells.
        self.motion: Motion | None = None
        self._lag, self._rate = lag, rate
        self._ahead = {
            True: number(TransformKind.PREDICT_FORWARD),
            False: number(TransformKind.PREDICT_BACKWARD),
        }
        self._behind = number(TransformKind.DISCREPANCY, offset=1)
        stale = stale or tied  # for where the other's updates come is not counted there
        self._stash = stale and rule.jacobian is Jacobian.STASHED
        self._overtaken = stale and rule.activations in (Activations.GRAPH, Activations.NEWEST)
        corrected = bool(any(self._ahead.values()) or self._behind)
        works = not self._stash and (corrected or lag > 0 or tied)  # for the other may move them
        self._working = self._copy() if works else None
        self._holds: tuple[float, ...] = ()  # what is written there

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
        """Let an optimizer change the live parameters: what is still read is left as it is.

        All of them move, also where a tied stage changes only some: afterwards the version that is
        read is no longer the newest, and nobody would move the rest before the next update.
        """
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
        self.motion = motion

    def shared(self) -> None:
        """Note that the optimizer of a tied stage has changed some live parameters."""
        self.newest += 1

    def reading(self, known: Callable[[tuple[float, ...]], Reading | None]) -> Reading | None:
        """What a pass has just read, if the store will not keep it.

        Args:
            known: finds the reading with such a key, if there is one already.
        """
        if self._working is not None:
            key: tuple[float, ...] = self._holds
        elif self._overtaken and not self._stash:
            key = (self.newest,)
        else:
            return None
        return known(key) or Reading(key, [tensor.clone() for tensor in self._ground()])

    @contextmanager
    def rebuilding(self, version: int, reading: Reading | None) -> Iterator[Weights]:
        """Weights to build a graph on again; inside, they have the values that it was made with."""
        if self._stash:
            yield self._held[version].weights
        elif reading is None:
            yield self._parameters
        else:
            ground = self._ground()
            now = [tensor.clone() for tensor in ground]
            self._fill(ground, reading.values)
            try:
                yield self._views() if self._working is None else self._working
            finally:
                self._fill(ground, now)

    def state(self) -> Any:
        """What the store holds, as plain data, besides the newest weights and their motion."""
        return {
            "newest": self.newest,
            "held": [
                {
                    "version": version,
                    "readers": self._readers[version],
                    "motion": None if held.motion is None else held.motion.state(),
                    "weights": None
                    if version == self.newest
                    else [held.weights[name] for name in self._trained],
                }
                for version, held in self._held.items()
            ],
        }

    def restore(self, state: Any) -> None:
        """Take over what `state` gave; the parameters have the newest values already."""
        self.begin(state["newest"], self.motion)
        for record in state["held"]:
            weights = self._views()
            for name, given in zip(self._trained, record["weights"] or [], strict=False):
                weights[name] = given.requires_grad_()
            motion = None if record["motion"] is None else Motion(**record["motion"])
            self._held[record["version"]] = _Version(weights, motion)
            self._readers[record["version"]] = record["readers"]

    def begin(self, newest: int, motion: Motion | None) -> None:
        """The parameters have become version ``newest``, by ``motion``; nothing else is held."""
        self.newest, self.motion, self._holds = newest, motion, ()
        self._held.clear()
        self._readers.clear()

    @property
    def count(self) -> int:
        """Versions held now, the newest included."""
        return len(self._held.keys() | {self.newest})

    def _check(self, version: int) -> None:
        if version != self.newest:
            raise RuntimeError(f"version {version} is gone; the newest is {self.newest}")

    def _hold(self, version: int) -> None:
        self._check(version)
        self._held[version] = _Version(self._views(), self.motion)

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
        wanted: tuple[float, ...] = (version, ahead, behind, self._rate() if ahead else 0.0)
        if wanted == self._holds:
            return self._working
        if version not in self._held:
            self._check(version)
        old = self._held.get(version)
        weights = self._parameters if old is None else old.weights
        motion = self.motion if old is None else old.motion
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

    def _ground(self) -> list[Tensor]:
        """The trained tensors that graphs are built on which are overwritten."""
        ground = self._parameters if self._working is None else self._working
        return [ground[name].data for name in self._trained]

    @staticmethod
    def _fill(ground: list[Tensor], values: list[Tensor]) -> None:
        for tensor, value in zip(ground, values, strict=True):
            tensor.copy_(value)

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
