"""The facts of a run as plain data: what each form of the report shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexigraft import __version__
from lexigraft.errors import LexigraftError
from lexigraft.families.segments import Extension
from lexigraft.files import read_object
from lexigraft.manifest import Manifest
from lexigraft.models.verdict import Thresholds, row_verdict
from lexigraft.reporting.repeating import repetition
from lexigraft.reporting.sentences import sentences
from lexigraft.reporting.space import row_space
from lexigraft.runfile import RunState

SHOWN_TERMS = 12
TRAINING = "training.json"
# Folders of a run that hold a manifest, the last one first.
_LATEST = ("merged", "adapter", "model", "vocab")
_EVIDENCE = (
    *("targets", "inputs", "moved", "top1", "rank", "leak", "adopted", "missed"),
    *("bits", "bits_before", "within"),
)
# Which training led to which measured model.
_TRAININGS = {
    "merged": "train",
    "control, equal text": "control/text/train",
    "control, equal compute": "control/compute/train",
}


def run_facts(state: RunState, folder: Path) -> dict[str, Any]:
    """Everything that a report says of a run, finished or not; keys: docs/report.md."""
    learned = state.result("learn")
    where = next((folder / name for name in _LATEST if (folder / name).is_dir()), None)
    manifest = Manifest.read(where) if where else None
    extension, why = opened(state, folder)
    looked: dict[str, Any] = {"shown": [], "samples": [], "why": why}
    return {
        "lexigraft": __version__,
        "base": Path(state.recipe.base).name,
        "seed": state.recipe.seed,
        "finished": "samples" in state.stages and state.running is None,
        "learn": learned,
        "graft": state.result("graft"),
        "tokens": _tokens(extension, _trained(state, folder)) if extension else [],
        "terms": _first_terms(learned),
        "models": model_rows(state),
        "training": _training(state),
        "curves": _curves(state),
        "rows": _rows(folder, extension, state.recipe.seed) if extension else {},
        "check": state.result("check"),
        "sentences": sentences(state.recipe, extension) if extension else looked,
        "samples": state.result("samples").get("samples", []),
        "stages": [
            {"stage": name, "seconds": stage.seconds} for name, stage in state.stages.items()
        ],
        "lineage": _lineage(where, manifest),
        "repeat": repetition(state, folder, manifest),
    }


def opened(state: RunState, folder: Path) -> tuple[Extension | None, str | None]:
    """The extended tokenizer beside the base's, if that is at hand; else why there is none."""
    vocab, base = folder / "vocab", Path(state.recipe.base)
    if not vocab.is_dir():
        return None, f"no folder {vocab}" if "learn" in state.stages else None
    try:
        return Extension.open(vocab, base if base.is_dir() else None), None
    except LexigraftError as fault:
        return None, fault.found


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
    keys = (
        *("base", "domain_bpb", "general_bpb"),
        *("adoption", "rows_moved", "new_rows", "log", "verdict"),
    )
    return {key: found[key] for key in keys} if "verdict" in found else {}


def _curves(state: RunState) -> list[dict[str, Any]]:
    """Bits per byte through training, of the extended model and of its controls.

    Stages of training follow each other: the second one starts where the first one ended.
    """
    curves = []
    for name, last in _TRAININGS.items():
        points: list[dict[str, Any]] = []
        for stage in _training_stages(state, last):
            begin = points[-1]["text_bytes"] if points else 0
            points += [
                {
                    "text_bytes": begin + entry["text_bytes"],
                    "domain_bpb": entry.get("domain_bpb"),
                    "general_bpb": entry.get("general_bpb"),
                }
                for entry in state.result(stage).get("log", [])
            ]
        curves += [{"model": name, "points": points}] if points else []
    return curves


def _trained(state: RunState, folder: Path) -> dict[str, Any]:
    """What the last training wrote of itself, rows included; empty before there is one."""
    name = Path(state.result("train").get("output", "")).name  # the run may have been moved
    path = folder / name / TRAINING
    return read_object(path) if name and path.is_file() else {}


def _tokens(extension: Extension, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every new token: what `learn` wrote of it, and what training found."""
    seen = {row["id"]: row for row in found.get("rows", [])}
    limits = Thresholds(**found.get("verdict", {}).get("thresholds", {}))
    tokens = []
    for token in extension.ids:
        row = extension.rows.get(token) or _special(extension, token)
        evidence = seen.get(token, {})
        tokens.append(
            {
                **row,
                "shown": extension.piece(token).text,
                "spelled": [extension.piece(i).text for i in row["pieces"]],
                **{key: evidence.get(key) for key in _EVIDENCE},
                "verdict": row_verdict(evidence, limits) if evidence else None,
            }
        )
    return tokens


def _special(extension: Extension, token: int) -> dict[str, Any]:
    """A new special token, in the form of the lines of `new_tokens.jsonl`."""
    data = extension.family.token_bytes(token)
    known: dict[str, Any] = dict.fromkeys(("count", "tokens_saved", "specificity", "parts"))
    return {
        "id": token,
        "token": extension.family.map.texts[token],
        "bytes": data.hex(),
        "text": data.decode("utf-8", "replace"),
        "pieces": extension.spelled(token),
        **known,
        "origin": "special",
    }


def _rows(folder: Path, extension: Extension, seed: int) -> dict[str, Any]:
    """Where the rows lie, of the last model that there is; empty before there is one."""
    where = next((name for name in ("merged", "model") if (folder / name).is_dir()), None)
    if where is None:
        return {}
    try:
        return {"model": where, **row_space(folder / where, extension, seed=seed)}
    except LexigraftError as fault:
        return {"model": where, "why": fault.found}


def _lineage(folder: Path | None, manifest: Manifest | None) -> dict[str, Any]:
    """The records of the last folder's manifest, without their probes; empty without one."""
    if folder is None or manifest is None:
        return {}
    records = [record.to_json() for record in manifest.records]
    for record in records:
        record.pop("probe", None)
    return {"folder": folder.name, "hash": manifest.hash, "records": records}


def _first_terms(learned: dict[str, Any]) -> list[dict[str, Any]]:
    """The listed terms that occur most, each in its best spelling."""
    terms = learned.get("terms")
    if not terms:
        return []
    from lexigraft.selection.terms import TermReport, TermTable

    best = TermTable([TermReport(**row) for row in terms["rows"]]).best()
    strongest = sorted(best, key=lambda row: (-row.occurrences, row.term))
    return [vars(row) for row in strongest[:SHOWN_TERMS]]
