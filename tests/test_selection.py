"""Word lists, terms in texts, merges for terms, contrast and size, against slow plain oracles."""

import gzip
import itertools
import math
import random
import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexigraft.errors import LexigraftError
from lexigraft.selection import contrast, sizing, terms
from lexigraft.selection.lists import read_special, read_words
from lexigraft.selection.terms import TermReport, TermTable, count_occurrences, plan, variants
from parts import SHARED, mistral_folder

TERMS = SHARED / "terms"
CORPORA = SHARED / "corpora"


# Word lists


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_a_list_made_by_hand_is_cleaned_and_every_line_accounted_for(tmp_path):
    text = "\ufeff冠状\r\n冠状\r\n\r\n 动脉\n动脉\u3000\ncafe\u0301\t3\nx\ty\n\u200b\na\u2028b\na\x1bb\n"
    found = read_words(write(tmp_path / "list.txt", text))
    assert [(w.text, w.weight, w.line) for w in found.words] == [
        ("冠状", 1, 1), ("动脉", 1, 4), ("café", 3, 6),
    ]  # fmt: skip
    assert [(n.line, n.reason, n.kept) for n in found.report] == [
        (2, "duplicate: of line 1", False),
        (3, "blank", False),
        (4, "spaces removed", True),
        (5, "duplicate: of line 4", False),
        (6, "normalised to NFC", True),
        (7, "weight is no positive number: y", False),
        (8, "blank", False),
        (9, "line break inside", False),
        (10, "control character", False),
    ]
    assert found.lines == 10
    assert found.summary() == (
        "list.txt: 10 lines: 3 terms; dropped 2 duplicate (first: line 2 冠状), "
        "2 blank (first: line 3), 1 weight is no positive number (first: line 7 x), "
        "1 line break inside (first: line 9 a\u2028b), 1 control character (first: line 10 a\x1bb); "
        "changed 1 spaces removed (first: line 4 动脉), "
        "1 normalised to NFC (first: line 6 cafe\u0301); weights 1 to 3"
    )


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "many"])
def test_a_weight_that_is_no_positive_number_drops_its_line(tmp_path, weight):
    found = read_words(write(tmp_path / "list.tsv", f"good\t2.5\nbad\t{weight}\nplain\t\n"))
    assert [(w.text, w.weight) for w in found.words] == [("good", 2.5), ("plain", 1)]


def test_the_last_line_needs_no_end_and_a_blank_one_counts(tmp_path):
    assert read_words(write(tmp_path / "a", "x\ny")).lines == 2
    assert read_words(write(tmp_path / "b", "x\ny\n")).lines == 2
    assert read_words(write(tmp_path / "c", "x\ny\n\n")).lines == 3
    assert read_words(write(tmp_path / "d", "")).words == []


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_is_read_by_its_column(tmp_path, delimiter):
    rows = [["code", "disease", "weight"], ["A00", "霍乱", "4"], ["A01", "伤寒", ""], ["A02"]]
    path = write(tmp_path / "codes.csv", "\n".join(delimiter.join(row) for row in rows))
    found = read_words(f"{path}#column=disease")
    assert [(w.text, w.weight, w.line) for w in found.words] == [("霍乱", 4, 2), ("伤寒", 1, 3)]
    assert [(n.line, n.reason) for n in found.report] == [(4, "blank")]
    with pytest.raises(LexigraftError, match="which column") as caught:
        read_words(path)
    assert "code, disease, weight" in caught.value.needed
    with pytest.raises(LexigraftError, match="no column 'name'"):
        read_words(f"{path}#column=name")


def test_a_table_of_one_column_needs_no_header(tmp_path):
    found = read_words(write(tmp_path / "one.csv", '霍乱\n"pest, black"\n'))
    assert [w.text for w in found.words] == ["霍乱", "pest, black"]


def test_a_file_whose_name_looks_like_a_column_is_read_as_it_is(tmp_path):
    path = write(tmp_path / "a#column=b", "x\n")
    assert [w.text for w in read_words(path).words] == ["x"]


