"""The verification table: every statement on every family of problems for K = 1, 2, ..."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import joblib

from ddg_sim.methods import ddg, fr
from ddg_sim.schedule import Schedule
from theory.bounds import STATEMENTS
from theory.check import MonteCarlo, Report, Verdict, check
from theory.gradients import is_layered
from theory.hypotheses import (
    FULL_GRADIENTS,
    MOMENTUM_DELAYS,
    REPLAYED,
    SUFFICIENT_DIRECTION,
    UNIFORM_DELAYS,
)
from theory.problems import PROBLEMS, make
from theory.statement import Hypothesis, Scope

#: Ticks that are enumerated, and what is drawn at random beside them.
ENUMERATED = 8
SAMPLED = 40
#: gamma L of a cell, as a part of 1/(2 (2D + 1)): what the strictest hypothesis allows, and less.
STEPS = (1.0, 1e-3)


@dataclass(frozen=True)
class Cell:
    """One check of the table. ``alpha`` is 0 where all paths are run."""

    statement: str
    problem: str
    stages: int
    step: float
    iterations: int
    alpha: float


def table(
    statements: Sequence[str] = tuple(STATEMENTS),
    problems: Sequence[str] = tuple(PROBLEMS),
    stages: Sequence[int] = tuple(range(1, 7)),
    alpha: float = 1e-3,
    seed: int = 0,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Cell, Report]:
    """Check all statements on all problems.

    Every cell is enumerated over T = 8 ticks; averages on problems with bounded gradients are also
    estimated over T = 40. Statements about full gradients get one sample; Features Replay's run
    its own method on chains of stages; that for one delay gets delays K - 1 everywhere; that with
    momentum gets beta = 0.9. All others run DDG.

    Args:
        statements: keys.
        problems: names of families.
        stages: numbers of stages K.
        alpha: the probability that any verdict of the table is wrong: Bonferroni, every cell with
            random paths gets an equal part. Enumeration makes no such mistakes and takes none.
        seed: of the random paths.
        jobs: processes; None leaves it to joblib's configuration (one, without any).
        progress: called with the cells done and all cells.

    Returns:
        The reports, in the order of the arguments.

    Raises:
        ValueError: naming an argument that is wrong.

    >>> found = table(["theorem-a"], ["kuramoto"], [2])
    >>> [(cell.iterations, cell.step, str(report.verdict)) for cell, report in found.items()]
    [(8, 1.0, 'VERIFIED'), (8, 0.001, 'VERIFIED'), (40, 1.0, 'VERIFIED')]
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    cells = list(_cells(statements, problems, stages))
    sampled = sum(cell.alpha > 0 for cell in cells)
    cells = [replace(cell, alpha=alpha / sampled) if cell.alpha else cell for cell in cells]
    if not cells:
        raise ValueError("statements, problems and stages must each name at least one")
    parallel: Any = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=8)
    found: dict[Cell, Report] = {}
    for cell, report in zip(
        cells, parallel(joblib.delayed(run)(cell, seed) for cell in cells), strict=True
    ):
        found[cell] = report
        if progress is not None:
            progress(len(found), len(cells))
    return found


def run(cell: Cell, seed: int = 0) -> Report:
    """Check one cell.

    >>> print(run(Cell("c-tau", "cauchy", 2, step=1.0, iterations=8, alpha=0.0)).verdict)
    VERIFIED
    """
    samples = 1 if _asks(cell.statement, FULL_GRADIENTS) else 2
    problem = make(cell.problem, cell.stages, samples)
    return check(
        cell.statement,
        problem,
        motion_for(cell.statement, cell.stages, layered=is_layered(problem)),
        gamma=cell.step / (2 * (2 * cell.stages - 1) * problem.L),
        iterations=cell.iterations,
        momentum=momentum_for(cell.statement),
        monte_carlo=MonteCarlo(cell.alpha or 0.5, seed, most=4096, always=cell.alpha > 0),
    )


def motion_for(statement: str, stages: int, layered: bool = False) -> Schedule | tuple[int, ...]:
    """Return the motion on which a statement is tried, on a problem with real stages or without.

    >>> motion_for("lian", 3)
    (2, 2, 2)
    """
    if _asks(statement, UNIFORM_DELAYS):
        return (stages - 1,) * stages
    if layered and _asks(statement, REPLAYED, SUFFICIENT_DIRECTION):
        return fr(stages)
    return ddg(stages)


def momentum_for(statement: str) -> float:
    """Return the momentum with which a statement is tried.

    >>> momentum_for("theorem-m"), momentum_for("theorem-a")
    (0.9, 0.0)
    """
    return 0.9 if _asks(statement, MOMENTUM_DELAYS) else 0.0


def counts(reports: Sequence[Report]) -> dict[Verdict, int]:
    """How many reports have which verdict.

    >>> found = table(["lemma1"], ["kuramoto"], [2])
    >>> {str(verdict): number for verdict, number in counts(list(found.values())).items()}
    {'VERIFIED': 1, 'VIOLATED': 1, 'INCONCLUSIVE': 0, 'NOT APPLICABLE': 0}
    """
    return {verdict: sum(report.verdict is verdict for report in reports) for verdict in Verdict}


def _cells(
    statements: Sequence[str], problems: Sequence[str], stages: Sequence[int]
) -> Iterator[Cell]:
    for statement in statements:
        sampled = STATEMENTS[statement].scope is Scope.AVERAGE and not _asks(
            statement, FULL_GRADIENTS, SUFFICIENT_DIRECTION
        )
        for problem in problems:
            finite = math.isfinite(make(problem, 1).M)
            for count in stages:
                for iterations in (ENUMERATED, SAMPLED)[: 2 if sampled and finite else 1]:
                    # What is estimated says least where the step is small.
                    for step in STEPS if iterations == ENUMERATED else STEPS[:1]:
                        alpha = 1.0 if iterations == SAMPLED else 0.0
                        yield Cell(statement, problem, count, step, iterations, alpha)


def _asks(statement: str, *hypotheses: Hypothesis) -> bool:
    return any(hypothesis in STATEMENTS[statement].hypotheses for hypothesis in hypotheses)
