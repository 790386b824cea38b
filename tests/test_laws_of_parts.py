"""The laws of the checkpoint over every verb that moves rows, on every kind of folder.

For each of split, extract, prune, align and learn --replace: laws 1, 6 to 11 and 17 by one list of
conditions, and the round trip that leads back: split + merge = merge, extract + merge = tuned,
prune + undo = base, an aligned model says what it said, replaced rows put back are the base.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import adapter_parts
import parts
from adapter_parts import ADDED, TOKENS
from lexigraft import align, check, extract, graft, learn, merge, prune, split, unprune
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.families import TokenMap, copy_tokenizer
from lexigraft.files import read_json
from lexigraft.manifest import Manifest
from test_align import still_is
from test_crashes import contents

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
AXES = {
    "tied": [True, False],
    "padded": [False, True],
    "shards": [False, True],
    "dtype": ["float32", "bfloat16", "float16"],
}
CASES = adapter_parts.pairwise(AXES)
# How far a stored number may be from what it was rounded from, of its size.
ROUNDING = {"F32": 2**-24, "BF16": 2**-9, "F16": 2**-12}


@dataclass(frozen=True)
class Moved:
    """A model, what a verb made of it, and where its ids went.

    Attributes:
        before: the model.
        after: the result.
        places: id -> new id of every token that keeps its row, bit for bit.
        new: ids of the result that have other rows.
        changed: tensors outside the vocabulary that were asked to change.
        padding_of: the rows whose mean new padding rows are: how many of the first.
    """

    before: Path
    after: Path
    places: dict[int, int]
    new: set[int]
    changed: set[str] = field(default_factory=set)
    padding_of: int = TOKENS


def require_laws(moved: Moved) -> None:
    """Laws 1, 7 to 11 of a model and what was made of it."""
    one, other = TokenMap.read(moved.before), TokenMap.read(moved.after)
    assert {i: other.texts[n] for i, n in moved.places.items()} == {
        i: one.texts[i] for i in moved.places
    }
    before, after = Checkpoint.open(moved.before), Checkpoint.open(moved.after)
    config = read_json(moved.after / "config.json")
    assert config["tie_word_embeddings"] == (TABLES[1] not in after.tensors)
    old, new = list(moved.places), list(moved.places.values())
    for name, tensor in after.tensors.items():
        rows = after.read(name)
        if name in TABLES:
            assert tensor.rows == config["vocab_size"] >= other.tokens
            source = before.read(name if name in before.tensors else TABLES[0])
            assert np.array_equal(rows[new], source[old]), name
            known = {*new, *moved.new}
            assert known >= set(other.texts)
            padding = rows[max(other.texts) + 1 :].astype(np.float64)
            mean = source[: moved.padding_of].astype(np.float64).mean(axis=0)
            own = {row.tobytes() for row in source[one.tokens :].astype(np.float64)}
            assert all(np.allclose(r, mean, atol=2e-2) or r.tobytes() in own for r in padding)
        elif name not in moved.changed:
            assert rows.tobytes() == before.read(name).tobytes(), name
    assert after.tensors.keys() - TABLES == before.tensors.keys() - TABLES
    found = check(moved.after, deep=True)
    assert found.ok, [one.found for one in found.findings]


def kept(changed: list[int], tokens: int = TOKENS) -> dict[int, int]:
    return {i: i for i in range(tokens) if i not in changed}


def trained(scene) -> list[int]:
    """The ids whose rows the adapter holds."""
    tied = read_json(scene.base / "config.json")["tie_word_embeddings"]
    return [*([3] if tied else []), *range(TOKENS, TOKENS + ADDED)]


def split_laws(scene, root: Path) -> Moved:
    # Named as it is from `root`: the adapter's config says so.
    before = Path.cwd()
    os.chdir(root)
    try:
        split(scene.base, scene.adapter, output="pair")
    finally:
        os.chdir(before)
    base, adapter = root / "pair" / "base", root / "pair" / "adapter"
    merge(scene.base, scene.adapter, output=root / "merged")
    merge(base, adapter, output=root / "again")
    assert weights(root / "again") == weights(root / "merged")
    rows = trained(scene)
    return Moved(scene.base, base, kept(rows), set(rows))


def extract_laws(scene, root: Path) -> Moved:
    tuned = merge(scene.base, scene.adapter, output=root / "tuned").output
    found = extract(tuned, base=scene.base, rank=8, output=root / "found")
    again = merge(scene.base, found.output, output=root / "again").output
    opened = [Checkpoint.open(folder) for folder in (scene.base, tuned, again)]
    lora = {one.name: one.error for one in found.of("lora")}
    for name, tensor in opened[1].tensors.items():
        one, other = (model.read(name).astype(np.float64) for model in opened[1:])
        if name in lora:
            start = opened[0].read(name).astype(np.float64)
            told = lora[name] * np.linalg.norm(one - start)
            rounding = 2 * ROUNDING[tensor.dtype] * np.linalg.norm(one)
            assert np.linalg.norm(one - other) <= told + rounding, name
        else:
            assert np.array_equal(one, other), name
    rows = trained(scene)
    return Moved(scene.base, again, kept(rows), set(rows), set(lora))


def prune_laws(scene, root: Path) -> Moved:
    tokens = TokenMap.read(scene.grafted)
    words = root / "words.txt"
    drawn = random.Random(len(tokens.texts)).sample(sorted(tokens.texts), 60)
    words.write_text("".join(f"#{i}\n" for i in drawn))
    small = prune(scene.grafted, listed=words, output=root / "small").output
    unprune(small, output=root / "back")
    assert contents(root / "back") == contents(scene.grafted)
    places = Manifest.read(small).last("prune").places
    assert len(places) < len(tokens.texts)
    return Moved(scene.grafted, small, places, set(), padding_of=TOKENS + ADDED)


def align_laws(scene, root: Path) -> Moved:
    other, _ = adapter_parts.permuted(scene.base, root / "other")
    (other / "model.safetensors.index.json").unlink(missing_ok=True)  # of shards that are gone
    result = align([scene.grafted, other], output=root / "out")
    for model, out in zip((scene.grafted, other), result.models, strict=True):
        still_is(model, out)
    ids, own = TokenMap.read(result.models[1]).ids, TokenMap.read(other)
    places = {i: ids[text] for i, text in own.texts.items()}
    return Moved(other, result.models[1], places, set(ids.values()) - set(places.values()))


def replace_laws(scene, root: Path) -> Moved:
    (root / "field.txt").write_text(parts.corpus_text(documents=40), "utf-8")
    (root / "general.txt").write_text(parts.ENGLISH.read_text("utf-8").replace("\n", "\n\n"))
    learn(
        scene.base, corpus=[root / "field.txt"], general=[root / "general.txt"], replace=10,
        min_count=5, allow_more=True, output=root / "vocab",
    )  # fmt: skip
    model = graft(scene.base, root / "vocab", init="mean", output=root / "model").output
    ids = [one.id for one in Manifest.read(model).last("learn").replaced]
    put_back(scene.base, model, ids, root / "back")
    return Moved(scene.base, model, kept(ids), set(ids))


def put_back(base: Path, model: Path, ids: list[int], folder: Path) -> None:
    """The undo map of docs/replace.md: the base's rows at these ids, and its tokenizer."""
    folder.mkdir()
    for path in model.glob("*.safetensors"):
        tensors, old = load_file(path), load_file(base / path.name)
        for name in tensors.keys() & set(TABLES):
            tensors[name][ids] = old[name][ids]
        save_file(tensors, folder / path.name, {"format": "pt"})
    copy_tokenizer(base, folder)
    for path in base.glob("*.safetensors"):
        one, other = load_file(path), load_file(folder / path.name)
        assert all(one[name].equal(other[name]) for name in one)
    assert TokenMap.read(folder).hash == TokenMap.read(base).hash


