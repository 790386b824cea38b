"""From texts to packed blocks: order, weights, replay, what is kept outside memory, and refusals."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import parts
from lexigraft import LexigraftError, families, train
from lexigraft.corpus import held_out, read_documents
from lexigraft.files import read_json
from lexigraft.models import packing
from lexigraft.models.bits import windows
from lexigraft.models.packing import IGNORED, pack, packed
from lexigraft.models.preparation import occurrences, prepare, read_texts
from lexigraft.models.reading import (
    Documents,
    held_out_general,
    in_order,
    pieces,
    reading,
    shuffled,
)
from test_train import make_place, settings  # noqa: F401 - the fixture `place`

torch.set_num_threads(1)
TEXTS = [f"document {i} 冠状动脉 " + "x" * (i % 90) for i in range(400)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_documents_outside_memory_are_the_documents(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr("lexigraft.models.reading._IN_MEMORY", 2**20 if in_memory else 50)
    found = Documents(((text, 1.0) for text in TEXTS), near=tmp_path)
    assert list(found) == TEXTS and found[3] == TEXTS[3] and found[5:8] == TEXTS[5:8]
    assert (len(found), found.bytes) == (400, sum(len(text.encode()) for text in TEXTS))
    assert list(tmp_path.iterdir()) == []  # a file without a name
    assert not Documents()


def test_the_order_is_that_of_hashes_of_seed_pass_and_content():
    repeated = [*TEXTS, TEXTS[7]]
    by_hand = sorted(repeated, key=lambda text: hashlib.sha256(f"5:2:{text}".encode()).digest())
    assert list(in_order(Documents((text, 1.0) for text in repeated), 5, 2)) == by_hand
    assert shuffled(repeated, 5, 2) == by_hand


def test_weights_say_how_often_a_document_is_read_in_a_pass():
    whole, quarter = Documents(), Documents((text, 0.25) for text in TEXTS)
    for text in TEXTS:
        whole.add(text, 2.5)
    counts = {text: list(whole).count(text) for text in TEXTS}
    assert set(counts.values()) == {2, 3}
    assert len(whole) == pytest.approx(2.5 * len(TEXTS), rel=0.05)
    assert len(quarter) == pytest.approx(len(TEXTS) / 4, rel=0.2)
    assert list(quarter) == list(Documents((text, 0.25) for text in TEXTS))
    order = list(in_order(whole, 0))
    assert sorted(order) == sorted(whole)
    twins = sum(one == other for one, other in itertools.pairwise(order))
    assert twins < 10  # copies of a document do not follow each other


def test_a_source_of_weight_2_is_read_twice(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(
            "\n\n".join(text.replace("document", name) for text in TEXTS), "utf-8"
        )
    specs = [f"{tmp_path / 'a.txt'}#weight=2", str(tmp_path / "b.txt")]
    texts = read_texts(specs, (), (), seed=0, measured_bytes=100)
    read = list(reading(texts.domain, seed=0, max_bytes=texts.domain.bytes))
    alone = read_texts(specs[1:], (), (), seed=0, measured_bytes=100)
    assert sum(text.startswith("b ") for text in read) == len(alone.domain)
    own = [text for text in read if text.startswith("a ")]
    assert len(own) == 2 * len(set(own)) > 300


@pytest.mark.parametrize("general", [[], [f"general {i} 心" * 9 for i in range(60)]])
@pytest.mark.parametrize("shares", [(0.2, 0.21, 0.2101, 1), (0.003, 0.5, 1), (1,)])
def test_shares_of_a_text_are_read_once_to_the_last_character(shares, general):
    """A document in which one stage ends is gone on with in the next, wherever it is parted."""
    texts = [text + "\n冠 y" * (i % 7) for i, text in enumerate(TEXTS)]
    size = sum(len(text.encode()) for text in texts)
    ends = [int(size * share) for share in shares]
    whole = list(reading(texts, general, seed=0, max_bytes=size))
    stages = [
        list(reading(texts, general, seed=0, max_bytes=end, skipped=begin))
        for begin, end in itertools.pairwise([0, *ends])
    ]
    assert "".join(itertools.chain(*stages)) == "".join(whole)
    assert all(map(all, stages))
    if not general:
        assert sorted(whole) == sorted(texts)


@pytest.mark.parametrize("replay", [0.1, 0.3, 0.6])
def test_early_replay_is_all_in_the_first_part(replay):
    domain = [f"domain {i} " + "x" * (i % 90) for i in range(400)]
    general = list(dict(pieces((f"general {i} " * 30, 1.0) for i in range(90))))
    texts = list(reading(domain, general, seed=0, max_bytes=60_000, replay=replay, early=60_000))
    sizes = np.array([len(text.encode()) for text in texts])
    is_general = np.array([text.startswith("g") for text in texts])
    share = sizes[is_general].sum() / sizes.sum()
    assert share == pytest.approx(replay, abs=0.02)
    part = max(0.5, replay)
    early = sizes.cumsum() <= 60_000 * replay / part
    assert sizes[early & is_general].sum() / sizes[early].sum() == pytest.approx(part, abs=0.05)
    assert sizes[~early & is_general].sum() < 1200


@pytest.mark.parametrize(("block_size", "waiting"), [(7, 2**20), (7, 50), (300, 50), (16, 1)])
def test_mapped_blocks_are_those_in_memory(tmp_path, monkeypatch, block_size, waiting):
    documents = [(list(range(1, 2 + i * 13 % 41)), 3 * i) for i in range(60)]
    wanted = pack(documents, block_size, start=[0, 1], end=2)
    monkeypatch.setattr(packing, "_WAITING", waiting)
    for found in (
        pack(documents, block_size, start=[0, 1], end=2),
        pack(documents, block_size, start=[0, 1], end=2, folder=tmp_path),
        packed(tmp_path, block_size),
    ):
        for name in ("inputs", "targets", "positions", "text_bytes", "tokens"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
            assert getattr(found, name).dtype == getattr(wanted, name).dtype
    assert isinstance(found.inputs, np.memmap)
    assert wanted.text_bytes[-1] == sum(size for _, size in documents)
    assert wanted.tokens[-1] == (wanted.targets != IGNORED).sum() == sum(
        len(ids) + 1 for ids, _ in documents
    )  # fmt: skip


def test_nothing_to_pack_is_no_block(tmp_path):
    for folder in (None, tmp_path):
        blocks = pack([], 8, start=[0], end=None, folder=folder)
        assert len(blocks) == 0 and blocks.inputs.shape == (0, 8) and len(blocks.tokens) == 0


def corpus_of(place):
    return read_texts([place / "corpus.txt"], (), (), seed=0, measured_bytes=2000)


def test_packed_blocks_are_kept_under_all_that_decides_them(place, tmp_path):
    """B48: tokenised data is never taken for another tokenizer, text or setting."""
    cache = tmp_path / "blocks"
    wanted = prepare(place / "tied", corpus_of(place), settings(), cache)
    stamp = (cache / "inputs.bin").stat().st_mtime_ns
    again = prepare(place / "tied", corpus_of(place), settings(), cache)
    assert (cache / "inputs.bin").stat().st_mtime_ns == stamp
    assert np.array_equal(again.blocks.inputs, wanted.blocks.inputs)
    assert np.array_equal(
        wanted.blocks.targets, prepare(place / "tied", corpus_of(place), settings()).blocks.targets
    )
    other = tmp_path / "corpus.txt"
    other.write_text((place / "corpus.txt").read_text("utf-8").replace("patient", "person"))
    shorter = read_texts([other], (), (), seed=0, measured_bytes=2000)
    for model, texts, changes in (
        (place / "base_tied", corpus_of(place), {}),
        (place / "tied", shorter, {}),
        (place / "tied", corpus_of(place), {"block_size": 32}),
        (place / "tied", corpus_of(place), {"seed": 1}),
    ):
        found = prepare(model, texts, settings(**changes), cache)
        fresh = prepare(model, texts, settings(**changes))
        assert np.array_equal(found.blocks.inputs, fresh.blocks.inputs)
        assert not np.array_equal(found.blocks.inputs, wanted.blocks.inputs)
    (cache / "key.json").unlink()  # a run that was killed while it packed
    (cache / "inputs.bin").write_bytes(b"")
    found = prepare(place / "tied", corpus_of(place), settings(), cache)
    assert np.array_equal(found.blocks.inputs, wanted.blocks.inputs)


def test_less_than_a_window_is_measured_where_no_more_is_asked_for(place):
    texts = read_texts([place / "corpus.txt"], (), (), seed=0, measured_bytes=200)
    assert 100 < sum(len(window.encode()) for window in texts.held_domain) <= 200


def test_of_one_long_general_text_pieces_are_held_out(place, tmp_path):
    chapter = tmp_path / "chapter.txt"
    chapter.write_text(" ".join(f"Sentence {i} of a long chapter." for i in range(4000)))
    assert not any(map(held_out, read_documents([chapter])))
    texts = read_texts([place / "corpus.txt"], [chapter], (), seed=0, measured_bytes=2**20)
    replayed, measured = "".join(texts.general), "".join(texts.held_general)
    assert len(replayed) + len(measured) == len(chapter.read_text())
    assert 0.02 < len(measured) / len(replayed) < 0.1
    assert not set(texts.general) & set(texts.held_general)
    assert sorted(held_out_general([chapter])) == sorted(texts.held_general)
    alone = read_texts([place / "corpus.txt"], (), [chapter], seed=0, measured_bytes=2**20)
    assert "".join(alone.held_domain) == chapter.read_text()


def test_a_document_that_is_trained_on_is_not_measured_on(place, tmp_path):
    documents = (place / "corpus.txt").read_text("utf-8").strip().split("\n\n")
    measured = tmp_path / "measured.jsonl"
    lines = [json.dumps({"text": text + "\n"}) for text in ("quite other text", documents[3])]
    measured.write_text("\n".join(lines))
    for name, texts in (
        ("corpus", {"corpus": [place / "corpus.txt"]}),
        ("general", {"corpus": [place / "general.txt"], "general": [place / "corpus.txt"]}),
    ):
        with pytest.raises(LexigraftError) as fault:
            train(place / "base_tied", **texts, held_out=[measured], output=tmp_path / "out")
        assert f"1 of 2 documents of --held-out are in --{name} too" in fault.value.found
        assert " ".join(documents[3].split())[:40] in fault.value.found
    assert [path.name for path in tmp_path.iterdir()] == ["measured.jsonl"]


def test_rows_are_counted_on_disk_before_the_model_is_loaded(place, tmp_path):
    """The weights cannot even be loaded here: the first fault is told, with both numbers."""
    broken = tmp_path / "broken"
    shutil.copytree(place / "base_tied", broken)
    families.copy_tokenizer(place / "tied", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(LexigraftError, match=r"cannot load|bytes"):
        train(broken, corpus=[place / "general.txt"], output=tmp_path / "o", max_steps=1)
    weights.write_bytes((place / "base_tied" / "model.safetensors").read_bytes())
    config = read_json(broken / "config.json")
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    (broken / "lexigraft.json").unlink(missing_ok=True)
    with pytest.raises(LexigraftError) as fault:
        train(broken, corpus=[place / "corpus.txt"], output=tmp_path / "o", max_bytes=20_000)
    assert "token id 4" in fault.value.found and "has 416 rows" in fault.value.found


def test_a_disk_that_fills_up_while_texts_are_packed(place, tmp_path):
    """A limit on the size of files stands for it: one message, and nothing is left."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    call = f"train({str(place / 'tied')!r}, corpus=[{str(place / 'corpus.txt')!r}], "
    done = subprocess.run(
        [sys.executable, "-c", limit + "from lexigraft import train; " + call + "output='out')"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "LexigraftError" in done.stderr.splitlines()[-3]
    assert "the disk of out is full (a limit on the size of files)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_changes_while_it_is_read(place, tmp_path):
    """It is told before anything is trained; what the user does with it later is nobody's business."""
    corpus = tmp_path / "corpus.txt"
    shutil.copyfile(place / "corpus.txt", corpus)

    def meddle(name, given):
        if armed and name == "open" and str(given[0]) == str(corpus):
            armed.clear()
            with corpus.open("a") as stream:
                stream.write("more")

    armed = [True]
    sys.addaudithook(meddle)
    with pytest.raises(LexigraftError, match=r"corpus\.txt was changed while it was read"):
        train(place / "tied", corpus=[corpus], output=tmp_path / "out", max_steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_rare_tokens_are_named_before_training(place, capsys):
    job = prepare(place / "tied", corpus_of(place), settings(max_bytes=4000))
    told = capsys.readouterr().err
    targets, _ = occurrences(job)
    texts = [job.family.token_bytes(token) for token in job.ids]
    longer = [
        sum(n for other, n in zip(texts, targets, strict=True) if text in other and text != other)
        for text in texts
    ]
    few = [i for i, n in enumerate(targets) if n < 20 and n + longer[i] < 20]
    assert len(few) < sum(n < 20 for n in targets), "one that longer words take is to be there"
    assert 10 < len(few) < 40
    assert f"{len(few)} of 40 new tokens will be predicted fewer than 20 times" in told
    rarest = texts[min(few, key=lambda i: targets[i])].decode("utf-8", "ignore")
    assert repr(rarest) in told or "<" in told


def test_a_batch_with_one_short_document_trains_on_all_its_documents(place):
    """MedicalGPT's collator made such a batch into copies of its first document."""
    family = families.load(place / "base_tied")
    long = ["The garden that she painted was near the river.", "They opened another window."]
    documents = [long[0], "a", long[1]]
    lines = [(ids, 1) for ids in family.encode_batch(documents)]
    blocks = pack(lines, 8, start=[380], end=380)
    batch = packing.collate([blocks[place] for place in range(len(blocks))])
    targets = batch["labels"].flatten().tolist()
    trained_on = [target for target in targets if target != IGNORED]
    assert trained_on == [token for ids, _ in lines for token in (*ids, 380)]


LIMITED = """
import resource, sys
import numba, torch, transformers
from pathlib import Path
from lexigraft.models.preparation import occurrences, prepare, read_texts
from lexigraft.models.settings import Settings
sys.path.insert(0, {tests!r})
from test_train import settings
model, corpus, cache = map(Path, sys.argv[1:4])
prepare(model, read_texts([corpus.with_name("corpus.txt")], (), (), seed=0, measured_bytes=2000), settings())
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[4]),) * 2)
texts = read_texts([corpus], (), (), seed=0, measured_bytes=2000, near=cache.parent)
job = prepare(model, texts, settings(max_bytes=None, block_size=512), cache)
print(int(job.blocks.tokens[-1]), sum(occurrences(job)[0]))
"""


@pytest.mark.matrix
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit on data is Linux's")
def test_memory_does_not_grow_with_the_corpus(place, tmp_path):
    """30 MB of text, whose tokens take 150 MB and as many Python objects, in 64 MB."""
    text = (place / "corpus.txt").read_text("utf-8").strip().split("\n\n")
    corpus = tmp_path / "large.txt"
    shutil.copyfile(place / "corpus.txt", tmp_path / "corpus.txt")
    size, turn = 0, 0
    with corpus.open("w", encoding="utf-8") as stream:
        while size < 30_000_000:
            size += stream.write("".join(f"{turn} {document}\n\n" for document in text))
            turn += 1
    code = LIMITED.format(tests=str(parts.ENGLISH.parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", code, place / "tied", corpus, tmp_path / "blocks", str(64 * 2**20)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, new = map(int, done.stdout.split())
    assert tokens > 10_000_000 and 0 < new < tokens


def test_general_text_is_mixed_in_in_pieces():
    found = list(pieces([("word " * 1000, 2.0), ("short", 1.0)]))
    assert "".join(piece for piece, _ in found[:-1]) == "word " * 1000
    assert [piece for piece, _ in found[:-1]] == windows("word " * 1000, 1024)
    assert {weight for _, weight in found[:-1]} == {2.0} and found[-1] == ("short", 1.0)
