"""How the executor gets its gradients: whole, or propagated through real stages.

Both know the parts of a `Rule` that are about activations and errors; the parts about weights are
in `theory.weights`.
"""

from dataclasses import dataclass, field
from typing import Protocol, TypeGuard, cast

import numpy as np

from ddg_sim.rule import Activations, Gradient, Rule, TransformKind
from ddg_sim.schedule import Op, OpKind
from theory.protocols import FloatArray, IntArray, LayeredProblem, Problem, ReversibleProblem
from theory.rows import align, spread


class Engine(Protocol):
    """How gradients come about; ``w_k`` is what the operation reads of its stage's weights."""

    def forward(self, op: Op, w_k: FloatArray) -> None:
        """Run a FORWARD or RECOMPUTE operation."""

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray | None:
        """Run a BACKWARD operation or a half; return the gradient of the weights, if it has one."""


@dataclass(eq=False)
class Snapshots:
    """Gradients of a problem without stages: whole, at the concatenation of what F read.

    A shrunk error shrinks the whole gradient of a stage, by one factor for every hop.

    Raises ValueError where an operation needs to know more than that.
    """

    problem: Problem
    rule: Rule
    columns: list[IntArray]
    read: dict[tuple[int, int], FloatArray] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)  # sample, by stage
    gradients: dict[int, FloatArray] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)  # by how many stages, by sample

    def __post_init__(self) -> None:
        if self.rule.gradient is Gradient.LOCAL and len(self.problem.blocks) > 1:
            raise ValueError(
                f"schedule: local losses need stage outputs; problem {self.problem.name!r} has "
                "none, take rotation-chain or reversible-chain"
            )

    def forward(self, op: Op, w_k: FloatArray) -> None:
        """Note which weights the sample meets."""
        if op.kind is OpKind.RECOMPUTE:
            self._require_snapshot(op, w_k)
        else:
            self.read[op.stage, op.sample] = w_k
            self.newest[op.stage] = op.sample

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray | None:
        """Return the stage's block of the sample's gradient, computed once for all stages."""
        self._require_snapshot(op, w_k)
        stages = len(self.problem.blocks)
        if op.sample not in self.gradients:
            # The last stage comes first: now every stage has read its weights for this sample.
            column = self.columns[op.sample]
            read = (self.read[k, op.sample] for k in range(stages))
            w = spread(np.concatenate(align(*read), axis=1), len(column))
            self.gradients[op.sample] = self.problem.gradients(w, spread(column, len(w)))
            self.taken[op.sample] = 0
        if op.kind is OpKind.BACKWARD_INPUT:
            return None
        gradient = self.gradients[op.sample][:, self.problem.blocks[op.stage]]
        self.taken[op.sample] += 1
        del self.read[op.stage, op.sample]
        if self.taken[op.sample] == stages:
            del self.gradients[op.sample], self.taken[op.sample]
        if shrink := self.rule.values(TransformKind.SHRINK):
            gradient = gradient * shrink[0] ** (stages - 1 - op.stage)
        return gradient

    def _require_snapshot(self, op: Op, w_k: FloatArray) -> None:
        late = self.rule.activations is Activations.NEWEST and self.newest[op.stage] != op.sample
        if late or w_k is not self.read[op.stage, op.sample]:
            raise ValueError(
                f"schedule: {op} reads other {'activations' if late else 'weights'} than "
                f"F{op.stage}({op.sample}) did, and problem {self.problem.name!r} has no stages "
                "that could tell the two apart; take rotation-chain, or stashed weights"
            )


#: Input and output of a stage.
Ends = tuple[FloatArray, FloatArray]


