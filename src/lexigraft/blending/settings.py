"""What a blend is asked to do: from options, or from a mergekit recipe that means the same."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lexigraft.blending.methods import METHODS, Method
from lexigraft.errors import LexigraftError, RefusalError

_OTHER_NAMES = {"task_arithmetic": "task", "dare_linear": "dare", "chat_vector": "chat-vector"}
_NUMBERS = ("weight", "density", "epsilon", "t", "lambda")
_SWITCHES = ("normalize", "rescale")
_PARAMETERS = (*_NUMBERS, *_SWITCHES, "int8_mask")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# A number, numbers spread over the layers, or a list of {filter, value}: mergekit's config.py.
Setting = Any


@dataclass(frozen=True)
class Settings:
    """A blend.

    Attributes:
        method: its name in METHODS.
        base: folder or hub id of the base.
        models: folders or hub ids, in order.
        shared: parameter -> setting for all models.
        own: per model, parameter -> setting.
        dtype: safetensors' name of the type to write; None for the base's.
        base_tokens_only: the tokenizer is to be the base's own (`tokenizer_source: base`).
        pad_to: rows of a grown vocabulary are a multiple of this.
        seed: of what is drawn by chance.
    """

    method: str
    base: str
    models: tuple[str, ...]
    shared: Mapping[str, Setting] = field(default_factory=dict)
    own: tuple[Mapping[str, Setting], ...] = ()
    dtype: str | None = None
    base_tokens_only: bool = False
    pad_to: int = 64
    seed: int = 0

    @property
    def how(self) -> Method:
        """The method."""
        return METHODS[self.method]

    def of(self, name: str, depth: float) -> Parameters:
        """The numbers for one tensor.

        Args:
            name: the tensor's.
            depth: its layer's place from 0 to 1; 0 outside the layers.

        Raises:
            LexigraftError: one is missing or out of its range.
        """
        models = range(len(self.models))

        def each(key: str, default: float) -> tuple[float, ...]:
            return tuple(self._number(key, name, depth, default, model) for model in models)

        found = Parameters(
            each("weight", 1.0),
            each("density", 1.0),
            each("epsilon", 0.15),
            self._number("t", name, depth, math.nan if self.method == "slerp" else 0.0),
            self._number("lambda", name, depth, 1.0),
            bool(self.shared.get("normalize", self.how.normalises)),
            bool(self.shared.get("rescale", self.how.thinned != "magnitude")),
        )
        self._require(found, name)
        return found

    def _number(
        self, key: str, name: str, depth: float, default: float, model: int | None = None
    ) -> float:
        sources = [self.shared] if model is None else [self.own[model], self.shared]
        for source in sources:
            if key in source:
                value = _evaluate(source[key], name, depth)
                if value is not None:
                    return float(value)
        return default

    def _require(self, found: Parameters, name: str) -> None:
        wrong = [f"weight {w:g}" for w in found.weights if not math.isfinite(w)]
        wrong += [f"density {d:g}" for d in found.densities if not 0 <= d <= 1]
        if self.how.thinned == "random":
            wrong += [f"density {d:g}" for d in found.densities if d == 0]
        if self.how.thinned == "ranked":
            wrong += [
                f"density {d:g} with epsilon {e:g}"
                for d, e in zip(found.densities, found.epsilons, strict=True)
                if d < 1 and not (d - e > 0 and d + e < 1)
            ]
        if self.how.kind == "slerp" and not 0 <= found.t <= 1:
            wrong.append("no t" if math.isnan(found.t) else f"t {found.t:g}")
        if self.how.kind == "linear" and found.normalise and sum(found.weights) == 0:
            wrong.append("weights that sum to 0")
        if wrong:
            raise LexigraftError(
                f"{self.method} with {wrong[0]} (for {name})",
                needed="finite weights, densities from 0 to 1 (dare: above 0; della: density "
                "-/+ epsilon between 0 and 1), and for slerp a t from 0 to 1",
                fix="--weights 0.5,0.5 --density 0.5 --t 0.5, or the same keys in the recipe",
            )


@dataclass(frozen=True)
class Parameters:
    """The numbers for one tensor; weights, densities and epsilons per model."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    epsilons: tuple[float, ...]
    t: float
    scale: float
    normalise: bool
    rescale: bool