def test_gzipped_lists_and_vocab_files_are_read(tmp_path):
    path = tmp_path / "domain.vocab.gz"
    path.write_bytes(gzip.compress("▁冠状\t-1\n冠状\t-2\n▁of▁the\t-3\n".encode()))
    assert [w.text for w in read_words(path).words] == ["冠状", "of the"]


def test_a_sentencepiece_model_is_a_word_list_without_its_control_and_byte_pieces(tmp_path):
    found = read_words(mistral_folder(tmp_path / "mistral", fast=False) / "tokenizer.model")
    words = {word.text for word in found.words}
    assert {"heart", "的", "the"} <= words
    assert not any(word.startswith(("<0x", "▁", " ")) or word in ("<s>", "<unk>") for word in words)
    assert len(words) == len(found.words) < found.lines


@pytest.mark.parametrize("data", [b"caf\xe9\n", "术语\n".encode("utf-16"), b"a\x00b\n"])
def test_what_is_no_utf8_text_is_refused_with_a_way_out(tmp_path, data):
    path = tmp_path / "list.txt"
    path.write_bytes(data)
    with pytest.raises(LexigraftError, match="not UTF-8") as caught:
        read_words(path)
    assert "iconv" in caught.value.fix


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(LexigraftError, match="cannot read"):
        read_words(tmp_path / "missing.txt")
    broken = tmp_path / "list.txt.gz"
    broken.write_bytes(gzip.compress(b"word\n" * 1000)[:-9])
    with pytest.raises(LexigraftError, match="cannot read"):
        read_words(broken)
    with pytest.raises(LexigraftError, match="field larger"):
        read_words(write(tmp_path / "long.csv", "x" * 200_000))


def test_special_tokens_keep_their_text_and_report_clashes(tmp_path):
    text = "<|diagnosis|>\n <|drug|>\n<|end|>\n<|drug|>\n\ncafe\u0301\n<a b>\na\tb\n"
    found = read_special(write(tmp_path / "special.txt", text), existing={"<|end|>"})
    assert [w.text for w in found.words] == ["<|diagnosis|>", "<|drug|>", "cafe\u0301", "<a b>"]
    assert [(n.line, n.reason, n.kept) for n in found.report] == [
        (2, "spaces removed", True),
        (3, "clash: the base has this token", False),
        (4, "duplicate: of line 2", False),
        (5, "blank", False),
        (8, "control character", False),
    ]


@pytest.mark.real
@pytest.mark.skipif(not TERMS.is_dir(), reason="no ../shared/data/terms")
def test_the_published_lists_are_read_whole():
    medical = read_words(TERMS / "THUOCL_medical.tsv")
    assert len(medical.words) == medical.lines == 18_749
    assert medical.words[0].text == "精神" and medical.words[0].weight == 606_946
    codes = read_words(f"{TERMS / 'zh_icd10_cn_diseases.csv'}#column=disease")
    assert codes.words[0].text == "霍乱" and len(codes.words) == 1_586


# Occurrences


def occurrences_by_pattern(spellings, chunks):
    """The definition of `count_occurrences` as a regular expression per spelling."""
    letter = {"a": "A-Za-z\u0301", "б": "а-я\u0301", "한": "가-힣\u0301"}
    counts = {}
    for spelling in spellings:
        body = spelling.removeprefix(" ")
        pattern = re.escape(spelling)
        script = next((k for k in letter if re.match(f"[{letter[k]}]", body)), None)
        if script and not spelling.startswith(" "):
            pattern = f"(?<![{letter[script]}])" + pattern
        if script and script != "한":
            pattern += f"(?![{letter[script]}])"
        if " " + spelling in spellings:
            pattern = "(?<! )" + pattern
        found = re.compile(f"(?={pattern})")
        counts[spelling] = sum(w * len(found.findall(chunk)) for chunk, w in chunks.items())
    return counts


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(
        st.one_of(*(st.text(alphabet, min_size=1, max_size=3) for alphabet in ("ab", "бв", "한국", "冠状动"))),
        min_size=1, max_size=6,
    ),
    chunks=st.dictionaries(st.text("ab бв한국冠状动.\u0301", max_size=12), st.integers(1, 9), max_size=8),
)  # fmt: skip
def test_occurrences_equal_a_regular_expression_per_spelling(words, chunks):
    spellings = {s for word in words for s in (word, " " + word)}
    assert count_occurrences(spellings, chunks) == occurrences_by_pattern(spellings, chunks)


