"""A finding: one fault, in the user's terms, with what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lexigraft.errors import LexigraftError

Severity = Literal["error", "warning", "note"]

# Codes are stable: scripts may rely on them. The table with explanations is docs/files.md.
CODES: dict[str, Severity] = {
    "LG101": "error",  # a tokenizer file cannot be read
    "LG102": "error",  # two tokenizer files give an id different texts, or one lacks tokens
    "LG103": "error",  # added tokens leave a hole after the vocabulary
    "LG104": "note",  # added_tokens.json repeats tokens of the vocabulary
    "LG105": "warning",  # an added token is in tokenizer_config.json only
    "LG106": "note",  # words are added tokens instead of tokens of the model
    "LG201": "error",  # config.vocab_size is not the number of rows
    "LG202": "error",  # a special id of a config has no row
    "LG203": "warning",  # a special id of a config means another token than the tokenizer says
    "LG204": "error",  # a config cannot be read
    "LG301": "error",  # the weights cannot be read
    "LG302": "error",  # fewer rows than tokens
    "LG303": "note",  # padding rows
    "LG304": "error",  # vocabulary tensors disagree, or there are none
    "LG305": "error",  # untied by the config, but no output head is stored
    "LG306": "note",  # tied by the config, but an output head is stored
    "LG307": "error",  # a vocabulary tensor is empty
    "LG401": "error",  # the adapter has more rows than the model
    "LG402": "warning",  # the adapter has fewer rows than the model
    "LG403": "error",  # a tensor of the adapter is empty
    "LG404": "error",  # the adapter's tokenizer is no extension of the model's
    "LG405": "error",  # the adapter's new rows belong to unknown tokens
    "LG406": "warning",  # the adapter was trained on more tokens than the model's tokenizer has
    "LG407": "error",  # the adapter's tokenizer has more tokens than anything holds rows
    "LG408": "error",  # the adapter's tensors do not fit the model's
    "LG409": "error",  # the adapter cannot be read
    "LG410": "warning",  # a kind of adapter that merge refuses
    "LG501": "error",  # the manifest cannot be read
    "LG502": "error",  # the tokenizer is not the one of the manifest
    "LG503": "error",  # the weights have other rows than the manifest says
    "LG504": "warning",  # the tokenizer comes from another manifest
    "LG601": "error",  # ids of the base mean other tokens here
    "LG602": "error",  # fewer rows than the base
    "LG603": "error",  # a tensor of the base is missing or has another shape
}


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
    """

    code: str
    severity: Severity
    where: str
    found: str
    needed: str
    fix: str

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def line(self) -> str:
        """All of it on one line."""
        parts = [f"{self.severity} {self.code} {self.where}: {self.found}"]
        parts += [f"needed: {self.needed}"] if self.needed else []
        parts += [f"try: {self.fix}"] if self.fix else []
        return " | ".join(parts)


def finding(code: str, where: str, found: str, *, needed: str = "", fix: str = "") -> Finding:
    """A finding with the severity of its code."""
    return Finding(code, CODES[code], where, found, needed, fix)


def from_error(code: str, where: str, fault: LexigraftError) -> Finding:
    """A fault that kept a file from being read, as a finding."""
    return finding(code, where, fault.found, needed=fault.needed, fix=fault.fix)
