"""The model card of a folder: what its manifest, its training and its run say, and nothing else.

Metadata as the hub reads it (huggingface.co/docs/hub/model-cards): terms, languages and tags are
those of the base's card, which the steps keep as README.base.md. Token texts, names and whatever
else comes out of files is written so that it has no meaning in Markdown and HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lexigraft.console import plain_line
from lexigraft.errors import LexigraftError
from lexigraft.families.measure import read_rows
from lexigraft.families.tokenmap import readable
from lexigraft.files import (
    BASE_CARD,
    CARD,
    CARD_MARK,
    NEW_TOKENS,
    is_there,
    read_settings,
    require_folder,
    sha256_bytes,
    write_whole,
)
from lexigraft.hub import HUB, REPOSITORY, is_hub_id
from lexigraft.manifest import BaseTokenizer, Manifest, TextSource
from lexigraft.models.verdict import verdict_lines
from lexigraft.reporting.facts import TRAINING, model_rows
from lexigraft.reporting.markdown import BITS, block
from lexigraft.reporting.repeating import repetition, versions_of
from lexigraft.reporting.tables import HEADERS, cells, pipes
from lexigraft.runfile import RunState

SHOWN = 12  # new tokens
ADAPTER = "adapter_config.json"
# What a card takes over from its base's: the terms of use and what a search finds it by.
_INHERITED = (
    *("license", "license_name", "license_link", "language"),
    *("library_name", "pipeline_tag", "tags"),
)
_LISTS = ("language", "tags")
_TASKS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
# Fields of records that are options of their steps, beside `settings`.
_OPTIONS = ("init", "pad_to", "mode", "method", "rank", "weights", "body_only", "seed")
_PLAIN = " ,;'\"%?"  # ASCII marks without a meaning in Markdown
_LONGEST, _MOST = 200, 100  # of a value, and of values, that are taken over
_CARD_BYTES = 2**20
# Folder of a run -> which of its measured models it is.
MEASURED = {"model": "grafted", "adapter": "merged", "merged": "merged"}


@dataclass(frozen=True)
class CardResult:
    """A card.

    Attributes:
        path: where it is, or would be.
        metadata: the block at its head.
        unknown: what it cannot say, each with what would help.
        written: False after a dry run.
    """

    path: Path
    text: str
    metadata: dict[str, Any]
    unknown: list[str]
    written: bool

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {**vars(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """What a person reads: where it is, or itself."""
        head = [f"wrote {self.path}"] if self.written else [self.text]
        return [*head, *(f"unknown: {what}" for what in self.unknown)]


def card(
    folder: str | Path,
    *,
    base_model: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> CardResult:
    """Write README.md, a model card, into a folder that lexigraft wrote.

    In a run folder it also tells what the run measured and how to do it again.

    Args:
        folder: of a model, adapter or vocabulary.
        base_model: the base's id on the hub, where the manifest knows but its folder's name.
        force: replace a README.md that is no card of ours, or was edited since.

    Raises:
        LexigraftError: the folder has no manifest, `base_model` is no hub id, or there is a
            README.md already.
    """
    place = require_folder(Path(folder), "a model")
    if base_model is not None and not REPOSITORY.fullmatch(base_model):
        raise LexigraftError(
            f"--base-model {base_model}",
            needed="an id of the hub, which a card links to",
            fix="--base-model OWNER/NAME",
        )
    written = place / CARD
    if written.exists() and not (force or dry_run or is_own(written)):
        raise LexigraftError(
            f"{written} was not written by lexigraft, or was edited since",
            needed="a folder without a README.md of its own: a card would take its place",
            fix="rename it, or add --force; --dry-run prints the card",
        )
    text, metadata, unknown = _card(place, base_model)
    if not dry_run:
        write_whole(written, text)
    return CardResult(written, text, metadata, unknown, not dry_run)


def is_own(path: Path) -> bool:
    """True for a card as `card` wrote it."""
    content = path.read_bytes() if path.is_file() else b""
    text, mark, _ = content.rpartition(CARD_MARK.encode())
    return bool(mark) and content == text + _mark(text).encode()


def _mark(text: bytes) -> str:
    return f"{CARD_MARK}{sha256_bytes(text)} -->\n"


def _card(folder: Path, base_model: str | None) -> tuple[str, dict[str, Any], list[str]]:
    manifest = Manifest.read(folder)
    if manifest is None or not manifest.records:
        raise LexigraftError(
            f"{folder} has no lexigraft.json",
            needed="a folder that lexigraft wrote: a card is made of its manifest",
            fix="lexigraft graft, merge or run write one",
        )
    run = RunState.read(folder.parent) if folder.name in MEASURED else None
    bases = [base_model] if base_model else _hub_bases(manifest)
    metadata = _metadata(folder, manifest, bases)
    unknown = [
        text
        for key, text in (
            ("base_model", "base_model: name the base with --base-model OWNER/NAME"),
            ("license", f"license: no {BASE_CARD} here that tells it"),
        )
        if key not in metadata
    ]
    parts = [
        [f"# {_title(manifest, bases)}"],
        _vocabulary(folder, manifest, run),
        _measurements(folder, run),
        _training(folder, run),
        _lineage(manifest),
        _repeat(manifest, run),
    ]
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    body = "\n\n".join("\n".join(part) for part in parts if part)
    text = f"---\n{head}---\n\n{body}\n\n"
    return text + _mark(text.encode("utf-8", "surrogatepass")), metadata, unknown


def inert(text: str) -> str:
    """`text` as it is read, with no meaning in Markdown or HTML; on one line.

    ASCII marks that have any meaning are numeric character references, which CommonMark (section
    2.5) takes for the mark itself and never for structure; spaces at the ends are made visible.

    >>> inert("<b>*x*"), inert(" of")
    ('&#60;b&#62;&#42;x&#42;', '␣of')
    """
    shown = plain_line(text)
    left = len(shown) - len(shown.lstrip(" "))
    right = len(shown[left:]) - len(shown[left:].rstrip(" "))
    shown = "␣" * left + shown[left : len(shown) - right] + "␣" * right
    return "".join(
        f"&#{ord(mark)};" if mark.isascii() and not (mark.isalnum() or mark in _PLAIN) else mark
        for mark in shown
    )


def _hub_bases(manifest: Manifest) -> list[str]:
    """The hub ids of what the model was made from, as far as all of them are known."""
    found = [base.name.partition("@")[0] for base in _bases(manifest)]
    return found if all(map(REPOSITORY.fullmatch, found)) else []


def _bases(manifest: Manifest) -> list[BaseTokenizer]:
    """What the model was made from: of a blend all models, else the first base."""
    blend, align = manifest.last("blend"), manifest.last("align")
    if blend:
        return list({one.name: one for one in (*blend.models, blend.base)}.values())
    if align:
        return [align.models[align.place]]
    found = [record.base for record in manifest.records if hasattr(record, "base")]
    same = [base for base in found if base.token_map == found[0].token_map]
    return sorted(same, key=lambda base: "/" not in base.name)[:1]  # a hub id says more


def _metadata(folder: Path, manifest: Manifest, bases: Sequence[str]) -> dict[str, Any]:
    """The block at the head, in the hub's words; a key that nothing tells is not there."""
    adapter = (folder / ADAPTER).is_file()
    known = _of_base(folder)
    config = read_settings(folder / "config.json")
    kind = "ForCausalLM" if adapter else str((config.get("architectures") or [""])[0])
    task = next((name for end, name in _TASKS.items() if kind.endswith(end)), None)
    relation = "adapter" if adapter else "merge" if manifest.last("blend") else "finetune"
    data_sets = sorted({name for name in map(_data_set, _sources(manifest)) if name})
    found = {
        **{key: known.get(key) for key in ("license", "license_name", "license_link", "language")},
        "library_name": "peft" if adapter else known.get("library_name", "transformers"),
        "pipeline_tag": known.get("pipeline_tag", task),
        "base_model": (bases[0] if len(bases) == 1 else [*bases]) if bases else None,
        "base_model_relation": relation if bases else None,
        "datasets": data_sets,
        "tags": list(dict.fromkeys([*_listed(known.get("tags")), "lexigraft"])),
    }
    return {key: value for key, value in found.items() if value}


