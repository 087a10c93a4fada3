"""Property-based tests of convergence conditions and methods, with Hypothesis.

Everything is drawn from small grids of multiples of 1/4 and powers of 1/2, so a failure shrinks to
numbers that can be read. Expectations are over all sample paths: nothing is decided by chance.

A condition of your own is a `Statement`; often another one with some fields replaced:

>>> from dataclasses import replace
>>> from theory.bounds import STATEMENTS
>>> a = STATEMENTS["theorem-a"]
>>> def hopeful(constants, step_sizes):  # as if delays and noise cost nothing
...     gamma, T = step_sizes[0], len(step_sizes)
...     return 2 * constants.gap / (gamma * T)
>>> mine = replace(a, key="hopeful", bound=hopeful)
>>> found = falsify(mine, max_examples=100)
>>> found.report.verdict.value
'VIOLATED'

In a test of your own one line is enough; it fails with the smallest counterexample found:

>>> assert_statement(a, max_examples=20)

A method of your own is any function from a number of stages to a schedule, ``method=``. The paper's
Lemma 1 falls without any hint (one sample, one tick: a stage that waits does not descend):

>>> from ddg_sim.methods import ddg
>>> print(falsify("lemma1", method=ddg).report.reason)
every hypothesis holds and measured > bound (worst step t = 0: warm-up, stages idle)

Needs Hypothesis (the extra `strategies`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from ddg_sim.methods import bp, ddg, fr
from ddg_sim.schedule import Schedule, staleness
from theory.bounds import statement_named
from theory.check import Report, Verdict, check
from theory.links import CAUCHY, COSINE, GEMAN_MCCLURE, WELSCH, Link
from theory.protocols import FloatArray, IntArray
from theory.ridge import RidgeSum
from theory.statement import Statement, constant_steps, harmonic_steps

try:
    from hypothesis import HealthCheck, Phase, assume, find, settings, target
    from hypothesis import strategies as st
    from hypothesis.errors import NoSuchExample
except ImportError as error:
    raise ImportError(
        "theory.strategies needs Hypothesis: pip install 'ddg-toolkit[strategies]'"
    ) from error

LINKS: dict[str, Link] = {link.name: link for link in (COSINE, GEMAN_MCCLURE, WELSCH, CAUCHY)}
#: The schedules that the theory's executor runs on problems without real stages.
METHODS: tuple[Callable[[int], Schedule], ...] = (bp, ddg)
LAYERED_METHODS: tuple[Callable[[int], Schedule], ...] = (bp, ddg, fr)
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Ridge:
    """f_i(w) = sum_e coefficients[i][e] rho(rows[e] . w - offsets[e]), one weight a stage.

    It prints as a line that builds it again. ``problem`` has L, M, variance and f*, proved.

    >>> Ridge("cosine", ((1.0, 1.0),), (0.0,), ((3.0,), (-1.0,)), (1.5, 0.0)).problem.L
    2.0
    """

    link: str
    rows: tuple[Numbers, ...]
    offsets: Numbers
    coefficients: tuple[Numbers, ...]
    start: Numbers

    @property
    def problem(self) -> RidgeSum:
        """The problem with its certified constants."""
        return RidgeSum(
            name=self.link,
            link=LINKS[self.link],
            rows=np.array(self.rows),
            offsets=np.array(self.offsets),
            coefficients=np.array(self.coefficients),
            start=np.array(self.start),
            blocks=tuple(slice(k, k + 1) for k in range(len(self.start))),
        )


@dataclass(frozen=True)
class Case:
    """An input to `theory.check.check`; ``delays`` is None where a method says them."""

    ridge: Ridge
    delays: tuple[int, ...] | None
    gamma: float
    iterations: int


@dataclass(frozen=True)
class Counterexample:
    """The smallest case found that violates a statement, and the report that says so."""

    case: Case
    report: Report


def quarters(low: int, high: int) -> st.SearchStrategy[float]:
    """Multiples of 1/4 from ``low`` to ``high``; small and positive ones are simplest."""
    return st.integers(4 * low, 4 * high).map(lambda count: count / 4)


@st.composite
def ridges(draw: st.DrawFn, max_stages: int = 3, max_samples: int = 2, max_terms: int = 2) -> Ridge:
    """Problems with certified constants: 2..max_stages weights, samples that may disagree."""
    stages = draw(st.integers(min(2, max_stages), max_stages))
    terms, samples = draw(st.integers(1, max_terms)), draw(st.integers(1, max_samples))
    # Always draw the most and cut: then fewer stages, terms or samples are a simpler example.
    rows = draw(st.tuples(*[st.tuples(*[st.integers(-1, 1)] * max_stages)] * max_terms))
    columns = draw(st.tuples(*[st.tuples(*[st.integers(-1, 3)] * max_samples)] * max_terms))
    offsets = draw(st.tuples(*[quarters(-2, 2)] * max_terms))
    start = draw(st.tuples(*[quarters(-2, 2)] * max_stages))
    cut = [tuple(map(float, row[:stages])) for row in rows[:terms]]
    weighted = [tuple(map(float, column[:samples])) for column in columns[:terms]]
    # The mean coefficients must not be negative, single ones may be; and f is not constant.
    assume(all(sum(column) >= 0 for column in weighted))
    assume(any(any(row) and sum(column) for row, column in zip(cut, weighted, strict=True)))
    return Ridge(
        link=draw(st.sampled_from(sorted(LINKS))),
        rows=tuple(cut),
        offsets=offsets[:terms],
        coefficients=tuple(zip(*weighted, strict=True)),
        start=start[:stages],
    )


def delay_vectors(num_stages: int, max_delay: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Fixed delays of every stage, in any order."""
    return st.tuples(*[st.integers(0, max_delay)] * num_stages)


