"""`ddg verify`: does a convergence statement hold, by exact enumeration?"""

from __future__ import annotations

from typing import Annotated

import typer

from ddg_cli.output import print_json, print_line, print_table


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
            fields = ("key", "title", "status", "hypotheses", "formula", "source", "note")
            print_json(
                {"statements": [{f: getattr(s, f) for f in fields} for s in STATEMENTS.values()]}
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
                "ratio": found.ratio,
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
        ["measured / bound", "–" if found.ratio != found.ratio else f"{found.ratio:.4g}"],
        ["bound says something", "yes" if found.nonvacuous else "no (vacuous)"],
        ["sample paths, all of them", str(found.paths)],
        ["verdict here", found.verdict.value],
    ]
    title = f"{statement} on {problem}, K={stages}, γ={gamma:g}, T={iterations}"
    print_table(title, ["", ""], rows, numeric=False)
    print_line(found.reason)
