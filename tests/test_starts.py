"""Starts that are asked for: lists, functions, two methods, and what merge can make again.

`pytest tests/test_starts.py`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import adapter_parts
import parts
from extend import extend
from lexigraft import families
from lexigraft.checkpoints.checkpoint import SINGLE, Checkpoint
from lexigraft.embeddings import AUTO, METHODS
from lexigraft.errors import LexigraftError
from lexigraft.families import TokenMap
from lexigraft.manifest import GraftRecord, Manifest
from lexigraft.steps.graft import graft
from lexigraft.steps.merge import merge

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADDED = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """BASE (untied), VOCAB, and the number of the base's tokens."""
    root = tmp_path_factory.mktemp("starts")
    base = parts.write_byte_level(root / "base")
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens)
    return base, extend(base, root / "vocab", ADDED, literal=1), tokens


def rows_of(model: Path, name: str, tokens: int):
    return Checkpoint.open(model).read(name, tokens, tokens + ADDED)


def record_of(model: Path) -> GraftRecord:
    return Manifest.read(model).last("graft")


def refused(match: str, *arguments, **options) -> None:
    output = options["output"]
    with pytest.raises(LexigraftError, match=match) as fault:
        graft(*arguments, **options)
    assert fault.value.needed and fault.value.fix
    assert not list(output.parent.glob(f"{output.name}*"))


# -- one method for the embedding, one for the head


def test_each_matrix_starts_by_its_own_method(made, tmp_path):
    base, vocab, tokens = made
    for init in ("mean", "first", "mean,first"):
        assert graft(base, vocab, output=tmp_path / init, init=init).init == init
    for name, alone in ((EMBED, "mean"), (HEAD, "first")):
        both = rows_of(tmp_path / "mean,first", name, tokens)
        assert both.tobytes() == rows_of(tmp_path / alone, name, tokens).tobytes()
    record = record_of(tmp_path / "mean,first")
    assert record.start.methods == {EMBED: "mean", HEAD: "first"}
    settings = json.loads((tmp_path / "mean,first" / "tokenizer_config.json").read_text())
    assert settings["lexigraft"]["init"] == "mean,first"


