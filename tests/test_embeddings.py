"""How new rows start: `pytest tests/test_embeddings.py`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import parts
from extend import extend
from lexigraft import families
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.growth import rows_hash, survey
from lexigraft.embeddings import METHODS, Spelled, resolve, spell, starter
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import TokenMap

ROWS = np.arange(24, dtype=np.float32).reshape(6, 4)
CENTER = ROWS.mean(axis=0)


def start(method, pieces, rows=ROWS, center=CENTER, seed=0):
    ids = range(100, 100 + len(pieces))
    return METHODS[method](Spelled(rows, pieces, center, ids, seed))


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


def test_auto_is_the_subword_mean_and_names_are_checked():
    assert resolve("auto") == "mean"
    assert [resolve(name) for name in METHODS] == list(METHODS)
    with pytest.raises(LexigraftError, match="--init best") as fault:
        resolve("best")
    assert "mean" in fault.value.needed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_from_disk_equal_rows_from_memory_in_any_block(dtype, tmp_path):
    base = parts.write_byte_level(tmp_path / "base")
    vocab = extend(base, tmp_path / "vocab", 40, literal=3)
    family, new = families.load(base), TokenMap.read(vocab)
    first_id = family.map.tokens
    parts.write_model(base, tokens=first_id, dtype=dtype)
    pieces = spell(family, new, first_id)
    assert len(pieces) == 40
    assert all(
        b"".join(map(family.token_bytes, spelt)).decode() == new.texts[first_id + place]
        for place, spelt in enumerate(pieces)
    )
    checkpoint = Checkpoint.open(base)
    table = checkpoint.tensors["model.embed_tokens.weight"]
    mean = survey(table, first_id).mean
    rows = starter(table, pieces, first_id, init="mean", seed=0, center=lambda: mean)
    values = checkpoint.read(table.name).astype(np.float32)
    expected = np.array([values[spelt].mean(axis=0, dtype=np.float64) for spelt in pieces])
    np.testing.assert_allclose(rows(0, 40), expected, rtol=1e-5, atol=1e-6)
    assert (np.concatenate([rows(0, 7), rows(7, 40)]) == rows(0, 40)).all()
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    stored = rows(0, 40).astype(kinds[dtype])
    import hashlib

    assert rows_hash(table, 40, rows) == hashlib.sha256(stored.tobytes()).hexdigest()


def test_an_unused_id_starts_at_the_mean(tmp_path):
    base = parts.write_byte_level(tmp_path)
    family = families.load(base)
    tokens = family.map.tokens
    gap = TokenMap({**family.map.texts, tokens + 2: "garden river"}, frozenset({tokens + 2}))
    pieces = spell(family, gap, tokens)
    assert pieces[:2] == [[], []]
    assert pieces[2]
