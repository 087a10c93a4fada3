"""A verdict as a file: all that is needed to compute both sides again, and what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ddg_sim.files import read_text, replacing
from ddg_sim.notation import parse, render
from ddg_sim.profile import first_problem
from ddg_sim.schedule import Schedule
from theory.bounds import STATEMENTS
from theory.check import MonteCarlo, Report, Verdict, check
from theory.links import LINKS
from theory.problems import make
from theory.protocols import Problem
from theory.quadratic import NoisyQuadratic
from theory.ridge import RidgeSum

Item = TypeVar("Item")


class CertificateError(ValueError):
    """A certificate that is missing, broken or cannot be run; one line with path and field."""


def _rectangle(rows: list[list[Item]]) -> list[list[Item]]:
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError("rows must be equally long, and neither they nor their list empty")
    return rows


Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Vector = list[Number]
Matrix = Annotated[list[Vector], AfterValidator(_rectangle)]
Delays = Annotated[list[list[Count]], AfterValidator(_rectangle)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(_Strict):
    """A problem by name and arguments, see `theory.problems.make`."""

    kind: Literal["named"] = "named"
    name: str
    stages: Count
    samples: Count = 2
    seed: Count = 0

    def build(self) -> Problem:
        """Make the problem."""
        return make(self.name, self.stages, self.samples, self.seed)


class Ridge(_Strict):
    """A `RidgeSum` by its arrays; ``blocks`` hold the first weight of each stage and its end."""

    kind: Literal["ridge"] = "ridge"
    name: str
    link: str
    rows: Matrix
    offsets: Vector
    coefficients: Matrix
    start: Vector
    blocks: list[tuple[Count, Count]]

    def build(self) -> Problem:
        """Make the problem."""
        if self.link not in LINKS:
            raise ValueError(f"link {self.link!r} is unknown; known are {', '.join(LINKS)}")
        return RidgeSum(
            self.name,
            LINKS[self.link],
            rows=np.array(self.rows),
            offsets=np.array(self.offsets),
            coefficients=np.array(self.coefficients),
            start=np.array(self.start),
            blocks=tuple(slice(first, stop) for first, stop in self.blocks),
        )


class Quadratic(_Strict):
    """A `NoisyQuadratic` by its arrays."""

    kind: Literal["quadratic"] = "quadratic"
    name: str
    matrix: Matrix
    solution: Vector
    noise: Matrix
    start: Vector
    blocks: list[tuple[Count, Count]]

    def build(self) -> Problem:
        """Make the problem."""
        return NoisyQuadratic(
            self.name,
            matrix=np.array(self.matrix),
            solution=np.array(self.solution),
            noise=np.array(self.noise),
            start=np.array(self.start),
            blocks=tuple(slice(first, stop) for first, stop in self.blocks),
        )


class Paths(_Strict):
    """Random sample paths, see `theory.check.MonteCarlo`."""

    alpha: Annotated[float, Field(gt=0, lt=1, strict=True)]
    seed: Count
    most: Annotated[int, Field(ge=1, strict=True)]


class Certificate(_Strict):
    """One check: its input, whole, and its result.

    ``schedule`` is a schedule's text or None, ``delays`` one row per tick or one for all, or None.
    ``sampling`` is None where all sample paths were run. ``paths`` is the number that was run.

    >>> from ddg_sim.methods import ddg
    >>> problem, schedule = Named(name="kuramoto", stages=2), ddg(2)
    >>> report = check("lemma1", problem.build(), schedule, gamma=0.01, iterations=3)
    >>> certificate = certify(report, problem, schedule)
    >>> certificate.verdict, recheck(certificate)[1]
    ('VIOLATED', [])
    """

    version: Literal[1] = 1
    statement: str
    problem: Annotated[Named | Ridge | Quadratic, Field(discriminator="kind")]
    schedule: str | None
    delays: Delays | None
    momentum: Number
    gamma: Number
    iterations: Annotated[int, Field(ge=1, strict=True)]
    sampling: Paths | None
    paths: Count
    step: Count | None
    left: Number | None
    right: Number | None
    rounding: Number | None
    verdict: str


def certify(
    report: Report,
    problem: Named | Problem,
    source: Schedule | np.typing.ArrayLike,
    momentum: float = 0.0,
) -> Certificate:
    """Return the certificate of a report.

    Args:
        report: what `check` answered.
        problem: by name, or a `RidgeSum` or `NoisyQuadratic`, of which the arrays are written.
        source: the schedule or delays that were checked.
        momentum: beta.

    Raises:
        ValueError: for a problem of another kind.

    >>> from theory.problems import one_sided_cosine
    >>> report = check("theorem-a", one_sided_cosine(), [1, 0], gamma=0.1, iterations=2)
    >>> certificate = certify(report, one_sided_cosine(), [1, 0])
    >>> certificate.delays, certificate.problem.link
    ([[1, 0]], 'cosine')
    """
    schedule = render(source) if isinstance(source, Schedule) else None
    delays = None if isinstance(source, Schedule) else np.atleast_2d(np.asarray(source)).tolist()
    sampled = report.sampling
    return Certificate(
        statement=report.statement,
        problem=problem if isinstance(problem, Named) else _arrays(problem),
        schedule=schedule,
        delays=delays,
        momentum=momentum,
        gamma=report.gamma,
        iterations=report.iterations,
        sampling=None
        if sampled is None
        else Paths(alpha=sampled.alpha, seed=sampled.seed, most=sampled.most),
        paths=report.paths,
        step=report.step,
        left=_number(report.measured),
        right=_number(report.bound),
        rounding=_number(report.rounding),
        verdict=report.verdict.value,
    )


def recheck(certificate: Certificate) -> tuple[Report, list[str]]:
    """Compute both sides again; return the report, and what differs from the certificate.

    Sides may differ by the rounding that the new report allows for; all else must be the same.

    Raises:
        CertificateError: if what the certificate describes cannot be run; says why.
    """
    try:
        problem = certificate.problem.build()
        source = _motion(certificate)
        sampling = certificate.sampling
        report = check(
            certificate.statement,
            problem,
            source,
            certificate.gamma,
            certificate.iterations,
            certificate.momentum,
            MonteCarlo(**sampling.model_dump(), always=True) if sampling else MonteCarlo(),
        )
    except (ValueError, IndexError, OverflowError) as error:
        raise CertificateError(f"the certificate cannot be run: {error}") from None
    found = []
    for name, stored, now in (
        ("left", certificate.left, _number(report.measured)),
        ("right", certificate.right, _number(report.bound)),
        ("rounding", certificate.rounding, _number(report.rounding)),
    ):
        same = stored == now or (
            stored is not None and now is not None and abs(stored - now) <= report.rounding
        )
        if not same:
            found.append(f"{name} is {now!r}, the certificate says {stored!r}")
    for name, then, again in (
        ("verdict", certificate.verdict, report.verdict.value),
        ("paths", certificate.paths, report.paths),
        ("step", certificate.step, report.step),
    ):
        if then != again:
            found.append(f"{name} is {again}, the certificate says {then}")
    return report, found


def save(certificate: Certificate, path: str | Path) -> None:
    """Write the certificate as JSON, whole or not at all. Raises OSError where it cannot.

    >>> from tempfile import TemporaryDirectory
    >>> problem = Named(name="kuramoto", stages=2)
    >>> report = check("theorem-a", problem.build(), [1, 0], gamma=0.05, iterations=2)
    >>> certificate = certify(report, problem, [1, 0])
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "found.json")
    ...     save(certificate, path)
    ...     load(path) == certificate
    True
    """
    with replacing(path) as temporary:
        temporary.write_text(certificate.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(path: str | Path) -> Certificate:
    """Read a certificate.

    Raises CertificateError, in one line with the path, if it is missing, broken or no certificate.

    >>> load("no/such/file")
    Traceback (most recent call last):
    ...
    theory.certificate.CertificateError: no/such/file: cannot be read: No such file or directory
    """
    text = read_text(path, CertificateError)
    try:
        certificate = Certificate.model_validate_json(text)
    except ValidationError as error:
        raise CertificateError(f"{path}: {first_problem(error)}") from None
    if certificate.statement not in STATEMENTS:
        raise CertificateError(f"{path}: statement {certificate.statement!r} is unknown")
    if certificate.verdict not in {verdict.value for verdict in Verdict}:
        raise CertificateError(f"{path}: verdict {certificate.verdict!r} is unknown")
    if (certificate.schedule is None) == (certificate.delays is None):
        raise CertificateError(f"{path}: give a schedule or delays, and not both")
    return certificate


def _motion(certificate: Certificate) -> Schedule | np.ndarray[tuple[int, ...], np.dtype[np.int_]]:
    if certificate.schedule is not None:
        return parse(certificate.schedule)
    rows = certificate.delays or []
    return np.array(rows[0] if len(rows) == 1 else rows, dtype=np.int64)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _arrays(problem: Problem) -> Ridge | Quadratic:
    blocks = [(block.start or 0, block.stop) for block in problem.blocks]
    if isinstance(problem, RidgeSum):
        return Ridge(
            name=problem.name,
            link=problem.link.name,
            rows=problem.rows.tolist(),
            offsets=problem.offsets.tolist(),
            coefficients=problem.coefficients.tolist(),
            start=problem.start.tolist(),
            blocks=blocks,
        )
    if isinstance(problem, NoisyQuadratic):
        return Quadratic(
            name=problem.name,
            matrix=problem.matrix.tolist(),
            solution=problem.solution.tolist(),
            noise=problem.noise.tolist(),
            start=problem.start.tolist(),
            blocks=blocks,
        )
    raise ValueError(f"problem {problem.name!r} has no arrays to write; give it by name")
