"""A run as a page of Markdown."""

from __future__ import annotations

from typing import Any

from lexigraft.reporting.tables import HEADERS, cells, pipes


def markdown(facts: dict[str, Any]) -> str:
    """The page; parts of the run that are not done yet are left out."""
    parts = [
        [f"# {facts['base']}, extended"],
        [] if facts["finished"] else ["The run is not finished."],
        _summary(facts),
        _models(facts),
        _samples(facts),
        _tokens(facts),
        _verdict(facts),
        _seconds(facts),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _summary(facts: dict[str, Any]) -> list[str]:
    learned, grafted = facts["learn"], facts["graft"]
    if not learned:
        return []
    domain = learned["domain"]
    lines = [
        f"- {learned['added']:,} new tokens from id {learned['first_id']:,} on; "
        f"domain text takes {domain['tokens_after'] / max(1, domain['tokens_before']):.3f} of the "
        f"base's tokens ({domain['bytes']:,} bytes measured)",
        f"- general text that is split otherwise: {learned['drift']}; new tokens that never "
        f"occur: {learned['dead']}; kept only as parts of others: {learned['bridges']}",
    ]
    if grafted:
        lines.append(
            f"- rows: {grafted['rows_before']:,} -> {grafted['rows_after']:,}, "
            f"new rows start by `{grafted['init']}`"
        )
    return lines


def _models(facts: dict[str, Any]) -> list[str]:
    if not facts["models"]:
        return []
    return [
        "## Models",
        "",
        *pipes(HEADERS, [cells(row) for row in facts["models"]]),
        "",
        "bpb: bits per UTF-8 byte, comparable across tokenizers, lower is better. "
        "The controls are the base without new tokens, trained in the same way: once on the same "
        "text, once on about as many tokens (to the end of a document).",
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


def _samples(facts: dict[str, Any]) -> list[str]:
    rows = [
        (
            sample["text"],
            f"{len(sample['before'])}: {' · '.join(sample['before'])}",
            f"{len(sample['after'])}: {' · '.join(sample['after'])}",
        )
        for sample in facts["samples"]
    ]
    return ["## Before and after", "", *pipes(("text", "base", "extended"), rows)] if rows else []


def _tokens(facts: dict[str, Any]) -> list[str]:
    rows = [
        (
            token["text"] if token["text"] is not None else f"bytes {token['bytes']}",
            str(token["id"]),
            f"{token['count']:,}",
            f"{token['tokens_saved']:,}",
            token["origin"],
        )
        for token in facts["tokens"]
    ]
    header = ("token", "id", "count", "tokens saved", "origin")
    return ["## The first new tokens", "", *pipes(header, rows)] if rows else []


def _verdict(facts: dict[str, Any]) -> list[str]:
    if not facts["check"]:
        return []
    findings = facts["check"]["findings"]
    state = "ok" if facts["check"]["ok"] else "faults"
    return ["## Check", "", f"The merged model: {state}."] + [
        f"- {f['severity']} {f['code']} {f['where']}: {f['found']}" for f in findings
    ]


def _seconds(facts: dict[str, Any]) -> list[str]:
    rows = [(stage["stage"], f"{stage['seconds']:.1f}") for stage in facts["stages"]]
    total = ("all", f"{sum(stage['seconds'] for stage in facts['stages']):.1f}")
    return ["## Time", "", *pipes(("stage", "seconds"), [*rows, total])]