def step_sizes(iterations: int, halvings: int = 10) -> st.SearchStrategy[FloatArray]:
    """Constant and harmonic step sizes (T,) that start at a power of 1/2."""
    return st.builds(
        lambda rule, gamma: rule(gamma, iterations),
        st.sampled_from((constant_steps, harmonic_steps)),
        _powers(halvings),
    )


def schedules(
    max_stages: int = 4, methods: tuple[Callable[[int], Schedule], ...] = METHODS
) -> st.SearchStrategy[Schedule]:
    """Schedules of training methods; by default those that run on problems without stages."""
    return st.builds(
        lambda method, stages: method(stages),
        st.sampled_from(methods),
        st.integers(1, max_stages),
    )


def sample_paths(
    num_samples: int, iterations: int, max_paths: int = 4
) -> st.SearchStrategy[IntArray]:
    """Sample indices (P, T) as the executors take them."""
    path = st.lists(st.integers(0, num_samples - 1), min_size=iterations, max_size=iterations)
    return st.lists(path, min_size=1, max_size=max_paths).map(
        lambda rows: np.array(rows, dtype=np.int64)
    )


@st.composite
def cases(
    draw: st.DrawFn, max_iterations: int = 4, max_delay: int = 3, with_delays: bool = True
) -> Case:
    """Problem, fixed delays, step size and T, small enough to run all sample paths."""
    ridge, iterations = draw(ridges()), draw(st.integers(1, max_iterations))
    longest = min(max_delay, iterations - 1)  # a longer delay would never end
    return Case(
        ridge=ridge,
        delays=draw(delay_vectors(len(ridge.start), longest)) if with_delays else None,
        gamma=draw(_powers(10)),
        iterations=iterations,
    )


def falsify(
    statement: Statement | str,
    method: Callable[[int], Schedule] | None = None,
    max_examples: int = 200,
    seed: int = 0,
) -> Counterexample | None:
    """Search for an input on which a statement fails, and shrink it; None if there was none.

    Args:
        statement: a statement, or its key.
        method: what is iterated, for any number of stages; None draws fixed delays.
        max_examples: how many inputs are tried before giving up; more are for shrinking.
        seed: of the search. The same arguments give the same answer.

    Raises:
        ValueError: if the statement is unknown, or ``max_examples`` below 1.

    >>> falsify("theorem-a", max_examples=30) is None
    True
    """
    if isinstance(statement, str):
        statement = statement_named(statement)
    if max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got {max_examples}")
    chosen = statement

    def fails(case: Case) -> bool:
        if chosen.after_warm_up and case.iterations <= max(_delays(case, method)):
            return False  # ends before it begins
        report = _report(chosen, case, method)
        if np.isfinite(report.tightness) and report.verdict is not Verdict.NOT_APPLICABLE:
            target(report.tightness)
        return report.verdict is Verdict.VIOLATED

    try:
        case = find(
            cases(with_delays=method is None),
            fails,
            random=Random(seed),
            settings=settings(
                max_examples=max_examples,
                phases=(
                    Phase.generate,
                    Phase.target,
                    Phase.shrink,
                ),  # explaining took five times as long
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except NoSuchExample:
        return None
    return Counterexample(case, _report(chosen, case, method))


def assert_statement(
    statement: Statement | str,
    method: Callable[[int], Schedule] | None = None,
    max_examples: int = 200,
    seed: int = 0,
) -> None:
    """Raise AssertionError, with the smallest counterexample, if `falsify` finds one.

    >>> assert_statement("theorem-d", max_examples=20)
    """
    found = falsify(statement, method, max_examples, seed)
    if found is not None:
        report = found.report
        raise AssertionError(
            f"{report.statement} is violated, measured {report.measured:.6g} > bound "
            f"{report.bound:.6g}: {report.reason}; {found.case}"
        )


def _report(statement: Statement, case: Case, method: Callable[[int], Schedule] | None) -> Report:
    source = _delays(case, None) if method is None else method(len(case.ridge.start))
    return check(statement, case.ridge.problem, source, case.gamma, case.iterations)


def _delays(case: Case, method: Callable[[int], Schedule] | None) -> tuple[int, ...]:
    if method is not None:
        return staleness(method(len(case.ridge.start)))
    assert case.delays is not None
    return case.delays


def _powers(halvings: int) -> st.SearchStrategy[float]:
    return st.integers(0, halvings).map(lambda count: 0.5**count)
