"""The path from a base to a model with new words: learn, graft, train, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexigraft.cli.application import app, print_result
from lexigraft.cli.options import (
    NONE,
    Corpus,
    DryRun,
    Force,
    General,
    Json,
    MaxShardSize,
    Output,
    Quiet,
    Seed,
    Trust,
    numbers,
    roles,
)
from lexigraft.errors import LexigraftError


@app.command()
def learn(
    base: Annotated[
        Path, typer.Argument(help="Model folder or hub id whose tokenizer is extended.")
    ],
    *,
    output: Output,
    corpus: Corpus = NONE,
    general: General = NONE,
    terms: Annotated[
        list[str], typer.Option(help="List of words that come first. Repeatable.")
    ] = NONE,
    contrast: Annotated[
        list[str],
        typer.Option(
            help="Text of other fields: tokens no more frequent in the corpus than there are not "
            "learned. Repeatable."
        ),
    ] = NONE,
    pin: Annotated[
        list[str], typer.Option(help="List of words that become tokens however rare.")
    ] = NONE,
    ban: Annotated[list[str], typer.Option(help="List of words that never become tokens.")] = NONE,
    special: Annotated[
        list[str], typer.Option(help="List of new special tokens, such as <|diagnosis|>.")
    ] = NONE,
    tokens: Annotated[
        str, typer.Option(help="How many: a number, a percentage, or auto.")
    ] = "auto",
    replace: Annotated[
        int | None,
        typer.Option(
            help="So many of the new tokens take the ids and rows of old ones: of tokens never "
            "emitted, never trained, or least used in --general. Without --tokens, that many are "
            "learned in all, and nothing grows.",
            min=1,
        ),
    ] = None,
    min_count: Annotated[
        int | None,
        typer.Option(
            help="Least occurrences of a new token.", show_default="by --train-bytes", min=1
        ),
    ] = None,
    allow_more: Annotated[
        bool, typer.Option("--allow-more", help="Accept more than 10% of the base's tokens.")
    ] = False,
    train_bytes: Annotated[
        int | None,
        typer.Option(
            help="Bytes of text that training will see.", show_default="the corpus once", min=1
        ),
    ] = None,
    change_check_text: Annotated[
        bool,
        typer.Option("--change-check-text", help="Keep tokens that change llama.cpp's check text."),
    ] = False,
    from_vocab: Annotated[
        Path | None,
        typer.Option("--from", help="Take the first tokens of this earlier result instead."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Where the corpus is counted: local or ray.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes that count.", show_default="one per core", min=1)
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose new tokens from your text; write the extended tokenizer."""
    from lexigraft.steps.learn import learn as verb

    result = verb(
        base,
        corpus=corpus,
        general=general,
        terms=terms,
        contrast=contrast,
        pin=pin,
        ban=ban,
        special=special,
        tokens=tokens,
        replace=replace,
        min_count=min_count,
        allow_more=allow_more,
        train_bytes=train_bytes,
        change_check_text=change_check_text,
        from_vocab=from_vocab,
        engine=engine,
        workers=workers,
        seed=seed,
        output=output,
        force=force,
        dry_run=dry_run,
    )
    print_result(result, as_json, ["graft", base, output, "-o", "MODEL"], dry_run=dry_run)


