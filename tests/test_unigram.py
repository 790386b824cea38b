"""Unigram: the laws for each set of files, ids behind the `.model`, and the score rule."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parts
from lexigraft import families, learn
from lexigraft.counting import CHUNK
from lexigraft.errors import RefusalError
from lexigraft.families import unigram
from lexigraft.families.choice import choose
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.layouts import layout_of
from lexigraft.families.proof import HARD_TEXTS, contexts, offenders, prove
from lexigraft.families.spelling import script_of
from lexigraft.families.tokenmap import TokenMap, parse_sentencepiece

FILES = ["model", "json", "both"]
SPACE = "\u2581"


def chosen(family, texts, *, limit=60, min_count=10):
    chunks = Counter(chunk for text in texts for chunk in CHUNK.findall(family.prefix + text))
    return choose(family, family.count_units(chunks), limit=limit, min_count=min_count)


def extended(base_folder, output, texts, **wanted):
    """(base, extension, chosen merges)"""
    base = families.load(base_folder)
    choice = chosen(base, texts, **wanted)
    output.mkdir()
    base.extend(choice.merges, output)
    return base, families.load(output), choice


@pytest.fixture(scope="module")
def documents():
    return parts.corpus_text().split("\n\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory, documents):
    """files -> (base, extension, choice), each made once."""
    root = tmp_path_factory.mktemp("unigram")
    known = {}

    def get(files):
        if files not in known:
            folder = parts.write_unigram(root / files, files=files)
            known[files] = extended(folder, root / f"{files}-vocab", documents)
        return known[files]

    return get


def hard_texts(base, extension, texts):
    words = words_of(extension, base.map.tokens)
    return [*HARD_TEXTS, *contexts(words), *texts]


def words_of(extension, first):
    return [extension.token_bytes(i).decode() for i in range(first, extension.map.tokens)]


@pytest.mark.parametrize("files", FILES)
def test_unigram_keeps_laws_1_to_5(made, documents, files):
    base, extension, choice = made(files)
    assert base.name == "Unigram" and len(choice.merges) > 40
    assert extension.map.tokens == base.map.tokens + len(choice.merges)
    lines = [line for document in documents for line in document.split("\n")]
    english = [line.split(". ")[0] for line in lines]
    words = words_of(extension, base.map.tokens)
    proof = prove(base, extension, [*HARD_TEXTS, *contexts(words), *lines, *english])
    assert proof.drift == 0 and proof.texts - proof.unknown > 1500
    assert proof.lengths.ratio < 0.8
    alive = {extension.map.texts[token_id] for token_id in proof.emitted}
    assert {m.token for m in choice.merges} - choice.bridges <= alive  # law 4


@pytest.mark.parametrize("files", FILES)
def test_unknown_letters_are_adopted_and_come_closer_to_the_text(made, files):
    base, extension, choice = made(files)
    adopted = {merge.token for merge in choice.merges if merge.right is None}
    assert adopted and {script_of(letter) for letter in adopted} == {"CJK"}
    text = f"patient with {''.join(sorted(adopted)[:3])}"
    assert base.unknown_id in base.encode(text)
    assert base.decode(base.encode(text), skip_special=True) != text
    assert extension.decode(extension.encode(text), skip_special=True) == text


def test_han_letters_get_words_too(tmp_path):
    run = "肝炎患者" * 3
    folder = parts.write_unigram(tmp_path / "base", files="both")
    base, extension, choice = extended(folder, tmp_path / "vocab", [run] * 20)
    assert choice.merges and not choice.bridges
    ids = extension.encode(run)
    assert extension.unknown_id not in ids and len(ids) < len(run)
    assert extension.decode(ids) == run


@pytest.mark.parametrize("files", FILES)
def test_transformers_reads_it_with_the_same_ids(made, documents, files):
    from transformers import AutoTokenizer

    base, extension, _ = made(files)
    before = AutoTokenizer.from_pretrained(base.folder)
    loaded = AutoTokenizer.from_pretrained(extension.folder)
    assert max(loaded.get_vocab().values()) + 1 == extension.map.tokens
    for text, token_id in before.get_vocab().items():
        assert loaded.convert_tokens_to_ids(text) == token_id, text
    texts = [*HARD_TEXTS, *documents[:20], "a <extra_id_0> b <extra_id_9>."]
    compared = 0
    for text in texts:
        if before.encode(text, add_special_tokens=False) != base.encode(text):
            continue  # spaces and sentinels: raw SentencePiece knows neither rule
        compared += 1
        assert loaded.encode(text, add_special_tokens=False) == extension.encode(text), text
    assert compared > 30
    marked = "a <extra_id_0> b <extra_id_9> cardiitis"
    sentinels = [before.convert_tokens_to_ids(f"<extra_id_{n}>") for n in (0, 9)]
    assert [i for i in loaded.encode(marked) if i in sentinels] == sentinels
    for skip in (False, True):
        ids, old = loaded.encode(marked), before.encode(marked)
        assert loaded.decode(ids, skip_special_tokens=skip) == before.decode(
            old, skip_special_tokens=skip
        )


@pytest.mark.parametrize("files", FILES)
def test_loading_and_saving_keeps_the_hash_of_the_content(made, tmp_path, files):
    _, extension, _ = made(files)
    shutil.copytree(extension.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(path)).save(str(path))
    assert families.load(tmp_path / "copy").content_hash == extension.content_hash
    assert made(files)[0].content_hash != extension.content_hash


@pytest.mark.parametrize("files", FILES)
def test_normaliser_and_settings_stay(made, files):
    base, extension, _ = made(files)
    if files != "json":
        old, new = (
            parse_sentencepiece((f.folder / "spiece.model").read_bytes(), f.folder)
            for f in (base, extension)
        )
        assert old.normalizer_spec == new.normalizer_spec
        assert list(new.pieces)[: len(old.pieces)] == list(old.pieces)
        assert new.trainer_spec.vocab_size == len(new.pieces)
    if files != "model":
        old, new = (
            json.loads((f.folder / "tokenizer.json").read_text()) for f in (base, extension)
        )
        count = len(old["model"]["vocab"])
        assert new["model"]["vocab"][:count] == old["model"]["vocab"]
        assert {**new, "model": {**new["model"], "vocab": 0}} == {
            **old, "model": {**old["model"], "vocab": 0}
        }  # fmt: skip


@pytest.mark.parametrize("files", FILES)
def test_learn_writes_a_proved_unigram_vocabulary(made, documents, tmp_path, files):
    base, _, _ = made(files)
    corpus = tmp_path / "medical.txt"
    corpus.write_text("\n\n".join(documents))
    result = learn(base.folder, corpus=[corpus], general=[parts.ENGLISH], tokens=25, min_count=20,
                   output=tmp_path / "vocab")  # fmt: skip
    assert result.added == 25 and result.drift == 0 and result.bridges == 0
    extension = families.load(tmp_path / "vocab")
    assert extension.map.tokens == base.map.tokens + 25


def test_engines_that_differ_are_found(made, tmp_path):
    """One file with another score: the token that the engines disagree on is to blame."""
    base, extension, choice = made("both")
    shutil.copytree(extension.folder, tmp_path / "vocab")
    path = tmp_path / "vocab" / "spiece.model"
    proto = parse_sentencepiece(path.read_bytes(), path)
    token = next(m.token for m in choice.merges if m.token.startswith(SPACE) and len(m.token) > 6)
    next(piece for piece in proto.pieces if piece.piece == token).score -= 9
    path.write_bytes(proto.SerializeToString())
    text = token[1:]
    assert offenders(base, extension, [text]) == set()
    assert offenders(base, families.load(tmp_path / "vocab"), [text]) != set()


def test_equal_inputs_give_equal_bytes(made, documents, tmp_path):
    base, extension, _ = made("both")
    extended(base.folder, tmp_path / "again", documents[::-1])
    for path in extension.folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_new_token_scores_just_above_its_spelling(tmp_path):
    """A token that scores 0 wins inside other words; one at sum - 1 is never used (B11)."""
    folder = parts.write_unigram(tmp_path / "base", files="model")
    base = families.load(folder)
    token = f"{SPACE}angiocardiogram"
    pieces = base.pieces(token)
    base.extend([Merge(token, SPACE, "angiocardiogram", 1)], tmp_path)
    proto = parse_sentencepiece((tmp_path / "spiece.model").read_bytes(), tmp_path)
    old = parse_sentencepiece((folder / "spiece.model").read_bytes(), folder)
    scores = {piece.piece: piece.score for piece in old.pieces}
    spelled = sum(scores[base.map.texts[i]] for i in pieces)
    normal = [piece.score for piece in old.pieces if piece.type == 1]
    added = proto.pieces[-1]
    assert spelled < added.score < spelled + 2 * unigram.DELTA * len(pieces) + 1e-4
    assert added.score < max(normal) < 0
    text = "an angiocardiogram, angiocardiograms"
    new = families.load(tmp_path).encode(text)
    assert new.count(base.map.tokens) == 2
    for wrong in (spelled - 1, 0.0):
        added.score = wrong
        (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
        assert (base.map.tokens in families.load(tmp_path).encode(text)) == (wrong == 0.0)


def test_junk_is_no_token(made):
    """Spaces, known pieces, digits, line ends, several scripts: never joined (B27)."""
    base, _, _ = made("both")
    known = next(text for text in base.map.ids if len(text) > 3 and text.startswith(SPACE))
    pairs = [(SPACE, SPACE), ("a", SPACE), ("a", "\n"), ("a", "1"), ("a", "患"), ("", " "),
             (known[:2], known[2:]), ("a" * 20, "b" * 20)]  # fmt: skip
    assert [pair for pair in pairs if base.join(*pair) is not None] == []
    assert base.join(f"{SPACE}angio", "cardio") == f"{SPACE}angiocardio"


@pytest.mark.parametrize("files", FILES)
def test_new_ids_follow_the_sentinels_and_a_reserved_hole(tmp_path, documents, files):
    """Ids that no piece has keep their meaning; new ones come behind the highest (B25, B26)."""
    folder = parts.write_unigram(tmp_path / "base", files=files)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    tokens = families.load(folder).map.tokens
    if files == "model":
        entry = {"content": "<|note|>", **flags, "special": False}
        config["added_tokens_decoder"] = {str(tokens): entry}
        path.write_text(json.dumps(config))
    else:
        file = folder / "tokenizer.json"
        data = json.loads(file.read_text())
        entry = {"id": tokens, "content": "<|note|>", **flags, "special": False}
        data["added_tokens"].append(entry)
        file.write_text(json.dumps(data))
    base, extension, choice = extended(folder, tmp_path / "vocab", documents, limit=20)
    assert base.map.texts[tokens] == "<|note|>" and base.map.tokens == tokens + 1
    assert extension.map.texts[tokens + 1] == choice.merges[0].token
    for text in ("a <|note|> b", "a<|note|>cardiitis<|note|>"):
        for read in extension.engines().values():
            assert tokens in read([text])[0]
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "vocab")
    assert loaded.convert_tokens_to_ids("<|note|>") == tokens
    assert loaded.convert_tokens_to_ids(choice.merges[0].token) == tokens + 1
    assert max(loaded.get_vocab().values()) + 1 == extension.map.tokens


def fairseq(folder, *, files, kind="XLMRobertaTokenizer"):
    """A folder of a class that places pieces in its own way, here trained on plain English."""
    import sentencepiece

    folder.mkdir()
    with (folder / "sentencepiece.bpe.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts.ENGLISH.read_text("utf-8").splitlines()),
            model_writer=model, vocab_size=200, model_type="unigram", minloglevel=2,
            num_threads=1,
        )  # fmt: skip
    parts.finish_unigram(folder, files=files, kind=kind)
    return folder


@pytest.mark.parametrize("kind", ["XLMRobertaTokenizer", "MBartTokenizer", "PegasusTokenizer"])
def test_ids_of_a_lone_model_are_those_of_its_class(tmp_path, kind):
    from transformers import AutoTokenizer

    if kind == "PegasusTokenizer":
        folder = parts.write_unigram(tmp_path / "base", files="model")
        parts.finish_unigram(folder, files="model", kind=kind)
    else:
        folder = fairseq(tmp_path / "base", files="model", kind=kind)
    loaded = AutoTokenizer.from_pretrained(folder).get_vocab()
    token_map = TokenMap.read(folder)
    assert layout_of(folder).head
    assert token_map.tokens == max(loaded.values()) + 1
    assert [i for i, text in token_map.texts.items() if loaded[text] != i] == []


def test_xlm_r_with_a_tokenizer_json_keeps_its_offset_and_mask(tmp_path):
    folder = fairseq(tmp_path / "base", files="both")
    texts = parts.corpus_text(documents=60).split("\n\n")
    base, extension, choice = extended(folder, tmp_path / "vocab", texts)
    mask = base.map.ids["<mask>"]
    assert mask == base.map.tokens - 1 and extension.map.ids[choice.merges[0].token] == mask + 1
    proto = parse_sentencepiece((tmp_path / "vocab/sentencepiece.bpe.model").read_bytes(), folder)
    assert proto.pieces[mask].piece == choice.merges[0].token  # one below its id
    english = [line.split(". ")[0] for text in texts for line in text.split("\n")]
    proof = prove(base, extension, [*HARD_TEXTS, *english])
    assert proof.engines == ("tokenizers", "sentencepiece") and proof.lengths.ratio < 0.8
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "vocab")
    assert loaded.mask_token_id == mask
    for text in english[:20]:
        assert loaded.encode(text, add_special_tokens=False) == extension.encode(text)


@pytest.mark.parametrize("kind", ["XLMRobertaTokenizer", "MBartTokenizer", "CamembertTokenizer"])
def test_a_lone_model_whose_loader_appends_tokens_is_refused(tmp_path, kind):
    folder = fairseq(tmp_path / "base", files="model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(RefusalError, match=rf"{kind}(.|\n)*tokenizer.json(.|\n)*save_pretrained"):
        families.load(folder)


def test_files_of_two_models_are_refused(tmp_path):
    folder = parts.write_unigram(tmp_path / "base", files="both")
    parts.write_sentencepiece(tmp_path / "other", fast=False)
    shutil.copy(tmp_path / "other" / "tokenizer.model", folder)
    (folder / "spiece.model").unlink()
    with pytest.raises(RefusalError, match=r"tokenizer\.model of another kind"):
        families.load(folder)


def test_spelling_is_the_engines_own(made):
    base, _, _ = made("both")
    scores = base._proto_scores
    for text in ("▁cardiogram", "thermometer", "▁garden", "患者", "▁quickest"):
        assert scores.spell(text).parts >= len(base.pieces(text))
        if base.unknown_id not in base.pieces(text):
            own = [base.map.texts[i] for i in base.pieces(text)]
            assert scores.spell(text).score == pytest.approx(
                sum(scores._pieces[piece] for piece in own)
            )
            assert scores.spell(text).parts == len(own)


def test_a_near_tie_is_not_admitted(tmp_path):
    """Where rounding decides how the base spells a string, it is no token."""
    folder = parts.write_unigram(tmp_path / "base", files="model")
    path = folder / "spiece.model"
    proto = parse_sentencepiece(path.read_bytes(), path)
    for piece in ("qu", "uz", "q", "z"):
        for known in proto.pieces:
            if known.piece == piece:
                known.score = -9.0
                break
        else:
            proto.pieces.add(piece=piece, score=-9.0)
    path.write_bytes(proto.SerializeToString())
    base = families.load(folder)
    spelling = base._proto_scores.spell("quz")
    assert spelling.margin == 0 and spelling.parts == 2
    merges = [Merge("quz", "qu", "z", 9), Merge("quick", "qu", "ick", 9)]
    assert [m.token for m in base.admits(merges)] == ["quick"]


HAN_PAIRS = {
    "type": "Split", "pattern": {"Regex": r"\p{Han}{1,2}"}, "behavior": "Isolated",
    "invert": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["own", "pairs of Han", "nothing"])
def test_units_end_where_the_engine_of_a_json_splits(tmp_path, kind):
    folder = parts.write_unigram(tmp_path / "base", files="json")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    own = data["pre_tokenizer"]
    steps = own["pretokenizers"] if own["type"] == "Sequence" else [own]
    pairs = {"type": "Sequence", "pretokenizers": [*steps, HAN_PAIRS]}
    data["pre_tokenizer"] = {"own": own, "pairs of Han": pairs, "nothing": None}[kind]
    path.write_text(json.dumps(data), "utf-8")
    base = families.load(folder)
    text = "the gardens  of\tCaf\u00e9 \u60a3\u8005\u75c5\u4eba"
    units = {"".join(unit) for unit in base.units([base.prefix + text])}
    words = {
        "own": {"▁gardens", "▁Caf\u00e9", "\u60a3\u8005\u75c5\u4eba"},
        "pairs of Han": {"▁gardens", "\u60a3\u8005", "\u75c5\u4eba"},
        "nothing": {"the", "gardens", "\u60a3\u8005\u75c5\u4eba"},
    }[kind]
    assert {word.removeprefix(SPACE) for word in words} <= {u.removeprefix(SPACE) for u in units}
    assert any(unit.startswith(SPACE) for unit in units) == (kind != "nothing")
    counted = base.count_units({base.prefix + text: 3}).to_tuples()
    assert counted and {"".join(unit) for unit in counted} == units
    assert set(counted.values()) == {3}


@settings(deadline=None)
@given(
    whole=st.text("abé", min_size=1, max_size=9),
    others=st.lists(st.text("abé", min_size=1, max_size=9), min_size=1, max_size=3),
    lost=st.integers(1, 3),
)
def test_one_token_wins_over_three_that_save_less(whole, others, lost):
    saved = [1 + len(other) for other in others]
    less = sum(unigram._bonus(o, k + 1) for o, k in zip(others, saved, strict=True))
    assert unigram._bonus(whole, sum(saved) + lost + 1) > less


def test_a_whole_word_wins_over_its_halves(tmp_path):
    folder = parts.write_unigram(tmp_path / "base", files="both")
    base = families.load(folder)
    words = ["béb", "bébbéb"]  # é has no piece: 3 and 6 parts
    base.extend([Merge(word, "", "", 1) for word in words], tmp_path)
    extension = families.load(tmp_path)
    for read in extension.engines().values():
        assert read([f"a {words[1]}"])[0][-1] == base.map.tokens + 1


LETTERS = st.text(alphabet="abcdei", min_size=1, max_size=8)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(LETTERS, min_size=2, max_size=12), seed=st.integers(0, 999))
def test_any_corpus_gives_a_lawful_unigram_tokenizer(tmp_path_factory, words, seed):
    base_folder = tmp_path_factory.getbasetemp() / "unigram-any"
    if not base_folder.exists():
        parts.write_unigram(base_folder, files="both")
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(words, 12)) for _ in range(20)]
    output = tmp_path_factory.mktemp("any") / "vocab"
    base, extension, choice = extended(base_folder, output, texts, limit=30, min_count=3)
    emitted = prove(base, extension, [*texts, *words, "".join(words)]).emitted
    alive = {extension.map.texts[token_id] for token_id in emitted}
    assert {m.token for m in choice.merges} - choice.bridges <= alive


REAL = {
    "t5-model": "t5_unigram_sp/spiece.model",
    "t5-both": "t5_unigram_sp/spiece.model",
    "xlmr-json": "xlmr_unigram50k_hf/tokenizer.json",
    "pegasus-json": "pegasus_unigram_hf/tokenizer.json",
    "chinese-model": "chinese_llama_sp/chinese_sp.model",
    "ja-model": "sp_test_models/test_ja_model_unigram.model",
    "en-model": "sp_test_models/test_model_unigram.model",
}
# One of each set of files: the model alone, tokenizer.json alone, and both.
QUICK = {"chinese-model", "pegasus-json", "t5-both"}


def real_folder(kind, folder):
    source = parts.SHARED / "tokenizers" / REAL[kind]
    if not source.is_file():
        pytest.skip(f"{source} is not here")
    folder.mkdir()
    plain = "tokenizer.model" if source.suffix == ".model" else source.name
    shutil.copy(source, folder / ("spiece.model" if kind.startswith("t5") else plain))
    if kind.startswith("t5"):
        parts.finish_unigram(folder, files=kind.split("-")[1], extra_ids=100)
    return folder


@pytest.mark.real
@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.matrix) for k in REAL]
)
def test_real_unigram_tokenizers_keep_the_laws(kind, tmp_path):
    folder = real_folder(kind, tmp_path / "base")
    name = "zh_med_medqa_exam" if kind == "chinese-model" else "en_med_ncbi_disease_abstracts"
    corpus = next(parts.SHARED.rglob(f"{name}.txt")).read_text()[:400_000]
    lines = [line for line in corpus.split("\n") if line]
    base, extension, choice = extended(folder, tmp_path / "vocab", lines, limit=500, min_count=8)
    assert len(choice.merges) > 50
    merges = choice.merges
    dropped = set()
    while bad := offenders(base, extension, hard_texts(base, extension, lines)):
        dropped |= bad  # as `learn` does
        merges = [merge for merge in merges if merge.token not in bad]
        base.extend(merges, tmp_path / "vocab")
        extension = families.load(tmp_path / "vocab")
    # The Japanese model spells English letter by letter: there are more ways to save as much.
    assert len(dropped) <= (0.05 if kind == "ja-model" else 0.01) * len(choice.merges)
    proof = prove(base, extension, hard_texts(base, extension, lines))
    assert proof.drift == 0 and proof.lengths.ratio < 0.99
    alive = {extension.map.texts[token_id] for token_id in proof.emitted}
    assert {m.token for m in merges} <= alive | choice.bridges
    if kind == "t5-model":
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tmp_path / "vocab")
        assert loaded.convert_tokens_to_ids("<extra_id_0>") == 32099
        assert loaded.convert_tokens_to_ids(merges[0].token) == 32100
        assert len(loaded) == extension.map.tokens
