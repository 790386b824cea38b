"""The tokenizer as the installed transformers loads it, in a child process: texts and time."""

from __future__ import annotations

from collections.abc import Iterator

from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.checks.tokenizers import MANY_ADDED, VOCABULARIES, added_words
from lexigraft.families.loader import Reading, TransformersLoader
from lexigraft.manifest import LearnRecord

# Seconds that no tokenizer needs to load unless a reader works through it token by token.
SLOW = 10.0


def probe_findings(facts: Facts) -> Iterator[Finding]:
    """The texts that a manifest keeps, read anew, and how long a heavy tokenizer takes to load."""
    record, heavy = _kept(facts), _heavy(facts)
    if record is None and heavy is None:
        return
    texts = [probe.text for probe in record.probe] if record else []
    with TransformersLoader() as loader:
        reading = loader.read(facts.folder, texts)
        fault = str(loader.reason)
    if record is not None:
        yield from _drifted(record, reading, fault)
    if heavy and reading is not None and reading.seconds > SLOW:
        yield finding(
            "LG114",
            "tokenizer",
            f"takes {reading.seconds:.0f} s to load: {heavy}",
            needed=f"{SLOW:.0f} s at most",
            fix="lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB, whose words are no "
            "added tokens and which writes tokenizer.json",
        )


def _kept(facts: Facts) -> LearnRecord | None:
    """The record that holds texts and their ids under this tokenizer."""
    record = facts.manifest.last("learn") if facts.manifest else None
    if record is None or not record.probe or facts.tokens is None:
        return None
    # LG502 says where this is another tokenizer.
    return record if facts.tokens.hash == record.token_map else None


def _heavy(facts: Facts) -> str | None:
    """What of a tokenizer may take long to load."""
    first = next((name for name in VOCABULARIES if name in facts.maps), None)
    if first is None:
        return None
    words = len(added_words(facts, first))
    if words > MANY_ADDED:
        return f"it has {words:,} added tokens"
    return None if first == "tokenizer.json" else f"it is converted from {first}"


def _drifted(record: LearnRecord, reading: Reading | None, fault: str) -> Iterator[Finding]:
    found = fault
    if reading is not None:
        pairs = zip(record.probe, reading.ids, strict=True)
        drifted = next(((probe, ids) for probe, ids in pairs if probe.ids != ids), None)
        if drifted is None:
            return
        probe, ids = drifted
        found = f"the text {probe.text!r} had the ids {probe.ids} and is read as {ids} now"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    yield finding(
        "LG505",
        "tokenizer",
        found,
        needed=f"the ids that the manifest holds ({versions})",
        fix="install these versions, or a later one of lexigraft and transformers",
    )
