"""Findings as SARIF, the format in which code hosts and editors take what a checker found.

Method: the OASIS standard "Static Analysis Results Interchange Format (SARIF) Version 2.1.0".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lexigraft.checks.codes import CODES
from lexigraft.checks.findings import Finding
from lexigraft.console import plain_line
from lexigraft.files import is_there

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def sarif(findings: Sequence[Finding], folders: Iterable[Path], *, version: str) -> dict[str, Any]:
    """One SARIF log with one run; `folders` are those checked, the subject first."""
    places = list(folders)
    used = sorted({one.code for one in findings})
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "lexigraft",
                        "version": version,
                        "rules": [_rule(code) for code in used],
                    }
                },
                "results": [_result(one, used.index(one.code), places) for one in findings],
            }
        ],
    }


def _rule(code: str) -> dict[str, Any]:
    story = CODES[code]
    return {
        "id": code,
        "shortDescription": {"text": story.meaning},
        "fullDescription": {"text": story.cause},
        "help": {"text": f"example: {story.example}\nmend: {story.mend}"},
        "defaultConfiguration": {"level": story.severity},
    }


def _result(one: Finding, rule: int, places: Sequence[Path]) -> dict[str, Any]:
    beside = (folder / one.where for folder in places)
    place = next((file for file in beside if is_there(file) and file.is_file()), places[0])
    return {
        "ruleId": one.code,
        "ruleIndex": rule,
        "level": one.severity,
        "message": {"text": one.message()},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": quote(place.as_posix())}},
                "logicalLocations": [{"name": plain_line(one.where)}],
            }
        ],
    }
