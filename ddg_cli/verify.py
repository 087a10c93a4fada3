"""`ddg verify`: does a convergence statement hold? By enumeration, or by random paths."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ddg_cli.output import (
    integers,
    names,
    only,
    output_path,
    print_json,
    print_line,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from theory.check import Report


class StatementFirst(TyperGroup):
    """`ddg verify STATEMENT ...` is the command; what is no subcommand's name goes to it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's own name before words that name no subcommand, `--help` included."""
        if not args or args[0] not in self.commands:
            args = ["statement", *args]
        return super().parse_args(ctx, args)


class Statement(TyperCommand):
    """The group's own command: its help lists the others."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, then the group's commands."""
        super().format_options(ctx, formatter)
        ctx.parent.command.format_commands(ctx.parent, formatter)


#: Stages of a table: more paths and weights than a table is for.
MAX_STAGES = 20

app = typer.Typer(cls=StatementFirst, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Alpha = Annotated[float, typer.Option(help="Probability of a wrong verdict by random paths.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random paths.")]
CertificateFile = Annotated[
    Path | None, typer.Option("--certificate", help="Write the verdict as JSON, to recheck.")
]


@app.callback()
def _group() -> None:
    """Check a convergence statement, its rate, or all of them."""


@app.command("statement", cls=Statement, hidden=True)
def verify(
    context: typer.Context,
    statement: Annotated[str | None, typer.Argument(help="Statement; --list has them.")] = None,
    problem: Annotated[
        str | None, typer.Option(help="Problem with proved constants, such as kuramoto.")
    ] = None,
    stages: Annotated[int | None, typer.Option(min=1, max=200, help="Number of stages K.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Step size (the first one).")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Number of iterations T.")] = None,
    method: Annotated[str | None, typer.Option(help="Training method; default: ddg.")] = None,
    delays: Annotated[
        str | None, typer.Option(help="Delays of the stages instead, such as 2,1,0.")
    ] = None,
    momentum: Annotated[float, typer.Option(help="Momentum of the updates.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Samples n of the problem.")] = 2,
    monte_carlo: Annotated[
        bool, typer.Option("--monte-carlo", help="Random paths even where all could be run.")
    ] = False,
    alpha: Alpha = 1e-3,
    seed: Seed = 0,
    certificate: CertificateFile = None,
    recheck: Annotated[
        Path | None, typer.Option(help="Compute the verdict of a certificate again.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the statements.")] = False,
    json: Json = False,
) -> None:
    """Check a convergence statement.

    Expectations are over all sample paths; where they are too many, random ones and confidence
    sequences decide.
    """
    if list_:
        only(context, "--list", "list_", "json")
        _list(json)
        return
    if recheck is not None:
        only(context, "--recheck", "recheck", "json")
        _recheck(recheck, json)
        return
    if statement is not None:  # also where it is the misspelt name of a subcommand
        from theory.bounds import statement_named

        statement_named(statement)
    wanted = integers("--delays", delays)
    if stages is None and wanted is not None:
        stages = len(wanted)
    given = {"--problem": problem, "--stages": stages, "--gamma": gamma, "--iterations": iterations}
    missing = [name for name, value in {"STATEMENT": statement, **given}.items() if value is None]
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (or use --list)")
    assert statement is not None
    assert problem is not None
    assert stages is not None
    assert gamma is not None
    assert iterations is not None
    if method is not None and wanted is not None:
        raise ValueError("give --method or --delays, not both")
    output_path("--certificate", certificate)
    from ddg_sim import methods
    from theory.certificate import Named, certify, save
    from theory.check import MonteCarlo, Verdict, check
    from theory.problems import make

    source = methods.method(method or "ddg", stages) if wanted is None else wanted
    made = make(problem, stages, samples)
    if not 0 < alpha < 1:
        raise ValueError(f"--alpha must be between 0 and 1, got {alpha}")
    sampling = MonteCarlo(alpha, seed, always=monte_carlo)
    found = check(statement, made, source, gamma, iterations, momentum, sampling)
    if certificate is not None:
        named = Named(name=problem, stages=stages, samples=samples)
        save(certify(found, named, source, momentum), certificate)
    if json:
        print_json(report_fields(found) | {"stages": stages})
        return
    title = f"{statement} on {problem}, {found.method}, K={stages}, γ={gamma:g}, T={iterations}"
    print_report(title, found)
    if found.verdict is Verdict.VIOLATED and certificate is None:
        print_line(
            "--certificate FILE writes this violation down, --recheck FILE computes it again"
        )


@app.command("table")
def table(
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    stages: Annotated[str, typer.Option(help="Numbers of stages.")] = "1,2,3,4,5,6",
    problems: Annotated[str | None, typer.Option(help="Families; default: all.")] = None,
    statements: Annotated[str | None, typer.Option(help="Statements; default: all.")] = None,
    alpha: Alpha = 1e-3,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Check all statements on all families of problems."""
    from theory.bounds import STATEMENTS, statement_named
    from theory.check import Verdict
    from theory.problems import PROBLEMS
    from theory.statement import Status
    from theory.sweep import counts
    from theory.sweep import table as check_all

    keys = names("--statements", statements) or tuple(STATEMENTS)
    families = names("--problems", problems) or tuple(PROBLEMS)
    sizes = sorted(set(integers("--stages", stages) or ()))
    if sizes and sizes[-1] > MAX_STAGES:
        raise ValueError(f"--stages {sizes[-1]}: give at most {MAX_STAGES}")
    with progress_bar("verify") as progress:
        found = check_all(
            [statement_named(key).key for key in keys], families, sizes, alpha, seed, jobs, progress
        )
    if json:
        cells = [
            {"stages": cell.stages, "gamma_L_part": cell.step} | report_fields(report)
            for cell, report in found.items()
        ]
        print_json({"alpha": alpha, "correction": "Bonferroni", "seed": seed, "cells": cells})
        return
    rows = []
    for key in keys:
        reports = [report for cell, report in found.items() if cell.statement == key]
        number = counts(reports)
        verified = [r for r in reports if r.verdict is Verdict.VERIFIED]
        tight = max((r.tightness for r in verified if r.tightness > 0), default=None)
        rows.append(
            [
                key,
                *(str(number[verdict] or "–") for verdict in Verdict),
                "–" if tight is None else f"{tight:.3g}",
                f"{sum(r.nonvacuous for r in reports)}/{len(reports)}",
            ]
        )
    columns = ["statement", "verified", "violated", "open", "n/a", "tightest", "says sth."]
    print_table(f"{len(found)} checks", columns, rows)
    refuted = [key for key in keys if STATEMENTS[key].status is Status.REFUTED]
    if refuted:
        print_line(f"refuted as stated, so that violations are expected: {', '.join(refuted)}")
    print_line(
        f"checked on {', '.join(families)}; K = {', '.join(map(str, sizes))};"
        f" T = {' and '.join(map(str, sorted({cell.iterations for cell in found})))};"
        " γL as large as the strictest hypothesis allows, and a thousandth of it"
    )
    sampled = sum(cell.alpha > 0 for cell in found)
    print_line(
        f"α = {alpha:g} for all {sampled} checks by random paths together (Bonferroni); the others "
        "run all paths. tightest: largest measured/bound; says sth.: bound below M and 2 L gap."
    )


