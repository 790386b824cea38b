"""How new rows start: `pytest tests/test_embeddings.py`."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import parts
from extend import extend
from lexigraft import families
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.growth import rows_hash
from lexigraft.checkpoints.survey import survey
from lexigraft.embeddings import AUTO, METHODS, Choice, Spelled, Start, choose, spell
from lexigraft.embeddings.spelling import characters_of
from lexigraft.embeddings.spread import spread_of
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import TokenMap

ROWS = np.arange(24, dtype=np.float32).reshape(6, 4)
CENTER = ROWS.mean(axis=0)
EMBEDDING = "model.embed_tokens.weight"


def start(method, pieces, rows=ROWS, center=CENTER, seed=0, **more):
    ids = range(100, 100 + len(pieces))
    spread = np.eye(rows.shape[1]) if rows.ndim > 1 else np.float64(1)
    return METHODS[method](
        Spelled(rows, pieces, center, ids, seed, **{"spread": lambda: spread, **more})
    )


def test_each_method_by_hand():
    pieces = [[1, 3, 3], [5], []]
    assert start("mean", pieces).tolist() == [
        ((ROWS[1] + 2 * ROWS[3]) / 3).tolist(),
        ROWS[5].tolist(),
        CENTER.tolist(),
    ]
    assert (start("first", pieces) == np.array([ROWS[1], ROWS[5], CENTER])).all()
    assert (start("last", pieces) == np.array([ROWS[3], ROWS[5], CENTER])).all()
    assert (start("mean-all", pieces) == CENTER).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("width", [(), (1,), (37,)])
def test_the_mean_sums_in_the_order_of_reduceat_to_the_bit(kind, width):
    """Manifests hold the hash of rows that were made with it."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((50, *width)).astype(kind)
    pieces = [random.integers(0, 50, 1 + n % 12).tolist() for n in range(48)]
    flat, lengths = np.concatenate(pieces), np.array([*map(len, pieces)])
    sums = np.add.reduceat(rows[flat], np.cumsum(lengths) - lengths, axis=0)
    means = sums / lengths.reshape(-1, *[1] * len(width)).astype(kind)
    found = start("mean", pieces, rows=rows, center=rows[0])
    assert found.tobytes() == means.tobytes()


def test_half_first_is_half_way_between_the_first_piece_and_the_mean():
    rows = start("half-first", [[1, 3, 5], [5], []])
    assert (rows == np.array([(ROWS[1] + ROWS[3]) / 2, ROWS[5], CENTER])).all()
    bias = start("half-first", [[0, 1], []], rows=np.float32([2, 6]), center=np.float32(9))
    assert bias.tolist() == [3, 9]


def test_outward_takes_the_distance_from_the_center_half_of_the_way_that_the_mean_lost():
    rows = np.float32([[3, 1, 1], [1, 3, 1], [1, -1, 1]])
    center = np.float32([1, 1, 1])
    found = start("outward", [[0, 1], [0], [], [1, 2], [0, 0]], rows=rows, center=center)
    # Pieces are 2 away, their mean the root of 2: the geometric mean of both is 2 ** 0.75.
    away = 2**0.75 / 2**0.5
    wanted = [[1 + away, 1 + away, 1], rows[0], center, center, rows[0]]
    assert np.allclose(found, np.float32(wanted), rtol=0, atol=1e-6)
    moved = start("outward", [[0, 1]], rows=rows + 50, center=center + 50)
    assert np.allclose(moved, found[:1] + 50, rtol=0, atol=1e-5)  # a constant changes nothing
    bias = start("outward", [[0, 1], []], rows=np.float32([2, 6]), center=np.float32(9))
    assert bias.tolist() == [4, 9]


def test_longer_pieces_weigh_more_by_their_characters():
    pieces, characters = [[1, 3], [5], [], [0, 2]], [[1, 3], [2], [], [0, 0]]
    rows = start("char-weighted", pieces, characters=characters)
    wanted = [(ROWS[1] + 3 * ROWS[3]) / 4, ROWS[5], CENTER, (ROWS[0] + ROWS[2]) / 2]
    assert (rows == np.array(wanted)).all()
    assert (start("char-weighted", pieces)[0] == (ROWS[1] + ROWS[3]) / 2).all()


@pytest.mark.parametrize(
    ("role", "tied", "sign"),
    [("embed", False, 1), ("head", False, -1), ("bias", False, -1), ("head", True, 1)],
)
def test_exponential_weights_run_to_the_end_in_the_embedding_and_to_the_start_in_the_head(
    role, tied, sign
):
    pieces = [[1, 3, 0], [5], []]
    weights = np.exp(2.0 * sign * np.arange(1, 4))  # AdaptiVocab: exp(+-2i), i = 1 ... k
    wanted = weights @ ROWS[pieces[0]] / weights.sum()
    rows = start("exponential", pieces, role=role, tied=tied)
    np.testing.assert_allclose(rows[0], wanted, rtol=1e-6)
    assert (rows[1:] == np.array([ROWS[5], CENTER])).all()
    long = start("exponential", [[0] + 2000 * [1] + [2]], role=role, tied=tied)
    assert np.isfinite(long).all()


