"""`ddg verify`: does a convergence statement hold, by exact enumeration?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ddg_cli.output import print_json, print_line, print_table


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


app = typer.Typer(cls=StatementFirst, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Check a convergence statement, its rate, or all of them."""


@app.command("statement", cls=Statement, hidden=True)
def verify(
    statement: Annotated[
        str | None,
        typer.Argument(help="Statement: lemma1, theorem1, theorem2 or theorem-a."),
    ] = None,
    problem: Annotated[
        str | None,
        typer.Option(help="Problem: geman-mcclure, kuramoto or rotation-chain."),
    ] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Number of stages K of DDG.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Step size (the first one).")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Number of iterations T.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the statements.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Check a convergence statement by exact enumeration.

    The problems have proved constants; the expectations are over all sample paths.
    """
    from ddg_sim.methods import ddg
    from theory.bounds import STATEMENTS
    from theory.check import check
    from theory.problems import make

    if list_:
        if json:
            fields = (
                "key",
                "title",
                "status",
                "conditioning",
                "formula",
                "latex",
                "source",
                "note",
            )
            print_json(
                {
                    "statements": [
                        {f: getattr(s, f) for f in fields}
                        | {"hypotheses": [h.text for h in s.hypotheses]}
                        for s in STATEMENTS.values()
                    ]
                }
            )
            return
        print_table(
            "Statements",
            ["statement", "status, what it says, and what is known about it"],
            [
                [s.key, f"{s.status.value}: {s.title}\n{s.formula}\n{s.note}"]
                for s in STATEMENTS.values()
            ],
            numeric=False,
        )
        return
    given = {"--problem": problem, "--stages": stages, "--gamma": gamma, "--iterations": iterations}
    missing = [name for name, value in {"STATEMENT": statement, **given}.items() if value is None]
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (or use --list)")
    assert statement is not None
    assert problem is not None
    assert stages is not None
    assert gamma is not None
    assert iterations is not None
    found = check(statement, make(problem, stages), ddg(stages), gamma, iterations)
    if json:
        print_json(
            {
                "statement": found.statement,
                "status": found.status.value,
                "problem": found.problem,
                "stages": stages,
                "gamma": gamma,
                "iterations": iterations,
                "hypotheses": found.hypotheses,
                "hypotheses_failing": found.failing,
                "measured": found.measured,
                "bound": found.bound,
                "tightness": found.tightness,
                "verdict": found.verdict.value,
                "reason": found.reason,
                "nonvacuous": found.nonvacuous,
                "paths": found.paths,
            }
        )
        return
    rows = [
        ["status in general", found.status.value],
        *(["assumes", hypothesis] for hypothesis in found.hypotheses),
        *(["does not hold here", hypothesis] for hypothesis in found.failing),
        ["measured", f"{found.measured:.6g}"],
        ["bound", f"{found.bound:.6g}"],
        [
            "measured / bound",
            "–" if found.tightness != found.tightness else f"{found.tightness:.4g}",
        ],
        ["bound says something", "yes" if found.nonvacuous else "no (vacuous)"],
        ["sample paths, all of them", str(found.paths)],
        ["verdict here", found.verdict.value],
    ]
    title = f"{statement} on {problem}, K={stages}, γ={gamma:g}, T={iterations}"
    print_table(title, ["", ""], rows, numeric=False)
    print_line(found.reason)
