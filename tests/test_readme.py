"""The README's commands run as written, and the two commands it promises exist."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from ddg_cli.main import main

ROOT = Path(__file__).parents[1]
EXACT = "<!-- exact -->"
#: Their own tests, or another test in this file, cover them.
SKIPPED = ("make", "git")


class Block(NamedTuple):
    """A console block: its line in the README, whether its output is exact, (command, output)."""

    line: int
    exact: bool
    commands: list[tuple[str, str]]


def blocks(text: str) -> list[Block]:
    """Find the console blocks of a Markdown text.

    >>> blocks("<!-- exact -->\\n```console\\n$ ddg --version\\nddg 1\\n```\\n")
    [Block(line=2, exact=True, commands=[('ddg --version', 'ddg 1\\n')])]
    """
    found = []
    for match in re.finditer(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip().splitlines()
        commands: list[tuple[str, str]] = []
        for line in match[1].splitlines(keepends=True):
            if line.startswith("$ "):
                commands.append((line[2:].strip(), ""))
            elif commands and commands[-1][0].endswith("\\") and not commands[-1][1]:
                commands[-1] = (commands[-1][0][:-1] + line.strip(), "")
            else:
                commands[-1] = (commands[-1][0], commands[-1][1] + line)
        number = text[: match.start()].count("\n") + 1
        found.append(Block(number, bool(before) and before[-1].strip() == EXACT, commands))
    return found


README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
WITH_DDG = [
    block for block in README if any(command.startswith("ddg ") for command, _ in block.commands)
]


def run(command: str) -> int | str | None:
    """Run a command line of the README in this process, which has imported torch already."""
    words = shlex.split(command, comments=True)
    assert words[0] == "ddg", f"cannot run {command!r}: it is not a ddg command"
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    return ended.value.code


def test_a_block_is_a_command_and_its_output():
    first = "```console\n$ ddg a \\\n    --b\nout\n\n$ make\n```\n"
    text = f"{EXACT}\n\n{first}```console\n$ ddg c\n```\n"
    assert blocks(text) == [
        Block(3, True, [("ddg a --b", "out\n\n"), ("make", "")]),
        Block(10, False, [("ddg c", "")]),
    ]


def test_the_readme_shows_every_command():
    shown = {command.split()[1] for block in WITH_DDG for command, _ in block.commands}
    assert {"simulate", "verify", "profile", "train", "validate"} <= shown


@pytest.mark.slow
@pytest.mark.parametrize("block", WITH_DDG, ids=lambda block: f"line{block.line}")
def test_commands_of_the_readme_run(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a relative one would no longer lead workers here
    monkeypatch.delenv("DDG_PORT", raising=False)
    for command, output in block.commands:
        if command.startswith(SKIPPED):
            continue
        code = run(command)
        out, err = capsys.readouterr()
        assert code in (0, None), f"{command}\n{out}\n{err}"
        assert out.strip(), command
        if block.exact:
            assert plain(out) == plain(output), command


def plain(text: str) -> list[str]:
    """Lines without the spaces at their ends, which editors remove."""
    return [line.rstrip() for line in text.strip().splitlines()]


def test_make_has_the_two_commands_and_ci_runs_one():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()