def test_legible_looks_at_the_end_of_what_can_be_read_and_at_all_of_what_cannot():
    pieces = [[1, 3, 0], [1, 3, 0], [5], [2, 4], []]
    characters = [[2, 1, 4], [1 / 3, 2 / 3, 1], [1], [1 / 3 + 2 / 3, 1 / 3 + 1 / 3 + 1 / 3], []]
    rows = start("legible", pieces, characters=characters)
    assert (rows == start("exponential", pieces))[[0, 2, 3, 4]].all()
    assert (rows[1] == start("outward", pieces)[1]).all() and (rows[1] != rows[0]).any()
    assert (start("legible", pieces) == start("exponential", pieces)).all()  # nothing is known
    bias = start("legible", pieces[:2], rows=ROWS[:, 0], center=CENTER[0], characters=characters)
    assert bias[1] == ROWS[pieces[1], 0].mean()


def test_pieces_hold_as_many_characters_as_the_token(tmp_path):
    base = families.load(parts.write_byte_level(tmp_path))
    words = ["angina", " cardiac", "患者", " 冠状动脉", "élan"]
    pieces = [base.encode(word) for word in words]
    characters = characters_of(base, pieces)
    assert [len(c) for c in characters] == [len(p) for p in pieces]
    assert [sum(c) for c in characters] == pytest.approx([len(word) for word in words])
    assert characters[2] == pytest.approx([1 / 3] * 6)


def _whitened(rows, center, spread):
    """Rows as draws of N(0, 1), if they are what transformers draws."""
    away = (rows.astype(np.float64) - center) / np.sqrt(1e-9)
    return np.linalg.solve(spread, away.T).T


