"""The charts of the page, drawn of a run's facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from lexigraft.reporting import svg
from lexigraft.reporting.space import usual_length
from lexigraft.reporting.words import Words

_KINDS = {"merged": "new", "control, equal text": "control", "control, equal compute": "control2"}


def charts(facts: Mapping[str, Any], t: Words) -> dict[str, Any]:
    """By name: None, or nothing, where a run has not come so far."""
    return {
        "size": _size_chart(facts, t),
        "training": list(_training_charts(facts, t)),
        "map": _map_chart(facts, t),
        "lengths": list(_length_charts(facts, t)),
    }


def _size_chart(facts: Mapping[str, Any], t: Words) -> Markup | None:
    curve = facts["learn"].get("curve")
    if not curve:
        return None
    size = facts["learn"].get("size") or {}
    named = [
        (size.get("knee"), "knee", ""),
        (size.get("best_speed_k"), "fastest", ""),
        (size.get("k", facts["learn"]["added"]), "chosen", "new"),
    ]
    last = curve[-1][0]
    marks = [
        (k, t(f"size.{key}", k=f"{k:,}"), kind)
        for k, key, kind in named
        if k is not None and 0 < k <= last
    ]
    said = t(
        "size.alt",
        y0=f"{curve[0][1]:.3f}",
        y1=f"{curve[-1][1]:.3f}",
        k=f"{last:,}",
        knee=f"{size.get('knee') or '–'}",
    )
    label = svg.Label(t("size"), said, t("size.x"), t("size.y"))
    return svg.line_chart(label, [svg.Series("new", curve)], marks=marks)


def _training_charts(facts: Mapping[str, Any], t: Words) -> Iterator[dict[str, Any]]:
    base = facts["training"].get("base") or {}
    for which in ("domain", "general"):
        key = f"{which}_bpb"
        series, legend, said = [], [], []
        for curve in facts["curves"]:
            points = [(p["text_bytes"], p[key]) for p in curve["points"] if p[key] is not None]
            if points:
                kind, name = _KINDS[curve["model"]], t(curve["model"])
                series.append(svg.Series(kind, points))
                legend.append((kind, name))
                ends = {"start": f"{points[0][1]:.3f}", "end": f"{points[-1][1]:.3f}"}
                said.append(t("training.alt", name=name, **ends))
        if not series:
            continue
        level = base.get(key)
        if level is not None:
            legend.append(("level", t("training.base", value=f"{level:.3f}")))
            said.append(legend[-1][1])
        title = t(f"training.{which}")
        label = svg.Label(title, " ".join(said), t("training.x"), t("training.y"))
        chart = svg.line_chart(label, series, level=level)
        yield {"title": title, "svg": chart, "legend": legend}


def _map_chart(facts: Mapping[str, Any], t: Words) -> Markup | None:
    found = facts["rows"].get("map")
    if not found:
        return None
    sizes = {kind: len(found[kind]) for kind in ("old", "new")}
    first, second = (
        t("rows.pc", n=n, share=f"{share:.1%}") for n, share in enumerate(found["explained"], 1)
    )
    label = svg.Label(t("rows.map"), t("rows.map.alt", **sizes), first, second)
    old, new = ([(x, y, text) for x, y, _, text in found[kind]] for kind in ("old", "new"))
    return svg.scatter(label, old, new)


def _length_charts(facts: Mapping[str, Any], t: Words) -> Iterator[dict[str, Any]]:
    for found in facts["rows"].get("lengths", []):
        edges = found["edges"]
        title = t("rows.lengths", name=found["name"])
        old, new = (f"{usual_length(found, kind):.3g}" for kind in ("old", "new"))
        said = t("rows.lengths.alt", old=old, new=new)
        label = svg.Label(title, said, t("rows.x"), t("rows.y"))
        series = [
            svg.Series(
                kind, [(edge, share) for edge, share in zip(edges, found[kind], strict=False)]
            )
            for kind in ("old", "new")
        ]
        yield {"title": title, "svg": svg.histogram(label, edges, series)}
