"""What is in a folder or a run: check, eval, show, report, card, upload, serve."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from lexigraft.cli.application import app, print_result
from lexigraft.cli.options import NONE, Corpus, Force, General, Json, Lang, Quiet, Trust
from lexigraft.console import plain
from lexigraft.errors import LexigraftError


@app.command()
def check(
    path: Annotated[
        Path | None,
        typer.Argument(help="Model, vocabulary or adapter folder, run, hub id, or GGUF file."),
    ] = None,
    *,
    base: Annotated[Path | None, typer.Option(help="The model that PATH was made from.")] = None,
    adapter: Annotated[
        list[str],
        typer.Option(help="An adapter to be used on PATH; several in the order of training."),
    ] = NONE,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read the weights too: NaN, untrained rows, changes.")
    ] = False,
    consumer: Annotated[
        Literal["gguf", "vllm", "transformers-4", "tgi"] | None,
        typer.Option("--for", help="Also tell what this program will refuse or garble."),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(help="Write a copy with what an edit mends: sizes, index, stale files."),
    ] = None,
    force: Force = False,
    explain: Annotated[
        str | None, typer.Option(metavar="CODE", help="Tell what a code such as LG302 means.")
    ] = None,
    as_json: Json = False,
    as_sarif: Annotated[
        bool, typer.Option("--sarif", help="Print a SARIF 2.1.0 log, for code hosts and editors.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare tokenizer, config, weights, adapter; exit 1 on a fault.

    The fault is told with the command that mends it.
    """
    if explain is not None:
        from lexigraft.checks.codes import explain as story

        print("\n".join(story(explain)))
        raise typer.Exit
    if path is None:
        raise LexigraftError(
            "no folder to check",
            needed="a model, vocabulary or adapter",
            fix="lexigraft check MODEL",
        )
    from lexigraft.steps import check as step

    if fix is not None and (base is not None or adapter or consumer is not None):
        raise LexigraftError(
            "--fix together with --base, --adapter or --for",
            needed="--fix alone: it mends one folder",
            fix=f"lexigraft check {path} --fix {fix}",
        )
    result: step.MendResult | step.CheckResult = (
        step.check(path, base=base, adapter=adapter, deep=deep, consumer=consumer)
        if fix is None
        else step.mend(path, fix, deep=deep, force=force)
    )
    if as_sarif:
        print(json.dumps(result.to_sarif()))
    else:
        print_result(result, as_json)
    raise typer.Exit(0 if result.ok else 1)


@app.command(name="eval")
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Model folders or hub ids, side by side.")],
    *,
    corpus: Corpus,
    general: General = NONE,
    held_out_only: Annotated[
        bool, typer.Option("--held-out-only", help="Only what learn and train left out.")
    ] = False,
    max_bytes: Annotated[int | None, typer.Option(help="At most so much of each text.")] = None,
    window_bytes: Annotated[int, typer.Option(help="Text is cut into windows.", min=64)] = 1024,
    speed_characters: Annotated[
        int, typer.Option(help="Characters to write for the speed; 0 for none.", min=0)
    ] = 200,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Tasks of lm-evaluation-harness to run too, or YAML files."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bits per byte, tokens per byte and speed, whatever the tokenizer."""
    from lexigraft.steps.evaluate import evaluate as verb

    result = verb(
        models,
        corpus=corpus,
        general=general,
        held_out_only=held_out_only,
        max_bytes=max_bytes,
        window_bytes=window_bytes,
        speed_characters=speed_characters,
        tasks=tasks.split(",") if tasks else [],
        trust_remote_code=trust_remote_code,
    )
    print_result(result, as_json)


@app.command()
def show(
    path: Annotated[str, typer.Argument(help="Vocabulary, model or adapter folder, or hub id.")],
    text: Annotated[str | None, typer.Argument(help="Text to split.")] = None,
    *,
    token: Annotated[str | None, typer.Option(help="Look this token up, by its text.")] = None,
    token_id: Annotated[int | None, typer.Option("--id", help="Look this id up.", min=0)] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base itself.", show_default="its reading, by new_tokens.jsonl"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Split a text with base and new tokenizer, or look a token up."""
    from lexigraft.steps.show import show as verb

    result = verb(path, text, token=token, token_id=token_id, base=base)
    if as_json or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        print_result(result, as_json)
    else:
        _show_in_colour(result.styled())


_COLOURS = {
    "label": "dim",
    "plain": "",
    "old": "on grey19",
    "other old": "on grey30",
    "new": "black on green",
}


def _show_in_colour(lines: Iterable[Iterable[tuple[str, str]]]) -> None:
    """Spans of text, each in the colour of what it is."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        spans = [(plain(text), _COLOURS[kind]) for text, kind in line]
        head = Text.assemble(*spans[:1])  # what follows it is wrapped beside it
        body = Text.assemble(*spans[1:])
        for part in body.wrap(console, max(20, console.width - head.cell_len)):
            console.print(head + part)
            head = Text(" " * head.cell_len)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Page to write.", show_default="RUN/report.html"),
    ] = None,
    lang: Lang = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what happened in a run as a page, Markdown and JSON."""
    from lexigraft.reporting import report as verb

    print_result(verb(run_folder, output=output, lang=lang), as_json)


BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        help="The base's id on the hub.",
        show_default="as the manifest says",
    ),
]


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, adapter or vocabulary.")],
    *,
    base_model: BaseModel = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md of yours.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print it, write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write README.md, a model card, of what manifest and training say."""
    from lexigraft.reporting.card import card as verb

    result = verb(folder, base_model=base_model, force=force, dry_run=dry_run)
    print_result(result, as_json, ["upload", folder, "OWNER/NAME"], dry_run=dry_run)


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, adapter or vocabulary.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the hub.")],
    *,
    private: Annotated[
        bool, typer.Option("--private", help="Make it private; stop where it is public.")
    ] = False,
    revision: Annotated[str, typer.Option(help="Branch to write.")] = "main",
    base_model: BaseModel = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the files, send nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send a folder that `check` finds sound to the Hugging Face hub.

    Its model card goes with it.
    """
    from lexigraft.uploading import upload as verb

    result = verb(
        folder,
        repository,
        private=private,
        revision=revision,
        base_model=base_model,
        dry_run=dry_run,
    )
    print_result(result, as_json)


@app.command()
def serve(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    port: Annotated[int, typer.Option(help="Where to listen; 0: any.", min=0, max=65535)] = 8000,
    lang: Lang = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run's report in the browser, with a box to try tokenizers."""
    from lexigraft.serving import serve as verb

    serving = verb(run_folder, port=port, lang=lang)
    print_result(serving, as_json)
    sys.stdout.flush()
    serving.forever()