@dataclass(eq=False)
class Propagation:
    """Gradients of a layered problem: h and delta go from stage to stage, as on devices.

    A local loss is the problem's own loss, at the stage's own output.

    Raises ValueError if stages shall be reversed that cannot be.
    """

    problem: LayeredProblem
    rule: Rule
    columns: list[IntArray]
    kept: dict[tuple[int, int], Ends] = field(default_factory=dict)
    newest: dict[int, Ends] = field(default_factory=dict)  # by stage
    sent: dict[tuple[OpKind, int, int], FloatArray] = field(default_factory=dict)
    rebuilt: dict[tuple[int, int], FloatArray] = field(default_factory=dict)  # outputs
    halves: dict[tuple[int, int], tuple[Ends, FloatArray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reverses = self.rule.activations is Activations.RECONSTRUCT
        if reverses and not hasattr(self.problem, "inverse"):
            raise ValueError(
                f"schedule: activations=reconstruct needs the stages' inverse, which problem "
                f"{self.problem.name!r} has not; take reversible-chain"
            )

    def forward(self, op: Op, w_k: FloatArray) -> None:
        """Run the stage; keep its input and output, and send the output on the first time."""
        if op.kind is OpKind.RECOMPUTE:
            h_in = self.kept[op.stage, op.sample][0]
        elif op.stage == 0:
            h_in = self.problem.inputs(self.columns[op.sample])
        else:
            h_in = self.sent.pop((OpKind.FORWARD, op.stage - 1, op.sample))
        w_k, h_in = align(w_k, h_in)
        h_out = self.problem.forward(op.stage, w_k, h_in)
        self.kept[op.stage, op.sample] = self.newest[op.stage] = h_in, h_out
        # A replayed output stays where it is: the next stage has long had the first one.
        if op.kind is OpKind.FORWARD and op.stage < self._last:
            self.sent[op.kind, op.stage, op.sample] = h_out

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray | None:
        """Return the stage's gradient from its activations and the error that has arrived.

        The half that sends the error on leaves both to the half that differentiates the weights.
        """
        if op.kind is OpKind.BACKWARD_WEIGHT:
            ends, delta = self.halves.pop((op.stage, op.sample))
            return self.problem.backward(op.stage, *align(w_k, *ends, delta))[0]
        ends = self._activations(op, w_k)
        delta = self._error(op, ends[1])
        gradient, before = self.problem.backward(op.stage, *align(w_k, *ends, delta))
        if op.stage and self.rule.gradient is Gradient.NEXT:
            self.sent[OpKind.BACKWARD, op.stage, op.sample] = before
        if op.kind is OpKind.BACKWARD:
            return gradient
        self.halves[op.stage, op.sample] = ends, delta
        return None

    @property
    def _last(self) -> int:
        return len(self.problem.blocks) - 1

    def _activations(self, op: Op, w_k: FloatArray) -> Ends:
        kept = self.kept.pop((op.stage, op.sample))
        if self.rule.activations is Activations.NEWEST:
            return self.newest[op.stage]
        if self.rule.activations is not Activations.RECONSTRUCT:
            return kept
        # The last stage still has its output, for the loss; the others get theirs with the error.
        h_out = kept[1] if op.stage == self._last else self.rebuilt.pop((op.stage, op.sample))
        w_k, h_out = align(w_k, h_out)
        h_in = cast(ReversibleProblem, self.problem).inverse(op.stage, w_k, h_out)
        if op.stage:
            self.rebuilt[op.stage - 1, op.sample] = h_in
        return h_in, h_out

    def _error(self, op: Op, h_out: FloatArray) -> FloatArray:
        if op.stage == self._last or self.rule.gradient is Gradient.LOCAL:
            column = self.columns[op.sample]
            h_out = spread(h_out, len(column))
            return self.problem.loss_gradient(h_out, spread(column, len(h_out)))
        delta = self.sent.pop((OpKind.BACKWARD, op.stage + 1, op.sample))
        shrink = self.rule.values(TransformKind.SHRINK)
        return shrink[0] * delta if shrink else delta


def is_layered(problem: Problem) -> TypeGuard[LayeredProblem]:
    """Whether the problem has real stages to propagate through.

    >>> from theory.problems import make
    >>> is_layered(make("kuramoto", 2)), is_layered(make("rotation-chain", 2))
    (False, True)
    """
    return all(hasattr(problem, part) for part in ("inputs", "forward", "backward"))


def engine_for(problem: Problem, rule: Rule, draws: list[IntArray]) -> Engine:
    """Return the way to get this problem's gradients, for samples drawn as `rows.columns` says.

    >>> from theory.problems import make
    >>> type(engine_for(make("kuramoto", 2), Rule(), [])).__name__
    'Snapshots'
    """
    if is_layered(problem):
        return Propagation(problem, rule, draws)
    return Snapshots(problem, rule, draws)
