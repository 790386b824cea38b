"""llama.cpp: the text by which it knows a tokenizer, and its SentencePiece tokenizer."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece

import parts
from lexigraft import families
from lexigraft.families.llama_cpp import check_text, simulate
from lexigraft.families.proof import HARD_TEXTS
from lexigraft.families.tokenmap import parse_sentencepiece
from lexigraft.selection.judges import check_text_judge

TEXTS = parts.corpus_text(documents=40).split("\n\n")
TOKENIZERS = parts.SHARED / "tokenizers"
# The hashes that llama.cpp's converter lists (get_vocab_base_pre in convert_hf_to_gguf.py).
LISTED = {
    "llama3_1_hf": "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5",
    "llama3_tiktoken": "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5",
    "gpt2_bpe": "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454",
}


def fingerprint(ids):
    """llama.cpp's hash of the ids of its check text, bos and eos of the template included."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()


@pytest.mark.real
@pytest.mark.parametrize("name", LISTED)
def test_the_check_text_gives_the_hashes_that_llama_cpp_lists(name):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"no {TOKENIZERS / name}")
    family = families.load(TOKENIZERS / name)
    assert fingerprint([*family.start_ids(), *family.encode(check_text())]) == LISTED[name]


def test_tokens_that_change_the_check_text_are_found(tmp_path):
    """Learned from the text itself, tokens change its hash; without those named, none does."""
    base = parts.write_byte_level(tmp_path / "base")
    texts = [check_text()] * 10 + TEXTS
    merges = parts.lengthen(base, tmp_path / "all", texts, tokens=100)
    old, new = families.load(base), families.load(tmp_path / "all")
    before = fingerprint(old.encode(check_text()))
    assert fingerprint(new.encode(check_text())) != before
    emitted = {new.map.texts[i] for i in new.encode(check_text()) if i >= old.map.tokens}
    changes = check_text_judge(old)
    assert changes(merges, {}) == emitted
    kept = list(merges)
    while gone := changes(kept, {}):
        for merge in kept:
            if gone.intersection(merge):
                gone.add(merge.token)
        kept = [merge for merge in kept if merge.token not in gone]
    assert 0 < len(kept) < len(merges)
    (tmp_path / "kept").mkdir()
    old.extend(kept, tmp_path / "kept")
    assert fingerprint(families.load(tmp_path / "kept").encode(check_text())) == before


def mistral(name, root):
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / name
    (root / "base").mkdir(parents=True)
    shutil.copyfile(source, root / "base" / "tokenizer.model")
    return root / "base"


CASES = {
    "tiny": lambda root: parts.write_sentencepiece(root / "base", fast=False),
    "mistral-v1": lambda root: mistral("tokenizer.model.v1", root),
    "mistral-v3": lambda root: mistral("mistral_instruct_tokenizer_240323.model.v3", root),
}


@pytest.mark.parametrize("name", CASES)
def test_the_simulation_reads_as_sentencepiece_does(name, tmp_path):
    """Base and extension: the scores alone, in llama.cpp's order of joining, give equal ids."""
    base = CASES[name](tmp_path)
    merges = parts.lengthen(base, tmp_path / "out", TEXTS, tokens=150)
    assert len(merges) >= 100
    rng = random.Random(5)
    words = " ".join(TEXTS[:3]).split()
    mixed = ["".join(rng.sample(word, len(word))) + rng.choice(words) for word in words]
    new_ids = 0
    for folder in (base, tmp_path / "out"):
        path = folder / "tokenizer.model"
        proto = parse_sentencepiece(path.read_bytes(), path)
        engine = sentencepiece.SentencePieceProcessor(model_file=str(path))
        texts = [text for text in HARD_TEXTS if "<s>" not in text] + TEXTS[:20] + mixed
        read = simulate(proto)(texts)
        assert read == engine.encode(texts)
        first = len(proto.pieces) - len(merges)
        new_ids = sum(token_id >= first for ids in read for token_id in ids)
    assert new_ids > 500


def test_the_simulation_follows_scores_not_the_order_of_pieces(tmp_path):
    """A piece of a better score than all others is joined first, wherever it stands in the file."""
    base = parts.write_sentencepiece(tmp_path / "base", fast=False)
    path = base / "tokenizer.model"
    proto = parse_sentencepiece(path.read_bytes(), path)
    before = simulate(proto)(["the river"])[0]
    assert "ve" not in {piece.piece for piece in proto.pieces}
    proto.pieces.add(piece="ve", score=1.0)
    engine = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    after = simulate(proto)(["the river"])[0]
    assert after == engine.encode("the river")
    assert after != before


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["llama2_sp_bpe/tokenizer.model", "chinese_llama2_merged_sp/tokenizer.model"]
)
def test_the_simulation_of_real_models(name):
    path = TOKENIZERS / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    proto = parse_sentencepiece(path.read_bytes(), path)
    engine = sentencepiece.SentencePieceProcessor(model_file=str(path))
    corpora = parts.SHARED / "corpora"
    texts = list(HARD_TEXTS)
    for corpus in ("zh_med_covid_guideline.txt", "en_med_covid_guideline.txt"):
        texts += (corpora / corpus).read_text("utf-8").split("\n\n")
    assert simulate(proto)(texts) == engine.encode(texts)