def _of_base(folder: Path) -> dict[str, Any]:
    """What the base's card says, as far as it is of the forms that the hub knows."""
    path = folder / BASE_CARD
    if not path.is_file() or path.stat().st_size > _CARD_BYTES:
        return {}
    from huggingface_hub import metadata_load

    try:
        said = metadata_load(path) or {}
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: said[key] for key in _INHERITED if _is_plain(key, said.get(key))}


def _is_plain(key: str, value: Any) -> bool:
    """A text, or a list of texts where the hub takes one, of sensible size."""
    texts = value if isinstance(value, list) and key in _LISTS else [value]
    return 0 < len(texts) <= _MOST and all(
        isinstance(text, str) and 0 < len(text) <= _LONGEST for text in texts
    )


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _sources(manifest: Manifest) -> Iterator[TextSource]:
    for record in manifest.records:
        for found in getattr(record, "sources", {}).values():
            yield from found


def _data_set(source: TextSource) -> str | None:
    """The hub id of a text's data set; None of a file, or of a folder in a data set's layout."""
    name = source.name.removeprefix(HUB).partition(":")[0].partition("@")[0]
    return name if source.name.startswith(HUB) and REPOSITORY.fullmatch(name) else None


def _title(manifest: Manifest, bases: Sequence[str]) -> str:
    """A heading; `bases` are the hub's ids, as far as they are known."""
    names = [_short(name) for name in bases or [base.name for base in _bases(manifest)]]
    learned, pruned = manifest.last("learn"), manifest.last("prune")
    if manifest.last("blend"):
        return inert(f"A blend of {' and '.join(names)}")
    what = inert(names[0]) if names else "A model"
    if learned:
        return f"{what}, extended by {learned.added:,} tokens"
    return f"{what}, without {_removed(pruned):,} of its tokens" if pruned else what


