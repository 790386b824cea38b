"""Rows translated from another model: `pytest tests/test_donor.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import parts
from extend import extend
from lexigraft import families
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.embeddings import donor as module
from lexigraft.embeddings import pursuit
from lexigraft.embeddings.donor import Donor
from lexigraft.embeddings.pursuit import matching_pursuit
from lexigraft.errors import LexigraftError
from lexigraft.manifest import Manifest
from lexigraft.steps.graft import graft

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def textbook(vector, atoms, count):
    """The definition: the atom of the largest |cosine|, then all weights anew by least squares."""
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen, weights, left = [], np.zeros(0), vector
    for _ in range(count):
        if np.linalg.norm(left) < 1e-4 * np.linalg.norm(vector):
            break
        cosines = np.abs(unit @ left)
        cosines[chosen] = -1
        chosen.append(int(cosines.argmax()))
        weights = np.linalg.lstsq(atoms[chosen].T, vector, rcond=None)[0]
        left = vector - weights @ atoms[chosen]
    return chosen, weights


def blocks_of(atoms, step):
    return lambda: (atoms[i : i + step] for i in range(0, len(atoms), step))


@pytest.mark.parametrize(("number", "width", "count"), [(200, 32, 8), (60, 64, 20), (500, 24, 16)])
@pytest.mark.parametrize("step", [7, 1000])
def test_equal_to_the_textbook(number, width, count, step):
    rng = np.random.default_rng(number)
    scale = rng.uniform(0.2, 3, (number, 1))
    atoms = (scale * rng.standard_normal((number, width))).astype(np.float32)
    vectors = rng.standard_normal((9, width)).astype(np.float32)
    places, weights = matching_pursuit(vectors, blocks_of(atoms, step), count)
    assert places.shape == weights.shape == (9, count)
    for vector, place, weight in zip(vectors, places, weights, strict=True):
        chosen, expected = textbook(vector.astype(float), atoms.astype(float), count)
        assert place[: len(chosen)].tolist() == chosen
        np.testing.assert_allclose(weight[: len(chosen)], expected, rtol=1e-3, atol=1e-4)


def test_a_sum_of_few_atoms_is_found_again(monkeypatch):
    rng = np.random.default_rng(1)
    atoms = rng.standard_normal((400, 128)).astype(np.float32)
    truth = [rng.choice(400, 4, replace=False) for _ in range(30)]
    shares = rng.uniform(1, 2, (30, 4)) * rng.choice([-1, 1], (30, 4))
    vectors = np.array([s @ atoms[t] for s, t in zip(shares, truth, strict=True)], np.float32)
    places, weights = matching_pursuit(vectors, blocks_of(atoms, 64), 16)
    for row in range(30):
        used = weights[row] != 0
        assert sorted(places[row][used]) == sorted(truth[row])
        found = dict(zip(places[row], weights[row], strict=True))
        assert [found[i] for i in truth[row]] == pytest.approx(shares[row], rel=1e-4)
    monkeypatch.setattr(pursuit, "_BASES_BYTES", 1)  # one vector at a time
    alone = matching_pursuit(vectors, blocks_of(atoms, 64), 16)
    assert (alone[0][weights != 0] == places[weights != 0]).all()
    np.testing.assert_allclose(alone[1], weights, rtol=1e-4, atol=1e-6)


def test_odd_atoms_and_vectors():
    atoms = np.zeros((5, 3), np.float32)
    atoms[1] = atoms[2] = [1, 0, 0]  # twice the same, three that are nothing
    vectors = np.array([[2, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    places, weights = matching_pursuit(vectors, blocks_of(atoms, 2), 4)
    assert (places[0][0], weights[0].tolist()) == (1, [2, 0, 0, 0])
    assert not weights[1:].any()  # nothing points there; nothing is asked
    empty = matching_pursuit(vectors[:0], blocks_of(atoms, 2), 4)
    assert [array.shape for array in empty] == [(0, 4), (0, 4)]


# -- from a model on disk


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A base, VOCAB, and a donor that has nine of its thirty new tokens."""
    root = tmp_path_factory.mktemp("donor")
    base = parts.write_byte_level(root / "base", vocab_size=400)
    tokens = families.load(base).map.tokens
    parts.write_model(base, tokens=tokens, hidden=32)
    vocab = extend(base, root / "vocab", 30, literal=1)
    donor = extend(base, root / "donor", 9)
    parts.write_model(donor, tokens=tokens + 9, hidden=64, seed=5)
    return root, base, vocab, donor, tokens


def copy_of(base: Path, target: Path) -> Path:
    return Path(shutil.copytree(base, target))


