"""`prune` and its undo: rows, tokenizers, settings and adapters without some of the tokens."""

import json
import random
import shutil
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

import adapter_parts
import parts
from lexigraft import check, families, graft, learn, prune, unprune
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.rows import by_row, read_rows
from lexigraft.checkpoints.token_ids import stated_ids, with_ids
from lexigraft.checks.conversion import _convert, gguf_writer
from lexigraft.checks.facts import read_facts
from lexigraft.cli import app
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import parse_sentencepiece
from lexigraft.files import sha256_file
from lexigraft.manifest import Manifest
from lexigraft.selection.pruning import script_of
from test_merge import gpt2_with_adapter

KINDS = {
    "byte": parts.write_byte_level,
    "byte-ignore": lambda folder: parts.write_byte_level(folder, ignore_merges=True),
    "gpt2-files": parts.write_byte_level_files,
    "sp-both": parts.write_sentencepiece,
    "sp-model": lambda folder: parts.write_sentencepiece(folder, fast=False),
    "unigram": parts.write_unigram,
    "wordpiece": parts.write_wordpiece,
    "ranks": parts.write_ranks,
}
QUICK = ("byte", "sp-both", "unigram")


def write_base(folder, kind, **options):
    KINDS[kind](folder)
    tokens = families.load(folder).map.tokens
    special = min(families.load(folder).map.special, default=0)
    return parts.write_model(folder, tokens=tokens, eos=special, **options)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    english = parts.ENGLISH.read_text("utf-8").splitlines()
    (folder / "domain.txt").write_text("\n\n".join(english[:30]), "utf-8")
    (folder / "general.txt").write_text(parts.plain_english()[:20_000], "utf-8")
    return folder


def hashes(folder):
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_of(folder, name):
    return read_rows(by_row(Checkpoint.open(folder).tensors[name]))


def marks(kinds):
    return [k if k in QUICK else pytest.param(k, marks=pytest.mark.matrix) for k in kinds]


