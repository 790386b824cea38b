"""The case this project began with: `size mismatch: [33296, 4096] vs [32000, 4096]`.

A real 32,000-piece SentencePiece tokenizer is extended to 33,296 tokens, an adapter is trained
with PEFT on the grafted model, and has to be merged into the base as it was before the graft.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapter_parts
import parts
from lexigraft import LexigraftError, check, families, graft, learn, merge, train
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.families import TokenMap
from lexigraft.manifest import Manifest

torch.set_num_threads(1)

OLD, ADDED = 32_000, 1_296
TEXTS = ("The old house near the river was quiet, and they went home.", "1 + 1 = 2\n\n\tx = y")
QUICK = {"block_size": 64, "max_bytes": 6000, "measurements": 1}


def domain_text() -> tuple[list[str], list[str]]:
    """Invented words, each in every document, and the documents."""
    rng = random.Random(1)
    syllables = [a + b for a in "b d f g k l m n p r s t v z tr kl pr".split() for b in "aeiouy"]
    words = ["".join(rng.choice(syllables) for _ in range(4)) for _ in range(2300)]
    documents = []
    for _ in range(16):
        order = rng.sample(words, len(words))
        lines = (" and ".join(order[place : place + 7]) for place in range(0, len(order), 7))
        documents.append("\n".join(f"The patient shows {line}." for line in lines))
    return words, documents


def train_with_peft(grafted, adapter, documents):
    """LoRA + embed_tokens + lm_head, some steps of AdamW, saved as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(grafted)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = get_peft_model(adapter_parts.load(grafted), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = tokenizer(documents[0], return_tensors="pt").input_ids[0]
    losses = []
    for step in range(6):
        block = ids[step * 64 : (step + 1) * 64][None]
        loss = model(input_ids=block, labels=block).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    return losses


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    root = tmp_path_factory.mktemp("origin")
    words, documents = domain_text()
    (root / "corpus.txt").write_text("\n\n".join(documents), "utf-8")
    base = parts.mistral_folder(root / "base")
    parts.write_model(base, tokens=OLD, eos=2)
    learn(base, corpus=[root / "corpus.txt"], tokens=ADDED, min_count=8, output=root / "vocab")
    graft(base, root / "vocab", output=root / "grafted", pad_to=1)
    train_with_peft(root / "grafted", root / "adapter", documents)
    return root, words


def test_plain_peft_stops_with_the_size_mismatch(origin):
    root, _ = origin
    assert TokenMap.read(root / "adapter").tokens == OLD + ADDED
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        adapter_parts.unmerged(root / "base", root / "adapter")
    assert "[33296, 32]" in str(caught.value)
    assert "[32000, 32]" in str(caught.value)


def test_check_explains_it_from_headers(origin):
    root, _ = origin
    result = check(root / "base", adapter=root / "adapter")
    assert not result.ok
    said = json.dumps(result.to_json()["findings"])
    assert "33,296" in said
    assert "32,000" in said
    assert f"lexigraft merge {root / 'base'} {root / 'adapter'}" in said


def test_merge_into_the_ungrafted_base_needs_no_flag(origin, tmp_path):
    root, words = origin
    result = merge(root / "base", root / "adapter", output=tmp_path / "merged")
    assert (result.rows, result.tokens, result.tied) == (OLD + ADDED, OLD + ADDED, False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    unmerged = adapter_parts.unmerged(root / "grafted", root / "adapter")
    new = [f"The patient shows {word} and more." for word in words[:40]]
    seen = set()
    for text in (*TEXTS, *new):
        ids = tokenizer(text, return_tensors="pt").input_ids
        seen |= {int(token_id) for token_id in ids[0] if token_id >= OLD}
        with torch.no_grad():
            difference = merged(input_ids=ids).logits - unmerged(input_ids=ids).logits
        assert difference.abs().max() < 1e-4
    assert len(seen) > 10
    made = merged.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert made.shape[1] > ids.shape[1]
    assert check(tmp_path / "merged").ok


def test_the_result_is_that_of_the_grafted_base(origin, tmp_path):
    root, _ = origin
    merge(root / "base", root / "adapter", output=tmp_path / "from_base")
    merge(root / "grafted", root / "adapter", output=tmp_path / "from_grafted")
    one, other = (tmp_path / name / "model.safetensors" for name in ("from_base", "from_grafted"))
    assert one.read_bytes() == other.read_bytes()


def test_the_sentencepiece_file_comes_from_where_it_is(origin, tmp_path):
    """Trainers save tokenizer.json alone; VOCAB has both, and the base's copy would be stale."""
    root, _ = origin
    (tmp_path / "adapter").mkdir()
    for path in (root / "adapter").iterdir():
        if path.is_file() and path.name != "tokenizer.model":
            shutil.copyfile(path, tmp_path / "adapter" / path.name)
    merge(root / "base", tmp_path / "adapter", output=tmp_path / "merged", tokenizer=root / "vocab")
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (root / "vocab" / name).read_bytes()
    merge(root / "base", tmp_path / "adapter", output=tmp_path / "alone")
    assert not (tmp_path / "alone/tokenizer.model").exists()


# The same with everything made by lexigraft: byte-level, tied and untied


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def own(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    (root / "corpus.txt").write_text(parts.corpus_text(documents=40), "utf-8")
    base = parts.write_byte_level(root / "base")
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens, tied=request.param, eos=tokens - 2)
    learn(
        base,
        corpus=[root / "corpus.txt"],
        tokens=40,
        min_count=5,
        allow_more=True,
        output=root / "vocab",
    )
    graft(base, root / "vocab", output=root / "grafted")
    for mode in ("rows", "lora"):
        train(
            root / "grafted",
            corpus=[root / "corpus.txt"],
            mode=mode,
            output=root / mode,
            **QUICK,
        )
    return root, request.param


@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_an_adapter_of_train_merges_into_either_base(own, tmp_path, mode):
    root, tied = own
    results = [
        merge(root / start, root / mode, output=tmp_path / start, prove=True)
        for start in ("base", "grafted")
    ]
    unmerged = adapter_parts.unmerged(root / "grafted", root / mode)
    family = families.load(tmp_path / "base")
    text = (root / "corpus.txt").read_text("utf-8")
    ids = torch.tensor([family.encode(text)[:128]])
    assert int(ids.max()) >= TokenMap.read(root / "base").tokens
    for start, result in zip(("base", "grafted"), results, strict=True):
        merged = adapter_parts.load(tmp_path / start)
        with torch.no_grad():
            difference = merged(input_ids=ids).logits - unmerged(input_ids=ids).logits
        assert difference.abs().max() < 1e-4
        assert result.difference < 1e-4
        assert result.tied == tied
        assert result.rows % 64 == 0
        assert check(tmp_path / start).ok
    # Padding rows included: graft and merge follow one rule.
    one, other = (tmp_path / start / "model.safetensors" for start in ("base", "grafted"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_what_train_wrote_travels(own, tmp_path, mode):
    root, _ = own
    merge(root / "base", root / mode, output=tmp_path / "merged")
    assert (tmp_path / "merged/new_tokens.jsonl").read_bytes() == (
        root / "vocab/new_tokens.jsonl"
    ).read_bytes()
    stages = [record.stage for record in Manifest.read(tmp_path / "merged").records]
    assert stages == ["learn", "graft", "train", "merge"]
    assert TokenMap.read(tmp_path / "merged").hash == TokenMap.read(root / "vocab").hash


def lora_only(root, folder):
    """A trainer that trained no rows; the user copied the manifest into the adapter's folder."""
    adapter = adapter_parts.write_adapter(root / "grafted", root / "grafted", folder, "lora")
    shutil.copyfile(root / "grafted/lexigraft.json", adapter / "lexigraft.json")
    return adapter


def test_rows_that_no_file_holds_are_made_again_and_proved(own, tmp_path):
    root, _ = own
    adapter = lora_only(root, tmp_path / "adapter")
    result = merge(root / "base", adapter, output=tmp_path / "from_base", prove=True)
    assert any("rebuilt" in line for line in result.sources)
    merge(root / "grafted", adapter, output=tmp_path / "from_grafted")
    one, other = (tmp_path / name / "model.safetensors" for name in ("from_base", "from_grafted"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("spoilt", ["base", "hash", "absent"])
def test_rows_that_cannot_be_proved_stop_the_merge(own, tmp_path, spoilt):
    root, _ = own
    adapter = lora_only(root, tmp_path / "adapter")
    base = shutil.copytree(root / "base", tmp_path / "base")
    if spoilt == "base":  # another model with the same tokenizer
        name = "model.embed_tokens.weight"
        zeros = bytes(200 * Checkpoint.open(base).tensors[name].row_bytes)
        parts.overwrite_row(base, name, 100, zeros)
    elif spoilt == "hash":
        data = json.loads((adapter / "lexigraft.json").read_text())
        for name in data["records"][-1]["new_rows"]:
            data["records"][-1]["new_rows"][name] = "0" * 64
        (adapter / "lexigraft.json").write_text(json.dumps(data))
    else:
        (adapter / "lexigraft.json").unlink()
    with pytest.raises(LexigraftError, match=r"no row of model\.embed_tokens\.weight") as caught:
        merge(base, adapter, output=tmp_path / "merged")
    assert "lexigraft merge MODEL" in caught.value.fix
    assert not (tmp_path / "merged").exists()
