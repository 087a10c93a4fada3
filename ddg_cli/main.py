"""The `ddg` command: what its subcommands are, and what becomes of errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from ddg_cli import demo, simulate, training, verify
from ddg_cli.output import ERRORS

# Typer's own base class of wrong usage has no public name.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="ddg",
    help="How much faster is decoupled training, does it converge, and is the prediction true?",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("simulate")(simulate.simulate)
app.command("verify")(verify.verify)
app.command("profile")(training.profile)
app.command("train")(training.train)
app.command("validate")(training.validate)
app.command("demo")(demo.demo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for bad input, 1 for a failed run, 130 for Ctrl-C.

    Args:
        arguments: words after ``ddg``; None takes those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(words, prog_name="ddg", standalone_mode=False)
    except UsageError as error:
        code = _fail(_usage(error, words))
    except ValueError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        ERRORS.print("ddg: interrupted", markup=False)
        code = 130
    except RuntimeError as error:
        if type(error).__module__.split(".")[0] not in ("ddg_sim", "ddg_gpu", "theory"):
            raise  # ours to mend, so the traceback stays
        ERRORS.print(f"ddg: {error}", markup=False)
        code = 1
    sys.exit(code)


def _fail(message: str) -> int:
    ERRORS.print(f"ddg: {' '.join(message.split())}", markup=False)
    return 2


def _usage(error: Exception, words: Sequence[str]) -> str:
    """Typer's message, with the value that it leaves out."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    names = getattr(getattr(error, "param", None), "opts", [])
    for name, value in zip(words, [*words[1:], None], strict=True):
        if name in names and value is not None and isinstance(error, typer.BadParameter):
            return f"{message} (got {value!r})"
    return f"{message} (try 'ddg --help')" if "No such" in message else str(message)