def test_words_of_spaced_scripts_stand_alone_and_those_of_others_are_found_inside_runs():
    chunks = {
        " angina": 3,
        "anginal": 5,
        "，患者冠状动脉正常": 2,
        "用angina和": 1,
        "환자는": 4,
        "대환자": 8,
    }
    asked = ["angina", " angina", "冠状动脉", "动脉", "환자", "heart rate"]
    assert count_occurrences(asked, chunks) == {
        "angina": 1, " angina": 3, "冠状动脉": 2, "动脉": 2, "환자": 4, "heart rate": 0,
    }  # fmt: skip


def test_a_space_belongs_to_the_spelling_that_has_it_only_if_that_is_asked_for():
    assert count_occurrences(["angina"], {" angina": 3}) == {"angina": 3}
    assert count_occurrences(["angina", " angina"], {" angina": 3}) == {"angina": 0, " angina": 3}


def test_variants_are_the_spellings_that_texts_use():
    assert variants("冠状") == ["冠状", " 冠状"]
    assert variants("Aspirin") == ["Aspirin", " Aspirin", "aspirin", " aspirin"]
    assert variants("AIDS") == ["AIDS", " AIDS"]  # "aids" is another word
    assert variants("pH") == ["pH", " pH", "PH", " PH", "ph", " ph"]


@pytest.mark.real
@pytest.mark.skipif(not TERMS.is_dir(), reason="no ../shared/data/terms")
def test_a_list_of_18_749_terms_is_counted_in_6_mb_of_chinese_in_seconds():
    listed = [word.text for word in read_words(TERMS / "THUOCL_medical.tsv").words]
    text = (CORPORA / "zh_med_tcm_classics.txt").read_text(encoding="utf-8")
    chunks = Counter(re.split(r"[\n，。；：、]", text))
    asked = [spelling for term in listed for spelling in variants(term)]
    began = time.process_time()
    counts = count_occurrences(asked, chunks)
    assert time.process_time() - began < 6  # 0.7 s on an idle core
    for term in random.Random(0).sample([term for term in listed if counts[term] > 3], 50):
        alone = re.compile(f"(?<! ){term}")
        plain = sum(
            weight * len(alone.findall(chunk)) for chunk, weight in chunks.items() if term in chunk
        )
        assert counts[term] == plain, term


# Why not


def why(spelling, occurrences=50, pieces=2, split=False):
    return terms.reasons(
        spelling,
        occurrences=occurrences,
        least=20,
        pieces=lambda text: list(range(pieces)),
        splits=lambda text: split,
    )


def test_every_reason_is_given_and_nothing_speaks_against_a_good_term():
    assert why(" angina") is None
    assert why("B12") == "contains a digit"
    assert why("第Ⅳ期") == "contains a digit"
    assert why("heart rate") == "crosses a split of the pre-tokenizer: several words"
    assert why("Crohn's") == "contains what is no letter: '"
    assert why("CT检查") == "mixed scripts"
    assert why("x" * 33) == "is more than 32 characters: 33"
    assert why("x" * 32) is None
    assert why("angina", split=True) == "crosses a split of the pre-tokenizer"
    assert why("angina", pieces=1) == "is one token already"
    assert why("angina", occurrences=1) == "too rare: occurs 1 time, fewer than 20"


