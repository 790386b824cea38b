"""Which rows count as never trained: `pytest tests/test_untrained.py`."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import parts
from lexigraft.checkpoints.checkpoint import SINGLE, Checkpoint
from lexigraft.checkpoints.header import header_bytes
from lexigraft.checkpoints.survey import require_finite, survey
from lexigraft.errors import LexigraftError

TOKENS, WIDTH = 2000, 64
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


def trained(seed=0, tokens=TOKENS):
    """Rows as a trained table has them: a common part, and sizes that differ up to fourfold."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.5, 2.0, (tokens, 1))
    return 0.02 * (sizes * rng.standard_normal((tokens, WIDTH)) + rng.standard_normal(WIDTH))


def table(folder: Path, values, dtype="F32"):
    stored = np.asarray(values).astype(TYPES[dtype])
    head = header_bytes([("e", dtype, stored.shape)], {"format": "pt"})
    (folder / SINGLE).write_bytes(head + stored.tobytes())
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder).tensors["e"], stored.astype(np.float64)


def assert_found(folder, values, untrained, dtype="F32", tokens=TOKENS):
    tensor, stored = table(folder, values, dtype)
    found = survey(tensor, tokens)
    assert found.untrained.tolist() == sorted(untrained)
    rest = np.delete(stored[:tokens], found.untrained, axis=0)
    np.testing.assert_allclose(found.mean, rest.mean(axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_trained_rows_are_all_kept(dtype, tmp_path):
    assert_found(tmp_path, trained(), [], dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_vanished(dtype, tmp_path):
    values = trained()
    values[[5, 900, 1999]] = 0
    values[[7, 8]] = 1e-7 * np.random.default_rng(1).standard_normal((2, WIDTH))
    assert_found(tmp_path, values, [5, 7, 8, 900, 1999], dtype)
    values[: TOKENS // 2 + 100] = 0  # most of the table
    assert_found(tmp_path, values, [*range(TOKENS // 2 + 100), 1999], dtype)


def test_many_copies_and_few(tmp_path):
    values = trained()
    values[100:150] = values[100]
    values[700:707] = values[700]  # seven tokens that someone started alike
    assert_found(tmp_path, values, range(100, 150))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_unused_rows_beside_padding_rows(dtype, tmp_path):
    """Head rows of tokens that no text holds are all pushed the same way, padding as well."""
    rng = np.random.default_rng(2)
    pushed = -0.05 * np.ones(WIDTH)
    near = [pushed + 0.001 * rng.standard_normal((n, WIDTH)) for n in (48, 30)]
    values = np.concatenate([trained(), near[0]])
    values[400:430] = near[1]
    assert_found(tmp_path, values, range(400, 430), dtype)


def test_padding_of_fresh_noise_condemns_nobody(tmp_path):
    """Rows that never moved from their start look like any other: trained rows lie among them."""
    rng = np.random.default_rng(3)
    values = np.concatenate([trained(), 0.02 * rng.standard_normal((100, WIDTH))])
    assert_found(tmp_path, values, [])


def test_padding_that_is_the_mean_of_all(tmp_path):
    """What graft and others leave there: only exact copies of it were not trained."""
    values = trained()
    values = np.concatenate([values, np.repeat(values.mean(axis=0, keepdims=True), 64, axis=0)])
    values[11] = values[-1]
    assert_found(tmp_path, values, [11])


@pytest.mark.parametrize("padding", [0, 1, 2, 64])
def test_tables_of_one_kind_only(padding, tmp_path):
    assert_found(tmp_path, np.zeros((TOKENS + padding, WIDTH)), [])
    assert_found(tmp_path, np.ones((TOKENS + padding, WIDTH)), [])


def test_a_bias_is_not_judged(tmp_path):
    tensor, _ = table(tmp_path, np.zeros(TOKENS))
    assert not len(survey(tensor, TOKENS).untrained)


def test_large_tables_are_read_in_blocks(tmp_path, monkeypatch):
    values = trained()
    values[::3] = values[0]
    values = np.concatenate([values, np.zeros((20, WIDTH))])
    tensor, _ = table(tmp_path, values)
    whole = survey(tensor, TOKENS)
    monkeypatch.setattr("lexigraft.checkpoints.rows.BLOCK_BYTES", 4096)
    parts_ = survey(tensor, TOKENS)
    assert whole.untrained.tolist() == parts_.untrained.tolist() == list(range(0, TOKENS, 3))
    assert whole.sha256 == parts_.sha256
    np.testing.assert_allclose(whole.mean, parts_.mean, rtol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(dtype, value, tmp_path):
    values = np.concatenate([trained(), np.full((3, WIDTH), np.nan)])  # padding is not used
    tensor, _ = table(tmp_path, values, dtype)
    require_finite(tensor, survey(tensor, TOKENS))
    values[[17, 1500], 3] = value
    tensor, _ = table(tmp_path, values, dtype)
    with pytest.raises(LexigraftError, match=r"e in .* rows 17, 1500") as fault:
        require_finite(tensor, survey(tensor, TOKENS))
    assert fault.value.fix
    tensor, _ = table(tmp_path, values[:, 3], dtype)  # a bias
    assert survey(tensor, TOKENS).broken == [17, 1500]


@pytest.mark.real
def test_every_row_of_a_real_model_was_trained():
    folder = parts.SHARED / "models" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    model = Checkpoint.open(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert not len(survey(model.tensors["model.embed_tokens.weight"], rows).untrained)
