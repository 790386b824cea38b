"""`eval`: the same text for every model, every byte once."""

import math

import pytest
import torch

import parts
from lexigraft import LexigraftError, evaluate, families, graft, learn
from lexigraft.corpus import held_out, read_documents
from lexigraft.families.measure import new_ids
from lexigraft.models.bits import windows
from lexigraft.models.load import load_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "corpus.txt").write_text(parts.corpus_text(documents=30), "utf-8")
    (folder / "general.txt").write_text(parts.plain_english()[:4000], "utf-8")
    base = parts.write_byte_level(folder / "base")
    parts.write_model(base, tokens=400, tied=True, eos=380)
    corpus = [folder / "corpus.txt"]
    learn(base, corpus=corpus, tokens=30, min_count=5, allow_more=True, output=folder / "vocab")
    graft(base, folder / "vocab", output=folder / "model")
    return folder


@pytest.fixture(scope="module")
def result(place):
    return evaluate(
        [place / "base", place / "model"],
        corpus=[place / "corpus.txt"],
        general=[place / "general.txt"],
        max_bytes=6000,
        speed_characters=60,
    )


def test_all_models_are_scored_on_the_same_bytes(place, result):
    base, grown = result.models
    for kind in ("domain", "general"):
        assert getattr(base, kind).bytes == getattr(grown, kind).bytes
    assert base.general.bytes == len(parts.plain_english()[:4000].encode())
    assert 5900 < base.domain.bytes <= 6000
    assert grown.domain.tokens < base.domain.tokens
    assert base.adoption == 0 < grown.adoption < 1


def test_bits_are_those_of_an_independent_count(place, result):
    """Window by window, one forward pass each, straight from transformers' logits."""
    folder = place / "model"
    model, reader = load_model(folder), families.load(folder)
    left, bits, size, new, tokens, spare = 6000, 0.0, 0, 0, 0, 0.0
    for document in read_documents([place / "corpus.txt"]):
        text = document if len(document.encode()) <= left else windows(document, left)[0]
        left -= len(document.encode())
        for window in windows(text, result.window_bytes):
            ids = reader.encode(window)
            with torch.inference_mode():
                logits = model(torch.tensor([[380, *ids]])).logits[0, :-1].double()
            spare += float(logits.softmax(-1)[:, reader.map.tokens :].sum())
            bits -= float(logits.log_softmax(-1)[range(len(ids)), ids].sum()) / math.log(2)
            size += len(window.encode())
            tokens += len(ids)
            new += sum(token in new_ids(folder, reader) for token in ids)
        if left <= 0:
            break
    grown = result.models[1]
    assert grown.domain.bpb == pytest.approx(bits / size, rel=1e-5)
    assert (grown.domain.tokens, grown.domain.bytes) == (tokens, size)
    assert grown.adoption == new / tokens
    assert grown.without_text == pytest.approx(spare / tokens, rel=1e-4)
    assert "ids without a token take" in result.lines()[-1]


def test_windows_fit_the_shortest_context(place, tmp_path, result):
    """Positions end at 512 here; a window of 1024 bytes can take more tokens than that."""
    assert result.window_bytes == 512
    assert (
        evaluate(
            [place / "model"], corpus=[place / "general.txt"], speed_characters=0, window_bytes=256
        ).window_bytes
        == 256
    )
    assert all(len(w.encode()) <= 256 for w in windows(parts.plain_english()[:4000], 256))


def test_the_json_has_the_documented_keys(place, result):
    data = result.to_json()
    for model, folder in zip(data["models"], ("base", "model"), strict=True):
        assert model["path"] == str(place / folder)
        assert set(model) == {
            "path", "domain", "general", "adoption", "without_text", "characters_per_second",
            "tasks",
        }  # fmt: skip
        assert set(model["domain"]) == set(model["general"]) == {"bpb", "tokens", "bytes"}
        assert model["characters_per_second"] > 0
    head, *lines = result.lines()
    assert head.split()[0] == "model" and len(lines) == 4  # two of them on spare rows
    assert len({len(line) for line in [head, *lines[:2]]}) == 1


def test_only_held_out_documents_where_asked(place):
    corpus = [place / "corpus.txt"]
    found = evaluate([place / "base"], corpus=corpus, held_out_only=True, speed_characters=0)
    apart = [d for d in read_documents(corpus) if held_out(d)]
    assert found.models[0].domain.bytes == sum(len(d.encode()) for d in apart) > 0
    assert found.models[0].general is None
    assert found.models[0].characters_per_second is None


def test_what_cannot_be_scored_is_refused(place, tmp_path):
    with pytest.raises(LexigraftError, match="no model"):
        evaluate([], corpus=[place / "corpus.txt"])
    with pytest.raises(LexigraftError, match=r"absent\.txt"):
        evaluate([place / "base"], corpus=[tmp_path / "absent.txt"])
    with pytest.raises(LexigraftError, match="no folder"):
        evaluate([tmp_path / "absent"], corpus=[place / "corpus.txt"])
    (tmp_path / "short.txt").write_text("one", "utf-8")
    with pytest.raises(LexigraftError, match="held out"):
        evaluate([place / "base"], corpus=[tmp_path / "short.txt"], held_out_only=True)
