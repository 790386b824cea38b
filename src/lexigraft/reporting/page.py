"""A run as one HTML page: no network, no library, light and dark, English or Chinese.

Every text that a run brings is escaped (Jinja2's autoescape); the page's policy forbids whatever
its own style sheet and script, known by their hashes, do not do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lexigraft.console import plain, plain_line
from lexigraft.reporting import chinese
from lexigraft.reporting.charts import charts
from lexigraft.reporting.tables import bits_rows
from lexigraft.reporting.words import Language, Words, reasons, speaker, unknown

# Of the table of tokens: the column, and how its values are written.
COLUMNS = (
    ("id", "id"),
    ("token", "token"),
    ("pieces", "pieces"),
    ("count", "count"),
    ("saved", "count"),
    ("specificity", "decimal"),
    ("origin", "word"),
    ("targets", "count"),
    ("moved", "distance"),
    ("top1", "share"),
    ("bits_before", "decimal"),
    ("bits", "decimal"),
    ("verdict", "word"),
)
_NUMERIC = ("id", "count", "decimal", "distance", "share")
_ORIGINS = ("merge", "term", "character", "bridge", "special")
_VERDICTS = ("learned", "rare", "spelled", "unmoved")
_TONES = {"sufficient": "good", "not yet": "warn", "harmful": "bad"}
# A sentence and its language: what has no Chinese words is told in English.
Told = tuple[str, str]
_RAW = re.compile(r"<[0-9A-F]+>")


@dataclass(frozen=True)
class Live:
    """What the page of `serve` begins with: a text, and whether models can write on."""

    text: str
    models: bool


def page(facts: Mapping[str, Any], language: Language = "en", live: Live | None = None) -> str:
    """The page of a run.

    Args:
        facts: as `run_facts` gives them.
        live: for the page of `serve`, which asks its own server.
    """
    t = speaker(language)
    tokens = {token["id"]: token for token in facts["tokens"]}
    text: str = _template().render(
        facts=facts,
        lang=language,
        live=live,
        t=t,
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        policy=policy(live=live is not None),
        data=_data(facts, t),
        cards=list(_cards(facts, t)),
        charts=charts(facts, t),
        columns=COLUMNS,
        numeric=_NUMERIC,
        rows=[_row(token) for token in facts["tokens"]],
        tip=lambda token: tip(tokens.get(token), token, t),
        lede=_lede(facts, t),
        why=_why(facts, language),
        limits=_limits(facts, language),
        sizes=_sizes(facts, t),
        term_lines=_terms(facts, t, language),
        reasons=reasons(facts, language) if facts["training"] else [],
        unknown=unknown(facts, language) if facts["training"] else [],
        tone=_TONES.get(facts["training"].get("verdict", {}).get("verdict", ""), ""),
        bits=_bits(facts, t),
        log=_log(facts),
        models=_models(facts, t),
        proofs=list(_proofs(facts, t)),
        findings=_findings(facts, language),
        check_lines=_check(facts, language),
        lineage=_lineage(facts),
        times=_times(facts, t),
        number=_number,
        percent=_percent,
        is_raw=_RAW.fullmatch,
        direction=direction,
        visible=plain_line,
        lines=plain,
    )
    return text


def policy(*, live: bool = False) -> str:
    """The page's Content-Security-Policy: nothing but its own style sheet and script.

    Args:
        live: it may also ask the server that it came from.
    """
    rules = [
        "default-src 'none'",
        f"style-src '{_hash('page.css')}'",
        f"script-src '{_hash('page.js')}'",
        "img-src data:",
        *(["connect-src 'self'"] if live else []),
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(rules)


@cache
def _template() -> Any:
    # StrictUndefined: a key that the facts lack is a fault of ours, not an empty place.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_file("page.html"))


@cache
def _file(name: str) -> str:
    return resources.files("lexigraft.reporting").joinpath(name).read_text("utf-8")


def _hash(name: str) -> str:
    digest = hashlib.sha256(_file(name).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def direction(text: str) -> str:
    """`rtl` if the first strong character of `text` runs from right to left (UAX #9, rule P2).

    >>> direction("1. قلب"), direction("heart قلب")
    ('rtl', 'ltr')
    """
    for character in text:
        kind = unicodedata.bidirectional(character)
        if kind in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


def tip(token: Mapping[str, Any] | None, token_id: int, t: Words) -> str:
    """What is told of a new token beside its text."""
    found = [t("tip.id", id=token_id)]
    if token is not None:
        pieces = " | ".join(token["spelled"])
        found.append(t("tip.pieces", pieces=pieces, n=len(token["spelled"])))
        if token["count"] is not None:
            found.append(t("tip.count", n=f"{token['count']:,}"))
    return "\n".join(found)


def _data(facts: Mapping[str, Any], t: Words) -> Markup:
    """What the script reads: JSON that cannot end its element."""
    known = ("merged", "base", *_ORIGINS, *_VERDICTS)
    data = {
        "tokens": [_row(token) for token in facts["tokens"]],
        "words": {word: t(word) for word in known},
        "found": t("table.found", shown="{shown}", found="{found}", all="{all}"),
        "working": t("try.working"),
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _row(token: Mapping[str, Any]) -> list[Any]:
    """A token in the order of `COLUMNS`, and behind them what is only searched for."""
    return [
        token["id"],
        token["shown"],
        token["spelled"],
        token["count"],
        token["tokens_saved"],
        token["specificity"],
        token["origin"],
        token["targets"],
        token["moved"],
        token["top1"],
        token["bits_before"],
        token["bits"],
        token["verdict"],
        token["bytes"],
    ]


def _number(kind: str, value: float) -> str:
    forms = {"count": ",", "decimal": ".1f", "distance": ".3f", "share": ".0%"}
    return format(value, forms.get(kind, ""))


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _saved(facts: Mapping[str, Any]) -> float:
    """Which share of the base's tokens a text of the field no longer takes."""
    domain = facts["learn"].get("domain")
    return 1 - domain["tokens_after"] / max(1, domain["tokens_before"]) if domain else 0.0


def _lede(facts: Mapping[str, Any], t: Words) -> str:
    """What `learn` made, in a sentence or two; empty before it."""
    learned = facts["learn"]
    if not learned:
        return ""
    values = {"added": f"{learned['added']:,}", "share": _percent(_saved(facts))}
    replaced, special = learned.get("replaced"), learned.get("special", 0)
    told = (
        t("lede.replaced", **values, replaced=f"{replaced['count']:,}")
        if replaced
        else t("lede", **values)
    )
    return told + (t("lede.special", special=special) if special else "")


def _cards(facts: Mapping[str, Any], t: Words) -> Iterator[dict[str, str]]:
    """The headline numbers."""
    learned = facts["learn"]
    if learned:
        domain = learned["domain"]
        size = max(1, domain["bytes"])
        before, after = (f"{learned[key]:,}" for key in ("tokens_before", "tokens_after"))
        replaced = learned.get("replaced")
        note = (
            t("card.added.replaced", before=before, after=after, replaced=f"{replaced['count']:,}")
            if replaced
            else t("card.added.note", before=before, after=after)
        )
        yield _card(t, "added", f"{learned['added']:,}", note)
        ratio = [f"{domain[key] / size:.3f}" for key in ("tokens_before", "tokens_after")]
        yield _card(
            t, "tokens", f"−{_saved(facts):.0%}",
            t("card.tokens.note", before=ratio[0], after=ratio[1]), "good",
        )  # fmt: skip
    by_name = {row["model"]: row for row in facts["models"]}
    merged, base = by_name.get("merged"), by_name.get("base")
    if merged is None or base is None:
        return
    control = by_name.get("control, equal text")
    other, key = (control, "control") if control else (base, "base")
    yield _card(
        t, "domain", f"{merged['domain_bpb']:.3f}",
        t(f"card.domain.{key}", value=f"{other['domain_bpb']:.3f}"),
        "good" if merged["domain_bpb"] <= other["domain_bpb"] else "warn",
    )  # fmt: skip
    if merged["general_bpb"] and base["general_bpb"]:
        worse = merged["general_bpb"] > base["general_bpb"] * 1.01
        yield _card(
            t, "general", f"{merged['general_bpb']:.3f}",
            t("card.general.note", value=f"{base['general_bpb']:.3f}"), "bad" if worse else "good",
        )  # fmt: skip
    fast, slow = (row.get("characters_per_second") for row in (merged, control or base))
    if fast and slow and control:
        note = t("card.speed.note", fast=f"{fast:.1f}", slow=f"{slow:.1f}")
        yield _card(t, "speed", f"×{fast / slow:.2f}", note, "good" if fast >= slow else "warn")
    if facts["training"]:
        verdict = facts["training"]["verdict"]
        note = t(
            "card.verdict.note", reasons=len(verdict["reasons"]), unknown=len(verdict["unknown"])
        )
        yield _card(t, "verdict", t(verdict["verdict"]), note, _TONES[verdict["verdict"]])


def _card(t: Words, key: str, value: str, note: str, tone: str = "") -> dict[str, str]:
    return {"name": t(f"card.{key}"), "value": value, "note": note, "tone": tone}


def _sizes(facts: Mapping[str, Any], t: Words) -> list[tuple[str, str]]:
    size = facts["learn"].get("size") or {}
    forms = {"speed": ".2f", "median": ",.0f", "low": ",.0f"}
    return [
        (t(f"size.{key}"), format(size[key], form))
        for key, form in forms.items()
        if size.get(key) is not None
    ]


def _why(facts: Mapping[str, Any], language: Language) -> Told:
    """Why there are so many new tokens; an empty text of runs from before sizes were chosen."""
    size = facts["learn"].get("size") or {}
    if language == "zh" and "because" in size:
        return chinese.size_sentence(size["because"]), "zh-Hans"
    return size.get("why", ""), "en"


def _limits(facts: Mapping[str, Any], language: Language) -> list[Told]:
    """What is to be known of this kind of tokenizer."""
    own = chinese.LIMITS.get(facts["learn"].get("family", "")) if language == "zh" else None
    limits = facts["learn"].get("limits", [])
    return [(limit, "en") if own is None else (own, "zh-Hans") for limit in limits]


def _terms(facts: Mapping[str, Any], t: Words, language: Language) -> list[tuple[str, ...]]:
    def fate(row: Mapping[str, Any]) -> str:
        if row["reason"] is None:
            return t("terms.reached", n=f"{row['reached']:,}")
        least = facts["learn"].get("min_count", 0)
        return chinese.term_reason(row, least) if language == "zh" else str(row["reason"])

    return [
        (
            plain_line(row["variant"]),
            f"{row['occurrences']:,}",
            "–" if row["token_id"] is None else str(row["token_id"]),
            plain_line(fate(row)),
        )
        for row in facts["terms"]
    ]


def _bits(facts: Mapping[str, Any], t: Words) -> list[list[str]]:
    return [
        [t(f"training.{name}"), *("–" if value is None else f"{value:.3f}" for value in found)]
        for name, found in bits_rows(facts)
    ]


def _log(facts: Mapping[str, Any]) -> list[list[str]]:
    keys = ("text_bytes", "domain_bpb", "old_bpb", "new_bpb", "new_top1", "leak", "general_bpb")
    forms = (",.0f", ".3f", ".3f", ".3f", ".1%", ".1%", ".3f")
    return [
        [
            "–" if entry.get(key) is None else format(entry[key], form)
            for key, form in zip(keys, forms, strict=True)
        ]
        for entry in facts["training"].get("log", [])
    ]


def _models(facts: Mapping[str, Any], t: Words) -> list[list[str]]:
    forms = {
        "tokens_per_byte": ".3f",
        "domain_bpb": ".3f",
        "general_bpb": ".3f",
        "characters_per_second": ".1f",
        "training_text_bytes": ",.0f",
        "training_tokens": ",.0f",
        "training_seconds": ".0f",
    }
    return [
        [t(row["model"]), *(format(row[k], form) if row[k] else "–" for k, form in forms.items())]
        for row in facts["models"]
    ]


def _findings(facts: Mapping[str, Any], language: Language) -> list[dict[str, str]]:
    """Each finding of `check`, with its sentences in the language of the page where it has them."""
    told = []
    for finding in facts["check"].get("findings", []):
        own = chinese.finding_sentence(finding) if language == "zh" else None
        found, fix = own or (finding["found"], finding["fix"])
        lang = "en" if own is None else "zh-Hans"
        told.append({**finding, "found": found, "fix": fix, "lang": lang})
    return told


def _check(facts: Mapping[str, Any], language: Language) -> list[tuple[str, ...]]:
    def cell(text: str) -> str:
        return plain_line(chinese.CELLS.get(text, text) if language == "zh" else text)

    return [
        (cell(row["part"]), cell(row["unit"]), _count(row["count"]), cell(row["detail"]))
        for row in facts["check"].get("table", [])
    ]


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _times(facts: Mapping[str, Any], t: Words) -> list[tuple[str, str]]:
    rows = [(stage["stage"], f"{stage['seconds']:,.1f}") for stage in facts["stages"]]
    total = sum(stage["seconds"] for stage in facts["stages"])
    return [*rows, (t("all"), f"{total:,.1f}")] if rows else []


def _proofs(facts: Mapping[str, Any], t: Words) -> Iterator[tuple[str, str]]:
    """(tone, sentence) of everything that was proved, or was not."""
    learned, parity = facts["learn"], facts["learn"].get("parity")
    if not parity:
        return
    if learned.get("replaced"):
        yield _replaced(learned["replaced"], t)
    yield _good(learned["drift"] == 0), t("proof.drift", n=learned["drift"])
    counts = {key: f"{learned[key]:,}" for key in ("added", "dead", "bridges")}
    yield "good" if learned["dead"] <= learned["bridges"] else "warn", t("proof.reach", **counts)
    engines = ", ".join(parity["engines"])
    yield "good", t("proof.parity", engines=engines, texts=f"{parity['texts']:,}")
    if parity["base_differences"]:
        yield "warn", t("proof.base_differences", n=f"{parity['base_differences']:,}")
    loader = parity.get("loader")
    if loader and loader["reason"]:
        yield "warn", t("proof.no_loader", why=plain_line(loader["reason"]))
    elif loader:
        yield "good", t("proof.loader", n=f"{loader['compared']:,}")
    for rows in facts["graft"].get("row_statistics", []):
        equal = {key: f"{rows[key]:,}" for key in ("equal_new", "equal_old")}
        sound = not rows["equal_new"] and not rows["equal_old"]
        yield "good" if sound else "warn", t("proof.equal", tensor=rows["tensor"], **equal)
    training = facts["training"]
    if training:
        moved, new = training["rows_moved"], training["new_rows"]
        told = t("proof.moved", moved=f"{moved:,}", rows=f"{new:,}")
        yield "good" if moved == new else "warn", told
    if facts["check"]:
        ok = facts["check"]["ok"]
        yield _good(ok), t("proof.check" if ok else "proof.no_check")


def _replaced(replaced: Mapping[str, Any], t: Words) -> tuple[str, str]:
    """(tone, sentences) of old tokens that are no more, and of texts that held them."""
    told, changed = t("proof.replaced", n=f"{replaced['count']:,}"), 0
    kind = next((kind for kind in ("general", "domain") if replaced[kind]), None)
    if kind:
        reading = replaced[kind]
        counts = {key: f"{reading[key]:,}" for key in ("changed", "texts")}
        told += t(f"proof.replaced.{kind}", **counts)
        changed = reading["changed"]
    return "warn" if changed else "good", told


def _good(state: bool) -> str:
    return "good" if state else "bad"


def _lineage(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per record of the manifest its stage, its settings, and what else it holds, as text."""
    return [
        {
            "stage": record["stage"],
            "lines": list(_lines_of({**record, "settings": None})),
            "settings": list(_lines_of(record.get("settings", {}))),
        }
        for record in facts["lineage"].get("records", [])
    ]


def _lines_of(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        name = f"{before}{key}"
        if key in ("stage", "versions") or value is False or value in (None, [], {}):
            continue
        if isinstance(value, dict):
            yield from _lines_of(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
            for place, one in enumerate(value):
                yield f"{name}[{place}]", ", ".join(f"{k} {v}" for k, v in one.items())
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)
