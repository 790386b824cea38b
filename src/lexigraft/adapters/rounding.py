"""How much rounding a merge costs: what is added is summed in a wide type and rounded once."""

from __future__ import annotations

from threading import Lock


class Rounding:
    """The largest error that storing a sum in the base's type has made so far.

    Several threads may report to it. PEFT rounds what it adds to an embedding before the sum too,
    and so do we: the error is that of both.
    """

    def __init__(self) -> None:
        """Nothing was rounded yet."""
        self._lock = Lock()
        self.largest: float | None = None

    def see(self, error: float) -> None:
        """Take note of the largest error of a block."""
        with self._lock:
            self.largest = max(error, self.largest or 0.0)
