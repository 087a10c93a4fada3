"""The `ddg` command: what its subcommands are, and what becomes of errors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from ddg_cli import (
    anchors,
    demo,
    pictures,
    plan,
    rate,
    search,
    simulate,
    training,
    validation,
    verify,
)
from ddg_cli.output import ERRORS, print_line

# Typer's own base class of wrong usage has no public name.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
INTERRUPTED = 130

app = typer.Typer(
    name="ddg",
    help="How much faster is decoupled training, does it converge, and is the prediction true?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print_line(f"ddg {version('ddg-toolkit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command("simulate")(simulate.simulate)
app.command("plan")(plan.plan)
verify.app.command("rate")(rate.rate)
verify.app.command("plot")(pictures.plot)
verify.app.command("search")(search.search)
app.add_typer(verify.app, name="verify")
app.command("profile")(validation.profile)
app.command("train")(training.train)
app.command("validate")(validation.validate)
app.command("anchors")(anchors.anchors)
app.command("demo")(demo.demo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for bad input, 1 for a failed run, 130 for Ctrl-C.

    Args:
        arguments: words after ``ddg``; None takes those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # end like any exit, so that temporary files and workers go
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = typer.main.get_command(app).main(words, prog_name="ddg", standalone_mode=False)
    except UsageError as error:
        code = _fail(_usage(error, words))
    except ValueError as error:
        code = _fail(str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        ERRORS.print(f"ddg: {error}", markup=False)
        code = 1
    except MemoryError as error:
        ERRORS.print(f"ddg: out of memory: {error}", markup=False)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except RuntimeError as error:
        if type(error).__module__.split(".")[0] not in ("ddg_sim", "ddg_gpu", "theory"):
            raise  # ours to mend, so the traceback stays
        ERRORS.print(f"ddg: {error}", markup=False)
        code = 1
    if code == INTERRUPTED:  # some versions of Typer raise, others give this code
        ERRORS.print("ddg: interrupted", markup=False)
    sys.exit(code)


def _fail(message: str) -> int:
    ERRORS.print(f"ddg: {' '.join(message.split())}", markup=False)
    return 2


def _usage(error: Exception, words: Sequence[str]) -> str:
    """Typer's message, with the value that it leaves out."""
    message: str = error.format_message() if hasattr(error, "format_message") else str(error)
    found = _value(getattr(error, "param", None), words)
    if found is not None and isinstance(error, typer.BadParameter):
        reason = error.message.split(", ")[0].replace("Input should be", "must be")
        return f"{found[0]} {found[1]!r}: {reason}"
    if message.startswith(("No such", "Missing command")):
        return f"{message} (try 'ddg --help')"
    return message


def _value(parameter: object, words: Sequence[str]) -> tuple[str, str] | None:
    """Name and value with which an option was given, on the command line or by the environment."""
    names = getattr(parameter, "opts", [])
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            return name, value if equals else following
    variable = getattr(parameter, "envvar", None)
    if isinstance(variable, str) and variable in os.environ:
        return variable, os.environ[variable]
    return None
