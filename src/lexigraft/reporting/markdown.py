"""A run as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lexigraft.console import plain_line
from lexigraft.models.verdict import verdict_lines
from lexigraft.reporting.space import usual_length
from lexigraft.reporting.tables import HEADERS, bits_rows, cells, pipes

SHOWN_TOKENS = 12
BITS = "bpb: bits per UTF-8 byte, comparable across tokenizers, lower is better."


def markdown(facts: dict[str, Any]) -> str:
    """The page; parts of the run that are not done yet are left out."""
    parts = [
        [f"# {facts['base']}, extended"],
        [] if facts["finished"] else ["The run is not finished."],
        _summary(facts),
        _models(facts),
        _training(facts),
        _curves(facts),
        _sentences(facts),
        _size(facts),
        _tokens(facts),
        _terms(facts),
        _rows(facts),
        _proof(facts),
        _verdict(facts),
        _lineage(facts),
        _repeat(facts),
        _seconds(facts),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _summary(facts: dict[str, Any]) -> list[str]:
    learned, grafted = facts["learn"], facts["graft"]
    if not learned:
        return []
    domain = learned["domain"]
    special, replaced = learned.get("special", 0), learned.get("replaced")
    where = f"from id {learned['first_id']:,} on"
    if replaced:
        where = f"{replaced['count']:,} of them under the ids of old ones"
    lines = [
        f"- {learned['added']:,} new tokens{',' if replaced else ''} {where}"
        f"{f' and {special:,} special behind them' if special else ''}; "
        f"domain text takes {domain['tokens_after'] / max(1, domain['tokens_before']):.3f} of the "
        f"base's tokens ({domain['bytes']:,} bytes measured)",
        f"- general text that is split otherwise: {learned['drift']}; new tokens that never "
        f"occur: {learned['dead']}; kept only as parts of others: {learned['bridges']}",
    ]
    if replaced and replaced["general"]:
        general = replaced["general"]
        lines.append(
            f"- general texts that are split otherwise without the replaced tokens: "
            f"{general['changed']:,} of {general['texts']:,}"
        )
    if learned.get("addresses"):
        lines.append(f"- URLs and e-mail addresses not learned from: {learned['addresses']:,}")
    if grafted:
        lines.append(
            f"- rows: {grafted['rows_before']:,} -> {grafted['rows_after']:,}, "
            f"new rows start by `{grafted['init']}`"
        )
        lines += map(_row_line, grafted.get("row_statistics", []))
    return lines


def _row_line(rows: dict[str, Any]) -> str:
    return (
        f"- `{rows['tensor']}`: median norm of new rows {rows['norms'][1]:.3g}, of old rows "
        f"{rows['old_norms'][1]:.3g}; new rows that equal another: {rows['equal_new']:,}, "
        f"an old one: {rows['equal_old']:,}"
    )


def _models(facts: dict[str, Any]) -> list[str]:
    if not facts["models"]:
        return []
    return [
        "## Models",
        "",
        *pipes(HEADERS, [cells(row) for row in facts["models"]]),
        "",
        f"{BITS} The controls are the base without new tokens, trained in the same way: once on "
        "the same text, once on about as many tokens (to the end of a document).",
        "",
        *verdict(facts["models"]),
    ]


def verdict(models: list[dict[str, Any]]) -> list[str]:
    """What the expansion gained and what it cost, in sentences."""
    by_name = {row["model"]: row for row in models}
    merged, control = by_name.get("merged"), by_name.get("control, equal text")
    if merged is None or control is None:
        return []
    shorter = 1 - merged["tokens_per_byte"] / control["tokens_per_byte"]
    sentences = [
        f"Gained: {shorter:.0%} fewer tokens for domain text, so that much more of it fits into "
        f"the context{_speed(merged, control)}."
    ]
    for name in ("control, equal text", "control, equal compute"):
        other = by_name.get(name)
        if other:
            change = merged["domain_bpb"] / other["domain_bpb"] - 1
            word = "Paid" if change > 0 else "Won"
            sentences.append(
                f"{word}: {abs(change):.1%} {'more' if change > 0 else 'fewer'} bits per byte of "
                f"domain text than the {name}."
            )
    return sentences


def _speed(merged: dict[str, Any], control: dict[str, Any]) -> str:
    fast, slow = merged.get("characters_per_second"), control.get("characters_per_second")
    return f", and text is generated {fast / slow:.2f} times as fast" if fast and slow else ""


_TRAINING_HEADER = (
    "trained on bytes",
    "domain bpb",
    "of old tokens",
    "of new tokens",
    "likeliest",
    "leak",
    "general bpb",
)


_BITS_HEADER = (
    *("bits per byte", "base, untrained", "before training", "after training"),
    "control, equal text",
)


def _training(facts: dict[str, Any]) -> list[str]:
    """The measurements of the last training, and whether it was enough."""
    training = facts["training"]
    if not training:
        return []
    keys = ("text_bytes", "domain_bpb", "old_bpb", "new_bpb", "new_top1", "leak", "general_bpb")
    forms = (",.0f", ".3f", ".3f", ".3f", ".1%", ".1%", ".3f")
    rows = [
        [
            "-" if entry.get(key) is None else format(entry[key], form)
            for key, form in zip(keys, forms, strict=True)
        ]
        for entry in training["log"]
    ]
    return [
        "## Was the training enough?",
        "",
        *verdict_lines(training["verdict"]),
        "",
        *pipes(_BITS_HEADER, [(name, *map(_bits, found)) for name, found in bits_rows(facts)]),
        "",
        *pipes(_TRAINING_HEADER, rows),
        "",
        "Likeliest: how often a new token is, where it comes next. Leak: the probability that the "
        "first piece of its old spelling keeps there.",
    ]


def _curves(facts: dict[str, Any]) -> list[str]:
    """Bits per byte through training, of the extended model and of its controls."""
    if not facts["curves"]:
        return []
    base = facts["training"].get("base")
    lines = [("base, untrained", {"text_bytes": 0, **base})] if base else []
    lines += [(curve["model"], point) for curve in facts["curves"] for point in curve["points"]]
    rows = [
        (name, f"{point['text_bytes']:,}", _bits(point["domain_bpb"]), _bits(point["general_bpb"]))
        for name, point in lines
    ]
    header = ("model", "trained on bytes", "domain bpb", "general bpb")
    return [
        *("## Through training", "", *pipes(header, rows)),
        *("", "Measured while training; the table of models afterwards, as a rule on more text."),
    ]


def _bits(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _sentences(facts: dict[str, Any]) -> list[str]:
    """Held-out sentences and the recipe's samples in tokens, the new ones in brackets."""

    def reading(pieces: list[list[Any]]) -> str:
        shown = " · ".join(f"[{text}]" if new else text for _, text, new in pieces)
        return _cell(f"{len(pieces)}: {shown}")

    found = facts["sentences"]
    rows = [
        (_cell(one["text"]), reading(one["before"]), reading(one["after"]))
        for one in [*found["shown"], *found["samples"]]
    ]
    lines = []
    if rows:
        header = ("text", "base", "extended")
        lines = ["", "New tokens stand in brackets.", "", *pipes(header, rows)]
    if found["why"]:
        lines += ["", f"Held-out sentences are not shown: {plain_line(found['why'])}."]
    return ["## Before and after", *lines] if lines else []