def from_options(
    models: Sequence[str],
    *,
    base: str,
    method: str,
    weights: Sequence[float] | None,
    density: Sequence[float] | None,
    t: float | None,
    seed: int,
) -> Settings:
    """A blend from options; one density counts for all models.

    Raises:
        LexigraftError: an unknown method, or numbers that do not fit the models.
    """
    name = _method(method)
    own: list[dict[str, Setting]] = [{} for _ in models]
    for key, option, given in (("weight", "--weights", weights), ("density", "--density", density)):
        if given is None:
            continue
        numbers = [*given] * (len(models) if len(given) == 1 and key == "density" else 1)
        if len(numbers) != len(models):
            raise LexigraftError(
                f"{option} with {len(given)} numbers for {len(models)} models",
                needed="one for each model",
                fix=f"{option} " + ",".join(["0.5"] * len(models)),
            )
        for one, number in zip(own, numbers, strict=True):
            one[key] = number
    if METHODS[name].thinned and density is None:
        raise LexigraftError(
            f"--method {method} without --density",
            needed="the share of each model's changes that stays",
            fix="--density 0.5",
        )
    shared = {} if t is None else {"t": t}
    return _checked(Settings(name, base, tuple(models), shared, tuple(own), seed=seed))


def from_recipe(path: Path, *, seed: int) -> Settings:
    """The blend that a mergekit recipe describes.

    Raises:
        RefusalError: a key or a form that would mean something else here, by name.
        LexigraftError: the file is missing or no recipe.
    """
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as fault:
        raise LexigraftError(
            f"{path} cannot be read as YAML: {str(fault).splitlines()[0]}",
            needed="a mergekit recipe",
            fix="lexigraft blend MODEL... --base BASE --method linear -o OUT",
        ) from None
    recipe = _Recipe(path)
    known = ("models", "slices", "merge_method", "base_model", "parameters", "dtype", "out_dtype")
    recipe.require_keys(data, (*known, "tokenizer_source", "tokenizer", "name"), "")
    entries = recipe.entries(data)
    name = recipe.method(data.get("merge_method"))
    base = data.get("base_model")
    models = [recipe.model(entry) for entry in entries]
    own = [recipe.parameters(entry.get("parameters"), "models") for entry in entries]
    if METHODS[name].kind == "task" and base in models:  # listed, but it has no change of its own
        place = models.index(base)
        models.pop(place)
        own.pop(place)
    dtype = data.get("out_dtype", data.get("dtype"))
    if dtype is not None and str(dtype) not in _DTYPES:
        raise recipe.refusal(f"dtype: {dtype}", "one of " + ", ".join(_DTYPES))
    source, pad_to = recipe.tokenizer(data)
    settings = Settings(
        name,
        str(base if base is not None else models[0]),
        tuple(models),
        recipe.parameters(data.get("parameters"), ""),
        tuple(own),
        None if dtype is None else _DTYPES[dtype],
        source == "base",
        pad_to,
        seed,
    )
    if settings.shared.get("rescale") and METHODS[name].thinned == "magnitude":
        raise recipe.refusal("rescale: true with ties", "ties as published, which rescales nothing")
    return _checked(settings)