def test_the_table_counts_terms_not_spellings():
    rows = [
        TermReport("angina", "angina", 5, reason="too rare: occurs 5 times, fewer than 20"),
        TermReport("angina", " angina", 400, 380, 50_001),
        TermReport("heart", " heart", 900, 0, 17, "is one token already"),
        TermReport("B12", "B12", 30, reason="contains a digit"),
        TermReport("rare", "rare", 1, reason="too rare: occurs 1 time, fewer than 20"),
    ]
    table = TermTable(rows)
    assert table.lines(top=2) == [
        "terms: 4 listed; 1 became tokens in 1 spellings, 95.0% of their 400 occurrences reached",
        "  1: is one token already",
        "  1: contains a digit",
        "  1: too rare",
        "  ' heart': 900 occurrences; is one token already",
        "  ' angina': token 50001; 380 of 400 occurrences (95.0%)",
        "  ... and 2 more terms",
    ]
    report = table.to_json()
    assert (report["listed"], report["became_tokens"], report["reached"]) == (4, 1, 380)
    assert report["rows"][1]["token_id"] == 50_001 and len(report["rows"]) == 5
    assert TermTable([]).lines() == ["terms: 0 listed; 0 became tokens in 0 spellings"]


# Merges for terms


def run_merges(symbols, merges):
    """What a BPE engine makes of `symbols`: the merge of the lowest rank first, from the left."""
    ranks = {(left, right): rank for rank, (_, left, right) in enumerate(merges)}
    parts = [(symbol,) for symbol in symbols]
    while True:
        present = [ranks[pair] for pair in itertools.pairwise(parts) if pair in ranks]
        if not present:
            return parts
        _, left, right = merges[min(present)]
        at, joined = 0, []
        while at < len(parts):
            if parts[at : at + 2] == [left, right]:
                joined.append(left + right)
                at += 2
            else:
                joined.append(parts[at])
                at += 1
        parts = joined


def fewest_bridges(wanted):
    """Exhaustive: the size of the smallest set of bridges with which every token has two parts.

    A lower bound of what merges can do: it does not ask whether one order of merges makes them all.
    """
    spans = {t[i:j] for t in wanted for i in range(len(t)) for j in range(i + 2, len(t) + 1)}
    for size in itertools.count():
        for bridges in itertools.combinations(sorted(spans - wanted), size):
            tokens = wanted | set(bridges)
            if all(
                any(
                    all(len(part) == 1 or part in tokens for part in (t[:at], t[at:]))
                    for at in range(1, len(t))
                )
                for t in tokens
            ):
                return size
    raise AssertionError("all spans together always suffice")