def test_gaussian_rows_are_drawn_as_transformers_draws_them(tmp_path):
    """Mean and covariance of both against the analytic ones, and their fourth moments."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens, width, new = 300, 16, 4000
    folder = parts.write_model(tmp_path, tokens=tokens, hidden=width, tied=True)
    tensor = Checkpoint.open(folder).tensors["model.embed_tokens.weight"]
    values = Checkpoint.open(folder).read(tensor.name).astype(np.float64)
    known = survey(tensor, tokens)
    spread = spread_of(tensor, tokens, known)
    np.testing.assert_allclose(spread @ spread.T, np.cov(values.T, bias=True), rtol=1e-4, atol=1e-9)
    center = known.mean.astype(np.float32)
    ours = start("gaussian", [[0]] * new, values.astype(np.float32), center, spread=lambda: spread)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(tokens + new, mean_resizing=True)
    theirs = model.get_input_embeddings().weight[tokens:].detach().numpy()
    for rows in (ours, theirs):
        drawn = _whitened(rows, known.mean, spread)
        assert np.abs(drawn.mean(axis=0)).max() < 5 / np.sqrt(new)
        assert np.abs(np.cov(drawn.T) - np.eye(width)).max() < 5 * np.sqrt(2 / new)
        assert (drawn**4).mean() == pytest.approx(3, abs=0.1)  # of a normal distribution
    drawn = _whitened(ours, known.mean, spread)
    between = drawn[:-1] * drawn[1:]  # rows know nothing of each other
    assert np.abs(between.mean(axis=0)).max() < 5 / np.sqrt(new)


def test_gaussian_where_the_covariance_is_singular(tmp_path):
    """transformers gives every token the same row there."""
    base = parts.write_byte_level(tmp_path / "base")
    parts.write_model(base, tokens=382, hidden=512, layers=1)
    tensor = Checkpoint.open(base).tensors["model.embed_tokens.weight"]
    spread = spread_of(tensor, 382, survey(tensor, 382))
    values = Checkpoint.open(base).read(tensor.name).astype(np.float64)
    assert np.isfinite(spread).all()
    covariance = np.cov(values.T, bias=True)
    assert np.abs(spread @ spread.T - covariance).max() < 1e-6 * covariance.max()
    rows = start("gaussian", [[0]] * 5, values, values.mean(axis=0), spread=lambda: spread)
    assert len(np.unique(rows, axis=0)) == 5


def test_gaussian_of_a_bias_is_transformers_own():
    rows = ROWS[:, 0]
    drawn = start("gaussian", [[0]] * 4000, rows.astype(np.float64), 0.0 * CENTER[0].astype(float),
                  spread=lambda: np.float64(3.0))  # fmt: skip
    assert drawn.shape == (4000,)
    assert drawn.std() == pytest.approx(3e-9, rel=0.05)


def test_random_rows_have_the_stated_spread_and_depend_on_id_and_seed_alone():
    rows = start("random", [[0]] * 500, center=np.zeros(64, np.float32))
    assert rows.std() == pytest.approx(0.02, rel=0.05)
    assert rows.mean() == pytest.approx(0, abs=0.002)
    assert (start("random", [[3, 4]] * 3)[:2] == start("random", [[0]] * 2)).all()
    assert (start("random", [[0]]) != start("random", [[0]], seed=1)).any()


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=8))
def test_every_method_gives_one_row_per_token(pieces):
    for method in METHODS:
        for rows, center in ((ROWS, CENTER), (ROWS[:, 0], CENTER[0])):
            result = start(method, pieces, rows, center)
            assert result.shape == (len(pieces), *rows.shape[1:])
            assert result.dtype == np.float32
    for token, row in zip(pieces, start("mean", pieces), strict=True):
        expected = ROWS[token].mean(axis=0) if token else CENTER
        np.testing.assert_allclose(row, expected, rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_auto_is_the_measured_rule_and_names_are_checked(tied):
    auto = choose("auto", tied=tied)
    assert (auto.embed, auto.head) == AUTO["tied" if tied else "untied"]
    assert auto.reason.startswith("auto: ")
    for name in METHODS.keys() - {"copy", "donor"}:
        assert str(choose(name, tied=tied)) == name
    with pytest.raises(LexigraftError, match="--init best") as fault:
        choose("best", tied=tied)
    assert "mean" in fault.value.needed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_from_disk_equal_rows_from_memory_in_any_block(dtype, tmp_path):
    base = parts.write_byte_level(tmp_path / "base")
    vocab = extend(base, tmp_path / "vocab", 40, literal=3)
    family, new = families.load(base), TokenMap.read(vocab)
    first_id = family.map.tokens
    parts.write_model(base, tokens=first_id, dtype=dtype)
    pieces = spell(family, new, range(first_id, new.tokens))
    assert len(pieces) == 40
    assert all(
        b"".join(map(family.token_bytes, spelt)).decode() == new.texts[first_id + place]
        for place, spelt in enumerate(pieces)
    )
    checkpoint = Checkpoint.open(base)
    table = checkpoint.tensors["model.embed_tokens.weight"]
    known = survey(table, first_id)
    rows = Start.of(choose("mean", tied=False), family, new).rows(table, "embed", lambda: known)
    values = checkpoint.read(table.name).astype(np.float32)
    expected = np.array([values[spelt].mean(axis=0, dtype=np.float64) for spelt in pieces])
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    stored = rows(0, 40)
    assert stored.dtype == kinds[dtype]
    off = np.abs(stored.astype(np.float64) - expected)
    assert (off <= np.abs(expected) * np.float64(ml_dtypes.finfo(kinds[dtype]).eps) + 1e-6).all()
    assert (np.concatenate([rows(0, 7), rows(7, 40)]) == rows(0, 40)).all()
    import hashlib

    assert rows_hash(table, 40, rows) == hashlib.sha256(stored.tobytes()).hexdigest()


def test_an_unused_id_starts_at_the_mean(tmp_path):
    base = parts.write_byte_level(tmp_path)
    family = families.load(base)
    tokens = family.map.tokens
    gap = TokenMap({**family.map.texts, tokens + 2: "garden river"}, frozenset({tokens + 2}))
    pieces = spell(family, gap, range(tokens, gap.tokens))
    assert pieces[:2] == [[], []]
    assert pieces[2]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"donor"}))
@pytest.mark.parametrize("role", ["embed", "head"])
def test_no_row_depends_on_the_blocks(method, role, tmp_path):
    base = parts.write_byte_level(tmp_path / "base")
    vocab = extend(base, tmp_path / "vocab", 90, literal=3)
    family, new = families.load(base), TokenMap.read(vocab)
    tokens = family.map.tokens
    parts.write_model(base, tokens=tokens)
    tensor = Checkpoint.open(base).tensors["lm_head.weight" if role == "head" else EMBEDDING]
    known = survey(tensor, tokens)
    copies = {tokens + 4: [3], tokens + 70: [7, 8]}
    choice = Choice(method, method, "")
    rows = Start.of(choice, family, new, copies=copies).rows(tensor, role, lambda: known)
    whole = rows(0, 90)
    for cuts in ([0, 1, 90], [0, 63, 64, 90], [0, 31, 32, 33, 90]):
        pieces = [rows(a, b) for a, b in pairwise(cuts)]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()
    again = Start.of(choice, family, new, copies=copies).rows(tensor, role, lambda: known)
    assert again(0, 90).tobytes() == whole.tobytes()


def test_two_methods_and_what_does_not_fit():
    both = choose("mean,first", tied=False)
    assert (both.of("embed"), both.of("head"), both.of("bias")) == ("mean", "first", "first")
    assert (str(both), str(choose("mean,mean", tied=True))) == ("mean,first", "mean")
    assert str(choose("auto", tied=True, init_from=True)) == "copy"
    assert str(choose("donor,first", tied=False, donor=True)) == "donor,first"
    for init, options in (
        ("mean,first", {"tied": True}),
        ("mean,first,last", {"tied": False}),
        ("copy", {"tied": False}),
        ("donor", {"tied": False}),
        ("first", {"tied": False, "donor": True}),
        ("auto", {"tied": False, "donor": True, "init_from": True}),
        ("mean,", {"tied": False}),
        ("a b:c", {"tied": False}),
    ):
        with pytest.raises(LexigraftError) as fault:
            choose(init, **options)
        assert fault.value.needed and fault.value.fix
