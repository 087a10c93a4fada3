"""What a stage holds of the samples that it has run forward and not yet applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddg_gpu.state import Tree
from ddg_gpu.value import Value
from ddg_gpu.weights import Reading, Weights


@dataclass(slots=True)
class InFlight:
    """What a stage keeps of a sample between its forward and its backward pass."""

    number: int
    inputs: Value
    targets: Value | None
    version: int
    weights: Weights
    #: Of the graph: the floating-point members of the activation, or the loss where there is one.
    #: None if there is no graph (yet).
    roots: tuple[Tensor, ...] | None = None
    #: Whether its loss or its error is not finite, so that it is left out of the update.
    skipped: bool = False
    #: Of a last stage that will be reversed: its output, which nobody sends back.
    outputs: Value = ()
    #: Values of the weights and buffers that its pass has read, where nothing else keeps them.
    reading: Reading | None = None
    buffers: Weights | None = None


@dataclass(slots=True)
class Sum:
    """Gradients of the samples of one update, added as they come; None where there are none.

    So one is held, not one per sample; methods that differentiate the samples of an update in
    another order (GPipe: the last one first) add them in that order.
    """

    count: int = 0
    total: list[Tensor | None] = field(default_factory=list)

    def mean(self) -> list[Tensor | None]:
        """Mean over the samples; the sum is gone then."""
        if self.count == 1:
            return list(self.total)
        return [None if total is None else total.div_(self.count) for total in self.total]


@dataclass(slots=True)
class Flight:
    """All that a stage holds of samples.

    Args:
        samples: in flight, by number.
        halves: those whose input gradient is known and whose weights' is not, with their error.
        sums: of gradients that wait for their update, by its number.
        losses: of all samples so far.
    """

    samples: dict[int, InFlight] = field(default_factory=dict)
    halves: dict[int, tuple[InFlight, Value | None]] = field(default_factory=dict)
    sums: dict[int, Sum] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    def all(self) -> list[InFlight]:
        """Every sample that is held, each once."""
        found = [*self.samples.values(), *(sample for sample, _ in self.halves.values())]
        return list({id(sample): sample for sample in found}.values())

    def reading(self, key: tuple[float, ...]) -> Reading | None:
        """What another sample's pass has read, if it was the same."""
        for sample in self.all():
            if sample.reading is not None and sample.reading.key == key:
                return sample.reading
        return None

    def buffers(self, now: Mapping[str, Tensor]) -> Weights:
        """Copies of a module's buffers; where another sample has the same values, its copies."""
        known = next((s.buffers for s in reversed(self.all()) if s.buffers is not None), {})
        return {
            name: known[name] if name in known and torch.equal(known[name], own) else own.clone()
            for name, own in now.items()
        }

    def state(self, buffers: Mapping[str, Tensor]) -> Tree:
        """All of it as plain data, but the graphs; buffers only where they differ from these."""
        found = self.all()
        place = {id(sample): index for index, sample in enumerate(found)}
        readings = {s.reading.key: s.reading for s in found if s.reading is not None}
        return {
            "samples": [
                {
                    "number": sample.number,
                    "version": sample.version,
                    "inputs": sample.inputs,
                    "targets": sample.targets,
                    "outputs": sample.outputs,
                    "graph": sample.roots is not None,
                    "skipped": sample.skipped,
                    "reading": None if sample.reading is None else sample.reading.key,
                    "buffers": None
                    if sample.buffers is None
                    else {
                        name: own
                        for name, own in sample.buffers.items()
                        if not torch.equal(own, buffers[name])
                    },
                }
                for sample in found
            ],
            "readings": [[key, reading.values] for key, reading in readings.items()],
            "in flight": {number: place[id(sample)] for number, sample in self.samples.items()},
            "halves": {
                number: [place[id(sample)], error]
                for number, (sample, error) in self.halves.items()
            },
            "sums": {number: [own.count, own.total] for number, own in self.sums.items()},
            "losses": self.losses,
        }

    @classmethod
    def restored(
        cls, state: Tree, buffers: Mapping[str, Tensor], grow: Callable[[InFlight, bool], None]
    ) -> Flight:
        """What `state` was taken of.

        Args:
            state: its tensors are on the stage's device.
            buffers: of the stage's module.
            grow: gives a sample its weights, and its graph if it shall have one.
        """
        readings = {tuple(key): Reading(tuple(key), values) for key, values in state["readings"]}
        found = []
        for record in state["samples"]:
            given = record["buffers"]
            sample = InFlight(
                record["number"],
                _value(record["inputs"]),
                None if record["targets"] is None else _value(record["targets"]),
                record["version"],
                {},
                skipped=record["skipped"],
                outputs=_value(record["outputs"]),
                reading=None if record["reading"] is None else readings[tuple(record["reading"])],
                buffers=None
                if given is None
                else {name: given.get(name, own).clone() for name, own in buffers.items()},
            )
            grow(sample, record["graph"])
            found.append(sample)
        return cls(
            {number: found[place] for number, place in state["in flight"].items()},
            {
                number: (found[place], None if error is None else _value(error))
                for number, (place, error) in state["halves"].items()
            },
            {number: Sum(count, list(total)) for number, (count, total) in state["sums"].items()},
            dict(state["losses"]),
        )


def _value(tree: Tree) -> Value:
    return tuple(tree) if isinstance(tree, list) else tree
