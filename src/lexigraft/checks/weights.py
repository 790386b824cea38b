"""Do config, rows and tokens of one model fit together?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lexigraft.checkpoints.architectures import per_layer_rows
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.nested import get
from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Edit, Finding, finding
from lexigraft.families.tokenmap import token_text

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Ids that generation uses, also in lists and lists of lists.
GENERATION = (
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "force_words_ids"),
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def weight_findings(facts: Facts) -> Iterator[Finding]:
    """Faults between the config, the weights and the tokenizer of one model folder."""
    if facts.checkpoint is None:
        return
    yield from _empty(facts.checkpoint)
    yield from _index(facts.checkpoint)
    yield from _per_layer(facts)
    if facts.rows is None:
        return
    yield from _rows(facts, facts.rows)
    yield from _tying(facts)
    yield from _special_ids(facts, facts.rows)


def _empty(checkpoint: Checkpoint) -> Iterator[Finding]:
    empty = [tensor for tensor in checkpoint.tensors.values() if 0 in tensor.shape]
    if empty:
        yield finding(
            "LG307",
            empty[0].name,
            f"has shape {list(empty[0].shape)} ({len(empty)} tensors are empty): it was saved "
            "without gathering the shards of ZeRO-3",
            needed="whole tensors",
            fix="python zero_to_fp32.py in the training folder, or save with "
            "stage3_gather_16bit_weights_on_model_save",
            shape=str(list(empty[0].shape)),
            count=len(empty),
        )


def _index(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The index and the files beside it, against the shards that it names."""
    index, where = checkpoint.index, "model.safetensors.index.json"
    fix = "write the index again: load the model with transformers and save it to a new folder"
    if index is not None:
        unnamed = [name for name in checkpoint.tensors if name not in index["weight_map"]]
        metadata = index.get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if unnamed:
            yield finding(
                "LG308",
                where,
                f"does not name {len(unnamed)} tensors that its shards hold, such as {unnamed[0]}",
                needed="every tensor in weight_map",
                fix=fix,
                edit=Edit(
                    where,
                    ("weight_map",),
                    {name: tensor.path.name for name, tensor in checkpoint.tensors.items()},
                ),
                count=len(unnamed),
                tensor=unnamed[0],
            )
        elif isinstance(stated, int | float) and stated != checkpoint.bytes:
            yield finding(
                "LG308",
                where,
                f"says total_size = {stated:,}, the tensors have {checkpoint.bytes:,} bytes",
                needed=f"total_size = {checkpoint.bytes:,}",
                fix=f"set total_size to {checkpoint.bytes} in {checkpoint.folder / where}",
                edit=Edit(where, ("metadata", "total_size"), checkpoint.bytes),
                stated=str(stated),
                bytes=checkpoint.bytes,
            )
    for path in sorted(checkpoint.folder.iterdir()):
        if _SHARD.fullmatch(path.name) and path.name not in checkpoint.headers:
            named = "the index" if index is not None else "model.safetensors beside it"
            yield finding(
                "LG309",
                path.name,
                f"is a shard that {named} does not know: it is of another save",
                needed="the shards of one save",
                fix=f"rm {path}",
                edit=Edit(path.name),
            )
            return


def stated_rows(config: dict[str, Any]) -> dict[str, int]:
    """Every `vocab_size` of a config by its dotted path.

    Parts of composite models that have no text (vision, audio) are left out.

    >>> stated_rows({"text_config": {"vocab_size": 9}, "vision_config": {"vocab_size": 3}})
    {'text_config.vocab_size': 9}
    """
    found = {}
    if isinstance(config.get("vocab_size"), int):
        found["vocab_size"] = config["vocab_size"]
    for key in ("text_config", "llm_config", "language_config", "decoder", "thinker_config"):
        part = config.get(key)
        if isinstance(part, dict):
            found |= {f"{key}.{path}": size for path, size in stated_rows(part).items()}
    return found


def _per_layer(facts: Facts) -> Iterator[Finding]:
    """The number of rows of per-layer embeddings, which in Gemma 3n is not that of the others."""
    for path, size, rows in stated_per_layer(facts):
        if size != rows:
            yield _stale(facts, path, size, rows, "the embeddings per layer")


def stated_per_layer(facts: Facts) -> Iterator[tuple[str, int, int]]:
    """Each dotted path where a config counts per-layer embeddings, its number, and their rows."""
    for path, tensor in per_layer_rows(facts.checkpoint).items() if facts.checkpoint else ():
        size = get(facts.config.get("config.json", {}), path)
        if isinstance(size, int):
            yield ".".join(path), size, tensor.rows


def _stale(facts: Facts, path: str, size: int, rows: int, owner: str = "the weights") -> Finding:
    return finding(
        "LG201",
        "config.json",
        f"says {path} = {size:,}, {owner} have {rows:,} rows: it was edited by hand, or belongs to "
        "other weights",
        needed=f"{path} = {rows:,}",
        fix=f"set {path} to {rows} in {facts.folder / 'config.json'}",
        edit=Edit("config.json", tuple(path.split(".")), rows),
        key=path,
        stated=size,
        rows=rows,
    )


