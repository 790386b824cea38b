"""The facts of a run as plain data: what the page shows, and what report.json holds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from lexigraft.manifest import NEW_TOKENS
from lexigraft.runfile import RunState

SHOWN_TOKENS = 12
SHOWN_TERMS = 12
# Which training led to which measured model.
_TRAININGS = {
    "merged": "train",
    "control, equal text": "control/text/train",
    "control, equal compute": "control/compute/train",
}


def run_facts(state: RunState, folder: Path) -> dict[str, Any]:
    """Everything that a report says of a run, finished or not."""
    learned = state.result("learn")
    return {
        "base": Path(state.recipe.base).name,
        "seed": state.recipe.seed,
        "finished": "samples" in state.stages and state.running is None,
        "learn": learned,
        "graft": state.result("graft"),
        "tokens": _first_tokens(folder / "vocab" / NEW_TOKENS),
        "terms": _first_terms(learned),
        "models": model_rows(state),
        "training": _training(state),
        "check": state.result("check"),
        "samples": state.result("samples").get("samples", []),
        "stages": [
            {"stage": name, "seconds": stage.seconds} for name, stage in state.stages.items()
        ],
    }


def model_rows(state: RunState) -> list[dict[str, Any]]:
    """One row per measured model: its eval, and the training that it had."""
    rows = []
    found = state.result("evaluate")
    for model, measured in zip(found.get("names", []), found.get("models", []), strict=True):
        training = _TRAININGS.get(model)
        stages = _training_stages(state, training) if training else []
        rows.append(
            {
                "model": model,
                "tokens_per_byte": measured["domain"]["tokens"] / measured["domain"]["bytes"],
                "domain_bpb": measured["domain"]["bpb"],
                "general_bpb": (measured.get("general") or {}).get("bpb"),
                "adoption": measured.get("adoption"),
                "characters_per_second": measured.get("characters_per_second"),
                "training_text_bytes": sum(state.result(s)["text_bytes"] for s in stages),
                "training_tokens": sum(state.result(s)["tokens"] for s in stages),
                "training_seconds": sum(state.stages[s].seconds for s in stages),
            }
        )
    return rows


def _training_stages(state: RunState, last: str) -> list[str]:
    """`last`, and the stages of training before it."""
    prefix = last.removesuffix("train")
    earlier = [n for n in state.stages if n.startswith(f"{prefix}stage") and n.endswith("/train")]
    return [*earlier, *([last] if last in state.stages else [])]


def _training(state: RunState) -> dict[str, Any]:
    """What the last training says of itself; empty of a run from before there were verdicts."""
    found = state.result("train")
    keys = ("base", "adoption", "rows_moved", "new_rows", "log", "verdict")
    return {key: found[key] for key in keys} if "verdict" in found else {}


def _first_tokens(path: Path) -> list[dict[str, Any]]:
    """The first new tokens, which were chosen first."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, SHOWN_TOKENS)]


def _first_terms(learned: dict[str, Any]) -> list[dict[str, Any]]:
    """The listed terms that occur most, each in its best spelling."""
    terms = learned.get("terms")
    if not terms:
        return []
    from lexigraft.selection.terms import TermReport, TermTable

    best = TermTable([TermReport(**row) for row in terms["rows"]]).best()
    strongest = sorted(best, key=lambda row: (-row.occurrences, row.term))
    return [vars(row) for row in strongest[:SHOWN_TERMS]]
