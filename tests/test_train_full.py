"""`train --mode full`: the whole model trains, and comes out as an ordinary folder."""

import importlib.util

import numpy as np
import pytest
import torch

import parts
from lexigraft import LexigraftError, check, families, graft, merge, train
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.errors import RefusalError
from lexigraft.files import read_json
from lexigraft.manifest import Manifest, NewIds
from lexigraft.models.bits import score
from lexigraft.models.load import load_model, start_and_end
from lexigraft.models.preparation import prepare, read_texts

torch.set_num_threads(1)
QUICK = {"block_size": 64, "max_bytes": 6000, "measurements": 2, "measured_bytes": 3000}
FAST = {"learning_rate": 1e-3, "new_row_learning_rate": 3e-3}
FIRST, TOKENS = 382, 422  # the new tokens of `grafted_models`


@pytest.fixture
def place(grafted_models):
    return grafted_models


def bpb(folder, source, corpus):
    """Of the windows on which a training of `source` by `QUICK` measures."""
    from test_train import settings

    texts = read_texts([corpus], (), (), seed=0, measured_bytes=3000)
    texts = prepare(source, texts, settings()).texts.held_domain
    reader = families.load(folder)
    start, _ = start_and_end(reader)
    return score(load_model(folder), texts, reader.encode_batch(texts), start=start).bpb


def rows_of(folder, name):
    return Checkpoint.open(folder).read(name)


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("old_rows", ["frozen", "slow"])
def test_a_whole_model_comes_out(place, tmp_path, tied, old_rows):
    """What was measured at the end is what the folder gives; which rows moved, and which not."""
    source, out = place / tied, tmp_path / "out"
    corpus = place / "corpus.txt"
    result = train(
        source, corpus=[corpus], mode="full", old_rows=old_rows, output=out, **FAST, **QUICK
    )
    assert result.domain_bpb < result.log[0]["domain_bpb"] - 0.05
    assert result.rows_moved == 40
    assert bpb(out, source, corpus) == pytest.approx(result.domain_bpb, rel=1e-5)
    names = Checkpoint.open(source).tensors.keys()
    assert Checkpoint.open(out).tensors.keys() == names
    tables = {"model.embed_tokens.weight", "lm_head.weight"} & names
    for name in names:
        before, after = rows_of(source, name), rows_of(out, name)
        if name not in tables:
            assert not np.array_equal(before, after), name
            continue
        old = np.array_equal(before[:FIRST], after[:FIRST])
        assert old == (old_rows == "frozen"), name
        assert np.array_equal(before[TOKENS:], after[TOKENS:])
        assert (before[FIRST:TOKENS] != after[FIRST:TOKENS]).any()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "new_tokens.jsonl"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert read_json(out / "generation_config.json") == read_json(source / "generation_config.json")
    record = Manifest.read(out).last("train")
    assert (record.mode, record.settings["old_rows"]) == ("full", old_rows)
    assert check(out).ok
    assert not list(out.glob("transformers*")) and not (tmp_path / "out.partial").exists()


