"""Which package may import what, and that libraries stay silent."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ddg_sim", "theory", "ddg_gpu", "ddg_cli")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
LIBRARIES = [path for path in MODULES if path.relative_to(ROOT).parts[0] != "ddg_cli"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    return name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path) -> set[str]:
    """Every top-level package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative imports hide the arrows"
            found.add(str(node.module).split(".")[0])
    return found


def importers(package: str, among: list[Path]) -> list[str]:
    return [name(path) for path in among if package in imports(path)]


def within(*packages: str) -> list[Path]:
    return [path for path in MODULES if path.relative_to(ROOT).parts[0] in packages]


def test_every_module_is_looked_at():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)
    assert "torch" in imports(ROOT / "ddg_gpu" / "stage.py")
    assert len(MODULES) > 40


def test_simulator_and_theory_do_not_name_torch():
    assert importers("torch", within("ddg_sim", "theory")) == []


def test_theory_and_backend_do_not_know_each_other():
    assert importers("ddg_gpu", within("theory", "ddg_sim")) == []
    assert importers("theory", within("ddg_gpu", "ddg_sim")) == []


def test_one_engine_imports_simpy():
    assert importers("simpy", MODULES) == ["ddg_sim/simulate.py"]


def test_only_plot_modules_import_matplotlib():
    assert {Path(path).name for path in importers("matplotlib", MODULES)} == {"plot.py"}


def test_nothing_below_knows_the_command_line():
    assert importers("ddg_cli", LIBRARIES) == []
    assert importers("typer", LIBRARIES) == importers("rich", LIBRARIES) == []


@pytest.mark.parametrize("path", LIBRARIES, ids=name)
def test_libraries_do_not_print(path: Path):
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    ]
    assert calls == []


LOADED = """
import importlib, json, sys
heavy = {}
for module in sys.argv[1:]:
    importlib.import_module(module)
    heavy[module] = [name for name in ("torch", "simpy", "matplotlib") if name in sys.modules]
print(json.dumps(heavy))
"""


def loaded(modules: list[str]) -> dict[str, list[str]]:
    """Import modules in this order in a fresh interpreter: what is loaded after each of them."""
    run = subprocess.run(
        [sys.executable, "-c", LOADED, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_schedule_alone_loads_nothing_heavy():
    assert loaded(["ddg_sim.schedule"]) == {"ddg_sim.schedule": []}


@pytest.mark.parametrize("package", ["ddg_sim", "theory"])
def test_simulator_and_theory_never_load_torch(package: str):
    found = loaded([dotted(path) for path in within(package)])
    assert [module for module, heavy in found.items() if "torch" in heavy] == []


def test_only_the_engine_and_what_needs_it_load_simpy():
    order = ["schedule", "methods", "costs", "lowering", "timeline", "trace", "cycletime"]
    found = loaded([f"ddg_sim.{module}" for module in order])
    assert set(map(tuple, found.values())) == {()}


def test_the_command_line_starts_without_the_heavy_packages():
    assert loaded(["ddg_cli.main"]) == {"ddg_cli.main": []}


def test_there_is_no_drawer_for_everything():
    forbidden = {"utils.py", "helpers.py", "common.py"}
    assert [name(path) for path in MODULES if path.name in forbidden] == []