def test_a_head_that_repeats_the_embedding_stays_tied(tmp_path):
    """The weights of a tied model, saved with a copy of the embedding as head."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base = parts.write_byte_level(tmp_path / "base")
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens, tied=True)
    tensors = load_file(base / SINGLE)
    save_file({**tensors, HEAD: tensors[EMBED].clone()}, base / SINGLE, {"format": "pt"})
    vocab = extend(base, tmp_path / "vocab", ADDED)
    for init in ("exponential", "gaussian", "random", "char-weighted"):
        graft(base, vocab, output=tmp_path / init, init=init)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / init, dtype=torch.float32)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert embedding.data_ptr() == head.data_ptr()
    refused("its embedding", base, vocab, output=tmp_path / "no", init="mean,first")


def test_the_reason_of_auto_is_in_the_manifest(made, tmp_path):
    base, vocab, _ = made
    graft(base, vocab, output=tmp_path / "model")
    start = record_of(tmp_path / "model").start
    assert tuple(start.methods[name] for name in (EMBED, HEAD)) == AUTO["untied"]
    assert start.reason.startswith("auto: ")
    graft(base, vocab, output=tmp_path / "asked", init="last")
    assert record_of(tmp_path / "asked").start.reason == "--init"


def test_a_record_from_before_keeps_its_hash(made, tmp_path):
    base, vocab, _ = made
    graft(base, vocab, output=tmp_path / "model")
    path = tmp_path / "model" / "lexigraft.json"
    data = json.loads(path.read_text())
    del data["records"][-1]["start"]
    path.write_text(json.dumps(data))
    again = Manifest.read(tmp_path / "model")
    assert again.last("graft").start is None
    assert again.to_json() == data


# -- --init-from


def new_words(base: Path, vocab: Path) -> list[str]:
    texts, tokens = TokenMap.read(vocab).texts, TokenMap.read(base).tokens
    return [texts[i] for i in range(tokens, tokens + ADDED)]


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_listed_tokens_start_as_what_they_are_copied_from(form, made, tmp_path):
    base, vocab, tokens = made
    family, words = families.load(base), new_words(base, vocab)
    text = " the letter near the river"
    listed = {words[0]: "Ġhouse", words[3]: text}
    path = tmp_path / f"list.{form}"
    if form == "tsv":
        path.write_text(
            "\n".join(f"{token}\t{source}" for token, source in listed.items()) + "\n\n"
        )
    else:
        lines = [{"token": words[0], "copy": "Ġhouse"}, {"token": words[3], "text": text}]
        path.write_text("\n".join(map(json.dumps, lines)))
    result = graft(base, vocab, output=tmp_path / "model", init_from=path)
    graft(base, vocab, output=tmp_path / "mean", init="mean")
    assert result.init == "copy"
    pieces = {0: [family.map.ids["Ġhouse"]], 3: family.encode(text)}
    assert len(pieces[3]) > 3
    for name in (EMBED, HEAD):
        old = Checkpoint.open(base).read(name)
        rows, mean = (rows_of(tmp_path / m, name, tokens) for m in ("model", "mean"))
        assert (rows[0] == old[pieces[0][0]]).all()
        np.testing.assert_allclose(rows[3], old[pieces[3]].mean(axis=0), rtol=1e-5, atol=1e-7)
        others = [row for row in range(ADDED) if row not in pieces]
        assert rows[others].tobytes() == mean[others].tobytes()
    assert [one.to_json() for one in record_of(tmp_path / "model").start.copies] == [
        {"id": tokens + row, "source": source, "pieces": pieces[row]}
        for row, source in ((0, "Ġhouse"), (3, text))
    ]
    graft(base, vocab, output=tmp_path / "head", init_from=path, init="mean,copy")
    for name, model in ((EMBED, "mean"), (HEAD, "model")):
        expected = rows_of(tmp_path / model, name, tokens)
        assert rows_of(tmp_path / "head", name, tokens).tobytes() == expected.tobytes()


def test_a_token_may_be_named_by_its_text(tmp_path):
    base = parts.write_byte_level(tmp_path / "base")
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens)
    texts = ["the letterbox", "letterbox letterbox", "the gardengate"] * 20
    parts.lengthen(base, vocab := tmp_path / "vocab", texts)
    new = {i: t for i, t in TokenMap.read(vocab).texts.items() if i >= tokens}
    ids = {text: i for i, text in new.items()}
    assert {"Ġletterbox", "letterbox", "Ġgardengate"} <= ids.keys()
    path = tmp_path / "list.tsv"
    path.write_text(" letterbox\tĠhouse\nletterbox\tĠhouse\ngardengate\tĠhouse\n", "utf-8")
    graft(base, vocab, output=tmp_path / "model", init_from=path)
    copied = record_of(tmp_path / "model").start.copies
    assert {one.id for one in copied} == {
        ids[text] for text in ("Ġletterbox", "letterbox", "Ġgardengate")
    }


def test_every_wrong_line_is_named_at_once(made, tmp_path):
    base, vocab, _ = made
    words, path = new_words(base, vocab), tmp_path / "list.tsv"
    path.write_text(f"{words[0]} Ġhouse\n\nĠhouse\tĠroad\n{words[1]}\tĠroad\n{words[1]}\tthe\n"
                    f"nothing\tĠroad\n{words[2]}\t  \n", "utf-8")  # fmt: skip
    with pytest.raises(LexigraftError) as fault:
        graft(base, vocab, output=tmp_path / "model", init_from=path)
    for line in ("line 1:", "line 3: 'Ġhouse' is a base token", "line 5:", "listed before",
                 "line 6: 'nothing' is no new token", "line 7:"):  # fmt: skip
        assert line in fault.value.found
    assert not list(tmp_path.glob("model*"))
    jsonl = tmp_path / "list.jsonl"
    for line in ("{", "[]", '{"token": "a"}', '{"token": "a", "copy": 1}',
                 '{"token": "a", "copy": "b", "text": "c"}',
                 json.dumps({"token": words[0], "copy": "no such token"})):  # fmt: skip
        jsonl.write_text(line)
        refused("line 1", base, vocab, output=tmp_path / "model", init_from=jsonl)
    path.write_text("\n \n")
    refused("lists no token", base, vocab, output=tmp_path / "model", init_from=path)
    path.write_bytes(b"\xff\xfe\x00")
    refused("cannot be read", base, vocab, output=tmp_path / "model", init_from=path)
    refused("cannot be read", base, vocab, output=tmp_path / "model", init_from=tmp_path / "no")


def test_a_text_that_the_base_cannot_spell(tmp_path):
    base = parts.write_wordpiece(tmp_path / "base")
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens)
    vocab = Path(shutil.copytree(base, tmp_path / "vocab"))
    parts.lengthen(base, vocab := tmp_path / "longer", ["gardening windows"] * 20)
    new = next(text for i, text in TokenMap.read(vocab).texts.items() if i >= tokens)
    path = tmp_path / "list.tsv"
    path.write_text(f"{new}\t☃ 雪\n", "utf-8")
    refused("cannot spell", base, vocab, output=tmp_path / "model", init_from=path)


# -- a function of one's own


OWN = """
import numpy as np
def half(spelled):
    return np.stack([0.5 * spelled.rows[p[0]] if len(p) else spelled.center for p in spelled.pieces])
