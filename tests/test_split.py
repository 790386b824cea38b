"""split: base with rows and pure LoRA, whose sum is the merge (laws 10, 11, 14, 16, 17)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import adapter_parts
from adapter_parts import ADDED, FORMS, TOKENS
from lexigraft import check, merge, split
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import Manifest
from test_merge import folder_hash, gpt2_with_adapter, other_with_adapter

CARRIED = [form for form in FORMS if not form.startswith("dora") and form != "rows-only"]
QUICK = [("rows", True), ("saved-both", False)]


def tensors(folder):
    return adapter_parts.load(folder).state_dict()


def split_is_merge(base, adapter, root):
    """Base + adapter of the split, run by PEFT and merged again, against the merge."""
    result = split(base, adapter, output=root / "pair")
    merge(base, adapter, output=root / "merged")
    merge(result.base, result.adapter, output=root / "again")
    merged, again = tensors(root / "merged"), tensors(root / "again")
    assert merged.keys() == again.keys()
    for name, tensor in merged.items():
        if result.folded:
            assert torch.allclose(again[name], tensor, atol=1e-6), name
        else:
            assert torch.equal(again[name], tensor), name
    assert (root / "merged" / "config.json").read_text() == (
        result.base / "config.json"
    ).read_text()
    names = load_file(result.adapter / "adapter_model.safetensors").keys()
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    return result


def check_form(tmp_path, form, tied, **lora):
    scene = adapter_parts.scene(tmp_path, form, tied=tied, **lora)
    start = scene.grafted if form in ("lora", "saved-head", "lora-embed", "lora-head") else None
    start = start or (scene.base if form != "saved-embed" or tied else scene.grafted)
    before = [folder_hash(folder) for folder in (start, scene.adapter)]
    result = split_is_merge(start, scene.adapter, tmp_path)
    assert before == [folder_hash(folder) for folder in (start, scene.adapter)]
    served = adapter_parts.unmerged(result.base, result.adapter)
    ours, rows = adapter_parts.load(tmp_path / "merged"), TOKENS + ADDED
    difference = adapter_parts.logits(served, rows) - adapter_parts.logits(ours, rows)
    assert float(difference.abs().max()) < 1e-4
    ids = torch.tensor([[5, TOKENS, 40, TOKENS + ADDED - 1]])
    texts = [
        model.generate(input_ids=ids, max_new_tokens=12, do_sample=False).tolist()
        for model in (served, ours)
    ]
    assert texts[0] == texts[1]
    assert result.tied == tensors_are_tied(result.base)
    assert TokenMap.read(result.base).hash == TokenMap.read(tmp_path / "merged").hash
    assert check(result.base).ok
    assert check(result.base, adapter=result.adapter).ok
    assert not [
        one
        for consumer in ("vllm", "tgi")
        for one in check(result.base, adapter=result.adapter, consumer=consumer).findings
        if one.code in ("LG921", "LG942")
    ]
    assert Manifest.read(result.base).records[-1].stage == "split"
    return result


def tensors_are_tied(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize(("form", "tied"), QUICK)
def test_base_and_adapter_of_a_split_are_the_merge(tmp_path, form, tied):
    check_form(tmp_path, form, tied)


@pytest.mark.matrix
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", CARRIED)
def test_base_and_adapter_of_a_split_are_the_merge_in_every_form(tmp_path, form, tied):
    if tied or not form.endswith("-shared"):
        check_form(tmp_path, form, tied)


def test_ranks_and_scalings_become_one(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "use_rslora": True}
    result = check_form(tmp_path, "rows", True, **patterns)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], result.folded) == (8, 8, True)
    assert not {"rank_pattern", "use_rslora", "modules_to_save"} & config.keys()
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    stored = load_file(result.adapter / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in stored.items() if n.endswith("A.weight")} == {8}


@pytest.mark.parametrize(
    "lora",
    [
        {"bias": "all", "target_modules": ["c_attn", "wpe"]},
        {"lora_bias": True, "target_modules": ["c_attn"]},
    ],
    ids=["all", "of LoRA"],
)
def test_biases_and_positions_go_into_the_base(tmp_path, lora):
    base, adapter = gpt2_with_adapter(tmp_path, **lora)
    result = split_is_merge(base, adapter, tmp_path)
    served = adapter_parts.unmerged(result.base, result.adapter)
    expected = adapter_parts.logits(adapter_parts.unmerged(base, adapter), TOKENS, old_only=True)
    assert (adapter_parts.logits(served, TOKENS, old_only=True) - expected).abs().max() < 1e-4
    assert result.layers == 2
    assert result.tensors >= 2


def test_what_lora_cannot_carry_is_refused_by_name(tmp_path):
    for form, kind in (("dora", "DoRA"), ("rows-only", "no LoRA on linear")):
        scene = adapter_parts.scene(tmp_path / form, form, tied=True)
        with pytest.raises(RefusalError, match=kind) as caught:
            split(scene.grafted, scene.adapter, output=tmp_path / "pair")
        assert "lexigraft merge" in caught.value.fix
    names = {"target_parameters": ["mlp.experts.down_proj"]}
    base, adapter = other_with_adapter(tmp_path, "mixtral", **names)
    with pytest.raises(RefusalError, match=r"bare parameters mlp\.experts\.down_proj"):
        split(base, adapter, output=tmp_path / "pair")
    assert not (tmp_path / "pair").exists()


def test_a_split_keeps_the_rules_of_outputs(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows", tied=True)
    plan = split(scene.base, scene.adapter, output=tmp_path / "pair", dry_run=True).plan
    assert not (tmp_path / "pair").exists()
    assert {"model.embed_tokens.weight"} < {entry["tensor"] for entry in plan}
    first = split(scene.base, scene.adapter, output=tmp_path / "pair")
    kept = folder_hash(tmp_path / "pair")
    with pytest.raises(LexigraftError, match="exists"):
        split(scene.base, scene.adapter, output=tmp_path / "pair")
    split(scene.base, scene.adapter, output=tmp_path / "pair", force=True)
    assert folder_hash(tmp_path / "pair") == kept
    with pytest.raises(LexigraftError, match="no row of model"):
        merge(scene.base, first.adapter, output=tmp_path / "merged")  # which lacks the rows
    shutil.copytree(scene.base, tmp_path / "pair" / "inside")
    with pytest.raises(LexigraftError, match="input"):
        split(tmp_path / "pair" / "inside", scene.adapter, output=tmp_path / "pair", force=True)
