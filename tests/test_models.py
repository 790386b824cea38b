"""Packing, bits per byte and new rows: the parts of training and evaluation."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parts
from lexigraft import LexigraftError, families
from lexigraft.hub import local_folder
from lexigraft.manifest import NewIds
from lexigraft.models.adapter_files import (
    lora_config,
    read_trained,
    require_saved,
    trainable_tensors,
    write_adapter,
)
from lexigraft.models.bits import score, windows
from lexigraft.models.load import load_model, quiet_transformers, start_and_end
from lexigraft.models.new_rows import grow
from lexigraft.models.packing import IGNORED, collate, pack
from lexigraft.models.reading import encoded, reading, shuffled

torch.set_num_threads(1)
FIRST, TOKENS, ROWS = 90, 100, 112  # ids [90, 100) are new, rows [100, 112) are padding
NEW = NewIds((), FIRST, TOKENS)

documents = st.lists(
    st.tuples(st.lists(st.integers(3, 99), min_size=1, max_size=30), st.integers(1, 90)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(documents, st.integers(1, 17), st.sampled_from([[1], [2, 1]]), st.sampled_from([None, 0]))
def test_packing_loses_no_token_and_no_byte(docs, block_size, start, end):
    blocks = pack(docs, block_size, start=start, end=end)
    targets = blocks.targets[blocks.targets != IGNORED].tolist()
    assert targets == [i for ids, _ in docs for i in [*ids, *([] if end is None else [end])]]
    assert blocks.tokens[-1] == len(targets)
    assert blocks.text_bytes[-1] == sum(size for _, size in docs)
    assert (np.diff(blocks.text_bytes) >= 0).all()


@settings(deadline=None)
@given(documents, st.integers(2, 17))
def test_positions_count_from_the_last_boundary(docs, block_size):
    """Where they restart, attention is cut: at each block and at each document."""
    blocks = pack(docs, block_size, start=[1], end=0)
    starts = set(np.cumsum([0, *(len(ids) + 1 for ids, _ in docs)]).tolist())
    expected, place = [], 0
    for index in range(blocks.positions.size):
        place = 0 if index in starts or index % block_size == 0 else place + 1
        expected.append(place)
    assert blocks.positions.flatten().tolist() == expected


def packable(kind):
    """Tiny models of several attention kinds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    extra = {"mistral": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4}}
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = AutoConfig.for_model(kind, **sizes, **extra.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2"])
def test_no_document_sees_another_one_in_its_block(kind):
    """Logits in a packed block are those of each document alone; full and sliding attention."""
    model = packable(kind)
    docs = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]
    blocks = pack([(ids, 1) for ids in docs], 20, start=[1], end=None)
    batch = collate([blocks[0], blocks[0]])  # two rows, so that nothing depends on batch 1
    labels = batch.pop("labels")[0]
    with torch.inference_mode():
        packed = model(**batch, use_cache=False).logits[1]
        place = 0
        for ids in docs:
            alone = model(input_ids=torch.tensor([[1, *ids[:-1]]]), use_cache=False).logits[0]
            assert labels[place : place + len(ids)].tolist() == ids
            torch.testing.assert_close(packed[place : place + len(ids)], alone, atol=2e-5, rtol=0)
            place += len(ids)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n冠é😀"), min_size=1, max_size=80), st.integers(4, 40))
def test_windows_hold_every_byte_once(text, size):
    pieces = windows(text, size)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= size for piece in pieces)
    assert all(pieces)