symbol_words = st.lists(st.integers(0, 3), min_size=2, max_size=7).map(tuple)
strengths = st.dictionaries(symbol_words, st.integers(1, 1000), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(strengths, st.integers(0, 12))
def test_each_planned_spelling_is_one_symbol_and_the_budget_is_kept(wanted, budget):
    merges = plan(list(wanted.items()), budget)
    assert len(merges) <= budget
    wholes = [whole for whole, _, _ in merges]
    assert len(set(wholes)) == len(wholes)
    assert all(whole == left + right for whole, left, right in merges)
    made = {(symbol,) for word in wanted for symbol in word}
    for whole, left, right in merges:
        assert left in made and right in made  # parts come before what is made of them
        made.add(whole)
    for word in wanted:
        if word in made:
            assert run_merges(word, merges) == [word]


@settings(max_examples=200, deadline=None)
@given(strengths)
def test_with_room_for_all_every_spelling_is_made_and_no_bridge_is_idle(wanted):
    merges = plan(list(wanted.items()), 1000)
    wholes = {whole for whole, _, _ in merges}
    assert wanted.keys() <= wholes
    used = {part for _, left, right in merges for part in (left, right)}
    assert wholes - wanted.keys() <= used


def test_the_bridges_are_within_a_twentieth_of_the_fewest_possible():
    rng = random.Random(1)
    fewest = planned = 0
    for _ in range(150):
        roots = [
            tuple(rng.choices(range(rng.choice((2, 3, 4, 6))), k=rng.choice((1, 2, 2))))
            for _ in range(4)
        ]
        wanted = {}
        for _ in range(rng.randint(2, 5)):
            word = sum(rng.choices(roots, k=rng.choice((2, 2, 3)))[:3], ())[:5]
            if len(word) > 1:
                wanted[word] = rng.randint(1, 100)
        least = fewest_bridges(set(wanted))
        count = len({whole for whole, _, _ in plan(list(wanted.items()), 1000)} - wanted.keys())
        assert least <= count <= least + 2
        fewest, planned = fewest + least, planned + count
    assert fewest > 100 and planned <= 1.05 * fewest


def words(*texts):
    return [(tuple(map(ord, text)), float(strength)) for text, strength in texts]


def texts_of(merges):
    return [tuple("".join(map(chr, part)) for part in merge) for merge in merges]


def test_a_part_that_is_asked_for_is_no_bridge_even_if_it_is_weaker():
    merges = plan(words(("冠状动脉", 100), ("动脉", 1), ("冠状", 2)), 10)
    assert {whole for whole, _, _ in texts_of(merges)} == {"冠状", "动脉", "冠状动脉"}


def test_bridges_are_shared_by_the_words_that_have_them():
    merges = plan(words(("abx", 9), ("aby", 8), ("abz", 7)), 10)
    assert [whole for whole, _, _ in texts_of(merges)] == ["ab", "abx", "aby", "abz"]


def test_the_strongest_come_first_and_what_does_not_fit_is_passed_over():
    asked = words(("abcd", 100), ("xy", 1), ("pqr", 50))
    assert [whole for whole, _, _ in texts_of(plan(asked, 4))] == ["ab", "abc", "abcd", "xy"]
    assert plan(asked, 0) == []


def test_what_may_be_no_token_is_used_as_no_bridge():
    asked = words(("abc", 1))
    assert texts_of(plan(asked, 5, allowed=lambda s: s != (97, 98))) == [
        ("bc", "b", "c"), ("abc", "a", "bc"),
    ]  # fmt: skip
    assert plan(asked, 5, allowed=lambda s: len(s) == 3) == []


def test_known_sequences_are_parts_that_cost_nothing():
    known = {tuple(map(ord, "ab")), tuple(map(ord, "xyz"))}
    merges = plan(words(("abc", 1), ("xyz", 9)), 5, known.__contains__)
    assert texts_of(merges) == [("abc", "ab", "c")]


@pytest.mark.real
@pytest.mark.skipif(not TERMS.is_dir(), reason="no ../shared/data/terms")
def test_real_terms_are_all_made_one_symbol_from_the_bytes_of_their_characters():
    listed = [word.text for word in read_words(TERMS / "THUOCL_medical.tsv").words[:3000]]
    wanted = {tuple(term.encode()): len(term) for term in listed}

    def whole_or_beginning(symbols):
        data = bytes(symbols)
        text = data.decode("utf-8", "ignore")
        return text.encode() == data or (not text and data[0] >= 0xC0)

    merges = plan(list(wanted.items()), 10**6, allowed=whole_or_beginning)
    ranks = {whole for whole, _, _ in merges}
    assert all(whole_or_beginning(whole) for whole in ranks)
    assert wanted.keys() <= ranks
    for word in random.Random(0).sample(sorted(wanted), 200):
        assert run_merges(word, merges) == [word]


# Contrast


def log_odds_of_one(y1, y2, n1, n2, share):
    """Monroe et al. 2008, equations 15, 16 and 22, for one word."""
    a, a0 = share * (y1 + y2), share * (n1 + n2)
    if not a:
        return 0.0, 0.0
    first = math.log((y1 + a) / (n1 + a0 - y1 - a))
    second = math.log((y2 + a) / (n2 + a0 - y2 - a))
    return first - second, (first - second) / math.sqrt(1 / (y1 + a) + 1 / (y2 + a))


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=20),
    st.integers(501, 10**6), st.integers(501, 10**6), st.floats(0.01, 2),
)  # fmt: skip
def test_log_odds_equal_the_formula_word_by_word(counts, n1, n2, share):
    delta, z = contrast.log_odds(
        [y1 for y1, _ in counts], [y2 for _, y2 in counts],
        domain_total=n1, contrast_total=n2, prior_share=share,
    )  # fmt: skip
    slow = [log_odds_of_one(y1, y2, n1, n2, share) for y1, y2 in counts]
    np.testing.assert_allclose(delta, [d for d, _ in slow], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(z, [s for _, s in slow], rtol=1e-9, atol=1e-12)


def test_log_odds_of_a_worked_example():
    """y = 20 against 0 in 1,000 tokens each: a = 2, a0 = 200, so 22 of 1,200 against 2 of 1,200."""
    delta, z = contrast.log_odds([20], [0], domain_total=1000, contrast_total=1000)
    assert delta[0] == pytest.approx(math.log(22 / 1178) - math.log(2 / 1198))
    assert z[0] == pytest.approx(delta[0] / math.sqrt(1 / 22 + 1 / 2))
    assert z[0] == pytest.approx(3.27, abs=0.005)


def test_few_occurrences_prove_little_and_the_size_of_the_texts_matters():
    n = {"domain_total": 10**6, "contrast_total": 10**6}
    _, z = contrast.log_odds([7, 8, 100, 100, 0], [0, 0, 100, 10, 50], **n)
    assert contrast.is_specific(z).tolist() == [False, True, False, True, False]
    # 100 against 10 says nothing where the domain text is ten times as long.
    _, z = contrast.log_odds([100], [10], domain_total=10**7, contrast_total=10**6)
    assert not contrast.is_specific(z)[0]


@pytest.mark.parametrize("rate", [1, 5, 20, 100])
def test_words_of_equal_rate_seldom_pass(rate):
    draw = np.random.default_rng(rate).poisson
    _, z = contrast.log_odds(
        draw(rate, 50_000), draw(rate, 50_000), domain_total=1e6, contrast_total=1e6
    )
    assert contrast.is_specific(z).mean() <= 0.025


def test_counts_above_their_total_are_no_counts():
    with pytest.raises(ValueError, match="larger than the total"):
        contrast.log_odds([5], [0], domain_total=4, contrast_total=4)


# How many


def falling(count, scale, total):
    """Savings whose sum up to k is total * (1 - exp(-k / scale))."""
    k = np.arange(count + 1)
    return np.diff(total * (1 - np.exp(-k / scale)))


def test_the_curve_starts_at_the_base_and_ends_with_everything():
    after = sizing.tokens_after([30, 20, 10], 100)
    assert after.tolist() == [100, 70, 50, 40]
    assert sizing.curve(after, 200) == [(0, 0.5), (1, 0.35), (2, 0.25), (3, 0.2)]
    points = sizing.curve(sizing.tokens_after(falling(5000, 800, 60_000), 100_000), 400_000)
    assert len(points) == sizing.POINTS and points[0][0] == 0 and points[-1][0] == 5000
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    with pytest.raises(ValueError, match="cannot save all"):
        sizing.tokens_after([60, 40], 100)


@pytest.mark.parametrize("scale", [100, 300, 1000])
def test_the_knee_of_an_exponential_is_where_its_slope_is_that_of_the_chord(scale):
    """d/dk (1 - exp(-k/s)) / (1 - exp(-n/s)) = 1/n gives k = s ln(n / (s (1 - exp(-n/s))))."""
    n = 5000
    expected = scale * math.log(n / (scale * (1 - math.exp(-n / scale))))
    found = sizing.knee(sizing.tokens_after(falling(n, scale, 60_000), 100_000))
    assert found == pytest.approx(expected, abs=1)


def test_a_straight_or_empty_curve_has_no_knee():
    assert sizing.knee(sizing.tokens_after([5] * 100, 1000)) == 100
    assert sizing.knee(sizing.tokens_after([0] * 100, 1000)) == 100
    assert sizing.knee(sizing.tokens_after([], 1000)) == 0


def test_a_further_thousand_is_read_off_the_curve():
    after = sizing.tokens_after([10] * 3000, 100_000)
    assert sizing.further_gain(after, 1000) == pytest.approx(10_000 / 90_000)
    assert sizing.further_gain(after, 2500) == pytest.approx(5_000 / 75_000)
    assert sizing.further_gain(after, 3000) == 0


SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49_152,
}  # fmt: skip
LLAMA2 = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11_008, "vocab_size": 32_000,
}  # fmt: skip
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}


