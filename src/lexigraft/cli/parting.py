"""Parts of models, and several of them: split, extract, align, blend, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexigraft.cli.application import app, print_result
from lexigraft.cli.options import (
    NONE,
    DryRun,
    Force,
    General,
    Json,
    Output,
    Quiet,
    Seed,
    numbers,
    roles,
)
from lexigraft.errors import LexigraftError


@app.command()
def split(
    model: Annotated[
        Path, typer.Argument(help="Grafted model, or the base as it was: folder or hub id.")
    ],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    *,
    output: Output,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer, if the adapter has none.")
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Part an adapter into a base with its rows, and LoRA to serve.

    The base has new rows and old ones that moved; the LoRA is spelled as every server takes it.
    """
    from lexigraft.steps.split import split as verb

    result = verb(model, adapter, output=output, tokenizer=tokenizer, force=force, dry_run=dry_run)
    then = ["check", result.base, "--adapter", result.adapter]
    print_result(result, as_json, then, dry_run=dry_run)


@app.command()
def extract(
    tuned: Annotated[Path, typer.Argument(help="Fine-tuned model.")],
    *,
    output: Output,
    base: Annotated[Path, typer.Option(help="The model that it was made from.")],
    rank: Annotated[str, typer.Option(help="Of LoRA: a number, or auto.")] = "16",
    max_error: Annotated[
        float | None,
        typer.Option(
            help="With --rank auto: the largest relative error of a change.", show_default="0.1"
        ),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what a fine-tuned model has beyond its base as an adapter."""
    from lexigraft.steps.extract import extract as verb

    result = verb(
        tuned,
        base=base,
        output=output,
        rank=int(rank) if rank.isdecimal() else rank,
        max_error=max_error,
        seed=seed,
        force=force,
        dry_run=dry_run,
    )
    print_result(result, as_json, ["merge", base, output, "-o", "MERGED"], dry_run=dry_run)


@app.command()
def align(
    models: Annotated[
        list[str], typer.Argument(help="Model folders or hub ids; the first one's ids are kept.")
    ],
    *,
    output: Output,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put models on one vocabulary, ready for any merge tool."""
    from lexigraft.steps.align import align as verb

    result = verb(models, output=output, force=force, dry_run=dry_run)
    print_result(result, as_json, *(["check", one] for one in result.models), dry_run=dry_run)


@app.command()
def blend(
    models: Annotated[
        list[str], typer.Argument(help="Model folders or hub ids; or one mergekit recipe (.yml).")
    ],
    *,
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="What the models were made from; its ids are kept.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="linear, slerp, task, ties, dare, dare_ties, della, della_linear or chat-vector."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A number per model, such as 0.7,0.3.", show_default="1 each")
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(help="Share of changes that stays (ties, dare, della): one, or per model."),
    ] = None,
    t: Annotated[
        float | None, typer.Option("--t", help="slerp: 0 is the base, 1 the other model.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Blend whole models into one; tokens are matched by their text."""
    from lexigraft.steps.blend import blend as verb

    result = verb(
        models,
        output=output,
        base=base,
        method=method,
        weights=None if weights is None else numbers("--weights", weights),
        density=None if density is None else numbers("--density", density),
        t=t,
        seed=seed,
        force=force,
        dry_run=dry_run,
    )
    print_result(result, as_json, ["check", output], dry_run=dry_run)


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Model folder; with --undo the pruned one.")],
    *,
    output: Output,
    corpus: Annotated[
        list[str],
        typer.Option(
            help="Text whose tokens stay; alone, all that it never uses goes. Repeatable."
        ),
    ] = NONE,
    general: General = NONE,
    keep: Annotated[
        int | None, typer.Option(help="How many tokens are left; the rarest go.", min=1)
    ] = None,
    drop: Annotated[
        str | None, typer.Option(help="How many tokens go: a number, or a share such as 30%.")
    ] = None,
    min_count: Annotated[
        int,
        typer.Option(help="Tokens that the corpus has fewer of may go too.", min=1),
    ] = 1,
    scripts: Annotated[
        str | None,
        typer.Option(help="Scripts that stay, such as Latin,Han: tokens of others go."),
    ] = None,
    listed: Annotated[Path | None, typer.Option("--list", help="File of tokens that go.")] = None,
    adapter: Annotated[
        list[Path],
        typer.Option(help="Adapter of this model to copy for the result. Repeatable."),
    ] = [],  # noqa: B006 - typer copies defaults
    pad_to: Annotated[int, typer.Option(help="Rows are a multiple of this.", min=1)] = 64,
    tensor: Annotated[
        list[str],
        typer.Option(help="NAME=embed, head or bias, where the layout is unknown. Repeatable."),
    ] = NONE,
    undo: Annotated[
        bool, typer.Option("--undo", help="Write the model that MODEL was pruned from.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take unneeded tokens out of a model: rows, ids and settings."""
    from lexigraft.steps import prune as step

    options: dict[str, Any] = {
        "corpus": corpus,
        "general": general,
        "keep": keep,
        "drop": drop,
        "scripts": [name.strip() for name in scripts.split(",")] if scripts else [],
        "listed": listed,
        "adapters": adapter,
    }
    if undo:
        spelled = {"listed": "list", "adapters": "adapter"}
        given = [f"--{spelled.get(name, name)}" for name, value in options.items() if value]
        if given:
            raise LexigraftError(
                f"--undo together with {given[0]}",
                needed="--undo alone: it writes what the model was",
                fix=f"lexigraft prune --undo {model} -o {output}",
            )
        undone = step.unprune(model, output=output, force=force, dry_run=dry_run)
        print_result(undone, as_json, ["check", output], dry_run=dry_run)
        return
    result = step.prune(
        model,
        output=output,
        **options,
        min_count=min_count,
        pad_to=pad_to,
        tensor_roles=roles(tensor),
        force=force,
        dry_run=dry_run,
    )
    print_result(result, as_json, ["check", output], dry_run=dry_run)
