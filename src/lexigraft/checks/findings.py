"""A finding: one fault, in the user's terms, with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lexigraft.checks.codes import CODES, Severity
from lexigraft.console import plain_line
from lexigraft.errors import LexigraftError


@dataclass(frozen=True)
class Edit:
    """A change to one small file that mends a finding beyond doubt.

    Attributes:
        file: its name.
        path: keys that lead to the value to be set; () takes the file out of the folder.
        value: the value.
    """

    file: str
    path: tuple[str, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        code: stable name, for example `LG401`.
        severity: `error` makes a check fail; `warning` and `note` do not.
        where: the file or tensor.
        found: what is there and why it is a fault.
        needed: what would be right.
        fix: one command or action.
        edit: what `check --fix` does; None where it takes more than an edit.
        values: the figures and names in `found`, for programs and for other languages; with the
            codes that a folder by itself can have.
    """

    code: str
    severity: Severity
    where: str
    found: str
    needed: str
    fix: str
    edit: Edit | None = None
    values: Mapping[str, str | int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {key: value for key, value in asdict(self).items() if key != "edit"}

    def message(self) -> str:
        """What a person reads of it, on one line, whatever is in the files that it speaks of."""
        parts = [f"{self.where}: {self.found}"]
        parts += [f"needed: {self.needed}"] if self.needed else []
        parts += [f"try: {self.fix}"] if self.fix else []
        return plain_line(" | ".join(parts))

    def line(self) -> str:
        """`message` with severity and code."""
        return f"{self.severity} {self.code} {self.message()}"


def finding(
    code: str,
    where: str,
    found: str,
    *,
    needed: str = "",
    fix: str = "",
    edit: Edit | None = None,
    **values: str | int,
) -> Finding:
    """A finding with the severity of its code; `values` are what `found` tells."""
    return Finding(code, CODES[code].severity, where, found, needed, fix, edit, values)


def from_error(code: str, where: str, fault: LexigraftError) -> Finding:
    """A fault that kept a file from being read, as a finding."""
    return finding(code, where, fault.found, needed=fault.needed, fix=fault.fix)
