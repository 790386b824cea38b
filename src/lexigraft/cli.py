"""The command line: parse, call one function, print.

Each verb imports its function when it is run, so that `lexigraft --help` needs no torch.
Exit status: 0 done, 1 a check failed, 2 the user must change something, 130 interrupted, 143 told
to stop (SIGTERM).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer

from lexigraft import __version__
from lexigraft.console import is_first_process, plain, set_quiet
from lexigraft.errors import LexigraftError

app = typer.Typer(
    name="lexigraft",
    help="Teach a pretrained language model your field's words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Result(Protocol):
    """What every verb returns."""

    def to_json(self) -> dict[str, Any]:
        """The machine-readable object of `--json`."""

    def lines(self) -> list[str]:
        """What a person reads."""


def _set_quiet(value: bool) -> bool:
    set_quiet(value)
    return value


_NONE: list[str] = []  # typer copies defaults

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


def main() -> None:
    """Run the command line and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without UTF-8 must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
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


def _fail(fault: LexigraftError) -> None:
    prefix = "" if is_first_process() else "in a further process:\n"
    print(plain(prefix + str(fault)), file=sys.stderr)
    sys.exit(fault.status)


def _show(result: Result, as_json: bool) -> None:
    if not is_first_process():
        return
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print(plain("\n".join(result.lines())))


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


@app.command()
def learn(
    base: Annotated[
        Path, typer.Argument(help="Model folder or hub id whose tokenizer is extended.")
    ],
    *,
    output: Output,
    corpus: Corpus = _NONE,
    general: General = _NONE,
    terms: Annotated[
        list[str], typer.Option(help="List of words that come first. Repeatable.")
    ] = _NONE,
    contrast: Annotated[
        list[str],
        typer.Option(
            help="Text of other fields: tokens no more frequent in the corpus than there are not "
            "learned. Repeatable."
        ),
    ] = _NONE,
    pin: Annotated[
        list[str], typer.Option(help="List of words that become tokens however rare.")
    ] = _NONE,
    ban: Annotated[list[str], typer.Option(help="List of words that never become tokens.")] = _NONE,
    special: Annotated[
        list[str], typer.Option(help="List of new special tokens, such as <|diagnosis|>.")
    ] = _NONE,
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
    """Choose new tokens from your text and write the extended tokenizer."""
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
    _show(result, as_json)


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
    ] = _NONE,
    max_bytes: Annotated[
        int | None, typer.Option(help="With --init distill: read so much of it.")
    ] = None,
    pad_to: Annotated[int, typer.Option(help="Rows are a multiple of this.", min=1)] = 64,
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link untouched shards instead of copying.")
    ] = False,
    max_shard_size: MaxShardSize = None,
    tensor: Annotated[
        list[str],
        typer.Option(help="NAME=embed, head or bias, where the layout is unknown. Repeatable."),
    ] = _NONE,
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
    """Add rows for the new tokens to a checkpoint, without loading the model."""
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
        "tensor_roles": _roles(tensor),
        "probe": probe,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "force": force,
    }
    if not distilled or dry_run:
        from lexigraft.steps.graft import graft as verb

        _show(verb(base, vocab, **options, dry_run=dry_run), as_json)
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
    result = graft_distilled(base, vocab, **options, corpus=corpus, max_bytes=max_bytes)
    _show(result, as_json)


def _roles(pairs: list[str]) -> dict[str, str] | None:
    roles = {}
    for pair in pairs:
        name, _, role = pair.rpartition("=")
        if not name or role not in ("embed", "head", "bias"):
            raise LexigraftError(
                f"--tensor {pair}",
                needed="NAME=embed, NAME=head or NAME=bias",
                fix="--tensor model.embed_tokens.weight=embed",
            )
        roles[name] = role
    return roles or None