def test_parameters_are_those_of_published_models():
    assert sizing.model_size(SMOLLM2, tied=True) == sizing.ModelSize(576, 134_515_008, 1)
    assert sizing.model_size(LLAMA2, tied=False) == sizing.ModelSize(4096, 6_738_415_616, 2)
    nested = sizing.model_size({"model_type": "x", "text_config": SMOLLM2}, tied=True)
    assert nested == sizing.model_size(SMOLLM2, tied=True)
    estimate = sizing.model_size(GPT2, tied=True)  # without its biases and position embeddings
    assert estimate and estimate.parameters == pytest.approx(124_439_808, rel=0.01)
    assert sizing.model_size({"vocab_size": 100}, tied=True) is None
    assert sizing.model_size({**SMOLLM2, "hidden_size": "576"}, tied=True) is None


def test_only_the_experts_that_a_token_passes_count():
    dense = sizing.model_size(SMOLLM2, tied=True)
    two = sizing.model_size(
        {**SMOLLM2, "num_local_experts": 8, "num_experts_per_tok": 2}, tied=True
    )
    assert two.parameters - dense.parameters == 30 * 3 * 576 * 1536


def test_speed_is_fastest_where_a_row_costs_what_it_saves():
    """S = T(0) N / (T(k) (N + k d m)) is largest where T falls, relatively, as N + k d m grows."""
    size = sizing.ModelSize(hidden=1000, parameters=1_000_000, matrices=2)
    after = sizing.tokens_after(falling(3000, 200, 600_000), 1_000_000)
    speeds = sizing.speed_up(after, size)
    assert speeds[0] == 1
    assert speeds[100] == pytest.approx(1 / (1 - 0.6 * (1 - math.exp(-0.5))) / 1.2)
    best = int(np.argmax(speeds))
    assert 0 < best < 3000
    saved_share = (after[best - 1] - after[best]) / after[best]
    assert saved_share == pytest.approx(2000 / (1_000_000 + 2000 * best), rel=0.02)


