"""Is a folder what its manifest says, and what the base makes of it?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.families.llama_cpp import SPACE
from lexigraft.families.tokenmap import TokenMap, first_difference, prefix_hash, without
from lexigraft.files import MANIFEST

if TYPE_CHECKING:
    from lexigraft.manifest import Manifest


def manifest_findings(facts: Facts) -> Iterator[Finding]:
    """Faults between a manifest and the files beside it."""
    if facts.manifest is None:
        return
    last = next((r for r in reversed(facts.manifest.records) if hasattr(r, "token_map")), None)
    if last is not None and facts.tokens is not None:
        yield from _token_map(facts, last)
    rows = next((r for r in reversed(facts.manifest.records) if hasattr(r, "rows")), None)
    if rows is not None and facts.rows is not None and facts.rows != rows.rows:
        yield finding(
            "LG503",
            MANIFEST,
            f"says {rows.rows:,} rows, the weights have {facts.rows:,}",
            needed="the weights that were written with this manifest",
            fix="copy the weights and the manifest from one folder",
            stated=rows.rows,
            rows=facts.rows,
        )
    yield from _settings(facts, facts.manifest)


def _token_map(facts: Facts, record: Any) -> Iterator[Finding]:
    if facts.tokens is None or facts.tokens.hash == record.token_map:
        return
    base, first = getattr(record, "base", None), None
    if base is not None:
        same = prefix_hash(facts.tokens, base.tokens) == base.token_map
        first = "its base part agrees" if same else "its base part differs too"
    yield finding(
        "LG502",
        "tokenizer",
        f"token map {facts.tokens.hash[:12]} ({facts.tokens.tokens:,} tokens), but the manifest "
        f"was written with {record.token_map[:12]}"
        + (f" ({record.tokens:,} tokens)" if hasattr(record, "tokens") else "")
        + (f"; {first}" if first else "")
        + ": these rows belong to other words",
        needed="the tokenizer that these rows were made for",
        fix="copy the tokenizer files of the step that wrote this folder into it again",
        hash=facts.tokens.hash[:12],
        tokens=facts.tokens.tokens,
        wanted=record.token_map[:12],
    )


def _settings(facts: Facts, manifest: Manifest) -> Iterator[Finding]:
    """tokenizer_config.json carries the hash of the manifest it was written with."""
    key = facts.config.get("tokenizer_config.json", {}).get("lexigraft")
    named = key.get("manifest") if isinstance(key, dict) else None
    if not isinstance(named, str):
        return
    states = {
        type(manifest)(records=manifest.records[:count]).hash
        for count in range(len(manifest.records) + 1)
    }
    if named not in states:
        yield finding(
            "LG504",
            "tokenizer_config.json",
            f"was written with manifest {named[:12]}, which is no earlier state of {MANIFEST}",
            needed="tokenizer and manifest of one lineage",
            fix="copy the tokenizer files and the manifest from one folder",
            hash=named[:12],
            manifest=MANIFEST,
        )


def base_findings(facts: Facts, base: Facts) -> Iterator[Finding]:
    """Faults between a model or vocabulary and the base that it was made from."""
    old, new = base.tokens, facts.tokens
    record = facts.manifest.last("prune") if facts.manifest else None
    least, pruned = base.rows, False
    if record is not None and old is not None and old.hash == record.base.token_map:
        least, pruned = record.rows, True  # the tokens that were kept, under their new ids
        places = record.places
        old = TokenMap({places[i]: text for i, text in old.texts.items() if i in places})
    if old is not None and new is not None:
        if base.gguf is not None or facts.gguf is not None:
            moved = first_difference(_underlined(old), _underlined(new))
        else:
            moved = first_difference(without(old, facts.replaced(base)), new)
        if moved is not None:
            yield finding(
                "LG601",
                "tokenizer",
                f"id {moved} is {new.texts.get(moved)!r}, in {base.folder} it is "
                f"{old.texts[moved]!r}" + (" (ids as prune left them)" if pruned else ""),
                needed="every id of the base with its own token",
                fix=f"lexigraft learn {base.folder} --corpus TEXT -o VOCAB",
            )
    merged = facts.manifest.last("merge") if facts.manifest else None
    if merged is not None and merged.trimmed and least is not None:
        least = min(least, merged.rows)
    if facts.rows is not None and least is not None and facts.rows < least:
        yield finding(
            "LG602",
            "weights",
            f"have {facts.rows:,} rows, {base.folder} has {least:,}"
            + (" once pruned" if pruned else "")
            + ": something cut rows off",
            needed=f"at least {least:,} rows",
            fix=f"lexigraft graft {base.folder} {facts.folder} -o MODEL",
        )
    yield from _lost_tensors(facts, base)


def _underlined(tokens: TokenMap) -> TokenMap:
    """`▁` for each space: in user-defined tokens llama.cpp's converter writes a space for `▁`."""
    return TokenMap({i: text.replace(" ", SPACE) for i, text in tokens.texts.items()})


def _lost_tensors(facts: Facts, base: Facts) -> Iterator[Finding]:
    if facts.checkpoint is None or base.checkpoint is None or base.vocabulary is None:
        return
    for name, tensor in base.checkpoint.tensors.items():
        here = facts.checkpoint.tensors.get(name)
        if here is None or (here.shape != tensor.shape and name not in base.vocabulary.names):
            yield finding(
                "LG603",
                name,
                f"has shape {list(tensor.shape)} in {base.folder}, here "
                + (f"{list(here.shape)}" if here else "it is missing"),
                needed="every tensor of the base",
                fix=f"lexigraft graft {base.folder} VOCAB -o MODEL",
            )
            return
