"""Which tensors of a checkpoint are indexed by token id, and where its config says how many.

`architectures.json` is generated from transformers by scripts/make_architectures.py; it holds the
names under which transformers saves a tensor and those it has in memory. On disk a name may also
lack the table's first component (`wte.weight` of GPT-2). A type that the table lacks goes by shape
and by the last two components that the table's names have. What stays ambiguous is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.nested import get, paths_to
from lexigraft.checkpoints.rows import by_row
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.manifest import Manifest

Role = Literal["embed", "head", "bias"]

_WORDS = {"embed": "input embedding", "head": "output head"}
# Names that checkpoints with code of their own, or older transformers, give these tensors.
_MORE_NAMES: Mapping[str, Role] = {
    "embed_out.weight": "head",  # GPT-NeoX
    "output_layer.weight": "head",  # ChatGLM
    "output.weight": "head",  # InternLM2
    "tok_embeddings.weight": "embed",  # InternLM2
    "embedding.word_embeddings.weight": "embed",  # ChatGLM
}
# Multi-token-prediction layers carry copies of both tables (DeepSeek-V3, GLM-4-MoE, Qwen3-Next).
# transformers drops them on loading, so that no class knows of them.
_COPIES = re.compile(
    r"(?:\.layers\.\d+|(?:^|\.)mtp)\.(?:(embed_tokens)|shared_head\.head)\.weight$"
)
# What such a copy is called where it lies elsewhere (`medusa.lm_head.weight`).
_COPY_NAMES = (
    *("embed_tokens.weight", "word_embeddings.weight", "tok_embeddings.weight", "wte.weight"),
    *("lm_head.weight", "output_layer.weight", "shared_head.head.weight", "embed_out.weight"),
)
# The table of which Gemma 3n and 4 give each layer an embedding of its own, and the key that counts
# its rows.
_PER_LAYER, _PER_LAYER_SIZE = "embed_tokens_per_layer.weight", "vocab_size_per_layer_input"
# Keys that count rows wherever their value is the number of rows.
_SIZE_KEYS = (
    *("vocab_size", _PER_LAYER_SIZE, "decoder_vocab_size", "n_words", "n_token"),
    *(
        "padded_vocab_size",
        "text_vocab_size",
        "org_vocab_size",
        "n_vocab",
        "num_embeddings",
        "embedding_size",
    ),
)


@dataclass(frozen=True)
class VocabularyTensors:
    """The vocabulary tensors of a checkpoint, by the names under which they are on disk.

    Attributes:
        embeds: input embeddings, and stored copies of them.
        heads: output heads that are stored; empty when tied (or when the model has none).
        biases: head biases and the like, shape (rows,) or (1, rows).
        tied: no head is stored and the config (or its class's default) ties it to the embedding.
        rows: their common number of rows: what the weights hold, whatever the config says.
        config_paths: where config.json states it; the first is the one that loaders read.
        head_name: the name that a head has, or would have if it were stored.
    """

    embeds: tuple[str, ...]
    heads: tuple[str, ...]
    biases: tuple[str, ...]
    tied: bool
    rows: int
    config_paths: tuple[tuple[str, ...], ...]
    head_name: str

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.embeds, *self.heads, *self.biases)

    @property
    def roles(self) -> dict[str, Role]:
        """What each of them is."""
        return {
            **dict.fromkeys(self.embeds, "embed"),
            **dict.fromkeys(self.heads, "head"),
            **dict.fromkeys(self.biases, "bias"),
        }


@cache
def table() -> dict[str, dict[str, Any]]:
    """The generated table: model_type -> names, config path and defaults, or why it is refused."""
    text = Path(__file__).with_suffix(".json").read_text("utf-8")
    content: dict[str, dict[str, Any]] = json.loads(text)
    return content


def vocabulary_of(
    checkpoint: Checkpoint, roles: Mapping[str, str] | None = None
) -> VocabularyTensors:
    """Find the vocabulary tensors of `checkpoint`.

    Args:
        checkpoint: an open one; only headers and config are looked at.
        roles: tensor name -> `embed`, `head` or `bias`; they win over everything else. Without,
            those are taken that the folder's manifest holds, if a graft was told them.

    Raises:
        RefusalError: rows cannot be added to this model type.
        LexigraftError: nothing found, several candidates, or rows that differ.
    """
    entry = _entry(checkpoint)
    recorded = recorded_roles(checkpoint) if roles is None else {}
    found = _given(checkpoint, roles or recorded)
    roles = roles or recorded
    if recorded and "head" not in found.values():
        found |= _untied_later(checkpoint, entry, found)
    if not found:
        found = _by_table(checkpoint, entry) if entry else {}
    if "embed" not in found.values() and not roles:
        found = _head_alone(checkpoint, entry, found) or _by_name_and_shape(checkpoint)
    for name in checkpoint.tensors:
        if match := _COPIES.search(name):
            found.setdefault(name, "embed" if match[1] else "head")
    _require_tables(checkpoint, found)
    rows = _common_rows(checkpoint, found)
    if not roles:
        found |= _beyond_the_class(checkpoint, found, rows)
    embeds, heads, biases = (_with_role(found, role) for role in ("embed", "head", "bias"))
    stored = any(not _COPIES.search(name) for name in heads)
    return VocabularyTensors(
        embeds,
        heads,
        biases,
        tied=not stored and _states_tied(checkpoint.config, entry),
        rows=rows,
        config_paths=_config_paths(checkpoint, entry, rows),
        head_name=_head_name(heads, embeds, entry),
    )


def _entry(checkpoint: Checkpoint) -> dict[str, Any] | None:
    model_type = str(checkpoint.config.get("model_type"))
    entry = table().get(model_type)
    reason = _irregular(checkpoint) or (entry or {}).get("refused")
    if reason:
        raise RefusalError(
            f"{checkpoint.folder} is a {model_type} model: {reason}",
            needed="a model whose embedding can be extended at its end",
            fix="choose another base model",
        )
    return entry


def _irregular(checkpoint: Checkpoint) -> str:
    """Why rows cannot be added to this very model, whatever others of its type are like."""
    for name in checkpoint.tensors:
        if name.endswith(("additional_embedding.weight", "additional_fc.weight")):  # IDEFICS
            return f"its last tokens have rows of their own, in {name}"
    if checkpoint.config.get("asm") is True:  # XLM, FlauBERT
        return "its adaptive softmax (asm) gives ids their places by frequency"
    return ""


def _given(checkpoint: Checkpoint, roles: Mapping[str, str]) -> dict[str, Role]:
    found: dict[str, Role] = {}
    for name, role in roles.items():
        if name not in checkpoint.tensors:
            # Names that end alike, else any tables.
            near = [other for other in checkpoint.tensors if other.endswith(name.split(".")[-1])]
            near = near or [t.name for t in checkpoint.tensors.values() if len(t.shape) == 2]
            raise LexigraftError(
                f"--tensor {name}={role}: {checkpoint.folder} holds no tensor of that name",
                needed="a name from the weights, such as " + ", ".join(near[:3]),
                fix=f"lexigraft graft {checkpoint.folder} VOCAB -o MODEL --tensor NAME={role}",
            )
        if role not in ("embed", "head", "bias"):
            raise LexigraftError(
                f"--tensor {name}={role}",
                needed="embed, head or bias as the role",
                fix=f"--tensor {name}=embed",
            )
        found[name] = role  # type: ignore[assignment]
    return found


def recorded_roles(checkpoint: Checkpoint) -> dict[str, str]:
    """What `graft --tensor` was told, now or before a `prune`, for tensors still there."""
    manifest = Manifest.read(checkpoint.folder)
    records = [manifest.last(stage) for stage in ("graft", "prune")] if manifest else []
    told: Mapping[str, str] = next(
        (record.roles for record in records if record and record.roles), {}
    )
    return {name: role for name, role in told.items() if name in checkpoint.tensors}


def _untied_later(
    checkpoint: Checkpoint, entry: Mapping[str, Any] | None, found: Mapping[str, Role]
) -> dict[str, Role]:
    """The head that a merge has given to a model which was tied when its roles were told."""
    embeds = _with_role(found, "embed")
    name = _head_name((), embeds, entry)
    shapes = {checkpoint.tensors[embed].shape for embed in embeds}
    head = checkpoint.tensors.get(name)
    return {name: "head"} if head is not None and head.shape in shapes else {}


def _by_table(checkpoint: Checkpoint, entry: Mapping[str, Any]) -> dict[str, Role]:
    found: dict[str, Role] = {}
    for role, key in (("embed", "embeds"), ("head", "heads"), ("bias", "biases")):
        for name in _named(checkpoint.tensors, entry[key]):
            found.setdefault(name, role)  # type: ignore[arg-type]
    if "head" not in found.values():
        shapes = {checkpoint.tensors[name].shape for name, role in found.items() if role == "embed"}
        for name, tensor in checkpoint.tensors.items():
            if tensor.shape in shapes and _MORE_NAMES.get(_last_two(name)) == "head":
                found[name] = "head"
    return found


def _head_alone(
    checkpoint: Checkpoint, entry: Mapping[str, Any] | None, found: Mapping[str, Role]
) -> dict[str, Role]:
    """The one matrix of a tied model that was saved under the name of its head."""
    heads = [name for name, role in found.items() if role == "head"]
    if len(heads) != 1 or not _states_tied(checkpoint.config, entry):
        return {}
    return {**found, heads[0]: "embed"}


def _named(tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> list[str]:
    """The names on disk of the table's names: as they are, or without the first component."""
    exact = [name for name in wanted if name in tensors]
    if exact:
        return exact
    without = {_without_first(name) for name in wanted}
    near = [name for name in tensors if name in without or _without_first(name) in wanted]
    if near:
        return near
    ends = {_last_two(name) for name in wanted}
    return [name for name in tensors if _last_two(name) in ends and not _is_layered(name)]


def _without_first(name: str) -> str:
    return name.partition(".")[2]


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _is_layered(name: str) -> bool:
    """True for a tensor of one of many equal layers."""
    return any(part.isdigit() for part in name.split("."))


@cache
def _known_names() -> dict[str, Role]:
    known: dict[str, Role] = dict(_MORE_NAMES)
    for entry in table().values():
        for role, key in (("embed", "embeds"), ("head", "heads"), ("bias", "biases")):
            for name in entry.get(key, ()):
                known.setdefault(_last_two(name), role)  # type: ignore[arg-type]
    return known


def _by_name_and_shape(checkpoint: Checkpoint) -> dict[str, Role]:
    """Roles in a model of unknown type.

    Raises:
        LexigraftError: not exactly one input embedding, or an unnamed tensor of the same shape.
    """
    known = _known_names()
    flat = {n: t for n, t in checkpoint.tensors.items() if not _is_layered(n)}
    candidates = {n: t for n, t in flat.items() if len(t.shape) == 2 and t.shape[0] > 1}
    embeds = [name for name in candidates if known.get(_last_two(name)) == "embed"]
    stated = get(checkpoint.config, _size_path(checkpoint.config))
    if len(embeds) != 1:
        fitting = [name for name, tensor in candidates.items() if tensor.shape[0] == stated]
        raise _ambiguous(checkpoint, embeds or fitting, _WORDS["embed"])
    shape = candidates[embeds[0]].shape
    same = [n for n, t in candidates.items() if t.shape == shape and n != embeds[0]]
    heads = [name for name in same if known.get(_last_two(name)) == "head"]
    if len(same) > len(heads) or len(heads) > 1:
        raise _ambiguous(checkpoint, [embeds[0], *same], _WORDS["head"])
    found: dict[str, Role] = {embeds[0]: "embed", **dict.fromkeys(heads, "head")}
    for name, tensor in flat.items():
        if known.get(_last_two(name)) == "bias" and by_row(tensor).shape == shape[:1]:
            found[name] = "bias"
    return found


def _beyond_the_class(
    checkpoint: Checkpoint, found: Mapping[str, Role], rows: int
) -> dict[str, Role]:
    """Further tensors with a row per token, which the model's class does not load.

    Raises:
        RefusalError: one stands on its side.
        LexigraftError: one of an unknown name, unless its size may be another dimension's.
    """
    widths = {t.shape[1] for n in found if len((t := checkpoint.tensors[n]).shape) == 2}
    by_chance = _has_another(checkpoint.config, rows) or rows in widths
    more: dict[str, Role] = {}
    for name, tensor in checkpoint.tensors.items():
        shape = by_row(tensor).shape
        if name in found or len(shape) not in (1, 2) or rows not in shape:
            continue
        if len(shape) == 2 and shape[0] == rows and name.endswith(_COPY_NAMES):
            more[name] = _known_names().get(_last_two(name), "head")
        elif by_chance or _is_layered(name):
            continue
        elif shape[0] == rows:
            role = _known_names().get(_last_two(name))
            if role is None:
                raise _unknown(checkpoint, name)
            more[name] = role
        elif shape[1:] == (rows,) and shape[0] in widths:
            raise RefusalError(
                f"{name} of {checkpoint.folder} has shape {list(shape)}: tokens are its columns",
                needed="vocabulary tensors with one row per token",
                fix="transpose it and save the model again, as its class stores it",
            )
    return more


def _has_another(config: Mapping[str, Any], rows: int) -> bool:
    """True if the config gives `rows` as a size of something that is not a vocabulary."""
    return any(
        _has_another(value, rows)
        if isinstance(value, dict)
        else value == rows and key not in _SIZE_KEYS
        for key, value in config.items()
    )


def _unknown(checkpoint: Checkpoint, name: str) -> LexigraftError:
    shape = list(checkpoint.tensors[name].shape)
    return LexigraftError(
        f"{name} {shape} of {checkpoint.folder} seems to have a row per token, but is not known",
        needed="the names of all vocabulary tensors of this model",
        fix=f"name them all: --tensor {name}=embed (or head, or bias), and so on; leave out what "
        "has another meaning",
    )


def _ambiguous(checkpoint: Checkpoint, names: Sequence[str], what: str) -> LexigraftError:
    shown = [f"{name} {list(checkpoint.tensors[name].shape)}" for name in names[:6]]
    example = names[0] if names else "NAME"
    model_type = checkpoint.config.get("model_type", "unknown")
    return LexigraftError(
        f"the {what} of this {model_type} model could be: " + (", ".join(shown) or "nothing known"),
        needed="the names of its vocabulary tensors",
        fix=f"add --tensor {example}=embed (and --tensor NAME=head if it has a head of its own)",
    )


def _with_role(found: Mapping[str, Role], role: str) -> tuple[str, ...]:
    return tuple(name for name, its in found.items() if its == role)


def _require_tables(checkpoint: Checkpoint, found: Mapping[str, Role]) -> None:
    """One of `found` is an embedding, and embeddings and heads have a row of numbers per token."""
    for name, role in found.items():
        shape = checkpoint.tensors[name].shape
        if role != "bias" and len(shape) != 2:
            raise LexigraftError(
                f"{name} {list(shape)} of {checkpoint.folder} cannot be the {_WORDS[role]}",
                needed="one row of numbers per token",
                fix=f"lexigraft check {checkpoint.folder}, or name the right tensor: "
                f"--tensor NAME={role}",
            )
    if "embed" not in found.values():
        rows = {checkpoint.tensors[name].rows for name in found}
        near = [name for name, tensor in checkpoint.tensors.items() if tensor.rows in rows]
        raise _ambiguous(checkpoint, [n for n in near if n not in found], _WORDS["embed"])


def _common_rows(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    rows = {name: by_row(checkpoint.tensors[name]).rows for name in names}
    if len(set(rows.values())) > 1:
        raise LexigraftError(
            "the vocabulary tensors have different numbers of rows: "
            + ", ".join(f"{name} {count}" for name, count in rows.items()),
            needed="the same number in each",
            fix=f"download {checkpoint.folder} again, or train and save it with one tokenizer",
        )
    return next(iter(rows.values()))


def is_tied_by_config(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` makes embedding and head one tensor, its class's default included."""
    return _states_tied(config, table().get(str(config.get("model_type"))))


def _states_tied(config: Mapping[str, Any], entry: Mapping[str, Any] | None) -> bool:
    """What the config says; where it is silent, the class's default.

    Files of older versions state it in `text_config` only, and so do some whose top says False
    (transformers hands it up); True anywhere means tied.
    """
    stated = [bool(get(config, path)) for path in paths_to(config, ("tie_word_embeddings",))]
    if "tie_word_embeddings" in config or (stated and not entry):
        return any(stated)
    return any(stated) or (bool(entry["tied"]) if entry else True)


def _head_name(heads: Sequence[str], embeds: Sequence[str], entry: Mapping[str, Any] | None) -> str:
    stored = [name for name in heads if not _COPIES.search(name)]
    if stored:
        return stored[0]
    wanted: list[str] = list(entry["heads"]) if entry else []
    if not wanted:
        return "lm_head.weight"
    # Names on disk come first, those in memory last: the head follows the embedding's choice.
    in_memory = bool(entry and set(embeds) & set(entry["embeds"][1:]))
    return wanted[-1] if in_memory else wanted[0]


def _size_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the number of rows is stated, or would be."""
    stated = paths_to(config, ("vocab_size",)) or paths_to(config, _SIZE_KEYS)
    if stated:
        return stated[0]
    return ("text_config", "vocab_size") if "text_config" in config else ("vocab_size",)


def per_layer_rows(checkpoint: Checkpoint) -> dict[tuple[str, ...], Tensor]:
    """Where config.json states the rows of per-layer embeddings, with the table that has them."""
    tables = (tensor for name, tensor in checkpoint.tensors.items() if name.endswith(_PER_LAYER))
    table_of_layers = next(tables, None)
    if table_of_layers is None:
        return {}
    return dict.fromkeys(paths_to(checkpoint.config, (_PER_LAYER_SIZE,)), table_of_layers)


def _config_paths(
    checkpoint: Checkpoint, entry: Mapping[str, Any] | None, rows: int
) -> tuple[tuple[str, ...], ...]:
    config, counted = checkpoint.config, per_layer_rows(checkpoint)
    paths = paths_to(config, _SIZE_KEYS)
    fitting = [path for path in paths if path in counted or get(config, path) == rows]
    usual = tuple(entry["vocab_size"]) if entry else ()
    if usual and (get(config, usual) is not None or len(usual) > 1):
        main = usual
    elif entry or not fitting:
        # One type may have a class for text alone and one around it, whose config is nested.
        main = _size_path(config)
    else:
        main = fitting[0]
    return (main, *(path for path in fitting if path != main))