def _tokens(facts: dict[str, Any]) -> list[str]:
    rows = [
        (
            _cell(token["shown"]),
            str(token["id"]),
            "-" if token["count"] is None else f"{token['count']:,}",
            "-" if token["count"] is None else f"{token['tokens_saved']:,}",
            token["origin"],
            *(_bits(token[key], digits=1) for key in ("bits_before", "bits")),
        )
        for token in facts["tokens"][:SHOWN_TOKENS]
    ]
    header = ("token", "id", "count", "tokens saved", "origin", "bits before", "bits after")
    return ["## The first new tokens", "", *pipes(header, rows)] if rows else []


def _size(facts: dict[str, Any]) -> list[str]:
    """How many tokens, and why; runs from before sizes were chosen have none."""
    size = facts["learn"].get("size")
    if not size:
        return []
    measures = [
        ("new tokens", size["k"], "{:,}"),
        ("the curve bends at (knee)", size["knee"], "{:,}"),
        ("the model is fastest with (estimated)", size["best_speed_k"], "{:,}"),
        ("speed on domain text, as a multiple of the base's (estimated)", size["speed"], "{:.2f}"),
        ("occurrences of a new token in training, median (expected)", size["median"], "{:,.0f}"),
        ("nine new tokens in ten occur at least so often (expected)", size["low"], "{:,.0f}"),
    ]
    rows = [(name, form.format(value)) for name, value, form in measures if value is not None]
    return ["## How many tokens", "", f"{size['why']}.", "", *pipes(("measure", "value"), rows)]


def _terms(facts: dict[str, Any]) -> list[str]:
    """What became of the listed terms: totals, reasons, and the terms that occur most."""
    terms = facts["learn"].get("terms")
    if not terms:
        return []
    share = terms["reached"] / terms["occurrences"] if terms["occurrences"] else 0.0
    rows = [
        (
            f"`{row['variant']}`",
            f"{row['occurrences']:,}",
            "-" if row["token_id"] is None else str(row["token_id"]),
            f"{row['reached']:,} reached" if row["reason"] is None else row["reason"],
        )
        for row in facts["terms"]
    ]
    return [
        "## Terms",
        "",
        f"{terms['listed']:,} listed; {terms['became_tokens']:,} became tokens in "
        f"{terms['spellings']:,} spellings, which cover {share:.1%} of their "
        f"{terms['occurrences']:,} occurrences.",
        "",
        *[f"- {count:,}: {reason}" for reason, count in terms["reasons"].items()],
        *([""] if terms["reasons"] else []),
        *pipes(("term", "occurrences", "token", "what became of it"), rows),
    ]