def middle(spelled):
    return np.stack([spelled.rows[p].mean(0) if len(p) else spelled.center for p in spelled.pieces])
def narrow(spelled):
    return np.zeros((len(spelled.ids), 1), np.float32)
def whole(spelled):
    return np.zeros((len(spelled.ids), *spelled.center.shape), np.int64)
def listed(spelled):
    return [0.0]
def failing(spelled):
    raise RuntimeError("not today")
def broken(spelled):
    return np.full((len(spelled.ids), *spelled.center.shape), np.nan)
def alike(spelled):
    return np.zeros((len(spelled.ids), *spelled.center.shape), np.float32)
def large(spelled):
    rows = half(spelled).astype(np.float64)
    rows[1] = 1e300
    return rows
number = 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_of_ones_own(own, made, tmp_path):
    base, vocab, tokens = made
    result = graft(base, vocab, output=tmp_path / "model", init="own_rows:half,mean")
    assert result.init == "own_rows:half,mean"
    graft(base, vocab, output=tmp_path / "first", init="first,mean")
    half, first = (rows_of(tmp_path / m, EMBED, tokens) for m in ("model", "first"))
    assert (half == first / 2).all()
    assert record_of(tmp_path / "model").start.methods[EMBED] == "own_rows:half"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_rows:narrow", r"shape \(12, 1\)"),
        ("own_rows:whole", "int64"),
        ("own_rows:listed", "a list"),
        ("own_rows:failing", "RuntimeError: not today"),
        ("own_rows:broken", "NaN or infinity .* for 12 new tokens"),
        ("own_rows:alike", "the 12 new tokens .* the same row"),
        ("own_rows:large", "NaN or infinity .* for 1 new tokens"),
        ("own_rows:number", "is a int"),
        ("own_rows:absent", "AttributeError"),
        ("no_such_module:half", "cannot be imported"),
        ("own_broken:half", "ZeroDivisionError"),
    ],
)
def test_functions_that_do_not_work_are_named(name, words, own, made, tmp_path):
    base, vocab, _ = made
    refused(words, base, vocab, output=tmp_path / "model", init=name)


# -- what no row may start from


def test_a_table_that_is_all_alike_stops(tmp_path):
    """All rows of the base equal: every mean of pieces is that row."""
    from safetensors.torch import load_file, save_file

    base = parts.write_byte_level(tmp_path / "base")
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens)
    tensors = load_file(base / SINGLE)
    tensors[HEAD][:] = 0.5
    save_file(tensors, base / SINGLE, {"format": "pt"})
    vocab = extend(base, tmp_path / "vocab", ADDED)
    refused("lm_head.weight.* the same row", base, vocab, output=tmp_path / "model")
    refused("lm_head.weight.* the same", base, vocab, output=tmp_path / "m", init="gaussian")
    graft(base, vocab, output=tmp_path / "model", init="mean,mean-all")


