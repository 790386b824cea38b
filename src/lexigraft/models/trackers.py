"""Where measurements go besides TensorBoard: the trackers that transformers' Trainer knows."""

from __future__ import annotations

from collections.abc import Sequence

from lexigraft.errors import LexigraftError

# TensorBoard is always written, into the output itself.
_OWN = frozenset({"none", "tensorboard"})


def trackers(names: Sequence[str]) -> list[str]:
    """The trackers among `names` that Trainer has to report to.

    Raises:
        LexigraftError: Trainer knows none of that name, or its package is not installed.
    """
    from transformers.integrations import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    asked = [name for name in names if name not in _OWN]
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            raise LexigraftError(
                f"--report-to {name}",
                needed=f"one of none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
                fix="leave it out: TensorBoard events are written anyway",
            )
        if name not in get_available_reporting_integrations():
            raise LexigraftError(
                f"--report-to {name}: its package is not installed",
                needed=f"the package of {name}",
                fix=f"pip install {name}",
            )
    return asked
