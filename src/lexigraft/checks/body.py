"""Tensors outside the vocabulary against the base's (`--deep`): did any change that should not?

What may have changed is known from the records that the manifest has beyond the base's, or, of a
model that another program merged, from the adapter. Read in blocks, in constant memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lexigraft.adapters.folder import Adapter
from lexigraft.adapters.match import match
from lexigraft.checkpoints.rows import same_values
from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.errors import LexigraftError
from lexigraft.manifest import (
    MANIFEST,
    AlignRecord,
    BlendRecord,
    GraftRecord,
    MergeRecord,
    PruneRecord,
    SplitRecord,
    TrainRecord,
)

# What these wrote is known tensor by tensor.
_KNOWN = (GraftRecord, MergeRecord, PruneRecord, SplitRecord)


def body_findings(facts: Facts, base: Facts, adapters: Sequence[Facts]) -> Iterator[Finding]:
    """Tensors of a model that differ from its base's though nothing known changed them.

    Args:
        facts: the model.
        base: what it was made from.
        adapters: what was merged into it, for where no manifest tells.

    Raises:
        LexigraftError: a file became shorter while it was read.
    """
    recorded = _recorded_changes(facts, base)
    if recorded is not None:
        last = facts.manifest.records[-1].stage if facts.manifest else "graft"
        again = {"merge": "merge {} ADAPTER -o MERGED", "split": "split {} ADAPTER -o PAIR"}
        yield from _changed(
            "LG708",
            facts,
            base,
            recorded,
            why=f"and no step in {MANIFEST} changed it",
            fix="lexigraft " + again.get(last, "graft {} VOCAB -o MODEL").format(base.folder),
        )
    elif adapters and facts.manifest is None:
        named = _adapted(base, adapters)
        if named is not None:
            folders = " ".join(str(adapter.folder) for adapter in adapters)
            yield from _changed(
                "LG709",
                facts,
                base,
                named,
                why=f"and {folders} does not change it",
                fix=f"lexigraft merge {base.folder} {folders} -o MERGED",
            )


def _recorded_changes(facts: Facts, base: Facts) -> frozenset[str] | None:
    """Names of tensors that steps since the base changed; None if they may have changed any."""
    earlier = base.manifest.records if base.manifest else []
    since = [r for r in (facts.manifest.records if facts.manifest else []) if r not in earlier]
    if not any(isinstance(record, _KNOWN) for record in since):
        return None
    names: set[str] = set()
    for record in since:
        changed = _changed_by(record)
        if changed is None:
            return None
        names.update(changed)
    return frozenset(names)


def _changed_by(record: Any) -> Sequence[str] | None:
    """Tensors outside the vocabulary that a step changed; None if any."""
    if isinstance(record, MergeRecord | SplitRecord):
        return record.changed
    # Blended and aligned models come of several, and no record says of which `base` is one.
    free = isinstance(record, BlendRecord | AlignRecord)
    return None if free or (isinstance(record, TrainRecord) and record.mode == "full") else ()


def _adapted(base: Facts, adapters: Sequence[Facts]) -> frozenset[str] | None:
    """Names of tensors that adapters change in a base; None if they do not fit it."""
    if base.checkpoint is None or base.vocabulary is None:
        return None
    names: set[str] = set()
    try:
        for adapter in adapters:
            names.update(
                match(Adapter.open(adapter.folder), base.checkpoint, base.vocabulary).changes
            )
    except LexigraftError:  # a finding already
        return None
    return frozenset(names)


def _changed(
    code: str, facts: Facts, base: Facts, known: frozenset[str], *, why: str, fix: str
) -> Iterator[Finding]:
    if facts.checkpoint is None or base.checkpoint is None or base.vocabulary is None:
        return
    left_out = {*known, *base.vocabulary.names}
    pairs = [
        (tensor, facts.checkpoint.tensors[name])
        for name, tensor in base.checkpoint.tensors.items()
        if name not in left_out and name in facts.checkpoint.tensors
    ]
    # Another shape is a finding of its own.
    changed = [
        (old, new) for old, new in pairs if old.shape == new.shape and not same_values(old, new)
    ]
    if changed:
        old, new = changed[0]
        types = f" (stored as {new.dtype}, there as {old.dtype})" if old.dtype != new.dtype else ""
        others = f" ({len(changed):,} of {len(pairs):,} tensors do)" if len(changed) > 1 else ""
        yield finding(
            code,
            new.name,
            f"differs from that of {base.folder}{types}{others}, {why}",
            needed="the base's bytes in every tensor that nothing changed",
            fix=fix,
        )
