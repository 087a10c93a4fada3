"""`ddg verify search`: try to break a statement, or what is conjectured of all functions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ddg_cli.output import only, output_path, print_json, print_line, print_table
from ddg_cli.verify import CertificateFile, print_report, report_fields

CONJECTURE = "conjecture"


def search(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="A statement such as lemma1, or conjecture.")],
    most: Annotated[int, typer.Option(min=1, help="Inputs to try on a statement.")] = 2000,
    certificate: CertificateFile = None,
    max_delay: Annotated[int, typer.Option(min=0, max=12, help="conjecture: largest delay τ.")] = 3,
    iterations: Annotated[
        int, typer.Option(min=1, max=40, help="conjecture: largest run length T.")
    ] = 8,
    trials: Annotated[
        int, typer.Option(min=1, help="conjecture: combinations of delays, γ and T to try.")
    ] = 40,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="conjecture: of the draws.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Try to break a statement or the conjecture.

    Statements: small problems, steps and histories, the simplest first. The conjecture: with the
    extra worst-cases each trial covers all smooth functions, by a semidefinite program.
    """
    if target == CONJECTURE:
        if certificate is not None:
            raise ValueError(f"--certificate {certificate}: is for statements, such as c-tau")
        only(context, "conjecture", "target", "max_delay", "iterations", "trials", "seed", "json")
        _search_conjecture(max_delay, iterations, trials, seed, json)
    else:
        only(context, "a statement", "target", "most", "certificate", "json")
        _search_statement(target, most, certificate, json)


def _search_statement(target: str, most: int, certificate: Path | None, json: bool) -> None:
    output_path("--certificate", certificate)
    from theory.bounds import statement_named
    from theory.certificate import certify, save
    from theory.counterexamples import Found
    from theory.counterexamples import search as look

    found = look(statement_named(target).key, most)
    if not isinstance(found, Found):
        if json:
            print_json({"statement": target, "found": False, "tried": found})
        else:
            print_line(f"{target}: no violation on {found} inputs")
        return
    if certificate is not None:
        save(certify(found.report, found.problem, found.source, found.momentum), certificate)
    start = [float(w) for w in found.problem.start]
    if json:
        extra = {"found": True, "tried": found.tried, "start": start}
        print_json(report_fields(found.report) | extra)
        return
    report = found.report
    title = f"{target} on {report.problem}, γ={report.gamma:g}, T={report.iterations}"
    print_report(title, report)
    row = [int(a) for a in found.problem.rows[0]]
    print_line(
        f"f_i(w) = c_i (1 - cos(a·w)), c = {report.problem.split()[1]}, a = {row}, w⁰ = "
        f"{[round(w, 6) for w in start]}; input number {found.tried}"
    )


def _search_conjecture(max_delay: int, iterations: int, trials: int, seed: int, json: bool) -> None:
    from theory.search import search_conjecture
    from theory.worst_case import available

    found = search_conjecture(max_delay, iterations, trials, seed)
    if json:
        print_json({"target": CONJECTURE, "seed": seed, **asdict(found)})
        return
    print_table(
        "worst case / bound of (1/T) Σ‖∇f‖² ≤ (f(w⁰) − f*)/(γT c_τ(γL)), where it is largest",
        ["τ", "ratio", "delays", "γL", "T"],
        [
            [
                str(trial.delays[0]),
                f"{trial.ratio:.6f}",
                " ".join(map(str, trial.delays)),
                f"{trial.gamma:.5g}",
                str(trial.iterations),
            ]
            for trial in found.closest
        ],
    )
    verdict = "BROKEN: a ratio exceeds 1" if found.broken else "not broken"
    print_line(f"conjecture {verdict}; {found.trials} trials, each over {found.method}")
    if not available():
        print_line(
            "for all functions instead of random ones: pip install 'ddg-toolkit[worst-cases]'"
        )
