"""Options that several verbs have, and what is read from their text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lexigraft.console import set_quiet
from lexigraft.errors import LexigraftError


def _set_quiet(value: bool) -> bool:
    set_quiet(value)
    return value


NONE: list[str] = []  # typer copies defaults

Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="Same inputs and seed, same bytes.")]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        help="Cut the weights into files of at most this, such as 5GB.", show_default="as they are"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="No progress, no notices.", callback=_set_quiet),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model folder's own Python code."),
]
Lang = Annotated[
    Literal["en", "zh"] | None,
    typer.Option(help="Language of the page.", show_default="as the recipe says, or en"),
]
Corpus = Annotated[
    list[str],
    typer.Option(help="Text of your field: file, folder or quoted glob. Repeatable."),
]
General = Annotated[
    list[str],
    typer.Option(help="Everyday text: what must not get worse. Repeatable."),
]


def numbers(option: str, text: str) -> list[float]:
    """The numbers of `0.7,0.3`."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise LexigraftError(
            f"{option} {text}", needed="numbers between commas", fix=f"{option} 0.7,0.3"
        ) from None


def roles(pairs: list[str]) -> dict[str, str] | None:
    """Which tensor is what, by the NAME=ROLE of --tensor."""
    found = {}
    for pair in pairs:
        name, _, role = pair.rpartition("=")
        if not name or role not in ("embed", "head", "bias"):
            raise LexigraftError(
                f"--tensor {pair}",
                needed="NAME=embed, NAME=head or NAME=bias",
                fix="--tensor model.embed_tokens.weight=embed",
            )
        found[name] = role
    return found or None