def _short(name: str) -> str:
    """`model` of `owner/model@commit`."""
    return name.partition("@")[0].rpartition("/")[2]


def _removed(pruned: Any) -> int:
    return int(pruned.base.tokens - pruned.tokens)


def _vocabulary(folder: Path, manifest: Manifest, run: RunState | None) -> list[str]:
    lines: list[str] = []
    for record in manifest.records:
        if record.stage == "learn":
            gone = f", {len(record.replaced):,} of them under old ids" if record.replaced else ""
            lines.append(
                f"- {record.added:,} new tokens{gone}; the base has {record.base.tokens:,}, "
                f"now there are {record.tokens:,}"
            )
        elif record.stage == "graft":
            lines.append(
                f"- rows of the vocabulary: {record.rows_before:,} before, {record.rows:,}"
            )
        elif record.stage == "prune":
            lines.append(
                f"- {_removed(record):,} tokens were removed; the base has "
                f"{record.base.tokens:,}, now there are {record.tokens:,}"
            )
    domain = run.result("learn").get("domain") if run else None
    if domain:
        before, after = (domain[f"tokens_{when}"] / domain["bytes"] for when in ("before", "after"))
        lines.append(
            f"- text of the field: {before:.3f} tokens per byte before, {after:.3f} after "
            f"({domain['bytes']:,} bytes)"
        )
    table = _examples(folder / NEW_TOKENS, manifest.last("learn"))
    return ["## Vocabulary", "", *lines, *table] if lines or table else []


def _examples(path: Path, learned: Any) -> list[str]:
    if learned is None or not path.is_file():
        return []
    rows = [
        (
            inert(readable(bytes.fromhex(row["bytes"]))),
            f"{len(row['pieces']):,}",
            "-" if row["count"] is None else f"{row['count']:,}",
            inert(row["origin"]),
        )
        for row in read_rows(path, learned.new_ids)[:SHOWN]
    ]
    header = ("new token", "tokens of the base", "occurrences in the learning text", "origin")
    return ["", "The first of them:", "", *pipes(header, rows)] if rows else []


