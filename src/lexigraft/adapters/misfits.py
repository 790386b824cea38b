"""What of an adapter does not fit its base: all of it is found before any of it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lexigraft.errors import LexigraftError

_SHOWN = 5


class Misfit(NamedTuple):
    """A tensor that does not fit; `str(tensor) + " " + found` is a sentence."""

    tensor: str
    found: str
    needed: str = "the base that this adapter was trained on"
    fix: str = "name that base: base_model_name_or_path in adapter_config.json says which"


@dataclass
class Misfits:
    """A list of misfits that grows while an adapter is thought through.

    Attributes:
        found: those so far.
    """

    found: list[Misfit] = field(default_factory=list)

    def add(self, tensor: str, found: str, *rest: str) -> None:
        """Note one: what of the adapter, how it misfits, and what is needed where not the base."""
        self.found.append(Misfit(tensor, found, *rest))

    def told(self) -> str:
        """The first few, and how many more."""
        shown = [f"{one.tensor} {one.found}" for one in self.found[:_SHOWN]]
        rest = len(self.found) - len(shown)
        count = f"{len(self.found):,} faults: " if len(self.found) > 1 else ""
        return count + "; ".join(shown) + (f"; and {rest:,} more" if rest else "")

    def require_none(self) -> None:
        """Raise one fault that names them.

        Raises:
            LexigraftError: there are some.
        """
        if self.found:
            raise LexigraftError(
                self.told(),
                needed="; ".join(dict.fromkeys(one.needed for one in self.found)),
                fix="; or ".join(dict.fromkeys(one.fix for one in self.found)),
            )
