"""Do the installed versions still read the texts that a manifest keeps as `learn` read them?"""

from __future__ import annotations

from collections.abc import Iterator

from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.families.loader import TransformersLoader


def probe_findings(facts: Facts) -> Iterator[Finding]:
    """The manifest's probe, read anew by transformers in a child process."""
    record = facts.manifest.last("learn") if facts.manifest else None
    if record is None or not record.probe or facts.tokens is None:
        return
    if facts.tokens.hash != record.token_map:
        return  # LG502 says that this is another tokenizer
    with TransformersLoader() as loader:
        reading = loader.read(facts.folder, [probe.text for probe in record.probe])
        reason = loader.reason
    drifted = [
        (probe, ids)
        for probe, ids in zip(record.probe, reading.ids if reading else [], strict=False)
        if probe.ids != ids
    ]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    if reading is not None and not drifted:
        return
    yield finding(
        "LG505",
        "tokenizer",
        f"the text {drifted[0][0].text!r} had the ids {drifted[0][0].ids} and is read as "
        f"{drifted[0][1]} now"
        if drifted
        else str(reason),
        needed=f"the ids that the manifest holds ({versions})",
        fix="install these versions, or a later one of lexigraft and transformers",
    )