@dataclass(frozen=True)
class _Recipe:
    path: Path

    def refusal(self, found: str, needed: str) -> RefusalError:
        return RefusalError(f"{self.path}: {found}", needed=needed, fix="run mergekit for this one")

    def method(self, given: Any) -> str:
        found = _known_method(str(given))
        if found is None:
            raise self.refusal(
                "no merge_method" if given is None else f"the method {given}",
                "one of " + ", ".join((*METHODS, *_OTHER_NAMES)),
            )
        return found

    def require_keys(self, data: Any, known: Sequence[str], where: str) -> None:
        if not isinstance(data, dict):
            raise self.refusal(f"{where or 'the file'} is no mapping of keys", "a mergekit recipe")
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                raise self.refusal(
                    f"{where + '.' if where else ''}{key} is not honoured here",
                    f"{near[0]}?" if near else "one of " + ", ".join(known),
                )

    def entries(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The models, of `models` or of the one slice that takes all layers of each."""
        slices = data.get("slices")
        if slices is None:
            entries = self.items(data, "models")
            for entry in entries:
                self.require_keys(entry, ("model", "parameters"), "models")
        else:
            slices = self.items(data, "slices")
            if len(slices) != 1 or "models" in data:
                raise self.refusal(
                    f"{len(slices)} slices", "models blended layer by layer: one slice, all layers"
                )
            self.require_keys(slices[0], ("sources", "parameters"), "slices")
            if "parameters" in slices[0]:
                raise self.refusal("parameters of a slice", "parameters of the recipe")
            entries = self.items(slices[0], "sources")
            for entry in entries:
                self.require_keys(entry, ("model", "layer_range", "parameters"), "slices.sources")
        if not entries:
            raise self.refusal("it names no model", "models, or slices with their sources")
        return entries

    def items(self, data: Mapping[str, Any], key: str) -> list[Any]:
        found = data.get(key) or []
        if not isinstance(found, list):
            raise self.refusal(f"{key}: {found}", "a list")
        return found

    def model(self, entry: Mapping[str, Any]) -> str:
        name = entry.get("model")
        if isinstance(name, dict) and set(name) == {"model"}:
            name = name["model"].get("path") if isinstance(name["model"], dict) else None
        if not isinstance(name, str) or "+" in name:
            raise self.refusal(
                f"model: {name}", "a folder or hub id; an adapter is merged first: lexigraft merge"
            )
        return name

    def parameters(self, data: Any, where: str) -> dict[str, Setting]:
        if data is None:
            return {}
        self.require_keys(data, _PARAMETERS, f"{where + '.' if where else ''}parameters")
        for key in (*_SWITCHES, "int8_mask"):
            if key in data and not isinstance(data[key], bool):
                raise self.refusal(f"{key}: {data[key]}", "true or false, the same for all tensors")
        for key in _NUMBERS:
            if key in data and not _is_setting(data[key]):
                raise self.refusal(
                    f"{key}: {data[key]}", "a number, a list of numbers, or filters with values"
                )
        return {key: value for key, value in data.items() if key != "int8_mask"}  # memory only

    def tokenizer(self, data: Mapping[str, Any]) -> tuple[str, int]:
        described = data.get("tokenizer") or {}
        self.require_keys(described, ("source", "pad_to_multiple_of"), "tokenizer")
        source = data.get("tokenizer_source", described.get("source", "union"))
        if source not in ("union", "base"):
            raise self.refusal(
                f"tokenizer source {source}", "union (which keeps the base's ids) or base"
            )
        pad_to = described.get("pad_to_multiple_of", 64)
        if not isinstance(pad_to, int) or pad_to < 1:
            raise self.refusal(f"pad_to_multiple_of: {pad_to}", "a number from 1")
        return str(source), pad_to


def _is_setting(value: Any) -> bool:
    if _is_number(value):
        return True
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(part, dict) for part in value):
        return all(
            set(part) <= {"filter", "value"}
            and isinstance(part.get("filter"), str | None)
            and _is_flat(part.get("value"))
            for part in value
        )
    return _is_flat(value)


def _is_flat(value: Any) -> bool:
    parts = value if isinstance(value, list) and value else [value]
    return all(map(_is_number, parts))


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) or (whole and abs(value) < 2**63)


def _evaluate(setting: Setting, name: str, depth: float) -> float | None:
    """The value for one tensor; mergekit's rules (config.py, evaluate_setting).

    Numbers in a list are spread evenly over the layers and interpolated. Of filters, the first
    counts that is a part of the tensor's name, or has none.
    """
    if not isinstance(setting, list):
        return float(setting)
    if isinstance(setting[0], dict):
        for part in setting:
            wanted = part.get("filter")
            if wanted in (None, "*") or wanted in name:
                return _evaluate(part["value"], name, depth)
        return None
    place = depth * (len(setting) - 1)
    first = int(place)
    second = min(len(setting) - 1, first + 1)
    return float((1 - place + first) * setting[first] + (place - first) * setting[second])


def _known_method(name: str) -> str | None:
    """The name in METHODS of a method that mergekit may call otherwise; None if it is unknown."""
    found = _OTHER_NAMES.get(name, name)
    return found if found in METHODS else None


def _method(name: str) -> str:
    found = _known_method(name)
    if found is None:
        near = difflib.get_close_matches(name, METHODS, 1)
        raise RefusalError(
            f"the method {name}",
            needed="one of " + ", ".join(METHODS),
            fix=f"--method {near[0] if near else 'linear'}",
        )
    return found


def _checked(settings: Settings) -> Settings:
    """The settings, whose models are as many as the method takes."""
    count, fault = len(settings.models), None
    if settings.how.kind == "slerp" and (count != 2 or settings.base not in settings.models):
        fault = "two models, one of which is the base: t goes from it to the other"
    if settings.how.kind == "chat-vector" and count != 2:
        fault = "two models: the one that was trained on, and the chat model of the same base"
    if count == 0:
        fault = "a model"
    if fault:
        raise LexigraftError(
            f"{settings.method} with {count} models and the base {settings.base}",
            needed=fault,
            fix=f"lexigraft blend MODEL... --base BASE --method {settings.method} -o OUT",
        )
    settings.of("", 0.0)
    return settings


_LAYER = re.compile(r"^(.*?\.)?(\d+)\.")


def depths(names: Sequence[str]) -> dict[str, float]:
    """Tensor name -> the place of its layer from 0 (the first) to 1 (the last); 0 outside layers.

    >>> depths(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w"])
    {'embed.weight': 0.0, 'layers.0.w': 0.0, 'layers.1.w': 0.5, 'layers.2.w': 1.0}
    """
    layers = {name: found for name in names if (found := _LAYER.match(name))}
    last: dict[str | None, int] = {}
    for found in layers.values():
        last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return {
        name: int(layers[name][2]) / max(1, last[layers[name][1]]) if name in layers else 0.0
        for name in names
    }
