"""Everything at once: run, import, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lexigraft.cli.application import app, print_result
from lexigraft.cli.options import DryRun, Force, Json, Output, Quiet


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    output: Output,
    force: Annotated[bool, typer.Option("--force", help="Start over.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole recipe; stages with unchanged inputs are skipped."""
    from lexigraft.pipeline import run as verb

    print_result(verb(recipe, output=output, force=force), as_json)


@app.command(name="import")
def import_config(
    tool: Annotated[
        Literal["axolotl", "llamafactory"], typer.Argument(help="Whose configuration it is.")
    ],
    config: Annotated[Path, typer.Argument(help="Configuration in YAML.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Recipe to write.")] = Path(
        "recipe.yaml"
    ),
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a recipe that does what another tool's settings say.

    What it cannot do is told.
    """
    from lexigraft.importing import import_config as verb

    result = verb(tool, config, output=output, force=force, dry_run=dry_run)
    print_result(result, as_json, ["run", output, "-o", "RUN"], dry_run=dry_run)


@app.command()
def demo(
    *,
    output: Output = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="Less text: under 4 minutes.")] = False,
    language: Annotated[
        Literal["zh", "en"], typer.Option(help="Disease names in Chinese or English.")
    ] = "zh",
    force: Annotated[bool, typer.Option("--force", help="Start over.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Teach SmolLM2-135M names of diseases; show its gain and price."""
    from lexigraft.pipeline import demo as verb

    print_result(verb(output=output, fast=fast, language=language, force=force), as_json)
