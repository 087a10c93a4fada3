"""`ddg verify search`: try to break what is conjectured."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import Annotated

import typer

from ddg_cli.output import choice, print_json, print_line, print_table


class Target(Enum):
    """What can be searched for a counterexample."""

    CONJECTURE = "conjecture"


def search(
    target: Annotated[str, typer.Argument(help="What to break: conjecture.")],
    max_delay: Annotated[int, typer.Option(min=0, max=12, help="Largest delay τ.")] = 3,
    iterations: Annotated[int, typer.Option(min=1, max=40, help="Largest run length T.")] = 8,
    trials: Annotated[
        int, typer.Option(min=1, help="Combinations of delays, γ and T to try.")
    ] = 40,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Look for a smooth function and delays that break the conjectured worst case.

    With the extra worst-cases each trial covers all smooth functions, by a semidefinite program.
    """
    from theory.search import search_conjecture
    from theory.worst_case import available

    choice("target", target, Target)
    found = search_conjecture(max_delay, iterations, trials, seed)
    if json:
        print_json({"target": target, "seed": seed, **asdict(found)})
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
