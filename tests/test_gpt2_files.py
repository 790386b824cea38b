"""GPT-2's vocab.json and merges.txt without a tokenizer.json, against transformers' own classes."""

import json
import shutil
from functools import cache

import pytest

import parts
from lexigraft import families
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.proof import HARD_TEXTS, contexts, prove
from lexigraft.families.tokenmap import TokenMap

TEXTS = parts.corpus_text(documents=60).split("\n\n")
SPECIAL = ["a<|endoftext|>b", "<s>a</s>", "a <mask> b<mask>", "<pad> x", "Ａ é e\u0301 12345"]
KINDS = ["GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base folder, extended folder and merges of a tokenizer class."""

    @cache
    def make(kind):
        root = tmp_path_factory.mktemp(kind)
        base = parts.write_byte_level_files(root / "base", kind=kind)
        return base, root / "out", parts.lengthen(base, root / "out", TEXTS)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_both_read_as_the_class_of_transformers_does(made, kind):
    """Ids, template, special tokens, decoding: of the base and of what is written."""
    import transformers

    for folder in made(kind)[:2]:
        family = families.load(folder)
        reference = getattr(transformers, kind).from_pretrained(folder)
        assert reference.get_vocab() == family.map.ids
        for text in [*HARD_TEXTS, *SPECIAL, *TEXTS[:20]]:
            ids = family.encode(text)
            assert ids == reference.encode(text, add_special_tokens=False), text
            for skip in (False, True):
                decoded = reference.decode(ids, skip_special_tokens=skip)
                assert family.decode(ids, skip_special=skip) == decoded, text
        assert reference.encode("hello")[: len(family.start_ids())] == family.start_ids()
    assert bool(family.start_ids()) == (kind == "RobertaTokenizer")


@pytest.mark.parametrize("kind", KINDS)
def test_laws_1_to_5_of_vocab_and_merges(made, kind):
    base, out, merges = made(kind)
    old, new = families.load(base), families.load(out)
    words = [new.token_bytes(new.map.ids[m.token]).decode("utf-8", "replace") for m in merges]
    prove(old, new, [*HARD_TEXTS, *SPECIAL, *contexts(words)])
    proof = prove(old, new, TEXTS)
    assert proof.lengths.ratio < 0.9
    counted = old.replay(old.count_units(dict.fromkeys(TEXTS, 1)), merges).counts
    assert counted == {m.token: proof.emitted[new.map.ids[m.token]] for m in merges}


def test_the_folder_keeps_the_files_that_it_has(made):
    base, out, merges = made("GPT2Tokenizer")
    names = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names == {p.name for p in base.iterdir()}
    old, new = ((folder / "merges.txt").read_text("utf-8") for folder in (base, out))
    assert new == old + "".join(f"{merge.left} {merge.right}\n" for merge in merges)
    ids = json.loads((out / "vocab.json").read_text("utf-8"))
    first = TokenMap.read(base).tokens
    assert [ids[merge.token] for merge in merges] == list(range(first, first + len(merges)))


def test_added_tokens_behind_the_vocabulary_stay_there(tmp_path):
    """They get entries in vocab.json: a loader numbers what is not there by itself."""
    import transformers

    base = parts.write_byte_level_files(tmp_path / "base")
    last = TokenMap.read(base).tokens
    added = {"<note>": last, "half life": last + 1}
    (base / "added_tokens.json").write_text(json.dumps(added))
    settings = {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<note>"]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    parts.lengthen(base, tmp_path / "out", TEXTS, tokens=40)
    old, new = families.load(base), families.load(tmp_path / "out")
    prove(old, new, [*HARD_TEXTS, "a<note>b half life <note>"])
    assert new.encode("x<note>half life")[1:] == [last, last + 1]
    assert new.decode([last, last + 1], skip_special=True) == "half life"
    reference = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "out")
    for text in ("x<note>half life", *TEXTS[:10]):
        assert reference.encode(text) == new.encode(text)


def test_a_space_before_the_text_and_a_bos_are_kept(tmp_path):
    import transformers

    base = parts.write_byte_level_files(tmp_path / "base")
    settings = {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}
    settings["add_bos_token"] = True
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    parts.lengthen(base, tmp_path / "out", TEXTS, tokens=40)
    for folder in (base, tmp_path / "out"):
        family = families.load(folder)
        reference = transformers.GPT2Tokenizer.from_pretrained(folder)
        for text in ("patient", " patient", *TEXTS[:10]):
            assert family.encode(text) == reference.encode(text, add_special_tokens=False)
        assert family.start_ids() == reference.encode("")
    assert family.encode("patient") == family.encode(" patient")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"tokenizer_class": "BlenderbotTokenizer"}, "BlenderbotTokenizer"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "PreTrainedTokenizer"),
        ({"tokenizer_class": "GPT2Tokenizer", "pad_token": "<nowhere>"}, "'<nowhere>' has no id"),
    ],
)
def test_what_the_two_files_do_not_tell_is_refused(tmp_path, settings, found):
    base = parts.write_byte_level_files(tmp_path / "base")
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(LexigraftError, match=found):
        families.load(base)


