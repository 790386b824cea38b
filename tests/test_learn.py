"""`learn`: the tokenizer laws on every family, its numbers, and what it refuses."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parts
from lexigraft import families, learn
from lexigraft.corpus import held_out, read_documents
from lexigraft.errors import LexigraftError
from lexigraft.families import proof
from lexigraft.families.proof import HARD_TEXTS, contexts, prove
from lexigraft.manifest import Manifest

KINDS = ["byte", "byte-ignore", "byte-files", "byte-behind", "sp-both", "sp-model", "sp-json",
         "sp-behind"]  # fmt: skip


def make_base(kind, folder):
    if kind.startswith("byte"):
        parts.write_byte_level(folder, ignore_merges=kind == "byte-ignore")
        data = json.loads((folder / "tokenizer.json").read_text())
        if kind == "byte-files":
            (folder / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
            lines = "".join(" ".join(m) + "\n" for m in data["model"]["merges"])
            (folder / "merges.txt").write_text("#version: 0.2\n" + lines)
        if kind == "byte-behind":  # a reserved block: ids 382 to 409 have no token
            extra = {**data["added_tokens"][-1], "id": 410, "content": "<|far|>"}
            data["added_tokens"].append(extra)
            data["model"]["vocab"].update({t["content"]: t["id"] for t in data["added_tokens"]})
            (folder / "tokenizer.json").write_text(json.dumps(data))
        return folder
    parts.write_sentencepiece(folder, fast=kind != "sp-model")
    if kind == "sp-json":
        (folder / "tokenizer.model").unlink()
    if kind == "sp-behind":  # a chat fine-tune: added tokens behind tokenizer.model
        data = json.loads((folder / "tokenizer.json").read_text())
        extra = {**data["added_tokens"][0], "special": False, "normalized": False}
        data["added_tokens"].append({**extra, "id": 400, "content": "<|human|>"})
        (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "medical.txt"
    path.write_text(parts.corpus_text())
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory, corpus):
    """kind -> (base folder, VOCAB folder, result), each learned once."""
    root = tmp_path_factory.mktemp("learned")
    made = {}

    def get(kind):
        if kind not in made:
            base = make_base(kind, root / kind)
            output = root / f"{kind}-vocab"
            result = learn(base, corpus=[corpus], general=[parts.ENGLISH], tokens="10%",
                           min_count=20, output=output)  # fmt: skip
            made[kind] = (base, output, result)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_laws_1_to_5(learned, corpus, kind):
    base_folder, vocab, result = learned(kind)
    base, extended = families.load(base_folder), families.load(vocab)
    assert result.added == int(0.10 * base.map.tokens)
    assert extended.map.tokens == base.map.tokens + result.added
    assert result.drift == 0
    documents = list(read_documents([corpus]))
    rng = random.Random(3)
    mixed = ["".join(rng.sample(documents[0] + "  \n\t", 60)) for _ in range(300)]
    words = [
        extended.token_bytes(i).decode("utf-8", "replace")
        for i in range(base.map.tokens, extended.map.tokens)
    ]
    proved = prove(base, extended, [*HARD_TEXTS, *contexts(words), *documents, *mixed])
    assert proved.drift == 0 and proved.texts > 500
    # and with the ids written out once more, without prove's own expansion
    for text in documents[:20]:
        old, new = base.encode(text), extended.encode(text)
        assert len(new) < len(old)
        assert b"".join(map(extended.token_bytes, new)) == b"".join(map(base.token_bytes, old))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_with_equal_ids(learned, corpus, kind):
    from transformers import AutoTokenizer

    base_folder, vocab, result = learned(kind)
    extended = families.load(vocab)
    loaded = AutoTokenizer.from_pretrained(vocab)
    before = AutoTokenizer.from_pretrained(base_folder)
    assert max(loaded.get_vocab().values()) + 1 == extended.map.tokens
    for special, token_id in before.get_added_vocab().items():
        assert loaded.convert_tokens_to_ids(special) == token_id
    for text in list(read_documents([corpus]))[:40]:
        assert loaded.encode(text, add_special_tokens=False) == extended.encode(text)
        ids = loaded.encode(text)
        assert loaded.decode(ids, skip_special_tokens=True) == before.decode(
            before.encode(text), skip_special_tokens=True
        )


@pytest.mark.parametrize("kind", KINDS)
def test_law_4_every_token_comes_out_or_is_a_counted_bridge(learned, corpus, kind):
    base_folder, vocab, result = learned(kind)
    extended = families.load(vocab)
    rows = [json.loads(line) for line in (vocab / "new_tokens.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(result.first_id, result.tokens_after))
    counts = dict.fromkeys((row["id"] for row in rows), 0)
    for document in read_documents([corpus]):
        if not held_out(document):
            for token_id in extended.encode(document):
                if token_id in counts:
                    counts[token_id] += 1
    base = families.load(base_folder)
    for row in rows:
        assert row["count"] == counts[row["id"]]
        assert (row["count"] == 0) == (row["origin"] == "bridge")
        assert bytes.fromhex(row["bytes"]) == b"".join(map(base.token_bytes, row["pieces"]))
        assert row["token"] == extended.map.texts[row["id"]]
    assert sum(row["origin"] == "bridge" for row in rows) == result.bridges <= 0.05 * len(rows)


def test_no_new_token_has_a_digit_or_mixes_scripts(learned):
    from lexigraft.families.spelling import is_character_start, is_symbol, is_word

    for kind in KINDS:
        _, vocab, _ = learned(kind)
        for line in (vocab / "new_tokens.jsonl").read_text().splitlines():
            row = json.loads(line)
            data = bytes.fromhex(row["bytes"])
            text = row["text"]
            whole = text is not None and (is_word(text) or is_symbol(text))
            assert whole or (text is None and is_character_start(data)), row


def test_every_file_of_the_base_is_extended(learned):
    _, vocab, result = learned("byte-files")
    ids = json.loads((vocab / "vocab.json").read_text())
    merges = (vocab / "merges.txt").read_text().splitlines()[1:]
    data = json.loads((vocab / "tokenizer.json").read_text())["model"]
    # Added tokens stand in vocab.json too: readers would give one that does not the next free id.
    assert data["vocab"] == ids
    assert [tuple(line.split(" ")) for line in merges] == [tuple(m) for m in data["merges"]]
    from lexigraft.families.tokenmap import read_token_maps

    for kind in ("sp-both", "sp-behind"):
        maps = read_token_maps(learned(kind)[1])
        assert maps["tokenizer.json"].texts == maps["tokenizer.model"].texts


def test_new_scores_step_down_below_the_whitespace_pieces(learned):
    from lexigraft.families.tokenmap import parse_sentencepiece

    base_folder, vocab, result = learned("sp-model")
    path = vocab / "tokenizer.model"
    pieces = parse_sentencepiece(path.read_bytes(), path).pieces
    old, new = pieces[: result.first_id], pieces[result.first_id :]
    scores = [piece.score for piece in new]
    assert scores == sorted(set(scores), reverse=True)
    assert max(scores) < min(piece.score for piece in old)


def test_templates_and_settings_stay(learned):
    for kind in KINDS:
        base_folder, vocab, _ = learned(kind)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (base_folder / name).exists():
                assert (vocab / name).read_bytes() == (base_folder / name).read_bytes()
        if (base_folder / "tokenizer.json").exists():
            old = json.loads((base_folder / "tokenizer.json").read_text())
            new = json.loads((vocab / "tokenizer.json").read_text())
            for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"):
                assert old[key] == new[key]


def test_law_6_equal_inputs_give_equal_bytes(tmp_path, corpus):
    base = parts.write_byte_level(tmp_path / "base")
    halves = parts.corpus_text(1).split("\n\n")
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("\n\n".join(halves[:90]))
    second.write_text("\n\n".join(halves[90:]))
    outputs = []
    for seed, order, threads in (("1", [first, second], "1"), ("2", [second, first], "2")):
        output = tmp_path / f"vocab{seed}"
        code = (
            "import sys; from lexigraft import learn; "
            "learn(sys.argv[1], corpus=sys.argv[3:], output=sys.argv[2], tokens=30, min_count=9)"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(base), str(output), *map(str, order)], check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
        )  # fmt: skip
        outputs.append({p.name: p.read_bytes() for p in output.iterdir()})
    assert outputs[0] == outputs[1]


def test_manifest_binds_the_tokenizer(learned):
    base_folder, vocab, result = learned("byte")
    record = Manifest.read(vocab).last("learn")
    base, extended = families.load(base_folder), families.load(vocab)
    assert record.base.token_map == base.map.hash
    assert record.token_map == extended.map.hash
    assert record.content == extended.content_hash
    assert (record.first_id, record.added) == (base.map.tokens, result.added)
    for probe in record.probe:
        assert extended.encode(probe.text) == probe.ids
    text = (vocab / "lexigraft.json").read_text()
    assert str(vocab.parent) not in text and "20" + "26" not in text


def test_content_hash_survives_loading_and_saving(learned, tmp_path):
    from transformers import AutoTokenizer

    _, vocab, _ = learned("byte")
    AutoTokenizer.from_pretrained(vocab).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_bytes((vocab / "tokenizer_config.json").read_bytes())
    assert (tmp_path / "tokenizer.json").read_bytes() != (vocab / "tokenizer.json").read_bytes()
    assert families.load(tmp_path).content_hash == families.load(vocab).content_hash


def test_numbers_of_the_result_are_those_of_the_files(learned, corpus):
    base_folder, vocab, result = learned("sp-both")
    base, extended = families.load(base_folder), families.load(vocab)
    kept_out = [d for d in read_documents([corpus]) if held_out(d)]
    assert result.domain_is_held_out and kept_out
    assert result.domain.tokens_before == sum(len(base.encode(d)) for d in kept_out)
    assert result.domain.tokens_after == sum(len(extended.encode(d)) for d in kept_out)
    assert result.domain.bytes == sum(len(d.encode()) for d in kept_out)
    sizes = [k for k, _ in result.curve]
    assert sizes[0] == 0 and sizes[-1] == result.added
    assert result.curve[0][1] == pytest.approx(
        result.domain.tokens_before / result.domain.bytes, abs=1e-6
    )
    assert result.curve[-1][1] == pytest.approx(
        result.domain.tokens_after / result.domain.bytes, abs=1e-6
    )
    assert [v for _, v in result.curve] == sorted((v for _, v in result.curve), reverse=True)


def test_general_text_is_untouched_by_terms_it_does_not_hold(learned):
    for kind in ("byte", "sp-both"):
        _, _, result = learned(kind)
        assert result.general.tokens_after <= result.general.tokens_before


# --- how many -----------------------------------------------------------------------------------


def test_more_than_a_tenth_needs_allow_more(tmp_path, corpus):
    base = parts.write_byte_level(tmp_path / "base")
    with pytest.raises(LexigraftError, match="--tokens 200"):
        learn(base, corpus=[corpus], tokens=200, output=tmp_path / "v")
    assert not (tmp_path / "v").exists()
    more = learn(
        base, corpus=[corpus], tokens=60, allow_more=True, min_count=5, output=tmp_path / "v"
    )
    assert more.added == 60


def test_auto_takes_what_the_text_supports(tmp_path, corpus):
    base = parts.write_byte_level(tmp_path / "base")
    result = learn(base, corpus=[corpus], output=tmp_path / "v")
    assert result.min_count == 100
    twice = learn(base, corpus=[corpus], train_bytes=2 * result.domain.bytes, output=tmp_path / "w")
    assert twice.min_count > 100  # less training text than corpus: more must be asked of the corpus


def test_too_small_a_corpus_gives_what_it_supports_and_says_so(tmp_path, capsys):
    base = parts.write_byte_level(tmp_path / "base")
    (tmp_path / "c.txt").write_text("潜伏性感染与冠状动脉。\n\n" * 3)
    result = learn(base, corpus=[tmp_path / "c.txt"], tokens=38, min_count=2, output=tmp_path / "v")
    assert 0 < result.added < 38
    assert "supports" in capsys.readouterr().err


def test_nothing_to_learn_is_a_tokenizer_equal_to_the_base(tmp_path):
    base = parts.write_sentencepiece(tmp_path / "base")
    (tmp_path / "c.txt").write_text("123 456\n")
    result = learn(base, corpus=[tmp_path / "c.txt"], output=tmp_path / "v")
    assert result.added == 0
    assert families.load(tmp_path / "v").map.hash == families.load(base).map.hash


def test_dry_run_writes_nothing(tmp_path, corpus):
    base = parts.write_byte_level(tmp_path / "base")
    result = learn(
        base, corpus=[corpus], tokens=10, min_count=5, output=tmp_path / "v", dry_run=True
    )
    assert result.added == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


# --- bad input ----------------------------------------------------------------------------------


def fails(tmp_path, corpus_path, *words):
    base = tmp_path / "base"
    if not base.exists():
        parts.write_byte_level(base)
    with pytest.raises(LexigraftError) as caught:
        learn(base, corpus=[corpus_path], output=tmp_path / "v")
    assert not (tmp_path / "v").exists()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(tmp_path.glob("v.partial*"))


def test_missing_corpus(tmp_path):
    fails(tmp_path, tmp_path / "none.txt", "no file", "none.txt")


def test_empty_corpus(tmp_path):
    (tmp_path / "c.txt").write_text("\n\n  \n")
    fails(tmp_path, tmp_path / "c.txt", "no text")


def test_corpus_that_is_not_utf8(tmp_path):
    (tmp_path / "c.txt").write_bytes("患者潜伏性感染".encode("gb18030"))
    fails(tmp_path, tmp_path / "c.txt", "not UTF-8", "line 1", "iconv")


def test_corpus_with_nul_bytes(tmp_path):
    (tmp_path / "c.txt").write_bytes("patient\n".encode("utf-16"))
    fails(tmp_path, tmp_path / "c.txt", "NUL", "iconv")


def test_corpus_of_another_kind(tmp_path):
    (tmp_path / "c.docx").write_bytes(b"PK")
    fails(tmp_path, tmp_path / "c.docx", "c.docx")


def test_bad_json_lines(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    fails(tmp_path, tmp_path / "c.jsonl", "line 2", '{"text":')


def test_truncated_gzip(tmp_path):
    data = gzip.compress(parts.corpus_text().encode())
    (tmp_path / "c.txt.gz").write_bytes(data[: len(data) // 2])
    fails(tmp_path, tmp_path / "c.txt.gz", "c.txt.gz")


def test_output_exists(tmp_path, corpus):
    base = parts.write_byte_level(tmp_path / "base")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine.txt").write_text("keep")
    with pytest.raises(LexigraftError, match="exists"):
        learn(base, corpus=[corpus], output=tmp_path / "v")
    assert (tmp_path / "v" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("place", [".", "base", "texts", "base/vocab"])
def test_an_output_that_would_replace_an_input_is_refused(tmp_path, corpus, place):
    base = parts.write_byte_level(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "c.txt").write_text("冠状动脉炎\n" * 50)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(LexigraftError, match=r"-o .* input") as caught:
        learn(base, corpus=[tmp_path / "texts" / "c.txt"], output=tmp_path / place, force=True)
    assert "never modified" in caught.value.needed
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_bom_and_crlf_are_cleaned_and_reported(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    assert list(read_documents([tmp_path / "a.txt"])) == ["one\ntwo", "three"]
    said = capsys.readouterr().err
    assert "byte order mark" in said and "CR LF" in said


def test_all_kinds_of_text_files_read_alike(tmp_path):
    documents = ["one\ntwo", "three"]
    text = "\n\n\n".join(documents) + "\n"
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(lines)
    with gzip.open(tmp_path / "c.txt.gz", "wt") as stream:
        stream.write(text)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as stream:
        stream.write(lines)
    for name in ("a.txt", "b.jsonl", "c.txt.gz", "d.jsonl.gz"):
        assert list(read_documents([tmp_path / name])) == documents
    assert list(read_documents([tmp_path])) == documents * 4
    assert list(read_documents([str(tmp_path / "*.txt")])) == documents


def test_lone_surrogates_in_json_are_replaced(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert list(read_documents([tmp_path / "a.jsonl"])) == ["a?b"]
    assert "surrogates" in capsys.readouterr().err


# --- real tokenizers ----------------------------------------------------------------------------

REAL = ["smollm2_hf", "qwen3_hf", "llama3_1_hf", "gpt_neox_pythia_hf", "deepseek_v3_hf",
        "minimind_hf", "llama2_sp_bpe", "llama2_hf", "mistral_v1_hf", "internlm_sp",
        "stories260K_sp_hf", "gemma3_hf"]  # fmt: skip
QUICK = {"smollm2_hf", "llama2_sp_bpe", "llama2_hf"}


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.matrix) for n in REAL]
)
def test_real_tokenizers_keep_the_laws(name, tmp_path):
    folder = parts.SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("the real tokenizers of ../shared/data are not here")
    text = (parts.SHARED / "corpora" / "zh_med_medqa_exam.txt").read_text()[:120_000]
    english = (parts.SHARED / "corpora" / "en_med_pubmedqa.txt").read_text()[:300_000]
    (tmp_path / "c.txt").write_text(text + "\n\n" + english)
    general = parts.SHARED / "corpora" / "en_gen_wikipedia_demo.txt"
    (tmp_path / "g.txt").write_text(general.read_text()[:300_000])
    result = learn(folder, corpus=[tmp_path / "c.txt"], general=[tmp_path / "g.txt"], tokens=50,
                   min_count=10, output=tmp_path / "v")  # fmt: skip
    assert result.added == 50 and result.drift == 0 and result.dead <= 2
    if "tokenizer.json" in {p.name for p in folder.iterdir()}:
        from transformers import AutoTokenizer

        before, after = (
            AutoTokenizer.from_pretrained(folder),
            AutoTokenizer.from_pretrained(tmp_path / "v"),
        )
        extended = families.load(tmp_path / "v")
        base = families.load(folder)
        for line in (text[:20_000] + english[:20_000]).splitlines():
            if before.encode(line, add_special_tokens=False) == base.encode(line):
                assert after.encode(line, add_special_tokens=False) == extended.encode(line)


# --- any corpus ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: make_base(kind, root / kind) for kind in ("byte", "sp-both")}


ALPHABET = st.sampled_from(["ab", "cardi", "itis", "冠状", "动脉", "潜", "伏", "𠮷", "о", "т", "ع", "e\u0301",
                            " ", "  ", "\n", "7", "é", "-", "，", "🙂", "<|endoftext|>", "<s>", "\u2581"])  # fmt: skip
TEXTS = st.lists(ALPHABET, min_size=1, max_size=40).map("".join)


@pytest.fixture
def short_lines(monkeypatch):
    """A shorter long line: the megabyte is read in every other test."""
    monkeypatch.setattr(proof, "LONG_TEXT", 20_000)


@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize("kind", ["byte", "sp-both"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(corpus=st.lists(TEXTS, min_size=1, max_size=12), unseen=st.lists(TEXTS, max_size=12))
def test_any_corpus_gives_a_lawful_tokenizer(kind, bases, tmp_path_factory, corpus, unseen):
    folder = tmp_path_factory.mktemp("any")
    lines = (json.dumps({"text": text}) for text in [*corpus * 3, "plain words"])
    (folder / "c.jsonl").write_text("\n".join(lines))
    result = learn(bases[kind], corpus=[folder / "c.jsonl"], tokens=20, min_count=2,
                   output=folder / "v")  # fmt: skip
    base, extended = families.load(bases[kind]), families.load(folder / "v")
    assert prove(base, extended, [*corpus, *unseen]).drift == 0
    for text in unseen:
        assert len(extended.encode(text)) <= len(base.encode(text))
    assert result.bridges <= 0.05 * 20  # of the budget