def _rows(facts: dict[str, Any]) -> list[str]:
    """How long most new and old rows are, in the last model that there is."""
    lines = [
        f"- `{found['name']}` in {facts['rows']['model']}/: most new rows are about "
        f"{usual_length(found, 'new'):.3g} long, "
        f"most old ones about {usual_length(found, 'old'):.3g}"
        for found in facts["rows"].get("lengths", [])
    ]
    return ["## The new rows", "", *lines] if lines else []


def _proof(facts: dict[str, Any]) -> list[str]:
    """What was proved of the tokenizer, and what transformers' own loader made of it."""
    learned = facts["learn"]
    parity = learned.get("parity")
    if not parity:
        return []
    lines = [
        f"- on {parity['texts']:,} texts with {' and '.join(parity['engines'])}: "
        f"{'other ' if learned.get('replaced') else ''}old ids kept, texts only coarsened, "
        "decoded as before"
    ]
    if parity["base_differences"]:
        lines.append(
            f"- the base's own files differ on {parity['base_differences']:,} of these texts; "
            "each keeps its own reading"
        )
    if parity.get("unknown"):
        lines.append(f"- {parity['unknown']:,} of these texts hold what the base cannot spell")
    lines += _loader(parity.get("loader"))
    lines += [f"- note: {limit}" for limit in learned.get("limits", [])]
    return ["## Proof of the tokenizer", "", *lines]


def _loader(loader: dict[str, Any] | None) -> list[str]:
    if loader is None:  # a run from before transformers was asked
        return []
    if loader["reason"]:
        return [f"- not compared with transformers: {loader['reason']}"]
    line = f"- transformers' loader reads {loader['compared']:,} texts as the extended files do"
    if loader["base_differences"]:
        line += f"; it read {loader['base_differences']:,} texts of the base otherwise already"
    return [line]


def _verdict(facts: dict[str, Any]) -> list[str]:
    if not facts["check"]:
        return []
    findings = facts["check"]["findings"]
    state = "ok" if facts["check"]["ok"] else "faults"
    rows = [
        (
            _cell(row["part"]),
            _cell(row["unit"]),
            "-" if row["count"] is None else f"{row['count']:,}",
            _cell(row["detail"]),
        )
        for row in facts["check"].get("table", [])
    ]
    return [
        *("## Check", "", f"The merged model: {state}."),
        *(f"- {f['severity']} {f['code']} {f['where']}: {f['found']}" for f in findings),
        *(["", *pipes(("part", "counts", "count", "detail"), rows)] if rows else []),
    ]


def _cell(text: str) -> str:
    """A text of the run in a table: on one line, and no tag where it holds a `<`."""
    return plain_line(text).replace("<", "\\<")


def _lineage(facts: dict[str, Any]) -> list[str]:
    """The manifest, and what each of its records says by hash."""
    lineage = facts["lineage"]
    if not lineage:
        return []
    rows = [
        (record["stage"], key, f"`{value}`")
        for record in lineage["records"]
        for key, value in record.items()
        if key in ("token_map", "content", "model")
    ]
    head = f"Manifest of {lineage['folder']}/: `{lineage['hash']}`"
    return ["## Where it comes from", "", head, "", *pipes(("step", "hash of", "sha256"), rows)]


def _repeat(facts: dict[str, Any]) -> list[str]:
    repeat = facts["repeat"]
    versions = ", ".join(f"{name} {number}" for name, number in repeat["versions"].items())
    return [
        *("## Do it again", "", "recipe.yaml:", ""),
        *block(repeat["recipe"].splitlines()),
        *("", "The run, and the same without controls as single commands:", ""),
        *block([repeat["run"], "", *repeat["commands"]]),
        *("", f"With {versions}."),
    ]


def block(lines: Iterable[str]) -> list[str]:
    """Lines as they are, indented: no text in them can end it, as it could a fence."""
    return [f"    {plain_line(line)}".rstrip() for line in lines]


def _seconds(facts: dict[str, Any]) -> list[str]:
    rows = [(stage["stage"], f"{stage['seconds']:.1f}") for stage in facts["stages"]]
    total = ("all", f"{sum(stage['seconds'] for stage in facts['stages']):.1f}")
    return ["## Time", "", *pipes(("stage", "seconds"), [*rows, total])]
