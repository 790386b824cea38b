"""The application: how it is started, how it ends, and what a verb prints."""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import typer
from typer.models import CommandInfo

from lexigraft import __version__
from lexigraft.console import is_first_process, plain
from lexigraft.errors import LexigraftError

app = typer.Typer(
    name="lexigraft",
    help="Teach a pretrained language model your field's words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would take as long as all the rest of `--help`
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Result(Protocol):
    """What every verb returns."""

    def to_json(self) -> dict[str, Any]:
        """The machine-readable object of `--json`."""

    def lines(self) -> list[str]:
        """What a person reads."""


def main() -> None:
    """Run the command line and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without UTF-8 must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        _application(sys.argv[1:])()
    except LexigraftError as fault:
        _fail(fault)
    except (
        RecursionError
    ):  # a JSON file that a stranger made for this; small ones are refused by name
        _fail(
            LexigraftError(
                "an input file is nested too deep to be read",
                needed="files as their programs write them",
                fix="lexigraft check FOLDER, and look where the folder comes from",
            )
        )
    except OSError as fault:
        _fail(
            LexigraftError(
                f"{fault.filename or 'a file'}: {fault.strerror or fault}",
                needed="files and folders that can be read and written",
                fix="mend the permissions or the name, and run the command again",
            )
        )


def _application(words: Sequence[str]) -> typer.Typer:
    """What is to run `words`: all verbs, or the one that is named, as each takes its time."""
    named = [verb for verb in app.registered_commands if words[:1] == [_name(verb)]]
    if not named:
        return app
    one = copy.copy(app)
    one.registered_commands = named
    return one


def _name(verb: CommandInfo) -> str:
    return verb.name or getattr(verb.callback, "__name__", "").replace("_", "-")


def _fail(fault: LexigraftError) -> None:
    prefix = "" if is_first_process() else "in a further process:\n"
    print(plain(prefix + str(fault)), file=sys.stderr)
    sys.exit(fault.status)


def print_result(
    result: Result, as_json: bool, *then: Sequence[object], dry_run: bool = False
) -> None:
    """What a verb found, as one JSON object or for people; of several processes the first tells.

    People are also told what comes next, unless nothing was written: `then` are the words of a
    command behind `lexigraft`, or of several. What only they can know is in capitals.
    """
    if not is_first_process():
        return
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        commands = [] if dry_run else [shlex.join(map(str, words)) for words in then]
        print(plain("\n".join([*result.lines(), *(f"next: lexigraft {c}" for c in commands)])))


def _version(value: bool) -> None:
    if value:
        print(f"lexigraft {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Teach a pretrained language model your field's words."""