def test_a_row_that_is_not_finite_stops(made, tmp_path):
    base, vocab, tokens = made
    base = Path(shutil.copytree(base, tmp_path / "base"))
    parts.overwrite_row(base, HEAD, 9, np.float32(np.inf).tobytes())
    refused("lm_head.weight .* rows 9", base, vocab, output=tmp_path / "model")


def test_unused_rows_are_in_no_mean(made, tmp_path):
    base, vocab, tokens = made
    base = Path(shutil.copytree(base, tmp_path / "base"))
    zeros = bytes(20 * Checkpoint.open(base).tensors[EMBED].row_bytes)
    parts.overwrite_row(base, EMBED, 100, zeros)
    graft(base, vocab, output=tmp_path / "model", init="mean-all", pad_to=512)
    old = Checkpoint.open(base).read(EMBED, 0, tokens).astype(np.float64)
    mean = np.delete(old, range(100, 120), axis=0).mean(axis=0).astype(np.float32)
    new = Checkpoint.open(tmp_path / "model").read(EMBED)
    assert (new[tokens:] == mean).all()
    assert len(new) == 512


# -- what merge can make again


REPEATABLE = sorted(METHODS.keys() - {"donor"})


@pytest.mark.parametrize(
    ("init", "tied"),
    [*((name, tied) for name in REPEATABLE for tied in (True, False)), ("mean,first", False)],
)
def test_merge_makes_the_same_rows_again(init, tied, tmp_path):
    grafted, scene = rebuildable(tmp_path, tied=tied, init=init)
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    merge(grafted, scene.adapter, output=tmp_path / "other")
    one, other = Checkpoint.open(tmp_path / "merged"), Checkpoint.open(tmp_path / "other")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(one.read(name).tobytes() == other.read(name).tobytes() for name in one.tensors)


def rebuildable(root: Path, *, tied: bool, **options) -> tuple[Path, adapter_parts.Scene]:
    """A graft, and an adapter that was trained on it and holds none of its new rows."""
    base = adapter_parts.write_base(root / "base", tied=tied)
    vocab = adapter_parts.extended_tokenizer(base, root / "vocab")
    if options.get("init") == "copy":
        words = [TokenMap.read(vocab).texts[i] for i in adapter_parts.NEW]
        (root / "list.tsv").write_text(f"{words[1]}\tĠhouse\n{words[4]}\tnear a river\n", "utf-8")
        options["init_from"] = root / "list.tsv"
    grafted = root / "grafted"
    graft(base, vocab, output=grafted, pad_to=1, seed=4, **options)
    adapter = adapter_parts.write_adapter(grafted, grafted, root / "adapter", "lora")
    shutil.copyfile(grafted / "lexigraft.json", adapter / "lexigraft.json")
    return grafted, adapter_parts.Scene(base, grafted, adapter)


def test_rows_of_a_function_or_a_donor_are_not_guessed(own, tmp_path):
    grafted, scene = rebuildable(tmp_path, tied=False, init="own_rows:middle")
    with pytest.raises(LexigraftError, match="function own_rows:middle made them") as fault:
        merge(scene.base, scene.adapter, output=tmp_path / "merged")
    assert "model.safetensors" in fault.value.fix
    merge(grafted, scene.adapter, output=tmp_path / "merged")

    (tmp_path / "second").mkdir()
    donor = adapter_parts.extended_tokenizer(scene.base, tmp_path / "donor", added=3)
    parts.write_model(donor, tokens=adapter_parts.TOKENS + 3, hidden=48)
    grafted, scene = rebuildable(tmp_path / "second", tied=False, donor=donor)
    with pytest.raises(LexigraftError, match="translated from the model donor"):
        merge(scene.base, scene.adapter, output=tmp_path / "no")
    merge(grafted, scene.adapter, output=tmp_path / "yes")