@app.command()
def graft(
    base: Annotated[Path, typer.Argument(help="Model folder or hub id to grow, or a GGUF file.")],
    vocab: Annotated[Path, typer.Argument(help="Folder with the extended tokenizer.")],
    *,
    output: Output,
    init: Annotated[
        str,
        typer.Option(
            help="How new rows start: auto, mean, char-weighted, exponential, first, last, "
            "half-first, outward, legible, mean-all, gaussian, random, or module:function; "
            "EMBEDDING,HEAD for two. distill: auto, then learned from --corpus."
        ),
    ] = "auto",
    init_from: Annotated[
        Path | None,
        typer.Option(help="File of new tokens and the base token or text that each starts as."),
    ] = None,
    donor: Annotated[
        Path | None,
        typer.Option(help="Model that has new tokens as one token: its rows are translated."),
    ] = None,
    corpus: Annotated[
        list[str], typer.Option(help="With --init distill: text of the field. Repeatable.")
    ] = NONE,
    max_bytes: Annotated[
        int | None, typer.Option(help="With --init distill: read so much of it.")
    ] = None,
    pad_to: Annotated[int, typer.Option(help="Rows are a multiple of this.", min=1)] = 64,
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="Hard-link untouched shards instead of copying: base and result share them.",
        ),
    ] = False,
    max_shard_size: MaxShardSize = None,
    tensor: Annotated[
        list[str],
        typer.Option(help="NAME=embed, head or bias, where the layout is unknown. Repeatable."),
    ] = NONE,
    probe: Annotated[
        str | None,
        typer.Option(
            help="Run base and result on this everyday text; keep nothing if it got worse."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a checkpoint rows for new tokens; no model is loaded."""
    distilled = init == "distill"
    if corpus and not distilled:
        raise LexigraftError(
            f"--corpus with --init {init}",
            needed="--init distill: no other start reads text",
            fix="add --init distill, or leave --corpus out",
        )
    options: dict[str, Any] = {
        "output": output,
        "init": "auto" if distilled else init,
        "init_from": init_from,
        "donor": donor,
        "pad_to": pad_to,
        "link": link,
        "max_shard_size": max_shard_size,
        "tensor_roles": roles(tensor),
        "probe": probe,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "force": force,
    }
    texts = [word for text in corpus or ["TEXT"] for word in ("--corpus", text)]
    then = ["train", output, *texts, "-o", "ADAPTER"]
    if not distilled or dry_run:
        from lexigraft.steps.graft import graft as verb

        result = verb(base, vocab, **options, dry_run=dry_run)
        print_result(result, as_json, then, dry_run=dry_run)
        return
    from lexigraft.pipeline import graft_distilled

    if not corpus:
        raise LexigraftError(
            "--init distill without --corpus",
            needed="text of the field, which the new rows learn from",
            fix="lexigraft graft BASE VOCAB --init distill --corpus F -o OUT",
        )
    if probe is not None or link:
        raise LexigraftError(
            f"--init distill with {'--link' if probe is None else '--probe'}",
            needed="a graft that trains nothing: what is probed or linked would not be the result",
            fix="leave it out, and compare base and result with lexigraft eval",
        )
    learned = graft_distilled(base, vocab, **options, corpus=corpus, max_bytes=max_bytes)
    print_result(learned, as_json, then)


@app.command()
def train(
    model: Annotated[Path, typer.Argument(help="Grafted model.")],
    *,
    corpus: Corpus,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    general: General = NONE,
    held_out: Annotated[
        list[str], typer.Option(help="Text to measure on, instead of a part of the corpus.")
    ] = NONE,
    mode: Annotated[
        str,
        typer.Option(
            help="rows: new rows only; lora: new rows and LoRA on the body; full: everything."
        ),
    ] = "lora",
    objective: Annotated[
        str,
        typer.Option(
            help="lm: the next token; distill: the model's own reading (--mode rows or lora)."
        ),
    ] = "lm",
    passes: Annotated[
        int | None,
        typer.Option(help="Times the text is read.", show_default="1; distill: 4"),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop after so much text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Text per block, in tokens of the base.", show_default="512; distill: 256"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks at a time.")] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches that make a step.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak rate of the body.", show_default="by mode and size"),
    ] = None,
    new_row_learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of new rows.", show_default="by mode and size")
    ] = None,
    old_rows: Annotated[
        str, typer.Option(help="With --mode full: frozen, or slow: they train too.")
    ] = "frozen",
    old_row_scale: Annotated[
        float, typer.Option(help="Rate of slow old rows over the body's.")
    ] = 0.1,
    schedule: Annotated[str, typer.Option(help="cosine, wsd or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.05,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Of the body's matrices.", show_default="0; full: 0.1"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16, int8 or nf4.")
    ] = "auto",
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 16,
    lora_alpha: Annotated[
        float, typer.Option(help="What LoRA adds is multiplied by this over the rank.")
    ] = 32.0,
    replay: Annotated[float, typer.Option(help="Share of general text.")] = 0.1,
    replay_schedule: Annotated[
        str, typer.Option(help="even, or early: all general text in the first part.")
    ] = "even",
    base: Annotated[
        Path | None,
        typer.Option(
            help="The model before `graft`, to compare with.", show_default="MODEL, if untrained"
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many measurements without a better one.",
            show_default="never; distill: 2",
        ),
    ] = None,
    general_limit: Annotated[
        str | None,
        typer.Option(help="Stop where general text gets worse by this, such as 1%."),
    ] = None,
    report_to: Annotated[
        list[str], typer.Option(help="A tracker that Trainer knows, such as wandb. Repeatable.")
    ] = NONE,
    measurements: Annotated[int, typer.Option(help="How often held-out text is measured.")] = 4,
    measured_bytes: Annotated[
        int, typer.Option(help="Held-out text of each kind that is measured, at most.")
    ] = 16_384,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", show_default="a tenth")
    ] = None,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Try learning rates, write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a kill.")] = False,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the new rows; of the rest nothing, LoRA, or everything."""
    from lexigraft.models.verdict import HARMFUL
    from lexigraft.steps.train import find_learning_rate
    from lexigraft.steps.train import train as verb

    options: dict[str, Any] = {
        "corpus": corpus,
        "general": general,
        "held_out": held_out,
        "mode": mode,
        "objective": objective,
        "passes": passes,
        "max_steps": max_steps,
        "block_size": block_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "new_row_learning_rate": new_row_learning_rate,
        "old_rows": old_rows,
        "old_row_scale": old_row_scale,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup": warmup,
        "gradient_accumulation": gradient_accumulation,
        "gradient_checkpointing": gradient_checkpointing,
        "dtype": dtype,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "replay": replay,
        "replay_schedule": replay_schedule,
        "measured_bytes": measured_bytes,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
    }
    if find_lr:
        print_result(find_learning_rate(model, **options), as_json)
        return
    if output is None:
        raise LexigraftError("no -o", needed="a folder to write", fix="add -o OUT, or --find-lr")
    result = verb(
        model,
        output=output,
        max_bytes=max_bytes,
        max_tokens=max_tokens,
        base=base,
        patience=patience,
        general_limit=None if general_limit is None else _share(general_limit),
        report_to=report_to,
        measurements=measurements,
        save_steps=save_steps,
        resume=resume,
        force=force,
        **options,
    )
    if result.verdict["verdict"] == HARMFUL:  # whose lines say what to do instead
        print_result(result, as_json)
    elif mode == "full":
        print_result(result, as_json, ["check", output, "--base", model])
    else:
        print_result(result, as_json, ["merge", model, output, "-o", "MERGED"])


def _share(text: str) -> float:
    """`1%` or `0.01` as 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise LexigraftError(
            f"--general-limit {text}", needed="a share such as 1% or 0.01", fix="--general-limit 1%"
        )
    return share


@app.command()
def merge(
    base: Annotated[
        Path, typer.Argument(help="Grafted model, or the base as it was: folder or hub id.")
    ],
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders, first trained first.")],
    *,
    output: Output,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer, if the adapter has none.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="A number per adapter, such as 0.7,0.3: all are added to BASE together."),
    ] = None,
    remap: Annotated[
        bool,
        typer.Option("--remap", help="Move rows of adapters with other ids by token text."),
    ] = False,
    body_only: Annotated[
        bool,
        typer.Option("--body-only", help="Leave the adapters' rows out; the tokenizer is BASE's."),
    ] = False,
    trim: Annotated[
        bool,
        typer.Option("--trim", help="Only the adapter's rows: no padding of BASE beyond them."),
    ] = False,
    max_shard_size: MaxShardSize = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Read it back; compare logits with the unmerged model.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put adapters into the weights; the base is grown where needed."""
    from lexigraft.steps.merge import merge as verb

    result = verb(
        base,
        adapters,
        output=output,
        tokenizer=tokenizer,
        weights=None if weights is None else numbers("--weights", weights),
        remap=remap,
        body_only=body_only,
        trim=trim,
        max_shard_size=max_shard_size,
        prove=prove,
        force=force,
        dry_run=dry_run,
    )
    print_result(result, as_json, ["check", output, "--base", base], dry_run=dry_run)