def test_what_is_stored_stays_stored_in_its_way(place, tmp_path):
    """bfloat16, in shards, a tied head stored twice, a tensor that transformers does not load."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    parts.write_byte_level(source)
    parts.write_model(source, tokens=FIRST, tied=True, dtype="bfloat16", eos=380)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.9.extra"] = torch.arange(4.0)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    train(
        source, corpus=[place / "corpus.txt"], mode="full", old_rows="slow", output=out, **FAST,
        **QUICK,
    )  # fmt: skip
    after = load_file(out / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in weights.items()
    }
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], weights["lm_head.weight"])
    assert torch.equal(after["model.layers.9.extra"], weights["model.layers.9.extra"])


def test_a_stage_of_full_training_is_one_of_the_stages(place, tmp_path):
    """rows, full with slow old rows, rows again: nothing of a stage works on in the next one."""
    corpus = [place / "corpus.txt"]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    train(place / "tied", corpus=corpus, mode="rows", output=one, **QUICK)
    merge(place / "tied", [one], output=tmp_path / "merged")
    train(
        tmp_path / "merged", corpus=corpus, mode="full", old_rows="slow", weight_decay=0.1,
        output=two, **FAST, **QUICK,
    )  # fmt: skip
    train(two, corpus=corpus, mode="full", weight_decay=0.1, output=three, **FAST, **QUICK)
    name = "model.embed_tokens.weight"
    assert (rows_of(two, name)[:FIRST] != rows_of(tmp_path / "merged", name)[:FIRST]).any()
    assert np.array_equal(rows_of(three, name)[:FIRST], rows_of(two, name)[:FIRST])
    stages = [record.stage for record in Manifest.read(three).records]
    assert stages == ["learn", "graft", "train", "merge", "train", "train"]


def test_weight_decay_is_for_the_matrices_of_the_body(place):
    from lexigraft.models.training import Schedule, parameter_groups
    from lexigraft.models.whole_model import make_all_trainable

    model = load_model(place / "untied")
    rows = make_all_trainable(model, NewIds((), FIRST, TOKENS), old_rows=True)
    schedule = Schedule(
        5, 1, 1e-3, 3e-3, 5, frozenset(), 0, old_row_learning_rate=1e-4, weight_decay=0.1
    )
    groups = parameter_groups(model, rows, schedule)
    assert [(g["lr"], g.get("weight_decay", 0.0)) for g in groups] == [
        (1e-3, 0.1), (1e-3, 0.0), (3e-3, 0.0), (3e-3, 0.0), (1e-4, 0.0),
    ]  # fmt: skip
    counted = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(counted) == len(set(counted)) and set(counted) == set(trained)
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_smaller_pieces_make_the_same_step(place, tmp_path, mode):
    """Accumulated gradients and recomputed activations change what it costs, not what comes out."""
    options = {**QUICK, "max_bytes": None, "max_steps": 4, "block_size": 32, "mode": mode}
    corpus = [place / "corpus.txt"]
    plain = train(
        place / "tied", corpus=corpus, output=tmp_path / "a", batch_size=4, **FAST, **options
    )
    pieces = train(
        place / "tied", corpus=corpus, output=tmp_path / "b", gradient_accumulation=4,
        gradient_checkpointing=True, **FAST, **options,
    )  # fmt: skip
    assert (pieces.steps, pieces.tokens) == (plain.steps, plain.tokens)
    for one, other in zip(pieces.log, plain.log, strict=True):
        for key in ("step", "text_bytes", "train_bpb", "domain_bpb"):
            assert one[key] == (other[key] and pytest.approx(other[key], rel=1e-4)), key


@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_new_rows_and_lora_are_float32_beside_16_bit_weights(place, tmp_path, mode):
    from safetensors.torch import load_file

    corpus, out = [place / "corpus.txt"], tmp_path / "out"
    result = train(
        place / "untied", corpus=corpus, mode=mode, dtype="bfloat16", output=out, **QUICK
    )
    assert result.domain_bpb < result.log[0]["domain_bpb"] - 0.05
    assert result.rows_moved == 40
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_a_package_that_is_missing_is_named_before_any_text_is_read(place, tmp_path):
    with pytest.raises(LexigraftError, match="without bitsandbytes"):
        train(place / "tied", corpus=[tmp_path / "never.txt"], output=tmp_path / "o", dtype="nf4")


def test_layers_that_cannot_be_computed_again_are_refused(place, tmp_path):
    import transformers

    base, model = tmp_path / "base", tmp_path / "model"
    parts.write_byte_level(base)
    config = transformers.AutoConfig.for_model(
        "ctrl", vocab_size=FIRST, n_embd=32, n_layer=1, n_head=2, dff=32, eos_token_id=380
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    with pytest.raises(RefusalError, match="--gradient-checkpointing"):
        train(
            base, corpus=[place / "corpus.txt"], output=model, gradient_checkpointing=True,
            max_steps=1, block_size=32,
        )  # fmt: skip
    assert not model.exists() and not (tmp_path / "model.partial").exists()


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"mode": "lora", "old_rows": "slow"}, LexigraftError, "--mode full"),
        ({"mode": "full", "old_rows": "fast"}, LexigraftError, "'frozen' or 'slow'"),
        ({"schedule": "linear"}, LexigraftError, "'cosine', 'wsd' or 'constant'"),
        ({"dtype": "int3"}, LexigraftError, "bfloat16"),
        ({"mode": "full", "dtype": "float16"}, RefusalError, "loss scaling"),
        ({"mode": "rows", "dtype": "nf4"}, RefusalError, "--mode lora"),
    ],
)
def test_what_makes_no_sense_together_is_refused(place, tmp_path, options, error, told):
    with pytest.raises(error) as caught:
        train(place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "o", **options)
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_on_a_base_of_few_bits(place, tmp_path, dtype, tied):
    """New rows and LoRA learn in float32, and go into the base as it was before it lost its bits."""
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    base, model, out = tmp_path / "base", tmp_path / "model", tmp_path / "out"
    parts.write_byte_level(base)
    parts.write_model(base, tokens=400, tied=tied, hidden=64, eos=380)
    graft(base, place / "vocab", output=model)
    corpus = [place / "corpus.txt"]
    result = train(model, corpus=corpus, mode="lora", dtype=dtype, output=out, **QUICK)
    assert result.domain_bpb < result.log[0]["domain_bpb"] - 0.05
    assert result.rows_moved == 40
    adapter = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}
    merge(model, [out], output=tmp_path / "merged")
    found = bpb(tmp_path / "merged", model, place / "corpus.txt")
    assert found == pytest.approx(result.domain_bpb, rel=0.02)
    name = "model.embed_tokens.weight"
    assert np.array_equal(rows_of(tmp_path / "merged", name)[:FIRST], rows_of(model, name)[:FIRST])
