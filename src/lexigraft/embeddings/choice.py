"""Which method starts the rows of which tensor: what `--init` says, and what `auto` chooses."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from lexigraft.checkpoints.architectures import Role
from lexigraft.embeddings.methods import METHODS, Array, Method, Spelled
from lexigraft.errors import LexigraftError

# What `auto` takes for the embedding and the head, tied and untied: never the result of running
# the model. To change the rule, change this table (and its reason).
AUTO: dict[str, tuple[str, str]] = {
    "tied": ("outward", "outward"),
    "untied": ("legible", "half-first"),
}
AUTO_REASON = (
    "auto: of the methods that were measured it was nowhere far from the fewest bits per byte "
    "right after the graft (bench/results/init.md)"
)
_INPUTS = {"copy": "--init-from FILE", "donor": "--donor MODEL"}


@dataclass(frozen=True)
class Choice:
    """The methods of one graft.

    Attributes:
        embed: the name of the input embedding's.
        head: that of the head and its bias; the same where the head is the embedding.
        reason: why these, for people.
    """

    embed: str
    head: str
    reason: str

    def __str__(self) -> str:
        return self.embed if self.embed == self.head else f"{self.embed},{self.head}"

    def of(self, role: Role) -> str:
        """The name of a tensor's method."""
        return self.embed if role == "embed" else self.head

    @property
    def names(self) -> frozenset[str]:
        """Both."""
        return frozenset((self.embed, self.head))

    @property
    def own(self) -> list[str]:
        """Those that are functions of the user (`module:function`)."""
        return sorted(name for name in self.names if ":" in name)


def choose(init: str, *, tied: bool, init_from: bool = False, donor: bool = False) -> Choice:
    """The methods that `--init` names: one for both, or `EMBEDDING,HEAD`.

    Args:
        init: `auto`, names in `METHODS`, or `module:function`.
        tied: the head is the input embedding: it can have one method only.
        init_from: a file says what to copy; `auto` is then `copy`.
        donor: a donor is given; `auto` is then `donor`.

    Raises:
        LexigraftError: no such method, two methods for one tensor, or a method without its input.
    """
    if init_from and donor:
        raise LexigraftError(
            "--init-from and --donor together",
            needed="one of them: each says where new rows come from",
            fix="graft with --donor, or list what you need in the file of --init-from",
        )
    if init == "auto" and (init_from or donor):
        name = "copy" if init_from else "donor"
        return Choice(name, name, f"{_INPUTS[name].split()[0]} was given")
    if init == "auto":
        return Choice(*AUTO["tied" if tied else "untied"], AUTO_REASON)
    choice = _named(init, tied=tied)
    given = {"copy": init_from, "donor": donor}
    for name, option in _INPUTS.items():
        if (name in choice.names) != given[name]:
            found = f"--init {init} " + ("with" if given[name] else "without") + f" {option}"
            raise LexigraftError(
                found,
                needed=f"{option} if, and only if, rows start by {name}",
                fix=f"{option} alone: it implies --init {name}",
            )
    return choice


def _named(init: str, *, tied: bool) -> Choice:
    names = init.split(",")
    for name in names:
        if name not in METHODS and not _is_function(name):
            raise LexigraftError(
                f"--init {init}: no method {name!r}",
                needed="auto, " + ", ".join(METHODS) + ", or module:function of your own",
                fix="leave --init out: auto chooses",
            )
    if len(names) > 2 or (tied and len(set(names)) > 1):
        raise LexigraftError(
            f"--init {init} names {len(names)} methods"
            + (", and the head of this model is its embedding" if tied else ""),
            needed="one method"
            + ("" if tied else ", or one for the embedding and one for the head"),
            fix=f"--init {names[0]}",
        )
    return Choice(names[0], names[-1], "--init")


def _is_function(name: str) -> bool:
    return all(part.replace(".", "_").isidentifier() for part in name.split(":", 1)) and ":" in name


def method(name: str) -> Method:
    """The function of that name: one of ours, or the user's own, held to its shape and type.

    Raises:
        LexigraftError: the user's cannot be imported, or fails or gives what are no rows when it
            is called.
    """
    return METHODS[name] if name in METHODS else _own(name)


def _own(name: str) -> Method:
    home, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(home), attribute)
    except Exception as fault:  # whatever a stranger's module does when it is imported
        raise LexigraftError(
            f"--init {name} cannot be imported ({type(fault).__name__}: {fault})",
            needed="module:function that Python finds",
            fix="name its folder: PYTHONPATH=FOLDER lexigraft graft ...",
        ) from fault
    if not callable(function):
        raise LexigraftError(
            f"--init {name} is a {type(function).__name__}",
            needed="a function of lexigraft.embeddings.Spelled",
            fix="look at the functions in lexigraft/embeddings/methods.py",
        )

    def checked(spelled: Spelled) -> Array:
        try:
            rows: Any = function(spelled)
        except Exception as fault:
            raise LexigraftError(
                f"--init {name} failed on a {spelled.role} ({type(fault).__name__}: {fault})",
                needed="a function that gives a row for each new token",
                fix=f"call {name} with a lexigraft.embeddings.Spelled by hand",
            ) from fault
        wanted = (len(spelled.ids), *spelled.center.shape)
        if not isinstance(rows, np.ndarray) or rows.shape != wanted or rows.dtype.kind != "f":
            given = (
                f"an array of shape {rows.shape}, type {rows.dtype}"
                if isinstance(rows, np.ndarray)
                else f"a {type(rows).__name__}"
            )
            raise LexigraftError(
                f"--init {name} gave {given} for a {spelled.role}",
                needed=f"a numpy array of shape {wanted} and a float type",
                fix="return one row for each of spelled.ids, as wide as spelled.center",
            )
        return rows

    return checked