def test_rows_are_the_sums_that_the_donor_shows(scene, tmp_path, capsys):
    _, base, vocab, donor, tokens = scene
    graft(base, vocab, output=tmp_path / "model", donor=donor)
    graft(base, vocab, output=tmp_path / "mean", init="mean")
    assert "9 of the 30 new tokens" in capsys.readouterr().err
    old, theirs = Checkpoint.open(base), Checkpoint.open(donor)
    new, mean = Checkpoint.open(tmp_path / "model"), Checkpoint.open(tmp_path / "mean")
    special = families.load(base).map.special
    shared = [i for i in range(tokens) if i not in special]
    for name in (EMBED, HEAD):
        table, atoms = old.read(name).astype(float), theirs.read(name)[shared].astype(float)
        for row in range(9):
            vector = theirs.read(name)[tokens + row].astype(float)
            chosen, weights = textbook(vector, atoms, module.ATOMS)
            wanted = weights @ table[np.array(shared)[chosen]]
            found = new.read(name)[tokens + row]
            # 64 atoms in 64 dimensions: what is left at the end is rounding, and so is their order
            assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
        rest = slice(tokens + 9, tokens + 30)
        assert new.read(name)[rest].tobytes() == mean.read(name)[rest].tobytes()
    record = Manifest.read(tmp_path / "model").last("graft")
    assert record.init == "donor"
    assert set(record.start.methods.values()) == {"donor"}
    given = record.start.donor
    assert (given.name, given.known, given.shared) == ("donor", 9, len(shared))
    assert given.token_map == families.load(donor).map.hash


def test_a_donor_in_the_same_space_gives_its_own_rows(scene, tmp_path):
    """Shared rows equal, new row a sum of three of them: the graft finds that very row."""
    _, base, vocab, donor, tokens = scene
    import torch
    from transformers import AutoModelForCausalLM

    parts.write_model(base_ := copy_of(base, tmp_path / "base"), tokens=tokens, hidden=128)
    target = copy_of(donor, tmp_path / "donor")
    model = AutoModelForCausalLM.from_pretrained(base_, dtype=torch.float32)
    model.resize_token_embeddings(tokens + 9)
    wanted = {}
    with torch.no_grad():
        for name, table in ((EMBED, model.model.embed_tokens.weight), (HEAD, model.lm_head.weight)):
            for row in range(9):
                rows = table[[10 + row, 200 + row, 300]]
                table[tokens + row] = 2 * rows[0] - rows[1] + 1.5 * rows[2]
            wanted[name] = table[tokens : tokens + 9].clone().numpy()
    model.save_pretrained(target)
    graft(base_, vocab, output=tmp_path / "model", donor=target)
    new = Checkpoint.open(tmp_path / "model")
    for name, rows in wanted.items():
        np.testing.assert_allclose(new.read(name)[tokens : tokens + 9], rows, rtol=1e-3, atol=1e-4)


def test_rows_do_not_depend_on_blocks(scene, tmp_path, monkeypatch):
    _, base, vocab, donor, _ = scene
    graft(base, vocab, output=tmp_path / "one", donor=donor)
    monkeypatch.setattr("lexigraft.checkpoints.growth.block_rows", lambda tensor: 7)
    graft(base, vocab, output=tmp_path / "many", donor=donor)
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert all(one.read(n).tobytes() == many.read(n).tobytes() for n in one.tensors)


@pytest.mark.matrix
def test_rows_do_not_depend_on_the_number_of_threads(scene, tmp_path):
    """Matrix products of a size that BLAS gives to several threads."""
    _, base, vocab, donor, tokens = scene
    wide, theirs = copy_of(base, tmp_path / "base"), copy_of(donor, tmp_path / "donor")
    parts.write_model(wide, tokens=tokens, hidden=512, layers=1)
    parts.write_model(theirs, tokens=tokens + 9, hidden=512, layers=1, seed=3)
    code = (
        "import sys; from lexigraft.steps.graft import graft\n"
        "base, vocab, donor, out = sys.argv[1:]\n"
        "graft(base, vocab, donor=donor, output=out + '/donor')\n"
        "graft(base, vocab, init='gaussian', output=out + '/gaussian')\n"
    )
    for threads in ("1", "2"):
        command = [sys.executable, "-c", code, wide, vocab, theirs, tmp_path / threads]
        (tmp_path / threads).mkdir()
        limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), threads)
        subprocess.run(command, env=os.environ | limits, check=True)
    for kind in ("donor", "gaussian"):
        one, two = (Checkpoint.open(tmp_path / threads / kind) for threads in ("1", "2"))
        assert all(one.read(n).tobytes() == two.read(n).tobytes() for n in one.tensors)


