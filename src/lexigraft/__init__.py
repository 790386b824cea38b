"""Teach a pretrained language model your field's words.

Every verb of the command line is a function here with the same name and options. Each is
imported when it is first used, so that `import lexigraft` stays fast and free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lexigraft.errors import LexigraftError

__version__ = "0.1.0"

__all__ = [
    "EvidenceCallback",
    "LexigraftError",
    "align",
    "blend",
    "card",
    "check",
    "demo",
    "evaluate",
    "extract",
    "find_learning_rate",
    "graft",
    "graft_distilled",
    "import_config",
    "learn",
    "merge",
    "prune",
    "report",
    "run",
    "serve",
    "show",
    "split",
    "train",
    "unprune",
    "upload",
]

_HOMES = {
    "EvidenceCallback": "lexigraft.models.callback",
    "find_learning_rate": "lexigraft.steps.train",
    "import_config": "lexigraft.importing",
    "report": "lexigraft.reporting",
    "card": "lexigraft.reporting.card",
    "upload": "lexigraft.uploading",
    "run": "lexigraft.pipeline",
    "demo": "lexigraft.pipeline",
    "graft_distilled": "lexigraft.pipeline",
    "unprune": "lexigraft.steps.prune",
    "serve": "lexigraft.serving",
}

if TYPE_CHECKING:
    from lexigraft.importing import import_config
    from lexigraft.models.callback import EvidenceCallback
    from lexigraft.pipeline import demo, graft_distilled, run
    from lexigraft.reporting import report
    from lexigraft.reporting.card import card
    from lexigraft.serving import serve
    from lexigraft.steps.align import align
    from lexigraft.steps.blend import blend
    from lexigraft.steps.check import check
    from lexigraft.steps.evaluate import evaluate
    from lexigraft.steps.extract import extract
    from lexigraft.steps.graft import graft
    from lexigraft.steps.learn import learn
    from lexigraft.steps.merge import merge
    from lexigraft.steps.prune import prune, unprune
    from lexigraft.steps.show import show
    from lexigraft.steps.split import split
    from lexigraft.steps.train import find_learning_rate, train
    from lexigraft.uploading import upload


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, f"lexigraft.steps.{name}")), name)
    raise AttributeError(f"module 'lexigraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
