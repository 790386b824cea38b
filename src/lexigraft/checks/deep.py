"""What only the weights tell (`--deep`): read in blocks, in constant memory, without torch.

Letters: V tokens, R rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.finite import all_finite
from lexigraft.checkpoints.architectures import is_tied_by_config
from lexigraft.checkpoints.header import FLOATS, Tensor
from lexigraft.checkpoints.nested import get, paths_to
from lexigraft.checkpoints.rows import (
    by_row,
    ids_in_blocks,
    in_blocks,
    lengths,
    read_rows,
    same_values,
    widened,
)
from lexigraft.checkpoints.survey import survey
from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Edit, Finding, finding
from lexigraft.checks.weights import special_ids
from lexigraft.console import progress
from lexigraft.manifest import MANIFEST, GraftRecord, NewIds

# How much longer than a usual row the longest padding row may be.
LONG_PADDING = 2.0
# New rows are told whose median norm is above twice that of nearly all old rows, or below both a
# tenth of the usual one and half of the norm of their mean, which a start at the mean of all has.
FAR_ABOVE, NEARLY_ALL = 2.0, 0.999
FAR_BELOW, BELOW_MEAN = 0.1, 0.5
# How many ids of changed rows are told.
SHOWN_IDS = 20


def deep_findings(facts: Facts, base: Facts | None) -> Iterator[Finding]:
    """Faults of the numbers themselves; `base` is what a model was made from.

    Raises:
        LexigraftError: a file became shorter while it was read.
    """
    yield from _not_finite(facts)
    if facts.checkpoint is None or facts.vocabulary is None:
        return
    yield from _tie(facts)
    for name in (*facts.vocabulary.embeds, *facts.vocabulary.heads):
        tensor = facts.checkpoint.tensors[name]
        if len(tensor.shape) == 2 and tensor.dtype in FLOATS and facts.tokens is not None:
            yield from _rows(facts, tensor, facts.new_ids(base, "graft"))
    yield from _padding(facts)
    if base is not None:
        yield from _old_rows(facts, base)
    else:
        yield from _recorded_rows(facts)


def _not_finite(facts: Facts) -> Iterator[Finding]:
    stored = facts.checkpoint.tensors if facts.checkpoint else facts.adapter
    tensors = [t for t in stored.values() if t.dtype in FLOATS and 0 not in t.shape]
    broken: list[tuple[Tensor, int]] = []
    with progress("read", sum(tensor.bytes for tensor in tensors)) as advance:
        for tensor in tensors:
            for first, block in in_blocks(tensor):
                if not all_finite(block, tensor.dtype):
                    broken.append((tensor, first + _first_bad(block)))
                    break
            advance(tensor.bytes)
    if broken:
        tensor, row = broken[0]
        yield finding(
            "LG701",
            tensor.name,
            f"holds NaN or infinity, first in row {row:,}"
            + (f" ({len(broken)} tensors do)" if len(broken) > 1 else ""),
            needed="finite numbers",
            fix="take a checkpoint from before the training failed, or download "
            f"{tensor.path.name} again",
        )


def _first_bad(block: npt.NDArray[Any]) -> int:
    rows = widened(block).reshape(len(block) if block.ndim else 1, -1)
    return int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])


def _tie(facts: Facts) -> Iterator[Finding]:
    checkpoint, vocabulary = facts.checkpoint, facts.vocabulary
    if checkpoint is None or vocabulary is None or not vocabulary.heads or not vocabulary.embeds:
        return
    embed, head = (checkpoint.tensors[n[0]] for n in (vocabulary.embeds, vocabulary.heads))
    if is_tied_by_config(checkpoint.config) and not same_values(embed, head):
        yield finding(
            "LG705",
            head.name,
            f"differs from {embed.name} although tie_word_embeddings is true: loaders that trust "
            "the config drop one of them",
            needed="tie_word_embeddings = false, or one tensor",
            fix=f"set tie_word_embeddings to false in {facts.folder / 'config.json'}",
            edit=Edit("config.json", _tied_at(checkpoint.config), False),
        )


def _tied_at(config: Mapping[str, Any]) -> tuple[str, ...]:
    key = "tie_word_embeddings"
    return next((path for path in paths_to(config, (key,)) if get(config, path)), (key,))


def _rows(facts: Facts, tensor: Tensor, new: NewIds | None) -> Iterator[Finding]:
    """Rows of one table that nothing was learned in, and new rows that are alike."""
    texts = facts.tokens.texts if facts.tokens else {}
    tokens = min(facts.tokens.tokens if facts.tokens else 0, tensor.rows)
    known = survey(tensor, tokens).untrained
    untrained = {int(i) for i in known if int(i) in texts}
    ids = [] if new is None else new.below(tokens)
    yield from _new_norms(tensor, tokens, ids, known)
    copied = _copied(tensor, ids)
    alike = sorted(i for ids in copied.values() for i in ids)
    # An old row that new ones were copied from is no untrained one.
    untrained -= {i for i in untrained if read_rows(tensor, i, i + 1).tobytes() in copied}
    if alike:
        yield finding(
            "LG704",
            tensor.name,
            f"{len(alike):,} new rows equal another new row, the first is that of "
            f"{texts.get(alike[0])!r} (id {alike[0]}): a model cannot tell such tokens apart",
            needed="a row of its own for every new token",
            fix="lexigraft graft BASE VOCAB -o MODEL",
        )
    used = _used_specials(facts, tensor) & untrained
    for token_id in sorted(used):
        yield finding(
            "LG703",
            tensor.name,
            f"the row of {texts[token_id]!r} (id {token_id}), which the config uses, was never "
            "trained",
            needed="a trained row for the tokens that begin and end texts",
            fix="train the new rows and this one, or name another token in the config",
        )
    rest = sorted(untrained - used)
    if rest:
        yield finding(
            "LG702",
            tensor.name,
            f"{len(rest):,} rows of tokens were never trained, the first is that of "
            f"{texts[rest[0]]!r} (id {rest[0]})",
        )


def _copied(tensor: Tensor, ids: Sequence[int]) -> dict[bytes, list[int]]:
    """Bytes of rows that several of `ids` (ascending) have -> these ids."""
    seen: dict[bytes, list[int]] = defaultdict(list)
    for some, block in ids_in_blocks(tensor, np.asarray(ids, np.int64)):
        for token_id, row in zip(some.tolist(), block, strict=True):
            seen[row.tobytes()].append(token_id)
    return {row: ids for row, ids in seen.items() if len(ids) > 1}


def _new_norms(
    tensor: Tensor, tokens: int, new: Sequence[int], untrained: npt.NDArray[np.int64]
) -> Iterator[Finding]:
    """New rows whose norms lie far outside those of the old rows that were trained."""
    is_old = np.ones(tokens, bool)
    is_old[new] = is_old[untrained] = False
    if not len(new) or not is_old.any():
        return
    norms, total = np.zeros(tokens), np.zeros(tensor.shape[1])
    for first, block in in_blocks(tensor, 0, tokens):
        rows, here = widened(block), slice(first, first + len(block))
        norms[here] = lengths(rows)
        total += rows[is_old[here]].sum(axis=0, dtype=np.float64)
    mean = float(np.linalg.norm(total / is_old.sum()))
    usual, most = np.quantile(norms[is_old], (0.5, NEARLY_ALL))
    found = float(np.median(norms[new]))
    if found > FAR_ABOVE * most or found < min(FAR_BELOW * usual, BELOW_MEAN * mean):
        yield finding(
            "LG710",
            tensor.name,
            f"its {len(new):,} new rows have a norm of {found:.3g} (median), old rows one of "
            f"{usual:.3g}, nearly all below {most:.3g}: new tokens come out "
            + ("everywhere or nowhere" if found > most else "as if they said nothing"),
            needed="new rows about as long as old ones",
            fix="lexigraft graft BASE VOCAB -o MODEL",
        )


def _used_specials(facts: Facts, tensor: Tensor) -> set[int]:
    """Ids that this table has to know: bos is only read, eos is only written."""
    vocabulary = facts.vocabulary
    keys = []
    if vocabulary and tensor.name in vocabulary.embeds:
        keys.append("bos_token_id")
    if vocabulary and (tensor.name in vocabulary.heads or not vocabulary.heads):
        keys.append("eos_token_id")
    return {i for key in keys for ids in special_ids(facts, key).values() for i in ids}


def _padding(facts: Facts) -> Iterator[Finding]:
    """Rows without a token in the output table: long ones are sampled, and decode to nothing."""
    checkpoint, vocabulary, tokens = facts.checkpoint, facts.vocabulary, facts.tokens
    if checkpoint is None or vocabulary is None or tokens is None:
        return
    name = (vocabulary.heads or vocabulary.embeds)[0]
    tensor = checkpoint.tensors[name]
    if tensor.rows - tokens.tokens < 1 or len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        return
    norms = np.concatenate([lengths(widened(block)) for _, block in in_blocks(tensor)])
    longest = float(norms[tokens.tokens :].max())
    usual = float(np.median(norms[: tokens.tokens]))
    if longest > LONG_PADDING * usual:
        yield finding(
            "LG707",
            name,
            f"a padding row has a norm of {longest:.3g}, rows of tokens one of {usual:.3g} "
            "(median): ids without a text may be sampled",
            needed="padding rows no longer than others",
            fix="lexigraft graft BASE VOCAB -o MODEL, which starts padding rows as the mean",
        )


def _old_rows(facts: Facts, base: Facts) -> Iterator[Finding]:
    """Rows of the base's tokens against the base's own."""
    if facts.checkpoint is None or base.checkpoint is None or base.vocabulary is None:
        return
    for name in facts.vocabulary.names if facts.vocabulary else ():
        origin = base.checkpoint.tensors.get(name)
        if origin is None and base.vocabulary.tied and base.vocabulary.embeds:
            origin = base.checkpoint.tensors[base.vocabulary.embeds[0]]
        if origin is None:
            continue
        tensor, old = by_row(facts.checkpoint.tensors[name]), by_row(origin)
        if (tensor.dtype, tensor.shape[1:]) != (old.dtype, old.shape[1:]):
            continue
        shared = min(tensor.rows, base.tokens.tokens if base.tokens else old.rows, old.rows)
        replaced = frozenset(facts.replaced(base))
        changed = [i for i in _changed(tensor, old, shared) if i not in replaced]
        if changed:
            yield finding(
                "LG706",
                name,
                f"{len(changed):,} of {shared:,} old rows differ from those of {base.folder}: ids "
                + ", ".join(map(str, changed[:SHOWN_IDS]))
                + (" and more" if len(changed) > SHOWN_IDS else ""),
                needed="the base's own rows, unless the whole table was trained",
                fix=f"lexigraft graft {base.folder} VOCAB -o MODEL",
            )


def _changed(tensor: Tensor, old: Tensor, rows: int) -> Iterable[int]:
    for first, block in in_blocks(tensor, 0, rows):
        other = read_rows(old, first, first + len(block))
        one, two = (rows.reshape(len(block), -1).view(np.uint8) for rows in (block, other))
        yield from (first + np.flatnonzero((one != two).any(axis=1))).tolist()


def _recorded_rows(facts: Facts) -> Iterator[Finding]:
    """Rows of old ids against the hashes that `graft` wrote down, where nothing came after it."""
    records = facts.manifest.records if facts.manifest else []
    record = records[-1] if records else None
    if facts.checkpoint is None or not isinstance(record, GraftRecord):
        return
    for name, recorded in record.base_rows.items():
        tensor = facts.checkpoint.tensors.get(name)
        if tensor is None or by_row(tensor).rows < record.first_id:
            continue
        left_out = record.new_ids.replaced
        if survey(tensor, record.first_id, left_out).sha256 != recorded:
            yield finding(
                "LG706",
                name,
                f"old rows below id {record.first_id:,} are not those that {MANIFEST} records",
                needed="the rows that graft copied, unless the whole table was trained",
                fix="lexigraft graft BASE VOCAB -o MODEL",
            )
