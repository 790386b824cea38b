"""Rows of facts as text: columns for a terminal, pipes for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lexigraft.models.verdict import verdict_lines
from lexigraft.reporting.facts import model_rows
from lexigraft.runfile import RunState

HEADERS = (
    "model",
    "tokens/byte",
    "domain bpb",
    "general bpb",
    "generated characters/s",
    "trained on bytes",
    "trained tokens",
    "training seconds",
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table of models."""

    def number(key: str, form: str) -> str:
        value = row.get(key)
        return "-" if not value else format(value, form)

    return (
        row["model"],
        number("tokens_per_byte", ".3f"),
        number("domain_bpb", ".3f"),
        number("general_bpb", ".3f"),
        number("characters_per_second", ".1f"),
        number("training_text_bytes", ",.0f"),
        number("training_tokens", ",.0f"),
        number("training_seconds", ".0f"),
    )


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for a terminal: the first column to the left, numbers to the right.

    >>> columns(("a", "b"), [("long", "1")])
    ['a     b', 'long  1']
    """
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *rows)
    ]


def pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown.

    >>> pipes(("a", "b"), [("x|y", "1")])
    ['| a | b |', '|---|---:|', '| x\\\\|y | 1 |']
    """
    rule = ["---", *["---:"] * (len(header) - 1)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return [line(header), "|" + "|".join(rule) + "|", *map(line, rows)]


def bits_rows(facts: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
    """What held-out text costs, in bits per byte: `domain` and `general`, each with four figures.

    These are of the untrained base, of the extended model before and after training, and of the
    control with the same text. All are measured by training, on the same text. What has no figure
    is left out.
    """
    training = facts["training"]
    ends = {curve["model"]: (curve["points"][0], curve["points"][-1]) for curve in facts["curves"]}
    if not training or "merged" not in ends:
        return []
    control = ends.get("control, equal text", ({}, {}))[1]
    places = (training["base"], ends["merged"][0], training, control)
    rows = [(name, [one.get(f"{name}_bpb") for one in places]) for name in ("domain", "general")]
    return [(name, found) for name, found in rows if found[2] is not None]


def model_table(state: RunState) -> list[str]:
    """The measured models of a run, side by side."""
    return columns(HEADERS, [cells(row) for row in model_rows(state)])


def training_lines(state: RunState) -> list[str]:
    """The verdict on the last training; none of a run from before there were verdicts."""
    verdict = state.result("train").get("verdict")
    return verdict_lines(verdict) if verdict else []


def sample_lines(state: RunState) -> list[str]:
    """Texts in the pieces of the base and of the extended tokenizer."""
    lines = []
    for sample in state.result("samples").get("samples", []):
        before, after = sample["before"], sample["after"]
        lines += [
            f"{sample['text']}: {len(before)} -> {len(after)} tokens",
            f"  before  {' | '.join(before)}",
            f"  after   {' | '.join(after)}",
        ]
    return lines
