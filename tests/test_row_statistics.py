"""What graft says of its new rows: against numpy on the whole tensor. Numbers, not impressions."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import parts
from extend import extend
from lexigraft import families
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import header_bytes
from lexigraft.checks.rows import SAMPLE_VALUES, row_statistics
from lexigraft.errors import LexigraftError
from lexigraft.steps.graft import graft

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
EMBED = "model.embed_tokens.weight"


def stored(folder: Path, rows: np.ndarray, dtype: str = "F32"):
    """`rows` as a tensor on disk."""
    (folder / "config.json").write_text("{}")
    data = rows.astype(DTYPES[dtype])
    head = header_bytes([("E", dtype, data.shape)], {"format": "pt"})
    (folder / "model.safetensors").write_bytes(head + data.tobytes())
    return Checkpoint.open(folder).tensors["E"]


def draw(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_neighbours_are_those_of_the_whole_tensor(dtype, tmp_path):
    rows = draw(60)
    old = np.arange(50)
    found = row_statistics(stored(tmp_path, rows, dtype), range(50, 60), [[1, 2]] * 10, old, str)
    rows = rows.astype(DTYPES[dtype]).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(found.norms, np.quantile(norms[50:], [0.05, 0.5, 0.95]), rtol=1e-4)
    np.testing.assert_allclose(
        found.old_norms, np.quantile(norms[:50], [0.05, 0.5, 0.95]), rtol=1e-4
    )
    assert (found.rows, found.old_rows, found.sampled) == (10, 50, 50)
    assert (found.equal_new, found.equal_old) == (0, 0)
    assert [example.id for example in found.examples] == [50, 54, 59]
    for example in found.examples:
        by_hand = sorted(range(50), key=lambda i: -cosine(rows[i], rows[example.id]))[:3]
        assert [near.id for near in example.nearest] == by_hand
        for near in example.nearest:
            assert near.cosine == pytest.approx(cosine(rows[near.id], rows[example.id]), abs=1e-3)


def test_rows_that_equal_others_are_counted(tmp_path):
    rows = draw(58)
    rows[[50, 51, 52]] = rows[50]  # three alike
    rows[53] = rows[7]  # an old row
    rows[54] = rows[54 - 49]
    rows[55, :2] = rows[9, :2]  # its first 8 bytes only
    rows[57] = rows[8]  # a row that no token uses
    used = np.array([i for i in range(50) if i != 8])
    found = row_statistics(stored(tmp_path, rows), range(50, 58), [[1]] * 8, used, str)
    assert (found.equal_new, found.equal_old) == (3, 2)
    assert "3 equal another new row, 2 equal an old row" in found.line()


def test_rows_of_no_token_are_no_old_rows(tmp_path):
    rows = draw(60)
    rows[40:50] *= 1e3  # never trained
    rows[55] = rows[45]
    found = row_statistics(stored(tmp_path, rows), range(50, 60), [[1]] * 10, np.arange(40), str)
    assert found.old_norms[2] < 10 and found.old_rows == found.sampled == 40
    assert all(near.id < 40 for example in found.examples for near in example.nearest)


def test_a_large_table_is_sampled_and_pieces_are_neighbours_all_the_same(tmp_path):
    width, old = 4096, 3000
    rows = draw(old + 2, width)
    rows[old] = rows[11] + rows[2222]
    rows[old + 1] = rows[old - 1]
    assert old * width > SAMPLE_VALUES
    tensor = stored(tmp_path, rows)
    found = row_statistics(tensor, [old, old + 1], [[11, 2222], [2999]], np.arange(old), str)
    assert 0.9 * SAMPLE_VALUES / width < found.sampled <= SAMPLE_VALUES / width
    assert {near.id for near in found.examples[0].nearest[:2]} == {11, 2222}
    assert found.examples[1].nearest[0].id == 2999
    assert found.equal_old == 1  # which is looked for in all rows
    exact = np.quantile(np.linalg.norm(rows[:old], axis=1), 0.5)
    assert found.old_norms[1] == pytest.approx(exact, rel=0.01)
    assert "sampled" in found.line()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(60, 8), (60,), (1, 60)])
def test_a_row_that_is_not_finite_stops(value, shape, tmp_path):
    rows = draw(60)[:, : (8 if shape == (60, 8) else 1)].reshape(shape)
    rows.reshape(60, -1)[55, -1] = value
    with pytest.raises(LexigraftError, match="row 55 of 'word 55' holds NaN") as fault:
        row_statistics(
            stored(tmp_path, rows), range(50, 60), [[1]] * 10, np.arange(50), lambda i: f"word {i}"
        )
    assert "--init" in fault.value.fix


def test_a_bias_has_no_lengths_and_no_neighbours(tmp_path):
    assert (
        row_statistics(
            stored(tmp_path, draw(60)[:, 0]), range(50, 60), [[1]] * 10, np.arange(50), str
        )
        is None
    )


def test_no_new_rows_no_statistics(tmp_path):
    assert row_statistics(stored(tmp_path, draw(60)), [], [], np.arange(60), str) is None


# -- graft prints them


@pytest.fixture(scope="module")
def grafted(tmp_path_factory):
    """BASE, VOCAB and what graft says of an untied model."""
    folder = tmp_path_factory.mktemp("rows")
    base = parts.write_byte_level(folder / "base", vocab_size=330)
    tokens = families.load(base).map.tokens
    parts.write_model(base, tokens=tokens, rows=tokens + 9)
    vocab = extend(base, folder / "vocab", 40)
    return base, vocab, graft(base, vocab, output=folder / "model")


def test_graft_tells_of_its_rows(grafted):
    base, vocab, result = grafted
    by_name = {found.tensor: found for found in result.row_statistics}
    assert list(by_name) == [EMBED, "lm_head.weight"]
    tokens = families.load(base).map.tokens
    assert by_name[EMBED].old_rows == tokens  # without its padding rows
    extended = families.load(vocab)
    example = by_name[EMBED].examples[0]
    assert example.text == extended.decode([example.id])
    pieces = families.load(base).pieces(extended.map.texts[example.id])
    assert {near.id for near in example.nearest} >= set(pieces)
    text = "\n".join(result.lines())
    assert f"{EMBED}: norms of new rows" in text and "lm_head.weight: norms" in text
    assert text.count("nearest old rows of") == 3  # of the first tensor only
    data = json.loads(json.dumps(result.to_json()))["row_statistics"]
    assert data[0]["tensor"] == EMBED and len(data[1]["examples"][0]["nearest"]) == 3


def test_rows_that_were_never_trained_are_no_old_rows(grafted, tmp_path):
    import shutil

    base, vocab, _ = grafted
    bare = Path(shutil.copytree(base, tmp_path / "base"))
    zeros = bytes(8 * Checkpoint.open(bare).tensors[EMBED].row_bytes)
    parts.overwrite_row(bare, EMBED, 20, zeros)
    result = graft(bare, vocab, output=tmp_path / "model")
    tokens = families.load(base).map.tokens
    assert [found.old_rows for found in result.row_statistics] == [tokens - 8, tokens]


def test_rows_of_mean_all_are_all_alike_and_said_to_be(grafted, tmp_path):
    base, vocab, _ = grafted
    result = graft(base, vocab, output=tmp_path / "model", init="mean-all")
    assert [found.equal_new for found in result.row_statistics] == [40, 40]


def test_a_damaged_base_row_stops_the_graft_and_leaves_nothing(grafted, tmp_path):
    import shutil

    base, vocab, _ = grafted
    damaged = Path(shutil.copytree(base, tmp_path / "base"))
    first = families.load(vocab).map.texts[families.load(base).map.tokens]
    piece = families.load(base).pieces(first)[0]
    parts.overwrite_row(damaged, EMBED, piece, np.float32(np.nan).tobytes())
    with pytest.raises(LexigraftError):
        graft(damaged, vocab, output=tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())
