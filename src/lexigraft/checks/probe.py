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
        read = loader.encode(facts.folder, [probe.text for probe in record.probe])
        found = str(loader.reason)
    if read is not None:
        pairs = zip(record.probe, read, strict=True)
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