def _list(json: bool) -> None:
    from theory.bounds import STATEMENTS

    if json:
        fields = ("key", "title", "status", "conditioning", "formula", "latex", "source", "note")
        listed = [
            {field: getattr(statement, field) for field in fields}
            | {"hypotheses": [hypothesis.text for hypothesis in statement.hypotheses]}
            for statement in STATEMENTS.values()
        ]
        print_json({"statements": listed})
        return
    rows = [
        [s.key, f"{s.status.value}: {s.title}\n{s.formula}\n{s.note}\n({s.source})"]
        for s in STATEMENTS.values()
    ]
    columns = ["statement", "status, claim, what is known, source"]
    print_table("Statements", columns, rows, numeric=False)


def _recheck(path: Path, json: bool) -> None:
    from theory.certificate import load, recheck

    certificate = load(path)
    report, differing = recheck(certificate)
    if json:
        print_json(report_fields(report) | {"holds": not differing, "differing": differing})
    else:
        print_report(f"{certificate.statement}, computed again", report)
        for line in differing:
            print_line(line)
        print_line(
            "FAILED: the certificate does not hold" if differing else "the certificate holds"
        )
    if differing:
        raise typer.Exit(1)


def report_fields(report: Report) -> dict[str, Any]:
    """Return a report for JSON."""
    found = asdict(report)
    found["hypotheses_failing"] = found.pop("failing")
    found["status"], found["verdict"] = report.status.value, report.verdict.value
    return found


def print_report(title: str, found: Report) -> None:
    """Print a report as a table, and the reason of its verdict."""
    holds = not found.failing
    rows = [
        ["status in general", found.status.value],
        *(["assumes", hypothesis] for hypothesis in found.hypotheses),
        *(["does not hold here", hypothesis] for hypothesis in found.failing),
        ["measured", f"{found.measured:.6g}"],
        ["bound" if holds else "right side, which bounds nothing here", f"{found.bound:.6g}"],
        ["rounding", f"{found.rounding:.1g}"],
        ["tightness", "–" if found.tightness != found.tightness else f"{found.tightness:.4g}"],
    ]
    if holds:
        rows.append(["bound says something", "yes" if found.nonvacuous else "no (vacuous)"])
    if found.sampling is None:
        rows.append(["sample paths, all of them", str(found.paths)])
    else:
        rows.append(["sample paths, random", f"{found.paths} (seed {found.sampling.seed})"])
    if found.sampling is not None and found.interval is not None:
        lower, upper = found.interval
        rows.append(
            ["confidence limits", f"{lower:.6g} to {upper:.6g}, α = {found.sampling.alpha:g}"]
        )
    print_table(title, ["", ""], [*rows, ["verdict here", found.verdict.value]], numeric=False)
    print_line(found.reason)
