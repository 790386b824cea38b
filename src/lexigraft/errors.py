"""The one exception that a user is meant to see."""

from __future__ import annotations


class LexigraftError(Exception):
    """Something the user must change; the command line prints it and exits with status 2.

    Every message has three parts, so that none can stop at the complaint.

    Args:
        found: what was found, with the numbers or names.
        needed: what would have been right.
        fix: one command or action to try next.

    Attributes:
        status: what the command line exits with.

    >>> print(LexigraftError("a.txt is empty", needed="some text", fix="name another file"))
    found:  a.txt is empty
    needed: some text
    try:    name another file
    """

    status = 2

    def __init__(self, found: str, *, needed: str, fix: str) -> None:
        super().__init__(found)
        self.found = found
        self.needed = needed
        self.fix = fix

    def __str__(self) -> str:
        return f"found:  {self.found}\nneeded: {self.needed}\ntry:    {self.fix}"


class RefusalError(LexigraftError):
    """An input of a kind that lexigraft does not support, refused by name."""


class StoppedError(LexigraftError):
    """SIGTERM asked a run to stop; what it had done is kept."""

    status = 143  # 128 + SIGTERM, as a shell has it