@app.command()
def train(
    model: Annotated[Path, typer.Argument(help="Grafted model.")],
    *,
    corpus: Corpus,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    general: General = _NONE,
    held_out: Annotated[
        list[str], typer.Option(help="Text to measure on, instead of a part of the corpus.")
    ] = _NONE,
    mode: Annotated[
        str,
        typer.Option(
            help="rows: new rows only; lora: new rows and LoRA on the body; full: everything."
        ),
    ] = "lora",
    objective: Annotated[
        str,
        typer.Option(
            help="lm: the next token; distill: the model's own reading (with --mode rows)."
        ),
    ] = "lm",
    passes: Annotated[
        int | None,
        typer.Option(help="Times the text is read.", show_default="1; distill: 4", min=1),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop after so much text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Tokens per block.", show_default="512; distill: 256", min=8),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks at a time.", min=1)] = 1,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches that make a step.", min=1)
    ] = 1,
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
        float, typer.Option(help="Rate of slow old rows over the body's.", min=0)
    ] = 0.1,
    schedule: Annotated[str, typer.Option(help="cosine, wsd or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps.", min=0, max=0.9)] = 0.05,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Of the body's matrices.", show_default="0; full: 0.1", min=0),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16, int8 or nf4.")
    ] = "auto",
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.", min=1)] = 16,
    replay: Annotated[float, typer.Option(help="Share of general text.", min=0, max=0.9)] = 0.1,
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
        typer.Option(help="Stop after so many measurements without a better one.", min=1),
    ] = None,
    general_limit: Annotated[
        str | None,
        typer.Option(help="Stop where general text gets worse by this, such as 1%."),
    ] = None,
    report_to: Annotated[
        list[str], typer.Option(help="A tracker that Trainer knows, such as wandb. Repeatable.")
    ] = _NONE,
    measurements: Annotated[
        int, typer.Option(help="How often held-out text is measured.", min=1)
    ] = 4,
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
    """Train the new rows, and of the rest of the model nothing, LoRA, or everything."""
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
        "replay": replay,
        "replay_schedule": replay_schedule,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
    }
    if find_lr:
        _show(find_learning_rate(model, **options), as_json)
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
    _show(result, as_json)


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
        bool, typer.Option("--prove", help="Compare logits with the unmerged model.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put adapters into the weights; the base is grown when an adapter needs it."""
    from lexigraft.steps.merge import merge as verb

    result = verb(
        base,
        adapters,
        output=output,
        tokenizer=tokenizer,
        weights=None if weights is None else _numbers("--weights", weights),
        remap=remap,
        body_only=body_only,
        trim=trim,
        max_shard_size=max_shard_size,
        prove=prove,
        force=force,
        dry_run=dry_run,
    )
    _show(result, as_json)


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
    """Part an adapter into a base with its rows and LoRA that every server takes."""
    from lexigraft.steps.split import split as verb

    result = verb(model, adapter, output=output, tokenizer=tokenizer, force=force, dry_run=dry_run)
    _show(result, as_json)


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
    _show(result, as_json)


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

    _show(verb(models, output=output, force=force, dry_run=dry_run), as_json)


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
    """Blend whole models into one; their vocabularies are aligned by token text."""
    from lexigraft.steps.blend import blend as verb

    result = verb(
        models,
        output=output,
        base=base,
        method=method,
        weights=None if weights is None else _numbers("--weights", weights),
        density=None if density is None else _numbers("--density", density),
        t=t,
        seed=seed,
        force=force,
        dry_run=dry_run,
    )
    _show(result, as_json)


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
    ] = _NONE,
    general: General = _NONE,
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
    ] = _NONE,
    undo: Annotated[
        bool, typer.Option("--undo", help="Write the model that MODEL was pruned from.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take tokens that are not needed out of a model: rows, ids and settings move together."""
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
        if given or dry_run:
            raise LexigraftError(
                f"--undo together with {(*given, '--dry-run')[0]}",
                needed="--undo alone: it writes what the model was",
                fix=f"lexigraft prune --undo {model} -o {output}",
            )
        _show(step.unprune(model, output=output, force=force), as_json)
        return
    result = step.prune(
        model,
        output=output,
        **options,
        min_count=min_count,
        pad_to=pad_to,
        tensor_roles=_roles(tensor),
        force=force,
        dry_run=dry_run,
    )
    _show(result, as_json)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise LexigraftError(
            f"{option} {text}", needed="numbers between commas", fix=f"{option} 0.7,0.3"
        ) from None


@app.command()
def check(
    path: Annotated[
        Path | None,
        typer.Argument(help="Model, vocabulary or adapter folder, hub id, or GGUF file."),
    ] = None,
    *,
    base: Annotated[Path | None, typer.Option(help="The model that PATH was made from.")] = None,
    adapter: Annotated[
        list[str],
        typer.Option(help="An adapter to be used on PATH; several in the order of training."),
    ] = _NONE,
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
    """Compare tokenizer, config, weights and adapter; exit 1 with the fault and a command."""
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
        _show(result, as_json)
    raise typer.Exit(0 if result.ok else 1)


@app.command(name="eval")
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Model folders or hub ids, side by side.")],
    *,
    corpus: Corpus,
    general: General = _NONE,
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
    """Bits per byte, tokens per byte and speed of models, whatever their tokenizers."""
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
    _show(result, as_json)


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
    """Split a text with the base and the extended tokenizer, or look a token up."""
    from lexigraft.steps.show import show as verb

    result = verb(path, text, token=token, token_id=token_id, base=base)
    if as_json or not sys.stdout.isatty():
        _show(result, as_json)
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
    """Spans of text, each in the colour of what it is; without colours where NO_COLOR is set."""
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
    """Write what happened in a run as one page, with Markdown and JSON beside it."""
    from lexigraft.reporting import report as verb

    _show(verb(run_folder, output=output, lang=lang), as_json)


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
    """Write README.md, a model card for the hub, of what manifest, training and run say."""
    from lexigraft.reporting.card import card as verb

    _show(verb(folder, base_model=base_model, force=force, dry_run=dry_run), as_json)


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
    """Send a folder that `check` finds sound to the Hugging Face hub, with its card."""
    from lexigraft.uploading import upload as verb

    result = verb(
        folder,
        repository,
        private=private,
        revision=revision,
        base_model=base_model,
        dry_run=dry_run,
    )
    _show(result, as_json)


@app.command()
def serve(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    port: Annotated[int, typer.Option(help="Where to listen; 0: any.", min=0, max=65535)] = 8000,
    lang: Lang = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run's report in the browser of this machine, with a box to try its tokenizers."""
    from lexigraft.serving import serve as verb

    serving = verb(run_folder, port=port, lang=lang)
    _show(serving, as_json)
    sys.stdout.flush()
    serving.forever()


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    output: Output,
    force: Annotated[bool, typer.Option("--force", help="Start over.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole recipe; stages whose inputs are unchanged are skipped."""
    from lexigraft.pipeline import run as verb

    _show(verb(recipe, output=output, force=force), as_json)


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
    """Write a recipe that does what another tool's configuration says, and tell what it cannot."""
    from lexigraft.importing import import_config as verb

    _show(verb(tool, config, output=output, force=force, dry_run=dry_run), as_json)


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
    """Teach SmolLM2-135M the names of diseases, and show what it gained and paid."""
    from lexigraft.pipeline import demo as verb

    _show(verb(output=output, fast=fast, language=language, force=force), as_json)