def test_tokens_are_matched_by_text_across_families(tmp_path):
    byte_level = families.load(parts.write_byte_level(tmp_path / "byte"))
    pieces = families.load(parts.write_sentencepiece(tmp_path / "sp"))
    words = families.load(parts.write_wordpiece(tmp_path / "wp"))
    for other in (pieces, words):
        mine, theirs = module._by_text(byte_level), module._by_text(other)
        shared = mine.keys() & theirs.keys()
        assert len(shared) > 40
        assert b" garden" in shared or b" house" in shared
        for text in shared:
            assert byte_level.token_bytes(mine[text]) == text
            assert other.token_bytes(theirs[text]).strip() == text.strip()
    assert pieces.map.ids["<0x61>"] < pieces.map.ids["a"]
    assert module._by_text(pieces)[b"a"] == pieces.map.ids["a"]  # the letter, not the byte


def test_a_byte_level_donor_for_a_sentencepiece_base(tmp_path):
    base = parts.write_sentencepiece(tmp_path / "base", vocab_size=400)
    donor = parts.write_byte_level(tmp_path / "donor", vocab_size=700)
    mine, theirs = (module._by_text(families.load(folder)) for folder in (base, donor))
    lacking = [text.decode() for text in theirs.keys() - mine.keys() if text[:1] == b" "]
    words = sorted(text for text in lacking if text[1:].isalpha() and len(text) > 5)
    assert words
    parts.write_model(base, tokens=400, eos=2)
    parts.write_model(donor, tokens=families.load(donor).map.tokens, hidden=64)
    parts.lengthen(base, vocab := tmp_path / "vocab", [word * 3 for word in words] * 20)
    graft(base, vocab, output=tmp_path / "model", donor=donor)
    graft(base, vocab, output=tmp_path / "mean", init="mean")
    new = families.load(vocab)
    made, mean = (Checkpoint.open(tmp_path / name).read(EMBED) for name in ("model", "mean"))
    moved = [i for i in range(400, new.map.tokens) if (made[i] != mean[i]).any()]
    assert {new.token_bytes(i) for i in moved} == {
        text for i in range(400, new.map.tokens) if (text := new.token_bytes(i)) in theirs
    }
    assert {new.token_bytes(i).decode() for i in moved} >= set(words[:1])


def test_a_head_alone_and_a_tied_donor(scene, tmp_path):
    _, base, vocab, donor, tokens = scene
    tied = copy_of(donor, tmp_path / "tied")
    parts.write_model(tied, tokens=tokens + 9, hidden=64, seed=5, tied=True)
    graft(base, vocab, output=tmp_path / "model", donor=tied, init="mean,donor")
    record = Manifest.read(tmp_path / "model").last("graft")
    assert record.init == "mean,donor"
    assert record.start.methods == {EMBED: "mean", HEAD: "donor"}


def test_donors_that_are_none(scene, tmp_path):
    _, base, vocab, donor, tokens = scene
    broken = copy_of(donor, tmp_path / "broken")
    parts.overwrite_row(broken, EMBED, 50, np.float32(np.nan).tobytes())
    small = copy_of(donor, tmp_path / "small")
    parts.write_model(small, tokens=tokens)
    foreign = parts.write_sentencepiece(tmp_path / "foreign", vocab_size=320)
    parts.write_model(foreign, tokens=320)
    for folder, words in (
        (broken, "rows 50"),
        (small, "rows for"),
        (tmp_path / "nowhere", "nowhere"),
        (vocab, "config.json"),
        (base, "none of the 30 new tokens"),
        (foreign, "share"),
    ):
        with pytest.raises(LexigraftError, match=words) as fault:
            graft(base, vocab, output=tmp_path / "model", donor=folder)
        assert fault.value.fix
        assert not list(tmp_path.glob("model*"))


@pytest.mark.real
def test_a_real_tokenizer_knows_real_words(tmp_path):
    """SmolLM2's tokens are looked for among Qwen3's: most of them are there, byte for byte."""
    smol, qwen = (parts.SHARED / "tokenizers" / n for n in ("smollm2_hf", "qwen3_hf"))
    if not (smol.is_dir() and qwen.is_dir()):
        pytest.skip(f"no {smol} or {qwen}")
    mine, theirs = (module._by_text(families.load(folder)) for folder in (smol, qwen))
    assert len(mine.keys() & theirs.keys()) > 30_000
    assert b" cardiovascular" in mine.keys() & theirs.keys()


def test_each_new_token_knows_its_donor_id(scene):
    _, base, vocab, donor, tokens = scene
    found = Donor.open(donor, families.load(base), families.load(vocab))
    texts, theirs = families.load(vocab).map.texts, families.load(donor).map.texts
    assert found.known == 9
    for row, token_id in enumerate(found.wanted):
        if token_id is not None:
            assert theirs[token_id] == texts[tokens + row]
    dry = graft(base, vocab, output=base.parent / "none", donor=donor, dry_run=True)
    assert dry.init == "donor" and not (base.parent / "none").exists()