def _measurements(folder: Path, run: RunState | None) -> list[str]:
    """Bits per byte: of all models of a run, else of the training that the folder tells of."""
    if run is not None:
        own = MEASURED[folder.name]
        rows = [cells(row) for row in model_rows(run)]
        if own == "grafted":  # of which the training says nothing
            rows = [row for row in rows if row[0] in ("base", own)]
        rows = [(f"**{name}**" if name == own else name, *figures) for name, *figures in rows]
        table = pipes(HEADERS, rows) if rows else []
    else:
        table = _before_and_after(folder)
    return ["## Bits per byte", "", *table, "", BITS] if table else []


def _before_and_after(folder: Path) -> list[str]:
    told = read_settings(folder / TRAINING)
    log = told.get("log") or []
    kept = [entry for entry in log if entry.get("step") == told.get("kept_step")]
    if not kept:
        return []
    models = {"base": told.get("base") or {}, "before training": log[0], "trained": kept[-1]}
    rows = [
        (name, *(_number(said.get(f"{kind}_bpb")) for kind in ("domain", "general")))
        for name, said in models.items()
    ]
    return pipes(("model", "domain bpb", "general bpb"), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _training(folder: Path, run: RunState | None) -> list[str]:
    if run is not None:
        verdict = run.result("train").get("verdict") if folder.name != "model" else None
    else:
        verdict = read_settings(folder / TRAINING).get("verdict")
    if not verdict:
        return []
    head, *reasons = verdict_lines(verdict)
    lines = [f"- {inert(line.strip().removeprefix('- '))}" for line in reasons]
    return ["## Was the training enough?", "", inert(head), "", *lines]


def _lineage(manifest: Manifest) -> list[str]:
    rows = [
        (record.stage, inert(what), inert(value))
        for record in manifest.records
        for what, value in _hashes(record)
    ]
    return [
        *("## Where it comes from", ""),
        f"Manifest (lexigraft.json): {manifest.hash}",
        *("", *pipes(("step", "hash of", "sha256"), rows)),
    ]


def _hashes(record: Any) -> Iterator[tuple[str, str]]:
    """What a record says by hash: bases, texts, tokenizer, what was trained or merged."""
    for base in [getattr(record, "base", None), *getattr(record, "models", [])]:
        if base is not None:
            yield f"{base.name}, tokens", base.token_map
    for name in ("token_map", "content", "model", "adapter"):
        if isinstance(value := getattr(record, name, None), str):
            yield name, value
    for value in getattr(record, "adapters", []):
        yield "adapter", value
    for kind, found in getattr(record, "sources", {}).items():
        for source in found:
            yield f"{kind}: {source.name}", source.sha256


def _repeat(manifest: Manifest, run: RunState | None) -> list[str]:
    """The run's recipe and commands; without a run, the options that the records keep."""
    if run is not None:
        state = run.model_copy(update={"recipe": run.recipe.placed(_bare, _bare_model)})
        told = repetition(state, Path("RUN"), manifest)
        what = [
            *("recipe.yaml:", "", *block(told["recipe"].splitlines())),
            *("", "The run, and the same without controls as single commands:", ""),
            *block([told["run"], "", *told["commands"]]),
        ]
    else:
        what = ["The options of each step:", "", *block(map(_options, manifest.records))]
        told = {"versions": versions_of(manifest)}
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    return ["## Do it again", "", *what, "", "With", "", *block([versions])]


def _options(record: Any) -> str:
    """What a record keeps of its options, on one line."""
    found = {key: getattr(record, key, None) for key in _OPTIONS} | getattr(record, "settings", {})
    known = {key: value for key, value in found.items() if value is not None}
    return f"{record.stage} {json.dumps(known, ensure_ascii=False)}"


def _bare(spec: str) -> str:
    """A text spec without the folders that lead to it: they are nobody else's business."""
    if spec.startswith(HUB) and not is_there(Path(spec.removeprefix(HUB).partition(":")[0])):
        return spec
    return re.sub(rf"^({HUB})?.*/", r"\1", spec)


def _bare_model(name: str) -> str:
    return name if is_hub_id(name) else Path(name).name