def weights(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}


VERBS = [split_laws, extract_laws, prune_laws, align_laws, replace_laws]


def cells():
    for number, verb in enumerate(VERBS):
        for place, case in enumerate(CASES):
            is_quick = (
                place == number % len(CASES) and verb is not replace_laws
            )  # which learns twice
            marks = () if is_quick else (pytest.mark.matrix,)
            label = f"{verb.__name__.removesuffix('_laws')}-{adapter_parts.label(case)}"
            apart = verb is split_laws or not is_quick
            yield pytest.param(verb, case, apart, marks=marks, id=label)


def in_a_child(verb, scene, root: Path) -> None:
    """`verb` once more, in a process that orders sets and dicts of texts in another way."""
    folders = [str(folder) for folder in (scene.base, scene.grafted, scene.adapter, root)]
    script = (
        "import sys; from pathlib import Path; import adapter_parts, test_laws_of_parts as t;"
        "*scene, root = map(Path, sys.argv[2:]);"
        "getattr(t, sys.argv[1])(adapter_parts.Scene(*scene), root)"
    )
    subprocess.run(
        [sys.executable, "-c", script, verb.__name__, *folders],
        check=True, cwd=Path(__file__).parent, env={**os.environ, "PYTHONHASHSEED": "77"},
    )  # fmt: skip


@pytest.mark.parametrize(("verb", "case", "apart"), cells())
def test_laws_hold_for_every_verb_that_moves_rows(verb, case, apart, tmp_path):
    form = "rows" if case["tied"] else "rows-both"
    scene = adapter_parts.scene(tmp_path / "in", form, **case)
    inputs = contents(tmp_path / "in")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    moved = verb(scene, tmp_path / "one")
    require_laws(moved)
    assert contents(tmp_path / "in") == inputs  # law 17
    if apart:
        in_a_child(verb, scene, tmp_path / "two")
    else:
        verb(scene, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")  # law 6