def test_windows_end_at_lines_then_at_spaces():
    assert windows("one two\nthree four five", 12) == ["one two\n", "three four", " five"]
    assert windows("冠状动脉", 7) == ["冠状", "动脉"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = parts.write_byte_level(tmp_path_factory.mktemp("models") / "base")
    return parts.write_model(folder, tokens=400, eos=398)


def test_bits_are_those_of_the_model_one_token_at_a_time(base):
    model, family = load_model(base), families.load(base)
    start, end = start_and_end(family)
    assert start == [380] == [end]  # no template: the end-of-text token stands before a text
    texts = ["The house, 冠状动脉.", "and", "a friend that she remembered was near"]
    ids = family.encode_batch(texts)
    bits = 0.0
    for line in ids:
        for place, target in enumerate(line):
            with torch.inference_mode():
                logits = model(torch.tensor([[380, *line[:place]]])).logits[0, -1]
            bits -= float(torch.log_softmax(logits.double(), -1)[target]) / math.log(2)
    found = score(model, texts, ids, start=start, new_ids=range(300, 400))
    assert found.bits == pytest.approx(bits, rel=1e-5)
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.tokens == sum(map(len, ids))
    assert found.new_tokens == sum(token >= 300 for line in ids for token in line) > 0


def test_reading_is_the_same_for_every_tokenizer_and_mixes_by_bytes():
    domain = [f"domain {i} " + "x" * (i % 7) for i in range(40)]
    general = [f"general {i} " * 30 for i in range(9)]
    texts = list(reading(domain, general, seed=3, max_bytes=5000, replay=0.25))
    assert texts == list(reading(domain[::-1], general[::-1], seed=3, max_bytes=5000, replay=0.25))
    assert texts != list(reading(domain, general, seed=4, max_bytes=5000, replay=0.25))
    sizes = {kind: sum(len(t) for t in texts if t.startswith(kind)) for kind in ("d", "g")}
    assert 4900 <= sum(sizes.values()) <= 5000
    assert sizes["g"] / 5000 == pytest.approx(0.25, abs=0.06)
    first_pass = [text for text in texts if text.startswith("d")][: len(domain)]
    assert sorted(first_pass) == sorted(domain)  # every document once before any comes again
    assert shuffled(domain, 0, 0) != shuffled(domain, 0, 1)


@pytest.mark.parametrize("early", [None, 5000])
def test_parts_of_a_reading_are_the_whole(early):
    domain = [f"domain {i} " + "x" * (i % 7) for i in range(400)]
    general = [f"general {i} " * 3 for i in range(90)]
    ends = (0, 1700, 2900, 5000)
    parts_of_it = [
        list(reading(domain, general, seed=3, max_bytes=end, skipped=begin, early=early))
        for begin, end in itertools.pairwise(ends)
    ]
    whole = list(reading(domain, general, seed=3, max_bytes=5000, early=early))
    found = [text for part in parts_of_it for text in part]
    assert len(found) == len(whole) + 2  # a text in which a part ends is gone on with in the next
    assert "".join(found) == "".join(whole)


def test_encoding_stops_after_the_tokens_asked_for(base):
    family = families.load(base)
    found = list(encoded(iter(["The house"] * 1000), family, max_tokens=50))
    assert 50 <= sum(len(ids) for ids, _ in found) < 50 + len(found[0][0])


def model_with(tied, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4.0) if parameter.dim() == 2 else None
    return model


IDS = torch.tensor([[1, 95, 7, 90, 99, 20], [3, 4, 89, 98, 98, 88]])


@pytest.mark.parametrize("replaced", [(), (3, 20, 88)], ids=["behind", "replaced too"])
@pytest.mark.parametrize("tied", [True, False])
def test_grown_rows_give_the_gradient_of_the_whole_matrix(tied, replaced):
    """Only its new rows, and one parameter where embedding and head are tied."""
    plain, grown = model_with(tied).requires_grad_(True), model_with(tied)
    rows = grow(grown, NewIds(replaced, FIRST, TOKENS))
    assert list(rows.ids) == [*replaced, *range(FIRST, TOKENS)]
    assert list(rows.parameters) == ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    count = (10 + len(replaced)) * 32 * (2 - tied)
    assert sum(p.numel() for p in grown.parameters() if p.requires_grad) == count
    for model in (plain, grown):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(grown(IDS).logits, plain(IDS).logits)
    whole = {"model.embed_tokens": plain.get_input_embeddings().weight.grad}
    if not tied:
        whole["lm_head"] = plain.get_output_embeddings().weight.grad
    for path, parameter in rows.parameters.items():
        torch.testing.assert_close(parameter.grad, whole[path][list(rows.ids)])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "rows"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_plain_peft_loads_what_is_written(tied, lora, tmp_path):
    from peft import PeftModel, get_peft_model

    model = model_with(tied)
    with quiet_transformers():
        model.save_pretrained(tmp_path / "model")
    trained = get_peft_model(model, lora_config(4, 8.0)) if lora else model
    rows = grow(model, NEW)
    with torch.no_grad():
        for parameter in trainable_tensors(trained, rows).values():
            parameter.add_(torch.randn_like(parameter))
    write_adapter(tmp_path / "adapter", trained, rows, str(tmp_path / "model"))
    require_saved(tmp_path / "adapter", trained, rows)
    with warnings.catch_warnings():  # of missing or unexpected keys
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = PeftModel.from_pretrained(load_model(tmp_path / "model"), tmp_path / "adapter")
    again.eval()
    with torch.inference_mode():
        expected, found = trained(input_ids=IDS).logits, again(input_ids=IDS).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    untouched = load_model(tmp_path / "model")(IDS).logits
    assert (found - untouched).abs().max() > 0.1


def test_reading_an_adapter_back_restores_every_value(tmp_path):
    first, second = model_with(True), model_with(True)
    rows, other = grow(first, NEW), grow(second, NEW)
    assert rows.tied_head == "lm_head"
    with torch.no_grad():
        rows.parameters["model.embed_tokens"].add_(1.0)
    write_adapter(tmp_path, first, rows, "model")
    with pytest.raises(LexigraftError, match="not what was trained"):
        require_saved(tmp_path, second, other)
    read_trained(tmp_path, second, other)
    require_saved(tmp_path, second, other)
    assert other.moved().min() == pytest.approx(math.sqrt(32), rel=1e-5)
    smaller = model_with(True)
    with pytest.raises(LexigraftError, match=r"is \[10, 32\]"):
        read_trained(tmp_path, smaller, grow(smaller, NewIds((), FIRST, TOKENS - 1)))
    plain = model_with(True)
    with pytest.raises(LexigraftError, match="unexpected"):
        read_trained(tmp_path, plain, None)


def test_what_cannot_be_loaded_is_said_in_one_message(tmp_path, base):
    with pytest.raises(LexigraftError) as fault:
        local_folder(tmp_path / "absent")
    assert "no folder" in fault.value.found
    with pytest.raises(LexigraftError) as fault:
        load_model(parts.write_byte_level(tmp_path / "tokenizer"))
    assert "config.json" in fault.value.found
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(LexigraftError) as fault:
        load_model(tmp_path / "tokenizer")
    assert "safetensors" in fault.value.needed


REMOTE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("ran").touch()


class StrangerConfig(LlamaConfig):
    model_type = "stranger"


class StrangerForCausalLM(LlamaForCausalLM):
    config_class = StrangerConfig
"""


def test_code_in_a_model_folder_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    import json

    from transformers import dynamic_module_utils

    cache = tmp_path / "cache"  # where transformers copies such code before it runs it
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    folder = parts.write_model(tmp_path / "model", tokens=64)
    (folder / "stranger.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "stranger",
        "auto_map": {
            "AutoConfig": "stranger.StrangerConfig",
            "AutoModelForCausalLM": "stranger.StrangerForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LexigraftError, match="code of its own") as fault:
        load_model(folder)
    assert "--trust-remote-code" in fault.value.fix
    assert not list(tmp_path.rglob("ran"))
    assert load_model(folder, trust_remote_code=True).config.model_type == "stranger"
    assert list(tmp_path.rglob("ran"))
