"""`ddg verify rate`, `search` and `plot` as their users see them."""

import json
import shlex

import pytest

from ddg_cli.main import main
from theory import plot, worst_case


@pytest.fixture
def ddg(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(line):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line))
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_rate(ddg):
    code, out, _ = ddg("verify rate --method ddg --stages 4 --smoothness 2 --json")
    found = json.loads(out)
    assert code == 0
    assert found["largest_delay"] == 3
    assert found["stable"] == pytest.approx(0.2225209339563)
    assert found["suggested"] == pytest.approx(1 / 14)
    assert [each["statement"] for each in found["allowed"]] == [
        "theorem-a",
        "theorem-v",
        "theorem-d",
    ]
    _, table, _ = ddg("verify rate --method ddg --stages 4 --smoothness 2 --momentum 0.9")
    assert "Theorems A, V and D do not cover" in table


def test_search(ddg):
    words = "verify search conjecture --max-delay 1 --iterations 4 --trials 6"
    code, out, _ = ddg(words)
    assert code == 0
    assert "not broken; 6 trials, each over" in out
    assert ("random" in out) is not worst_case.available()
    assert json.loads(ddg(f"{words} --json")[1])["broken"] is False


@pytest.mark.parametrize(
    "words",
    [
        "region p.png",
        "frontier p.svg --stages 4 --momentum 0.5",
        "bounds p.png --stages 2 --iterations 6",
        "tightness p.svg --stages 2 --iterations 5 --samples 1 --problem geman-mcclure",
    ],
)
def test_plot(ddg, tmp_path, words):
    code, out, _ = ddg(f"verify plot {words}")
    name = words.split()[1]
    assert (code, out) == (0, f"wrote {name}\n")
    head = (tmp_path / name).read_bytes()[:8]
    assert head.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_what_is_drawn_is_what_is_measured(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, axes, path, title=None):
        for axis in axes:
            drawn[axis.get_xlabel()] = {
                line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
                for line in axis.get_lines()
            }

    monkeypatch.setattr(plot, "_finish", keep)
    plot.bounds(tmp_path / "p.png", "kuramoto", 2, 0.05, 6)
    report = plot.check("theorem-a", plot.make("kuramoto", 2), plot.methods.ddg(2), 0.05, 6)
    for label, place in (("iterations T", 6), ("learning rate γ", 0.05)):
        lines = drawn[label]
        assert (place, report.measured) in [(x, y) for x, y in lines["measured"]]
        assert dict(lines["theorem-a (bound)"])[place] == pytest.approx(report.bound)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("rate --stages 4", ["--smoothness"]),
        ("rate --stages 4 --smoothness 0", ["smoothness", "0.0"]),
        ("rate --stages 4 --smoothness 1 --momentum 1", ["momentum", "1.0"]),
        ("rate --stages 4 --smoothness 1 --method sgd", ["'sgd'"]),
        ("rate --stages 4 --smoothness 1 --method dgl", ["dgl", "local"]),
        ("rate --stages 4 --smoothness 1 --chunks 2", ["chunks 2"]),
        ("rate --stages 4 --smoothness 1 --gap -1", ["gap", "-1.0"]),
        ("search lemma", ["'lemma'", "lemma1"]),
        ("search conjecture --trials 0", ["--trials", "0"]),
        ("search conjecture --max-delay 13", ["--max-delay", "13"]),
        ("plot map p.png", ["picture", "'map'", "region"]),
        ("plot region p.gif", ["p.gif", ".png or .svg"]),
        ("plot bounds p.png --problem lasso", ["'lasso'"]),
        ("plot bounds p.png --gamma -1", ["gamma", "-1"]),
        ("plot region nowhere/p.png", ["nowhere"]),
        ("plot region p.png --stages 4", ["--stages", "region"]),
        ("plot frontier p.png --problem kuramoto", ["--problem", "frontier"]),
        ("plot bounds p.png --momentum 0.5", ["--momentum", "bounds"]),
        ("search lemma1 --max-delay 2", ["--max-delay", "statement"]),
        ("search conjecture --most 5", ["--most", "conjecture"]),
        ("theorem-a --list", ["statement", "--list"]),
        ("--recheck x.json --gamma 1", ["--gamma", "--recheck"]),
        ("tabel", ["'tabel'", "theorem-a"]),
        ("table --problems ''", ["--problems", "''"]),
        ("table --statements theorem-a,", ["--statements", "'theorem-a,'"]),
        (
            "theorem-a --problem kuramoto --stages 2 --gamma 0.1 --iterations 100000",
            ["iterations", "10000", "100000"],
        ),
        (
            "theorem-a --problem kuramoto --stages 201 --gamma 0.1 --iterations 4",
            ["--stages", "201", "200"],
        ),
    ],
)
def test_mistakes_are_one_line(ddg, words, named):
    code, out, error = ddg(f"verify {words}")
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert all(part in error for part in named)


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_are_as_wide_as_the_environment_says(ddg, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = ddg("verify --list")
    assert code == 0
    assert max(map(len, out.splitlines())) == columns


def test_names_are_not_broken_at_80_columns(ddg, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    keys = "theorem-a-young,features-replay,lemma1"
    _, out, _ = ddg(f"verify table --problems kuramoto --stages 1 --statements {keys}")
    assert max(len(line) for line in out.splitlines() if line.startswith("│")) <= 80
    assert all(f"│ {key}" in out for key in keys.split(","))


def test_a_name_given_twice_is_checked_once(ddg):
    words = "--problems kuramoto,kuramoto --statements theorem-d,theorem-d --stages 1,1 --json"
    code, out, _ = ddg(f"verify table {words}")
    assert (code, len(json.loads(out)["cells"])) == (0, 2)


@pytest.mark.parametrize(("picture", "points"), [(plot.tightness, 2), (plot.bounds, 2 + 3 + 9)])
def test_pictures_report_their_progress(tmp_path, picture, points):
    calls = []
    picture(
        tmp_path / "p.svg", "kuramoto", 2, 0.05, 3, ["theorem-a", "theorem1"],
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(i + 1, 2 * points) for i in range(2 * points)]