def _rows(facts: Facts, rows: int) -> Iterator[Finding]:
    config = facts.config.get("config.json", {})
    stated = {path: size for path, size in stated_rows(config).items() if size != rows}
    read = facts.vocabulary.config_paths[0] if facts.vocabulary else ()
    if get(config, read) == rows:
        # PaliGemma and LLaVA keep an older number outside the part that loaders read.
        stated = {path: size for path, size in stated.items() if path.count(".") >= len(read) - 1}
    tokens = facts.tokens.tokens if facts.tokens else None
    if tokens is not None and tokens > rows:
        said = next(iter(stated.values()), rows)
        yield finding(
            "LG302",
            _first_tensor(facts),
            f"has {rows:,} rows, the tokenizer has {tokens:,} tokens and config.json says "
            f"{said:,}: ids {rows:,} to {tokens - 1:,} have no row",
            needed=f"at least {tokens:,} rows",
            fix=f"lexigraft graft BASE {facts.folder} -o MODEL "
            "(BASE is this model before its tokenizer was extended)",
            rows=rows,
            tokens=tokens,
            stated=said,
            last=tokens - 1,
        )
    elif stated:
        path, size = next(iter(stated.items()))
        yield _stale(facts, path, size, rows)
    elif tokens is not None and rows > tokens:
        yield finding(
            "LG303",
            _first_tensor(facts),
            f"{rows - tokens:,} rows beyond the {tokens:,} tokens: normal padding",
            padding=rows - tokens,
            tokens=tokens,
        )


def _first_tensor(facts: Facts) -> str:
    names = facts.vocabulary.names if facts.vocabulary else ()
    return names[0] if names else "weights"


def _tying(facts: Facts) -> Iterator[Finding]:
    config, vocabulary = facts.config.get("config.json", {}), facts.vocabulary
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    tied = config.get("tie_word_embeddings", (text or {}).get("tie_word_embeddings"))
    if vocabulary is None or not vocabulary.embeds or tied is None:
        return
    if tied and vocabulary.heads:
        yield finding(
            "LG306",
            vocabulary.heads[0],
            "is stored although tie_word_embeddings is true: loaders use it only if it differs "
            f"from {vocabulary.embeds[0]}",
            embedding=vocabulary.embeds[0],
        )
    if not tied and not vocabulary.heads and _has_head(config):
        yield finding(
            "LG305",
            "weights",
            "hold no output head although tie_word_embeddings is false: loaders would fill it "
            "with noise",
            needed="an output head in the weights, or tie_word_embeddings = true",
            fix=f"set tie_word_embeddings to true in {facts.folder / 'config.json'}, if this "
            "model ties them, or download its weights again",
        )


def _has_head(config: dict[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(
        "CausalLM" in str(name) or "LMHead" in str(name) for name in names
    )


def _special_ids(facts: Facts, rows: int) -> Iterator[Finding]:
    """Ids in config.json and generation_config.json, against rows and against the tokenizer."""
    for key in (*SPECIAL, *GENERATION):
        named = special_ids(facts, key)
        for file, ids in named.items():
            beyond = [i for i in ids if i >= rows]
            if beyond:
                yield finding(
                    "LG202",
                    file,
                    f"{key} = {beyond[0]}, but there are {rows:,} rows",
                    needed=f"an id below {rows:,}",
                    fix=f"set {key} in {facts.folder / file} to the tokenizer's id",
                    key=key,
                    id=beyond[0],
                    rows=rows,
                )
        if key in SPECIAL:
            yield from _other_meaning(facts, key, {i for ids in named.values() for i in ids})


def special_ids(facts: Facts, key: str) -> dict[str, list[int]]:
    """The ids that config.json and generation_config.json give for `key`, by file."""
    return {
        file: _as_ids(facts.config.get(file, {}).get(key))
        for file in ("config.json", "generation_config.json")
    }


def _as_ids(value: Any) -> list[int]:
    if isinstance(value, list):
        return [i for part in value for i in _as_ids(part)]
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return [value] if is_id else []


def _other_meaning(facts: Facts, key: str, ids: set[int]) -> Iterator[Finding]:
    """The tokenizer names a special token, and no config points at it."""
    settings = facts.config.get("tokenizer_config.json", {})
    text = token_text(settings.get(key.removesuffix("_id")))
    if facts.tokens is None or text is None or not ids:
        return
    wanted = facts.tokens.ids.get(text)
    if wanted is None or wanted in ids:
        return
    other = min(ids)
    yield finding(
        "LG203",
        "config.json",
        f"{key} = {other} is {facts.tokens.texts.get(other)!r}, the tokenizer's "
        f"{key.removesuffix('_id')} is {text!r} (id {wanted})",
        needed=f"{key} = {wanted}",
        fix=f"set {key} to {wanted} in {facts.folder / 'config.json'}",
        key=key,
        id=other,
        text=repr(facts.tokens.texts.get(other)),
        wanted=wanted,
        named=repr(text),
    )
