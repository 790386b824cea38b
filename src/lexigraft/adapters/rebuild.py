"""Rows that no file holds, made again from the manifest's method and seed, and proved by its hash.

An adapter that trained no rows of its own was trained on rows that `graft` made. Where its folder
holds the manifest, they can be made again from the base; only rows whose hash is the recorded one
are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

from lexigraft import families
from lexigraft.adapters.tokens import TokenizerChoice
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.growth import NewRows, rows_hash
from lexigraft.checkpoints.survey import Survey
from lexigraft.embeddings import METHODS, Choice, Start
from lexigraft.families.replacing import without_tokens
from lexigraft.manifest import GraftRecord, Manifest


def rebuilt_rows(
    names: Iterable[str],
    manifest: Manifest | None,
    checkpoint: Checkpoint,
    vocabulary: VocabularyTensors,
    tokens: TokenizerChoice,
    *,
    known: Callable[[str], Survey],
) -> dict[str, NewRows]:
    """New rows of the vocabulary tensors `names`, for those that can be made again exactly.

    Args:
        names: vocabulary tensors of the base whose new rows are wanted.
        manifest: the adapter's.
        checkpoint: the base as it was before the graft.
        vocabulary: its vocabulary tensors.
        tokens: the tokenizer of the result.
        known: gives the survey of a base tensor's old rows, by its name.
    """
    record = _graft_of(manifest)
    if record is None or not _describes(record, tokens):
        return {}
    methods = record.init.split(",")
    choice = Choice(methods[0], methods[-1], "manifest")

    @cache
    def start() -> Start:
        base = families.load(checkpoint.folder)
        with without_tokens(base, record.new_ids.replaced) as left:
            return Start.of(
                choice,
                left,
                tokens.map,
                tied=vocabulary.tied,
                seed=record.seed,
                copies={one.id: one.pieces for one in record.start.copies} if record.start else {},
            )

    roles = vocabulary.roles
    count = len(record.new_ids)
    found = {}
    for name in names:
        if not _is_repeatable(choice.of(roles[name])):
            continue
        tensor = checkpoint.tensors[name]
        new_rows = start().rows(tensor, roles[name], partial(known, name))
        if rows_hash(tensor, count, new_rows) == record.new_rows.get(name):
            found[name] = new_rows
    return found


def lost_source(manifest: Manifest | None) -> str | None:
    """What rows came from that a manifest can name but not hold; None where it needs nothing."""
    record = _graft_of(manifest)
    if record is None:
        return None
    donor = record.start.donor if record.start else None
    lost = [name for name in dict.fromkeys(record.init.split(",")) if ":" in name]
    sources = [f"the function {name} made them (--init)" for name in lost]
    if donor is not None:
        sources.append(
            f"they were translated from the model {donor.name} (--donor; token map "
            f"{donor.token_map[:12]})"
        )
    return " and ".join(sources) or None


def _graft_of(manifest: Manifest | None) -> GraftRecord | None:
    record = manifest.records[-1] if manifest and manifest.records else None
    return record if isinstance(record, GraftRecord) else None


def _is_repeatable(method: str) -> bool:
    return method in METHODS and method != "donor"


def _describes(record: GraftRecord, tokens: TokenizerChoice) -> bool:
    return (
        record.token_map == tokens.map.hash
        and record.base.token_map == tokens.base.hash
        and record.first_id == tokens.base.tokens
    )