def test_expected_occurrences_scale_with_the_text():
    counts = np.arange(1, 102)
    assert sizing.expected_occurrences(counts, 1_000, 10_000) == pytest.approx((510, 110))
    assert sizing.expected_occurrences([], 1_000, 10_000) == (0, 0)


def choose(count=5000, scale=800, vocabulary=49_152, **more):
    return sizing.choose_size(
        falling(count, scale, 60_000), base_tokens=100_000, text_bytes=400_000,
        vocabulary=vocabulary, **more,
    )  # fmt: skip


def test_auto_takes_the_most_that_nothing_speaks_against():
    everything = choose(count=3000)
    assert everything.k == 3000 and "all that occur often enough" in everything.why
    assert everything.further == 0 and "more tokens would save" not in everything.why
    capped = choose()
    assert capped.k == 4915 and "10% of the base" in capped.why
    assert "85 more tokens would save another" in capped.why
    slow = choose(model=sizing.ModelSize(hidden=1000, parameters=1_000_000, matrices=2))
    assert slow.k == slow.best_speed_k < slow.knee * 2 and "slower" in slow.why
    assert slow.speed == pytest.approx(max(
        sizing.speed_up(sizing.tokens_after(falling(5000, 800, 60_000), 100_000),
                        sizing.ModelSize(1000, 1_000_000, 2))))  # fmt: skip


def test_a_number_asked_for_is_taken_or_what_there_is_of_it():
    assert choose(requested=1200).k == 1200
    short = choose(count=500, requested=1200)
    assert short.k == 500 and "500 tokens of 1,200 asked for" in short.why


def test_the_size_reports_what_its_rows_will_see():
    size = choose(count=100, counts=np.arange(200, 100, -1), counted_bytes=1000, train_bytes=2000)
    assert (size.median, size.low) == pytest.approx((301, 221.8))
    assert choose().median is None
    report = size.to_json()
    assert report["k"] == 100 and report["curve"][0] == (0, 0.25)
    assert report["ratio"] == pytest.approx(1 - 0.6 * (1 - math.exp(-100 / 800)))


def test_nothing_to_add_is_a_size_too():
    size = choose(count=0)
    assert size.k == 0 and size.ratio == 1 and size.curve == [(0, 0.25)]
