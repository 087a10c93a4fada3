import json

import numpy as np
import pytest

from ddg_sim.methods import ddg
from theory.bounds import STATEMENTS
from theory.certificate import CertificateError, Named, certify, load, recheck, save
from theory.check import MonteCarlo, Verdict, check
from theory.counterexamples import Found, search
from theory.problems import make, opposed_cosines
from theory.sweep import ENUMERATED, Cell, counts, table

EXACT = MonteCarlo()


def written(tmp_path, problem=None, source=(3, 1), sampling=EXACT, statement="theorem-a"):
    path = tmp_path / "c.json"
    problem = problem or Named(name="cauchy", stages=2)
    built = problem.build() if isinstance(problem, Named) else problem
    report = check(statement, built, source, 0.01, 6, monte_carlo=sampling)
    save(certify(report, problem, source), path)
    return path, report


@pytest.mark.parametrize(
    "input_",
    [
        {},
        {"source": ddg(2)},
        {"source": np.tile([1, 0], (6, 1))},
        {"sampling": MonteCarlo(alpha=0.01, seed=3, always=True)},
        {"problem": opposed_cosines(), "source": ddg(2), "statement": "lemma1-steady"},
        {"problem": make("noisy-quadratic", 2), "statement": "theorem-v"},
    ],
    ids=["delays", "schedule", "table", "random", "arrays", "quadratic"],
)
def test_a_certificate_brings_the_same_report_again(tmp_path, input_):
    path, report = written(tmp_path, **input_)
    again, differing = recheck(load(path))
    assert differing == []
    assert (again.verdict, again.paths) == (report.verdict, report.paths)
    assert (again.measured, again.bound) == pytest.approx((report.measured, report.bound), 1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("left", 0.5),
        ("right", 0.5),
        ("rounding", 0.5),
        ("verdict", "VIOLATED"),
        ("gamma", 0.02),
        ("paths", 65),
        ("step", 1),
        ("momentum", 0.5),
    ],
)
def test_an_edited_number_is_found(tmp_path, field, value):
    path, _ = written(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert recheck(load(path))[1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c[:40], "not valid JSON"),
        (lambda c: c.replace('"gamma": 0.01', '"gamma": "x"'), "gamma: input should be a valid"),
        (lambda c: c.replace('"version": 1', '"version": 2'), "version"),
        (lambda c: c.replace("theorem-a", "theorem-z"), "statement 'theorem-z' is unknown"),
        (lambda c: c.replace("VERIFIED", "FINE"), "verdict 'FINE' is unknown"),
        (lambda c: c.replace('"left"', '"lefty"'), "left"),
        (lambda c: c.replace('"schedule": null', '"schedule": "x"'), "schedule or delays"),
    ],
)
def test_a_broken_certificate_is_one_line(tmp_path, edit, message):
    path, _ = written(tmp_path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(CertificateError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", [[1.0, 1.0], [1.0]], r"problem.ridge.rows: rows must be equally long"),
        ("rows", [], r"problem.ridge.rows: rows must be equally long"),
        ("coefficients", [[], []], r"problem.ridge.coefficients: rows must be .* empty"),
        ("offsets", ["x"], r"problem.ridge.offsets\[0\]: input should be a valid number"),
        ("matrix", [[1.0, 0.0], [1.0]], r"problem.quadratic.matrix: rows must be equally long"),
        ("noise", [], r"problem.quadratic.noise: rows must be equally long"),
        ("delays", [[1, 0], [1]], r"delays: rows must be equally long"),
        ("delays", [[]], r"delays: rows must be equally long"),
        (
            "delays",
            [[10**30, 0]],
            r"delays\[0\]\[0\]: input should be less than 92233",
        ),
    ],
)
def test_a_wrong_array_is_named(tmp_path, field, value, message):
    quadratic = field in ("matrix", "noise")
    path, _ = written(
        tmp_path,
        statement="theorem-v" if quadratic else "theorem-a",
        problem=make("noisy-quadratic", 1) if quadratic else opposed_cosines(),
        source=[0] if quadratic else [1, 0],
    )
    text = json.loads(path.read_text())
    (text if field == "delays" else text["problem"])[field] = value
    path.write_text(json.dumps(text))
    with pytest.raises(CertificateError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_certificate_of_what_cannot_run_says_so(tmp_path):
    path, _ = written(tmp_path)
    path.write_text(path.read_text().replace('"cauchy"', '"lasso"'))
    with pytest.raises(CertificateError, match="cannot be run: problem 'lasso' is unknown"):
        recheck(load(path))
    with pytest.raises(ValueError, match="no arrays to write; give it by name"):
        written(tmp_path, problem=make("rotation-chain", 2), source=ddg(2))


# --- The search -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "step", "samples"), [("lemma1", 0, 1), ("lemma1-steady", 1, 2)]
)
def test_the_search_finds_the_counterexamples(tmp_path, statement, step, samples):
    found = search(statement)
    assert isinstance(found, Found)
    report = found.report
    assert (report.verdict, report.step) == (Verdict.VIOLATED, step)
    assert found.problem.num_samples == samples
    assert report.measured > report.bound + report.rounding
    certificate = certify(report, found.problem, found.source)
    save(certificate, tmp_path / "found.json")
    assert recheck(load(tmp_path / "found.json"))[1] == []


def test_the_search_finds_the_dependence():
    found = search("independence")
    assert isinstance(found, Found)
    assert abs(found.report.measured - found.report.bound) > 1e-6
    assert found.problem.num_samples == 2


@pytest.mark.parametrize("statement", ["theorem-a", "lemma1-prime", "lian", "c-tau", "theorem-m"])
def test_the_search_breaks_nothing_true(statement):
    # The first 240 inputs have one tick, too short for lemma1-prime and lian.
    assert search(statement, most=280) == 280


def test_the_search_catches_a_fault(monkeypatch):
    from dataclasses import replace

    from theory import bounds

    wrong = replace(STATEMENTS["theorem-a"], bound=lambda constants, gammas: 0.1)
    monkeypatch.setitem(bounds.STATEMENTS, "theorem-a", wrong)
    assert isinstance(search("theorem-a", most=300), Found)


# --- The table ------------------------------------------------------------------------------------


def test_the_table_divides_the_error_level():
    found = table(["theorem-a", "lemma1"], ["kuramoto", "noisy-quadratic"], [1, 2], alpha=0.01)
    sampled = [cell for cell in found if cell.alpha]
    assert {cell.alpha for cell in sampled} == {0.01 / len(sampled)}
    assert all((cell.iterations == ENUMERATED) == (cell.alpha == 0) for cell in found)
    assert len(found) == 18  # 2 x 2 x 2 problems and steps, and theorem-a on kuramoto at random
    number = counts(list(found.values()))
    assert number[Verdict.NOT_APPLICABLE] == 8  # no M
    assert [c for c, r in found.items() if r.verdict is Verdict.VIOLATED] == [
        Cell("lemma1", "kuramoto", 2, 1e-3, ENUMERATED, 0.0)
    ]
    assert number[Verdict.VERIFIED] == 9


def test_jobs_do_not_change_the_table():
    calls = []
    arguments = ["theorem-v"], ["cauchy"], [2]
    one = table(*arguments, progress=lambda done, total: calls.append((done, total)))
    assert repr(one) == repr(table(*arguments, jobs=2))
    assert calls == [(i + 1, 3) for i in range(3)]
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 1"):
        table(*arguments, alpha=1)
    with pytest.raises(ValueError, match="each name at least one"):
        table(["theorem-v"], ["cauchy"], [])