@pytest.mark.parametrize("kind", marks(KINDS))
def test_laws_of_a_pruned_model_and_its_undo(kind, texts, tmp_path):
    """Laws 1 (its exception), 5 to 8, 11 and 17; prune + undo = base."""
    untied = kind in ("sp-both", "wordpiece")
    base = write_base(tmp_path / "base", kind, tied=not untied, rows=448, dtype="bfloat16")
    (base / "notes.md").write_text("kept")
    before = hashes(base)
    options = {"corpus": [texts / "domain.txt"], "general": [texts / "general.txt"]}
    result = prune(base, **options, output=tmp_path / "out")
    old, new = families.load(base), families.load(tmp_path / "out")
    record = Manifest.read(tmp_path / "out").last("prune")
    places = record.places
    assert {i: new.map.texts[places[i]] for i in places} == {i: old.map.texts[i] for i in places}
    assert new.map.tokens == len(places) == result.tokens_after < result.tokens_before
    assert {places[i] for i in old.map.special} == set(new.map.special)
    # texts: the corpus as before, the general text longer and the same text
    domain, general = result.domain, result.general
    assert domain.changed == 0 and domain.tokens_after == domain.tokens_before
    assert general.tokens_after > general.tokens_before and general.changed
    # rows
    assert result.rows_after == 64 * -(-new.map.tokens // 64) < 448
    kept = sorted(places)
    for name, tensor in Checkpoint.open(base).tensors.items():
        rows = rows_of(tmp_path / "out", name)
        if tensor.shape[0] == 448:
            want = rows_of(base, name)
            assert np.array_equal(rows[: len(kept)], want[kept])
            assert np.array_equal(
                rows[len(kept) :], want[old.map.tokens :][: len(rows) - len(kept)]
            )
        else:
            assert np.array_equal(rows, rows_of(base, name))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base_config = json.loads((base / "config.json").read_text())
    eos = base_config["eos_token_id"]
    assert config == {
        **base_config, "vocab_size": result.rows_after, "eos_token_id": places[eos],
        "bos_token_id": places[eos],
    }  # fmt: skip
    assert (tmp_path / "out" / "notes.md").read_text() == "kept"
    # check knows it, alone and beside its base
    assert check(tmp_path / "out", deep=True).ok
    beside = check(tmp_path / "out", base=base)
    assert beside.ok and not {f.code for f in beside.findings} & {"LG601", "LG602", "LG603"}
    # law 6
    prune(base, **options, output=tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    # undo
    undone = unprune(tmp_path / "out", output=tmp_path / "back")
    assert undone.exact and hashes(tmp_path / "back") == before == hashes(base)
    assert families.load(tmp_path / "back").content_hash == old.content_hash


def test_logits_of_kept_tokens_are_the_base_s(texts, tmp_path):
    """The model itself says the same of texts of kept tokens, whatever loads it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = write_base(tmp_path / "base", "byte", tied=False)
    prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "out")
    places = Manifest.read(tmp_path / "out").last("prune").places
    text = (texts / "domain.txt").read_text("utf-8")[:300]
    one, two = (AutoTokenizer.from_pretrained(f) for f in (base, tmp_path / "out"))
    ids, moved = one(text)["input_ids"], two(text)["input_ids"]
    assert moved == [places[i] for i in ids]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([tokens])).logits
            for folder, tokens in ((base, ids), (tmp_path / "out", moved))
        )
    kept = sorted(places)
    assert torch.equal(before[..., kept], after[..., : len(kept)])


def test_numbers_lists_and_rare_tokens(texts, tmp_path):
    base = write_base(tmp_path / "base", "byte")
    corpus = [texts / "domain.txt"]
    whole = prune(base, corpus=corpus, output=tmp_path / "no", dry_run=True)
    free = whole.tokens_before - whole.tokens_after
    assert whole.plan and not (tmp_path / "no").exists()
    some = prune(base, corpus=corpus, drop=free // 2, output=tmp_path / "no", dry_run=True)
    assert some.tokens_before - some.tokens_after == free // 2
    share = prune(base, corpus=corpus, drop="2%", output=tmp_path / "no", dry_run=True)
    assert share.tokens_before - share.tokens_after == int(share.tokens_before * 0.02)
    with pytest.raises(LexigraftError, match="only") as fault:
        prune(base, corpus=corpus, keep=260, output=tmp_path / "no")
    assert f"--keep {whole.tokens_after}" in fault.value.fix
    rare = prune(base, corpus=corpus, min_count=10**6, keep=270, output=tmp_path / "rare", pad_to=1)
    assert rare.tokens_after == rare.rows_after == 270
    assert rare.domain.changed and rare.domain.tokens_after > rare.domain.tokens_before
    words = tmp_path / "list.txt"
    family = families.load(base)
    # " garden" by its text, a part of it by its spelling, a token that does not exist
    words.write_text(" garden\nĠgard\n#999\n" if "Ġgard" in family.map.ids else " garden\n#999\n")
    listed = prune(base, listed=words, output=tmp_path / "listed")
    assert "Ġgarden" in family.map.ids
    assert "Ġgarden" not in families.load(tmp_path / "listed").map.ids
    assert set(listed.dropped) == {"listed"}
    lines = (tmp_path / "listed" / "undo" / "dropped_tokens.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} >= {" garden"}
    for arguments, word in (
        ({"keep": 10, "drop": 3, "corpus": corpus}, "together"),
        ({"keep": 300}, "without --corpus"),
        ({"drop": "200%", "corpus": corpus}, "200%"),
        ({"scripts": ["Klingon"]}, "no token has a letter"),
        ({}, "nothing to drop"),
    ):
        with pytest.raises(LexigraftError, match=word):
            prune(base, **arguments, output=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_tokens_of_other_scripts_go(tmp_path):
    base = write_base(tmp_path / "base", "wordpiece")
    (tmp_path / "latin.txt").write_text("the garden of a friend, 12.")
    result = prune(base, scripts=["Latin"], general=[tmp_path / "latin.txt"],
                   output=tmp_path / "out")  # fmt: skip
    assert set(result.dropped) == {"script"} and result.general.changed == 0
    old, new = families.load(base), families.load(tmp_path / "out")
    han = {t for t in old.map.ids if any(script_of(c) == "HAN" for c in t)}
    assert han and set(old.map.ids) - set(new.map.ids) == han
    assert "," in new.map.ids and "[MASK]" in new.map.ids


def test_never_trained_rows_go_first(tmp_path):
    """Without any text: what no text becomes, and rows that training never moved."""
    base = write_base(tmp_path / "base", "byte", tied=False)
    family = families.load(base)
    leaves = set(family.map.texts) - family.fixed - {p for n in family.needs().values() for p in n}
    chosen = random.Random(1).sample(sorted(leaves), 9)
    for token_id in chosen:
        parts.overwrite_row(base, "model.embed_tokens.weight", token_id, bytes(4 * 32))
    result = prune(base, output=tmp_path / "out", pad_to=1)
    assert result.dropped == {"untrained": 9}
    gone = {family.map.texts[i] for i in chosen}
    assert set(family.map.ids) - set(families.load(tmp_path / "out").map.ids) == gone


def with_template(folder, kind):
    """A tokenizer whose post-processor puts in special tokens with the highest ids."""
    if kind == "bert":
        parts.write_wordpiece(folder, lines=False)
    else:
        parts.write_byte_level(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    vocabulary, added = data["model"]["vocab"], data["added_tokens"]
    if kind == "bert":
        first = len(added)
        ids = {token: i - first if i >= first else i - first + len(vocabulary)
               for token, i in vocabulary.items()}  # fmt: skip
        data["model"]["vocab"] = ids
        for token in added:
            token["id"] = ids[token["content"]]
        names, step = ("[CLS]", "[SEP]"), data["post_processor"]
    else:
        ids, names = {t["content"]: t["id"] for t in added}, ("<|im_end|>", "<|endoftext|>")
        step = {"type": "RobertaProcessing", "trim_offsets": False, "add_prefix_space": False}
    start, end = names
    step |= {"cls": [start, ids[start]], "sep": [end, ids[end]]}
    if kind == "llama3":
        text = [
            {"SpecialToken": {"id": start, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        pair = [
            *text,
            {"SpecialToken": {"id": start, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ]
        step = {
            "type": "TemplateProcessing", "single": text, "pair": pair,
            "special_tokens": {start: {"id": start, "ids": [ids[start]], "tokens": [start]}},
        }  # fmt: skip
        step = {"type": "Sequence", "processors": [data["post_processor"], step]}
    data["post_processor"] = step
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    return folder, names


@pytest.mark.parametrize(
    "kind", ["llama3", *(pytest.param(k, marks=pytest.mark.matrix) for k in ("roberta", "bert"))]
)
def test_templates_put_in_the_same_special_tokens(kind, texts, tmp_path):
    """Law 1 of what a post-processor adds: texts and pairs of texts, with specials, as read by both."""
    from transformers import AutoTokenizer

    base, (start, end) = with_template(tmp_path / "base", kind)
    family = families.load(base)
    parts.write_model(base, tokens=family.map.tokens, eos=family.map.ids[end])
    prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "out")
    pruned = families.load(tmp_path / "out").map.ids
    assert pruned[start] != family.map.ids[start] and pruned[end] != family.map.ids[end]
    lines = (texts / "domain.txt").read_text("utf-8").split("\n\n")
    inputs = [*lines, *pairwise(lines)]
    one, two = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (base, tmp_path / "out"))
    for old, new in zip(one.encode_batch(inputs), two.encode_batch(inputs), strict=True):
        assert (old.tokens, old.type_ids) == (new.tokens, new.type_ids) and old.ids != new.ids
        assert old.tokens[0] == start and new.ids == [pruned[token] for token in new.tokens]
        assert kind == "llama3" or old.tokens[-1] == end
    loaded = [AutoTokenizer.from_pretrained(f) for f in (base, tmp_path / "out")]
    old, new = (t.convert_ids_to_tokens(t(lines[0])["input_ids"]) for t in loaded)
    assert old == new == one.encode(lines[0]).tokens


IDLE = [
    "byte",
    "wordpiece",
    *(pytest.param(k, marks=pytest.mark.matrix) for k in ("sp", "unigram")),
]


@pytest.mark.parametrize("kind", IDLE)
def test_tokens_that_no_text_becomes_go_before_all_others(kind, texts, tmp_path):
    """The reason is named; a row that was never trained is next, then what the corpus lacks."""
    base, idle = parts.write_idle(tmp_path / "base", kind)
    family = families.load(base)
    parts.write_model(base, tokens=family.map.tokens, eos=min(family.map.special))
    alone = prune(base, output=tmp_path / "out", pad_to=1)
    assert alone.dropped == {"unreachable": 1} and "(1 unreachable)" in "\n".join(alone.lines())
    assert alone.tokens_after == alone.rows_after == family.map.tokens - 1
    (line,) = (tmp_path / "out" / "undo" / "dropped_tokens.jsonl").read_text("utf-8").splitlines()
    token = family.map.texts[idle]
    told = json.loads(line)
    assert (told["id"], told["token"], told["why"]) == (idle, token, "unreachable")
    assert families.load(tmp_path / "out").map.ids.keys() == family.map.ids.keys() - {token}
    unprune(tmp_path / "out", output=tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)
    lines = (texts / "domain.txt").read_text("utf-8").splitlines()
    taken = {i for line in family.encode_batch(lines) for i in line} | family.fixed
    taken |= {part for parts_ in family.needs().values() for part in parts_}
    leaf = max(i for i, t in family.map.texts.items() if len(t) > 3 and i not in {idle, *taken})
    parts.overwrite_row(base, "model.embed_tokens.weight", leaf, bytes(4 * 32))
    for count, reasons in (
        (1, {"unreachable": 1}), (2, {"unreachable": 1, "untrained": 1}),
        (3, {"unreachable": 1, "untrained": 1, "rare": 1}),
    ):  # fmt: skip
        some = prune(
            base, corpus=[texts / "domain.txt"], drop=count, output=tmp_path / "no", dry_run=True
        )
        assert some.dropped == reasons and some.domain.changed == 0


def test_ids_in_settings_move_along(texts, tmp_path):
    """Law 11: what a setting, a template or a suppress list names stays, under its new id."""
    base = write_base(tmp_path / "base", "byte")
    family = families.load(base)
    garden, river = family.map.ids["Ġgarden"], family.map.ids["Ġriver"]
    end = family.map.ids["<|im_end|>"]
    generation = {
        "eos_token_id": [end, 5], "suppress_tokens": [garden, 7], "pad_token_id": -1,
        "forced_decoder_ids": [[1, end], [2, None]], "sequence_bias": [[[garden], -1.5]],
        "bad_words_ids": [[garden, end]], "max_length": 300,
        "temperature": 0.5, "do_sample": True,
    }  # fmt: skip
    (base / "generation_config.json").write_text(json.dumps(generation))
    path = base / "tokenizer_config.json"
    template = "{% for m in messages %}{{ ' river' + m['content'] }}{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "out")
    places = Manifest.read(tmp_path / "out").last("prune").places
    assert {garden, river, end} <= places.keys()
    moved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    g, e = places[garden], places[end]
    assert moved == {
        **generation, "eos_token_id": [e, places[5]], "suppress_tokens": [g, places[7]],
        "forced_decoder_ids": [[1, e], [2, None]], "sequence_bias": [[[g], -1.5]],
        "bad_words_ids": [[g, e]],
    }  # fmt: skip
    assert with_ids(generation, lambda i: i) == generation
    assert stated_ids({"text_config": {"image_token_index": 3}, "vision_config": {"bos_token_id": 9},
                       "size": 4}) == {3}  # fmt: skip
    generation["pad_token_id"] = 5000
    (base / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(RefusalError, match="5000"):
        prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "no")


@pytest.mark.parametrize(
    "form",
    ["saved-both", "lora-both", "rows",
     *(pytest.param(f, marks=pytest.mark.matrix)
       for f in ("plain", "saved-embed", "lora-embed", "lora-head", "dora", "rows-both", "lora"))],
)  # fmt: skip
def test_adapters_follow_their_rows(form, texts, tmp_path):
    """Base + adapter = pruned base + its copy, on the logits of kept tokens."""
    import torch

    base = adapter_parts.write_base(
        tmp_path / "base", tied=form in ("rows", "lora-embed"), rows=400
    )
    grown = adapter_parts.write_grafted(base, tmp_path / "grown")
    whole = base if form in ("plain", "saved-both", "saved-embed") else grown
    adapter = adapter_parts.write_adapter(whole, grown, tmp_path / "adapter", form)
    result = prune(
        grown, corpus=[texts / "domain.txt"], adapters=[adapter], output=tmp_path / "out"
    )
    assert result.adapters == ("adapters/adapter",)
    places = Manifest.read(tmp_path / "out").last("prune").places
    kept = torch.tensor(sorted(places))
    ids = kept[torch.randint(0, len(kept), (2, 24), generator=torch.manual_seed(1))]
    moved = torch.tensor([[places[int(i)] for i in row] for row in ids])
    with torch.no_grad():
        before = adapter_parts.unmerged(grown, adapter)(input_ids=ids).logits[..., kept]
        copy = tmp_path / "out" / "adapters" / "adapter"
        after = adapter_parts.unmerged(tmp_path / "out", copy)(input_ids=moved).logits
    assert torch.equal(before, after[..., : len(kept)])
    assert families.load(copy).map.hash == families.load(tmp_path / "out").map.hash


def test_an_adapter_of_more_rows_is_refused_and_nothing_is_left(texts, tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    grown = adapter_parts.write_grafted(base, tmp_path / "grown")
    adapter = adapter_parts.write_adapter(base, grown, tmp_path / "adapter", "saved-both")
    with pytest.raises(LexigraftError, match="rows"):
        prune(base, corpus=[texts / "domain.txt"], adapters=[adapter], output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "grown"]


def test_an_adapter_of_another_model_is_refused(texts, tmp_path):
    """Law 15: each of its tensors has to have its place."""
    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    _, adapter = gpt2_with_adapter(tmp_path / "gpt2")
    with pytest.raises(LexigraftError, match="fits no tensor"):
        prune(base, corpus=[texts / "domain.txt"], adapters=[adapter], output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "gpt2"]


def test_padding_that_the_base_lacks_is_the_mean(texts, tmp_path):
    """Law 9: k padding rows of a head take no more than their share."""
    base = write_base(tmp_path / "base", "byte", tied=False, rows=383)
    assert families.load(base).map.tokens == 382
    result = prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "out", pad_to=50)
    kept = result.tokens_after
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, old = rows_of(tmp_path / "out", name), rows_of(base, name)
        assert len(rows) == result.rows_after == 350 and len(rows) > kept + 1
        assert np.array_equal(rows[kept], old[382])
        mean = old[:382].mean(axis=0, dtype=np.float64)
        assert np.allclose(rows[kept + 1 :], mean, atol=1e-6)


@pytest.mark.matrix
def test_a_pruned_model_is_a_base_like_any_other(texts, tmp_path):
    """learn and graft go on from it, and check knows both steps."""
    base = write_base(tmp_path / "base", "byte")
    pruned = tmp_path / "pruned"
    prune(base, corpus=[texts / "domain.txt"], output=pruned)
    (tmp_path / "medical.txt").write_text(parts.corpus_text(documents=40), "utf-8")
    learn(pruned, corpus=[tmp_path / "medical.txt"], tokens=20, min_count=5, allow_more=True,
          output=tmp_path / "vocab")  # fmt: skip
    graft(pruned, tmp_path / "vocab", output=tmp_path / "model")
    assert not (tmp_path / "model" / "undo").exists()
    for one in (pruned, base):
        found = check(tmp_path / "model", base=one)
        assert found.ok, [f.found for f in found.findings]
    with pytest.raises(LexigraftError, match="holds no undo"):
        unprune(tmp_path / "model", output=tmp_path / "no")


def test_room_for_what_lies_beside_the_weights_is_foreseen(texts, tmp_path):
    base = write_base(tmp_path / "base", "byte")
    prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "pruned")
    for folder in (base, tmp_path / "pruned"):
        parts.fill_beside(folder)
    with pytest.raises(LexigraftError, match="GB free"):
        prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "out")
    with pytest.raises(LexigraftError, match="GB free"):
        unprune(tmp_path / "pruned", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "pruned"]


def test_undone_after_training_and_what_cannot_be(texts, tmp_path):
    """Rows of kept tokens are then the trained ones; an undo map of another model is refused."""
    base = write_base(tmp_path / "base", "byte")
    pruned = tmp_path / "pruned"
    prune(base, corpus=[texts / "domain.txt"], output=pruned)
    parts.overwrite_row(pruned, "model.embed_tokens.weight", 300, bytes(4 * 32))
    told = unprune(pruned, output=tmp_path / "back", dry_run=True)
    assert not (tmp_path / "back").exists() and told.exact is None
    shapes = {one["tensor"]: one["shape"] for one in told.plan}
    old_shapes = {one["tensor"]: one["old_shape"] for one in told.plan}
    assert shapes == {n: list(t.shape) for n, t in Checkpoint.open(base).tensors.items()}
    assert old_shapes == {n: list(t.shape) for n, t in Checkpoint.open(pruned).tensors.items()}
    arguments = ["prune", "--undo", str(pruned), "-o", str(tmp_path / "back"), "--dry-run"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0 and said.output.splitlines() == told.lines()
    assert told.lines()[-1] == f"would be written: {tmp_path / 'back'}"
    undone = unprune(pruned, output=tmp_path / "back")
    assert not undone.exact and (undone.rows, undone.tokens) == (told.rows, told.tokens) == (
        382,
        382,
    )
    old = next(i for i, n in Manifest.read(pruned).last("prune").places.items() if n == 300)
    assert not rows_of(tmp_path / "back", "model.embed_tokens.weight")[old].any()
    shutil.copyfile(base / "tokenizer.json", pruned / "tokenizer.json")
    with pytest.raises(LexigraftError, match="cannot be undone"):
        unprune(pruned, output=tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["sp-both", pytest.param("byte", marks=pytest.mark.matrix)])
def test_a_gguf_of_the_result_is_written_and_read(kind, texts, tmp_path):
    gguf = pytest.importorskip("gguf")
    base = write_base(tmp_path / "base", kind)
    prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "out", pad_to=1)
    found = check(tmp_path / "out", consumer="gguf")
    told = {f.code for f in found.findings} & {"LG911", "LG912", "LG913"}
    # A converter that knows pre-tokenizers by ids of a text has to be told the name.
    assert told == ({"LG911"} if kind == "byte" else set()), [f.found for f in found.findings]
    family, path = families.load(tmp_path / "out"), tmp_path / "out.gguf"
    writer = gguf_writer(tmp_path / "out", _convert(read_facts(tmp_path / "out")), path)
    tables = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
    for name, ours in tables.items():
        writer.add_tensor(name, rows_of(tmp_path / "out", ours))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    read = {
        name.split("tokenizer.ggml.")[-1]: part.contents() for name, part in reader.fields.items()
    }
    assert read["tokens"] == [family.map.texts[i] for i in range(family.map.tokens)]
    kinds = [gguf.TokenType(number).name for number in read["token_type"]]
    special = {i for i, name in enumerate(kinds) if name in ("CONTROL", "UNKNOWN")}
    assert special == set(family.map.special)
    assert read["eos_token_id"] == family.map.ids["<|endoftext|>" if kind == "byte" else "</s>"]
    places = Manifest.read(tmp_path / "out").last("prune").places
    if kind == "byte":
        merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))["model"][
            "merges"
        ]
        assert read["merges"] == [" ".join(merge) for merge in merges]
    else:
        old = parse_sentencepiece((base / "tokenizer.model").read_bytes(), base)
        score = {places[i]: p.score for i, p in enumerate(old.pieces) if i in places}
        assert read["scores"] == [score[i] for i in range(family.map.tokens)]
        assert kinds.count("BYTE") == 256
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, ours in tables.items():
        assert np.array_equal(tensors[name], rows_of(base, ours)[sorted(places)])


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_encoders_and_their_biases(kind, texts, tmp_path):
    """Every vocabulary tensor loses the same rows: a head's bias, an encoder's and a decoder's."""
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "bert":
        base = parts.write_wordpiece(tmp_path / "base")
        tokens = families.load(base).map.tokens
        config = transformers.BertConfig(
            vocab_size=tokens, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias)
    else:
        base = parts.write_unigram(tmp_path / "base", files="model")
        tokens = families.load(base).map.tokens
        (base / "tokenizer_config.json").write_text('{"extra_ids": 10}')  # the class: config.json
        config = transformers.T5Config(
            vocab_size=tokens, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(base)
    before = {path.name: sha256_file(path) for path in base.iterdir()}
    result = prune(base, corpus=[texts / "domain.txt"], output=tmp_path / "out", pad_to=1)
    assert result.tokens_after == result.rows_after < tokens
    places = Manifest.read(tmp_path / "out").last("prune").places
    kept = sorted(places)
    ids = torch.tensor([kept[5:20]])
    moved = torch.tensor([[places[int(i)] for i in ids[0]]])
    inputs = [{"input_ids": ids}, {"input_ids": moved}]
    if kind == "t5":
        inputs = [{**one, "decoder_input_ids": one["input_ids"]} for one in inputs]
    loaded = [type(model).from_pretrained(folder).eval() for folder in (base, tmp_path / "out")]
    with torch.no_grad():
        old, new = (one(**given).logits for one, given in zip(loaded, inputs, strict=True))
    assert torch.equal(old[..., kept], new)
    unprune(tmp_path / "out", output=tmp_path / "back")
    assert {path.name: sha256_file(path) for path in (tmp_path / "back").iterdir()} == before


REAL = {
    "qwen3_hf": (151_669, 60_000),
    "gemma3_hf": (262_145, 60_000),
    "llama3_1_hf": (128_256, 60_000),
    "llama3_tiktoken": (128_256, 60_000),
    "bert_base_chinese_wordpiece": (21_128, 20_000),
    "t5_unigram_sp": (32_100, 25_000),
}


@pytest.mark.real
@pytest.mark.matrix
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_down_to_medical_text(name, tmp_path):
    """English and Chinese medical text is read as before; what was dropped is told."""
    source = parts.SHARED / "tokenizers" / name
    if not source.is_dir():
        pytest.skip(f"no {source}")
    base = tmp_path / "base"
    shutil.copytree(source, base)
    if name == "t5_unigram_sp":
        (base / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    family = families.load(base)
    parts.write_model(base, tokens=family.map.tokens, tied=True, hidden=8)
    corpora = parts.SHARED / "corpora"
    specs = []
    for part in ("en_med_medquad", "zh_med_medqa_exam", "zh_gen_classic_novels"):
        data = (corpora / f"{part}.txt").read_bytes()[:150_000].decode("utf-8", "ignore")
        (tmp_path / f"{part}.txt").write_text(data, "utf-8")
        specs.append(tmp_path / f"{part}.txt")
    result = prune(base, corpus=specs[:2], general=specs[2:], output=tmp_path / "out")
    tokens, most = REAL[name]
    assert result.tokens_before == tokens and result.tokens_after < most
    assert result.domain.changed == 0 and result.domain.tokens_after == result.domain.tokens_before
    assert result.general.tokens_after >= result.general.tokens_before
    assert check(tmp_path / "out", base=base).ok
    unprune(tmp_path / "out", output=tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)
    wanted = ["Latin"] if name == "t5_unigram_sp" else ["Latin", "Han"]
    scripts = prune(base, scripts=wanted, corpus=specs[:2], output=tmp_path / "s")
    assert scripts.domain.changed == 0 and scripts.tokens_after < tokens