def test_added_tokens_that_a_loader_would_move_are_refused(tmp_path):
    """transformers 5 gives `<note>` the next free id, whatever added_tokens.json says."""
    import transformers

    base = parts.write_byte_level_files(tmp_path / "base")
    (base / "added_tokens.json").write_text(json.dumps({"<note>": 5000}))
    moved = transformers.GPT2Tokenizer.from_pretrained(base).convert_tokens_to_ids("<note>")
    assert moved == TokenMap.read(base).ids["<mask>"] + 1
    with pytest.raises(LexigraftError, match="id 5000"):
        families.load(base)


def test_vocab_without_merges_is_refused_by_name(tmp_path):
    base = parts.write_byte_level_files(tmp_path / "base")
    (base / "merges.txt").unlink()
    with pytest.raises(RefusalError, match=r"vocab\.json without merges\.txt"):
        families.load(base)


def test_a_vocabulary_that_is_not_byte_level_is_refused(tmp_path):
    base = parts.write_byte_level_files(tmp_path / "base")
    ids = json.loads((base / "vocab.json").read_text("utf-8"))
    (base / "vocab.json").write_text(json.dumps({**ids, "cat</w>": len(ids)}))
    with pytest.raises(RefusalError, match="CLIP kind"):
        families.load(base)
    del ids["a"]
    (base / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(RefusalError, match="1 of 256 bytes missing"):
        families.load(base)


def test_a_damaged_merge_is_named(tmp_path):
    base = parts.write_byte_level_files(tmp_path / "base")
    with (base / "merges.txt").open("a") as stream:
        stream.write("a b c\n")
    with pytest.raises(LexigraftError, match="'a b c' is no merge"):
        families.load(base)


def test_tokenizer_json_with_other_merges_than_merges_txt_is_refused(tmp_path):
    base = parts.write_byte_level(tmp_path / "json")
    files = parts.write_byte_level_files(tmp_path / "files")
    data = json.loads((base / "tokenizer.json").read_text("utf-8"))
    (base / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    shutil.copyfile(files / "merges.txt", base / "merges.txt")
    families.load(base)
    lines = (base / "merges.txt").read_text("utf-8").splitlines(keepends=True)
    (base / "merges.txt").write_text("".join([*lines[:5], lines[6], lines[5], *lines[7:]]))
    with pytest.raises(LexigraftError, match=r"merges\.txt lists other merges"):
        families.load(base)


@pytest.mark.real
def test_gpt2_itself(tmp_path):
    import transformers

    source = parts.SHARED / "tokenizers" / "gpt2_bpe"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    shutil.copytree(source, tmp_path / "base")
    for path in (tmp_path / "base").iterdir():
        path.chmod(0o644)
    (tmp_path / "base").chmod(0o755)
    merges = parts.lengthen(tmp_path / "base", tmp_path / "out", TEXTS, tokens=300)
    old, new = families.load(tmp_path / "base"), families.load(tmp_path / "out")
    assert old.map.added == {50_256}
    prove(old, new, [*HARD_TEXTS, *SPECIAL, *TEXTS])
    assert new.map.tokens == 50_257 + len(merges)
    reference = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "out")
    for text in [*HARD_TEXTS, *SPECIAL, *TEXTS[:20]]:
        assert new.encode(text) == reference.encode(text), text
