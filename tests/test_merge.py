"""merge: laws 10, 11, 14, 15, 16 and 17 on real PEFT adapters of tiny real models."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter_parts
import launching
import parts
from adapter_parts import ADDED, FORMS, HAN, NEW, TOKENS
from adapter_parts import tensors as weights
from lexigraft import merge
from lexigraft.adapters import merging
from lexigraft.adapters import tokens as adapter_tokens
from lexigraft.checkpoints import write as writing
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import TokenMap
from lexigraft.manifest import Manifest
from lexigraft.steps.check import check

torch.set_num_threads(1)

AXES = {
    "form": list(FORMS),
    "tied": [False, True],
    "padded": [False, True],
    "ungrafted": [True, False],
    "shards": [False, True],
    "dtype": ["float32", "bfloat16"],
    "whole": [True, False],
}
PAIRS = adapter_parts.pairwise(AXES)
FULL = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def folder_hash(folder):
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def missing_rows(case):
    """The tensor whose new rows nobody holds: an ungrafted base, and an adapter without them."""
    form, tied = case["form"], case["tied"]
    if not case["ungrafted"]:
        return None
    if not tied and form in ("lora-embed", "dora-embed"):  # PEFT saves the targeted one alone
        return "lm_head.weight"
    if not tied and form == "lora-head":
        return "model.embed_tokens.weight"
    if case["whole"] and not case["padded"]:
        return None
    if form in ("lora", "dora", "saved-head"):
        return "model.embed_tokens.weight"
    if form == "saved-embed" or (form == "rows" and not tied):
        return "lm_head.weight"
    return None


def check_case(root, case):
    options = {k: v for k, v in case.items() if k not in ("form", "ungrafted")}
    scene = adapter_parts.scene(root, case["form"], **options)
    before = [folder_hash(folder) for folder in (scene.base, scene.grafted, scene.adapter)]
    start, output = scene.start(ungrafted=case["ungrafted"]), root / "merged"
    lost = missing_rows(case)
    if lost:
        with pytest.raises(LexigraftError, match=f"no row of {lost}") as caught:
            merge(start, scene.adapter, output=output)
        assert "model.safetensors" in caught.value.fix
        assert not output.exists()
        return
    result = merge(start, scene.adapter, output=output)
    assert before == [folder_hash(f) for f in (scene.base, scene.grafted, scene.adapter)]

    unmerged = adapter_parts.unmerged(scene.grafted, scene.adapter)
    expected = adapter_parts.logits(unmerged, result.rows)
    merged = adapter_parts.load(output)
    assert merged.config.vocab_size == result.rows
    if case["dtype"] == "float32":
        got = adapter_parts.logits(merged, result.rows)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < 1e-4
    peft = adapter_parts.merged_by_peft(
        scene.grafted, scene.adapter, case["form"], tied=case["tied"]
    )
    ours = merged.state_dict()
    for name, tensor in peft.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    head_differs = not torch.equal(peft["lm_head.weight"], peft["model.embed_tokens.weight"])
    assert result.tied == (not head_differs)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] == result.tied
    assert ("lm_head.weight" in weights(output)) == (not result.tied)
    assert TokenMap.read(output).hash == TokenMap.read(scene.adapter).hash


def applies(case):
    return case["tied"] or not case["form"].endswith("-shared")  # which is about tied models


@pytest.mark.parametrize("case", filter(applies, PAIRS), ids=adapter_parts.label)
def test_merged_is_what_peft_computes_unmerged(tmp_path, case):
    check_case(tmp_path, case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", filter(applies, FULL), ids=adapter_parts.label)
def test_merged_is_what_peft_computes_unmerged_everywhere(tmp_path, case):
    check_case(tmp_path, case)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_has_grown_since_keeps_its_later_rows(
    tmp_path, form, tied, padded, shards, dtype
):
    if not applies({"form": form, "tied": tied}):
        pytest.skip("a form of tied models")
    scene = adapter_parts.scene(tmp_path, form, tied=tied, padded=padded, dtype=dtype)
    old = TOKENS + ADDED
    larger = adapter_parts.write_larger(scene, tmp_path / "larger", shards=shards)
    merge(larger, scene.adapter, output=tmp_path / "merged")
    merged, later = adapter_parts.load(tmp_path / "merged"), adapter_parts.load(larger).state_dict()
    if dtype == "float32":
        expected, got = (
            adapter_parts.logits(model, old)
            for model in (adapter_parts.unmerged(scene.grafted, scene.adapter), merged)
        )
        assert (got - expected).abs().max() < 1e-4
    ours = merged.state_dict()
    peft = adapter_parts.merged_by_peft(scene.grafted, scene.adapter, form, tied=tied)
    for name, tensor in peft.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(ours[name][:old], tensor[:old]), name
            assert torch.equal(ours[name][old:], later[name][old:]), name
        else:
            assert torch.equal(ours[name], tensor), name
    assert TokenMap.read(tmp_path / "merged").hash == TokenMap.read(larger).hash


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}},
        {"alpha_pattern": {"v_proj": 32}},
        {"r": 3, "lora_alpha": 1, "use_rslora": True, "rank_pattern": {"v_proj": 5}},
        {"init_lora_weights": "gaussian", "target_modules": "all-linear"},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scaling_is_peft_s(tmp_path, lora, dtype):
    scene = adapter_parts.scene(tmp_path, "lora", tied=True, dtype=dtype, whole=False, **lora)
    merge(scene.grafted, scene.adapter, output=tmp_path / "merged")
    unmerged = adapter_parts.unmerged(scene.grafted, scene.adapter)
    with torch.no_grad():
        peft = unmerged.merge_and_unload().state_dict()
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in peft.items())


def test_an_adapter_stored_in_half_precision_merges_as_peft_loads_it(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows-both", tied=False, dtype="bfloat16")
    adapter_parts.edit_tensors(
        scene.adapter, lambda tensors: {n: t.to(torch.bfloat16) for n, t in tensors.items()}
    )
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    with torch.no_grad():
        peft = adapter_parts.unmerged(scene.grafted, scene.adapter).merge_and_unload().state_dict()
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in peft.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scaling_of_embedding_and_head_is_peft_s(tmp_path, dtype):
    scene = adapter_parts.scene(
        tmp_path,
        "lora-both",
        tied=False,
        dtype=dtype,
        use_rslora=True,
        rank_pattern={"embed_tokens": 7},
        alpha_pattern={"lm_head": 5},
    )
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged")
    assert f"LoRA on rows 0-{TOKENS + ADDED - 1}" in result.sources[0]
    peft = adapter_parts.merged_by_peft(scene.grafted, scene.adapter, "lora-both", tied=False)
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in peft.items())


def gpt2_with_adapter(root, dtype="float32", config=None, **lora):
    """A tiny GPT-2, whose linear layers are Conv1D with biases, and an adapter of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    base = adapter_parts.parts.write_byte_level(root / "base", vocab_size=TOKENS)
    model = GPT2LMHeadModel(sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(base)
    options = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, **lora}
    config = config or LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(adapter_parts.load(base), config)
    adapter_parts.move_what_trains(model)
    model.save_pretrained(root / "adapter")
    return base, root / "adapter"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("conv1d", [True, False])
def test_ia3_is_peft_s(tmp_path, conv1d, dtype):
    """Outputs with their bias, inputs of the feed-forward layers, square and other matrices."""
    from peft import IA3Config, PeftModel

    names = ["c_attn", "c_proj"] if conv1d else ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(
        target_modules=names,
        feedforward_modules=["c_proj" if conv1d else "down_proj"],
        fan_in_fan_out=conv1d,
        modules_to_save=["ln_f" if conv1d else "model.norm"],
        task_type="CAUSAL_LM",
    )
    if conv1d:
        base, adapter = gpt2_with_adapter(tmp_path, dtype, config)
    else:
        base, adapter = other_with_adapter(tmp_path, "qwen2", dtype, config=config)
    result = merge(base, adapter, output=tmp_path / "merged", prove=True)
    # in each of two layers three matrices and the biases of outputs; the norm
    assert result.tensors == (2 * (3 + 1) + 2 if conv1d else 2 * (3 + 2) + 1)
    assert result.difference < (1e-4 if dtype == "float32" else result.limit)
    with torch.no_grad():
        peft = PeftModel.from_pretrained(adapter_parts.load(base), adapter)
        expected = peft.merge_and_unload().state_dict()
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.matrix
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_ia3_and_saved_rows_go_into_the_base_as_it_was_before_the_graft(tmp_path, padded, shards):
    from peft import IA3Config, get_peft_model

    rows = 448 if padded else TOKENS
    base = adapter_parts.write_base(tmp_path / "base", tied=False, rows=rows, shards=shards)
    grafted = adapter_parts.write_grafted(base, tmp_path / "grafted")
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(adapter_parts.load(grafted), config)
    torch.manual_seed(11)
    adapter_parts.move_what_trains(model)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(grafted / name, adapter / name)
    merge(base, adapter, output=tmp_path / "merged")
    unmerged = adapter_parts.unmerged(grafted, adapter)
    got, expected = (
        adapter_parts.logits(one, TOKENS + ADDED)
        for one in (adapter_parts.load(tmp_path / "merged"), unmerged)
    )
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.matrix
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_patterns_beside_saved_rows_on_a_padded_base_in_bfloat16(tmp_path, tied, shards):
    scene = adapter_parts.scene(
        tmp_path, "rows-both", tied=tied, padded=True, dtype="bfloat16", shards=shards,
        use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32},
    )  # fmt: skip
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    peft = adapter_parts.merged_by_peft(scene.grafted, scene.adapter, "rows-both", tied=tied)
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in peft.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["c_attn", "wpe"]},
        {"target_modules": ["c_attn", "c_proj", "wpe"], "use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
    ],
    ids=lambda lora: "-".join(map(str, lora.values())),
)
def test_conv1d_and_biases_are_peft_s(tmp_path, lora, dtype):
    from peft import PeftModel

    base, adapter = gpt2_with_adapter(tmp_path, dtype, **lora)
    result = merge(base, adapter, output=tmp_path / "merged", prove=True)
    assert result.difference < (1e-4 if dtype == "float32" else result.limit)
    peft = PeftModel.from_pretrained(adapter_parts.load(base), adapter)
    with torch.no_grad():
        expected = peft.merge_and_unload().state_dict()
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    old = adapter_parts.load(base).state_dict()
    moved = {name.split(".")[-1] for name in old if not torch.equal(old[name], ours[name])}
    assert moved == ({"weight", "bias"} if {"bias", "lora_bias"} & lora.keys() else {"weight"})


def test_dora_of_an_embedding_needs_the_rows_that_it_was_trained_with(tmp_path):
    scene = adapter_parts.scene(tmp_path, "dora-both", tied=False)
    adapter_parts.edit_tensors(
        scene.adapter, lambda tensors: {n: t for n, t in tensors.items() if "base_layer" not in n}
    )
    fault = refused(scene.base, scene.adapter, tmp_path / "merged", "norms of 384 rows")
    assert isinstance(fault, RefusalError)
    assert merge(scene.grafted, scene.adapter, output=tmp_path / "merged", prove=True).difference


def other_with_adapter(root, kind, dtype="float32", width=24, config=None, **lora):
    """A tiny mixture of experts, or a Qwen2, and an adapter, with LoRA on bare parameters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config, Qwen3MoeConfig

    sizes = {"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 40}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if kind == "mixtral":
        few = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
        shape = MixtralConfig(**sizes, **layers, **few)
    elif kind == "qwen2":
        shape = Qwen2Config(**sizes, **layers)
    else:
        few = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": width}
        shape = Qwen3MoeConfig(**sizes, **layers, **few, head_dim=8)
    base = adapter_parts.parts.write_byte_level(root / "base", vocab_size=TOKENS)
    AutoModelForCausalLM.from_config(shape).to(getattr(torch, dtype)).save_pretrained(base)
    options = {"r": 4, "target_modules": ["q_proj"], **lora}
    config = config or LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(adapter_parts.load(base), config)
    adapter_parts.move_what_trains(model)
    model.save_pretrained(root / "adapter")
    return base, root / "adapter"


UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_parameters": [DOWN, UP]},
        {"target_parameters": [DOWN], "use_rslora": True},
        {"target_parameters": [UP, DOWN], "alpha_pattern": {"experts.down_proj": 3}},
    ],
    ids=["both", "down", "alpha"],
)
def test_lora_on_experts_is_peft_s(tmp_path, kind, dtype, lora):
    from peft import PeftModel

    base, adapter = other_with_adapter(tmp_path, kind, dtype, **lora)
    result = merge(base, adapter, output=tmp_path / "merged")
    assert result.tensors == 2 * (1 + 3 * (3 if UP in lora["target_parameters"] else 1))
    unmerged = PeftModel.from_pretrained(adapter_parts.load(base), adapter)
    expected = adapter_parts.logits(unmerged, TOKENS, old_only=True)
    merged = adapter_parts.load(tmp_path / "merged")
    if dtype == "float32":
        got = adapter_parts.logits(merged, TOKENS, old_only=True)
        assert (got - expected).abs().max() < 1e-4
    with torch.no_grad():
        peft = unmerged.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in peft.items())


def test_square_experts_alone_do_not_tell_which_way_they_were_trained(tmp_path):
    """PEFT has swapped the two factors between versions."""
    base, adapter = other_with_adapter(tmp_path, "qwen3_moe", width=16, target_parameters=[UP])
    refused(base, adapter, tmp_path / "merged", "square")


def test_lora_on_experts_that_does_not_fit_is_an_error(tmp_path):
    base, adapter = other_with_adapter(tmp_path, "mixtral", target_parameters=[UP, DOWN])
    adapter_parts.edit_adapter_config(adapter, target_parameters=[DOWN])
    refused(base, adapter, tmp_path / "merged", "has 2 LoRA, .* names down_proj")
    adapter_parts.edit_adapter_config(adapter, target_parameters=None)
    refused(base, adapter, tmp_path / "merged", "fits no tensor")
    adapter_parts.edit_adapter_config(adapter, target_parameters=[UP, DOWN])
    other = adapter_parts.write_base(tmp_path / "other", tied=False)
    refused(other, adapter, tmp_path / "merged", "does not store per expert")


def test_the_layers_tell_what_is_transposed_not_the_config(tmp_path):
    """PEFT saves the option of the layer that it adapted last."""
    base, adapter = gpt2_with_adapter(tmp_path)
    merge(base, adapter, output=tmp_path / "on")
    adapter_parts.edit_adapter_config(adapter, fan_in_fan_out=False)
    merge(base, adapter, output=tmp_path / "off")
    assert weights(tmp_path / "on").keys() == weights(tmp_path / "off").keys()
    for name, tensor in weights(tmp_path / "on").items():
        assert torch.equal(tensor, weights(tmp_path / "off")[name])


def image_text_model(folder):
    """A tiny Llava, saved under the older order of names that published checkpoints have."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=5, tie_word_embeddings=False
    )
    Llava(config).save_pretrained(folder)
    return Llava, adapter_parts.parts.write_byte_level(folder, vocab_size=TOKENS)


def test_an_adapter_of_an_image_text_model_finds_its_tensors(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    kind, base = image_text_model(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(kind.from_pretrained(base), lora)
    torch.manual_seed(1)
    adapter_parts.move_what_trains(model)
    model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    with torch.no_grad():
        peft = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "adapter")
        expected = peft.merge_and_unload().state_dict()
    ours = kind.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_saved_modules_outside_the_vocabulary_are_replaced(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=True, dtype="bfloat16")
    adapter = adapter_parts.write_adapter(
        base,
        base,
        tmp_path / "adapter",
        "lora",
        modules_to_save=["input_layernorm", "mlp"],
        target_modules=["q_proj"],
    )
    result = merge(base, adapter, output=tmp_path / "merged")
    assert result.tensors == 2 * (1 + 1 + 3)
    with torch.no_grad():
        peft = adapter_parts.unmerged(base, adapter).merge_and_unload().state_dict()
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in peft.items())


# What is on disk: layouts that other tools and versions write


def renamed(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def test_names_with_the_adapter_s_own_name_are_read(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    merge(scene.base, scene.adapter, output=tmp_path / "new")

    def old_style(tensors):
        for ending in ("lora_A", "lora_B", "modules_to_save"):
            tensors = renamed(tensors, f".{ending}.weight", f".{ending}.default.weight")
        return tensors

    adapter_parts.edit_tensors(scene.adapter, old_style)
    merge(scene.base, scene.adapter, output=tmp_path / "old")
    assert (tmp_path / "old/model.safetensors").read_bytes() == (
        tmp_path / "new/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "kept", [("modules_to_save",), ("plain",), ("modules_to_save", "original_module")]
)
def test_one_copy_of_a_saved_module_is_as_good_as_three(tmp_path, kept):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    merge(scene.base, scene.adapter, output=tmp_path / "three")

    def thin(tensors):
        def is_kept(name):
            if "embed_tokens" not in name and "lm_head" not in name:
                return True
            kind = next((k for k in ("modules_to_save", "original_module") if k in name), "plain")
            return kind in kept

        return {name: tensor for name, tensor in tensors.items() if is_kept(name)}

    adapter_parts.edit_tensors(scene.adapter, thin)
    merge(scene.base, scene.adapter, output=tmp_path / "thin")
    assert (tmp_path / "thin/model.safetensors").read_bytes() == (
        tmp_path / "three/model.safetensors"
    ).read_bytes()


def test_a_plain_embedding_alone_stands_for_a_tied_head_too(tmp_path):
    scene = adapter_parts.scene(tmp_path, "plain", tied=True)
    adapter_parts.edit_tensors(
        scene.adapter, lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n}
    )
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged", prove=True)
    assert result.tied
    assert result.difference < 1e-4


def test_rows_of_a_tied_head_alone_untie_it(tmp_path, capsys):
    """PEFT's own merge writes them into the shared matrix; the trained model did not."""
    scene = adapter_parts.scene(tmp_path, "saved-head", tied=True)
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged")
    ours, trained = weights(tmp_path / "merged"), weights(scene.adapter)
    assert not result.tied
    assert "tie_word_embeddings becomes false" in capsys.readouterr().err
    saved = trained["base_model.model.lm_head.modules_to_save.weight"]
    assert torch.equal(ours["lm_head.weight"], saved)
    assert not torch.equal(ours["model.embed_tokens.weight"], saved)


@pytest.mark.parametrize(
    "form",
    [
        {"trainable_token_indices": {"embed_tokens": [3, *NEW], "lm_head": [5, *NEW]}},
        {"trainable_token_indices": [3, *NEW], "target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": {"lm_head": [3, *NEW]}, "target_modules": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens"]},
    ],
    ids=["other-rows", "rows-lora", "lora-rows", "saved-lora", "lora-saved"],
)
def test_an_embedding_and_its_tied_head_trained_in_two_ways(tmp_path, monkeypatch, form):
    """PEFT's merge is wrong here; its unmerged model says what was trained."""
    monkeypatch.setitem(FORMS, "mixed", form)
    scene = adapter_parts.scene(tmp_path, "mixed", tied=True)
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged", prove=True)
    assert not result.tied
    assert result.difference < 1e-4


def test_a_stored_copy_of_a_tied_embedding_stays_tied(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows-only", tied=True)
    tensors = load_file(scene.base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, scene.base / "model.safetensors", metadata={"format": "pt"})
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged", prove=True)
    assert result.tied
    assert "lm_head.weight" not in weights(tmp_path / "merged")


# Rows and tokens


def test_an_adapter_smaller_than_its_padded_base_keeps_the_tail(tmp_path):
    """The trainer shrank the matrices to the tokenizer (151,936 rows of Qwen to 151,666)."""
    base = adapter_parts.write_base(tmp_path / "base", tied=False, rows=448)
    shrunk = adapter_parts.write_grafted(base, tmp_path / "shrunk", rows=TOKENS + ADDED)
    adapter = adapter_parts.write_adapter(base, shrunk, tmp_path / "adapter", "saved-both")
    result = merge(base, adapter, output=tmp_path / "merged", prove=True)
    assert result.rows == 448
    assert result.difference < 1e-4
    ours, old = weights(tmp_path / "merged"), weights(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(ours[name][TOKENS + ADDED :], old[name][TOKENS + ADDED :])


def test_rows_are_those_of_the_adapter_not_of_its_tokenizer(tmp_path):
    """Tokenizer 384, trained with rows padded to a multiple of 64."""
    base = adapter_parts.write_base(tmp_path / "base", tied=True)
    grafted = adapter_parts.write_grafted(base, tmp_path / "grafted", rows=448)
    adapter = adapter_parts.write_adapter(base, grafted, tmp_path / "adapter", "saved-both")
    assert merge(base, adapter, output=tmp_path / "merged", prove=True).rows == 448


def test_an_older_adapter_on_a_grown_model_leaves_the_new_rows(tmp_path):
    scene = adapter_parts.scene(tmp_path, "lora", tied=False)
    old = adapter_parts.write_adapter(scene.base, scene.base, tmp_path / "old", "saved-both")
    merge(scene.grafted, old, output=tmp_path / "merged")
    ours, grown, trained = weights(tmp_path / "merged"), weights(scene.grafted), weights(old)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(ours[name][:TOKENS], trained[f"base_model.model.{name}"][:TOKENS])
        assert torch.equal(ours[name][TOKENS:], grown[name][TOKENS:])
    assert TokenMap.read(tmp_path / "merged").tokens == TOKENS + ADDED


def test_no_row_is_guessed_without_a_tokenizer(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scene.adapter / name).unlink()
    with pytest.raises(LexigraftError, match="no tokenizer") as caught:
        merge(scene.base, scene.adapter, output=tmp_path / "merged")
    assert "--tokenizer" in caught.value.fix
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged", tokenizer=scene.grafted)
    assert result.tokens == TOKENS + ADDED
    assert (tmp_path / "merged/tokenizer.json").read_bytes() == (
        scene.grafted / "tokenizer.json"
    ).read_bytes()


def test_trained_rows_without_a_tokenizer_ask_for_it(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows-only", tied=True, whole=False)
    (scene.adapter / "tokenizer.json").unlink()
    with pytest.raises(LexigraftError, match=f"row of id {NEW[-1]}") as caught:
        merge(scene.base, scene.adapter, output=tmp_path / "merged")
    assert "--tokenizer" in caught.value.fix


def permuted(adapter):
    path = adapter / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    one, other = (token for token, token_id in vocabulary.items() if token_id in (300, 301))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(data))


def test_permuted_ids_of_equal_size_are_caught(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    permuted(scene.adapter)
    for start in (scene.base, scene.grafted):
        with pytest.raises(LexigraftError, match="id 300 is"):
            merge(start, scene.adapter, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_sibling_vocabulary_is_caught(tmp_path):
    """Base + tokens {a..} and an adapter trained on base + tokens {p..}: same sizes, other words."""
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    data = json.loads((scene.adapter / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        if token["id"] >= TOKENS:
            token["content"] += "x"
    (scene.adapter / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(LexigraftError, match=f"id {TOKENS} is"):
        merge(scene.grafted, scene.adapter, output=tmp_path / "merged")


def test_a_given_tokenizer_that_is_not_the_adapter_s_is_caught(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    other = adapter_parts.extended_tokenizer(scene.base, tmp_path / "other", added=ADDED + 3)
    with pytest.raises(LexigraftError, match=f"id {TOKENS + ADDED} is"):
        merge(scene.base, scene.adapter, output=tmp_path / "merged", tokenizer=other)


def test_new_ids_that_are_not_those_of_the_manifest_are_caught(tmp_path):
    """Swapped new ids of equal size: nothing but the manifest can tell."""
    from lexigraft import graft

    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    graft(scene.base, scene.grafted, output=tmp_path / "model", pad_to=1)
    shutil.copyfile(tmp_path / "model/lexigraft.json", scene.adapter / "lexigraft.json")
    merge(scene.base, scene.adapter, output=tmp_path / "right")
    path = scene.adapter / "tokenizer.json"
    data = json.loads(path.read_text())
    one, other = data["added_tokens"][-2:]
    one["content"], other["content"] = other["content"], one["content"]
    path.write_text(json.dumps(data))
    refused(scene.base, scene.adapter, tmp_path / "merged", "not the one that its manifest names")


def test_what_is_written_is_held_against_the_plan(tmp_path, monkeypatch):
    """The tokenizer id by id, and every place of the config; a fault leaves no output."""
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    output = tmp_path / "merged"
    copied, edited = adapter_tokens.copy_tokenizer, merging.edit_config

    def copy_another(folder, target):
        copied(folder, target)
        permuted(target)

    def edit_one_place(*arguments, **options):
        return edited(*arguments, **options) | {"text_config": {"vocab_size": TOKENS}}

    with monkeypatch.context() as patched:
        patched.setattr(adapter_tokens, "copy_tokenizer", copy_another)
        fault = refused(scene.base, scene.adapter, output, "not the one that its rows were made")
        assert "id 300 is" in fault.found
    config = json.loads((scene.base / "config.json").read_text())
    config["text_config"] = {"vocab_size": TOKENS}
    (scene.base / "config.json").write_text(json.dumps(config))
    with monkeypatch.context() as patched:
        patched.setattr(merging, "edit_config", edit_one_place)
        refused(scene.base, scene.adapter, output, f"text_config.vocab_size {TOKENS}")
    assert merge(scene.base, scene.adapter, output=output)
    written = json.loads((output / "config.json").read_text())
    assert written["vocab_size"] == written["text_config"]["vocab_size"] == TOKENS + ADDED


def test_another_base_with_the_same_tokenizer_is_noticed(tmp_path, capsys):
    from lexigraft import graft

    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    graft(scene.base, scene.grafted, output=tmp_path / "model", pad_to=1)
    shutil.copyfile(tmp_path / "model/lexigraft.json", scene.adapter / "lexigraft.json")
    other = adapter_parts.parts.write_model(tmp_path / "other", tokens=TOKENS, seed=9)
    adapter_parts.parts.write_byte_level(other, vocab_size=TOKENS)
    merge(scene.base, scene.adapter, output=tmp_path / "right")
    assert "another base" not in capsys.readouterr().err
    merge(other, scene.adapter, output=tmp_path / "merged")
    assert "the result is that of another base" in capsys.readouterr().err


def test_fewer_rows_than_tokens_is_an_error(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    longer = adapter_parts.extended_tokenizer(scene.base, tmp_path / "longer", added=ADDED + 5)
    shutil.copyfile(longer / "tokenizer.json", scene.adapter / "tokenizer.json")
    with pytest.raises(LexigraftError, match="384 rows for a tokenizer of 389"):
        merge(scene.base, scene.adapter, output=tmp_path / "merged")


# The output


def test_the_tokenizer_is_the_adapter_s_and_old_copies_are_gone(tmp_path):
    """A SentencePiece base: the adapter has only tokenizer.json, VOCAB has both files."""
    import sentencepiece.sentencepiece_model_pb2 as proto

    base = adapter_parts.parts.write_sentencepiece(tmp_path / "base", vocab_size=400)
    tokens = TokenMap.read(base).tokens
    adapter_parts.parts.write_model(base, tokens=tokens, tied=True)
    adapter_parts.parts.write_sentencepiece(base, vocab_size=400)
    vocab = shutil.copytree(base, tmp_path / "vocab")
    data = json.loads((vocab / "tokenizer.json").read_text())
    model = proto.ModelProto.FromString((vocab / "tokenizer.model").read_bytes())
    for place in range(4):
        piece = f"zq{'x' * place}"
        data["model"]["vocab"][piece] = tokens + place
        model.pieces.add(piece=piece, score=-1000.0 - place)
    (vocab / "tokenizer.json").write_text(json.dumps(data))
    (vocab / "tokenizer.model").write_bytes(model.SerializeToString())
    grown = adapter_parts.load(base)
    grown.resize_token_embeddings(tokens + 4, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grafted")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(vocab / name, tmp_path / "grafted" / name)
    adapter = adapter_parts.write_adapter(base, tmp_path / "grafted", tmp_path / "adapter", "plain")

    merge(base, adapter, output=tmp_path / "alone")
    assert not (tmp_path / "alone/tokenizer.model").exists()
    merge(base, adapter, output=tmp_path / "given", tokenizer=vocab)
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "given" / name).read_bytes() == (vocab / name).read_bytes()


def test_an_unchanged_token_map_keeps_the_base_s_sentencepiece_file(tmp_path):
    base = adapter_parts.parts.write_sentencepiece(tmp_path / "base", vocab_size=400)
    adapter_parts.parts.write_model(base, tokens=TokenMap.read(base).tokens, tied=True)
    adapter_parts.parts.write_sentencepiece(base, vocab_size=400)
    adapter = adapter_parts.write_adapter(base, base, tmp_path / "adapter", "lora")
    merge(base, adapter, output=tmp_path / "merged")
    assert (tmp_path / "merged/tokenizer.model").read_bytes() == (
        base / "tokenizer.model"
    ).read_bytes()


def test_a_bare_vocabulary_gets_the_settings_of_the_base(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    (scene.adapter / "tokenizer_config.json").unlink()
    (scene.base / "chat_template.jinja").write_text("{{ messages }}")
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    for name, source in (
        ("tokenizer.json", scene.adapter),
        ("tokenizer_config.json", scene.base),
        ("chat_template.jinja", scene.base),
    ):
        assert (tmp_path / "merged" / name).read_bytes() == (source / name).read_bytes()


def test_side_files_travel_and_config_changes_key_by_key(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    config = json.loads((scene.base / "config.json").read_text())
    config["a_key_of_tomorrow"] = {"kept": [1, 2]}
    (scene.base / "config.json").write_text(json.dumps(config))
    (scene.base / "README.md").write_text("the base")
    (scene.adapter / "new_tokens.jsonl").write_text('{"id": 372}\n')
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written == {**config, "vocab_size": TOKENS + ADDED, "tie_word_embeddings": False}
    assert (tmp_path / "merged/README.base.md").read_text() == "the base"
    assert not (tmp_path / "merged/README.md").exists()
    assert (tmp_path / "merged/new_tokens.jsonl").read_text() == '{"id": 372}\n'
    assert (tmp_path / "merged/generation_config.json").read_bytes() == (
        scene.base / "generation_config.json"
    ).read_bytes()


def test_an_end_token_that_the_training_changed_reaches_the_configs(tmp_path, capsys):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    path = scene.adapter / "tokenizer_config.json"
    changed = json.loads(path.read_text())
    changed["eos_token"] = "<|im_end|>"
    path.write_text(json.dumps(changed))
    expected = TokenMap.read(scene.base).ids["<|im_end|>"]
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text())["eos_token_id"] == expected
    assert "eos_token_id becomes" in capsys.readouterr().err


def test_the_manifest_names_the_adapter_by_its_hash(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    record = Manifest.read(tmp_path / "merged").last("merge")
    digest = hashlib.sha256((scene.adapter / "adapter_model.safetensors").read_bytes())
    assert record.adapters == [digest.hexdigest()]
    assert (record.rows, record.tied) == (TOKENS + ADDED, False)


def test_a_merged_model_can_be_merged_again(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    merge(scene.base, scene.adapter, output=tmp_path / "once")
    second = adapter_parts.write_adapter(
        tmp_path / "once", tmp_path / "once", tmp_path / "second", "lora"
    )
    result = merge(tmp_path / "once", second, output=tmp_path / "twice", prove=True)
    assert result.difference < 1e-4
    assert len(Manifest.read(tmp_path / "twice").records) == 2


def test_a_stack_whose_vocabularies_grow_is_merged_in_its_order(tmp_path):
    """Each adapter on what the ones before it left: PEFT, one merge after another."""
    first = adapter_parts.scene(tmp_path / "1", "saved-both", tied=True)
    merge(first.base, first.adapter, output=tmp_path / "once", prove=True)
    more, count = tmp_path / "grafted", ADDED + 7
    grown = adapter_parts.load(tmp_path / "once")
    grown.resize_token_embeddings(TOKENS + count, mean_resizing=False)
    grown.save_pretrained(more)
    adapter_parts.extended_tokenizer(first.base, more, added=count)
    second = adapter_parts.write_adapter(tmp_path / "once", more, tmp_path / "2", "lora-both")
    third = adapter_parts.write_adapter(more, more, tmp_path / "3", "dora")
    adapters = [first.adapter, second, third]
    result = merge(first.base, adapters, output=tmp_path / "merged", prove=True)
    assert result.rows == result.tokens == TOKENS + count
    assert result.difference < 1e-4
    assert result.adapters == tuple(adapters)
    assert len(Manifest.read(tmp_path / "merged").records) == 3
    merge(tmp_path / "once", second, output=tmp_path / "twice")
    with torch.no_grad():
        unmerged = adapter_parts.unmerged(tmp_path / "twice", third)
        expected = unmerged.merge_and_unload().state_dict()
    ours = adapter_parts.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert not list(tmp_path.glob("merged.*"))


def test_a_stack_in_the_wrong_order_is_an_error(tmp_path):
    first = adapter_parts.scene(tmp_path / "1", "saved-both", tied=False)
    merge(first.base, first.adapter, output=tmp_path / "once")
    more = adapter_parts.load(tmp_path / "once")
    more.resize_token_embeddings(TOKENS + ADDED + 7, mean_resizing=False)
    more.save_pretrained(tmp_path / "more")
    adapter_parts.extended_tokenizer(first.base, tmp_path / "more", added=ADDED + 7)
    second = adapter_parts.write_adapter(
        tmp_path / "more", tmp_path / "more", tmp_path / "2", "lora"
    )
    refused(first.base, [second, first.adapter], tmp_path / "merged", "no row of")
    assert not list(tmp_path.glob("merged.*"))


def test_the_result_says_where_each_row_comes_from(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows-only", tied=True, whole=False)
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged")
    assert result.to_json()["rows"] == TOKENS + ADDED
    assert result.to_json()["adapters"] == [str(scene.adapter)]
    line = next(line for line in result.lines() if line.startswith("model.embed_tokens.weight"))
    assert f"0-{TOKENS - 1} the base's" in line
    assert f"{TOKENS}-{TOKENS + ADDED - 1} the adapter's" in line


def test_the_bytes_depend_on_no_thread_count_and_no_hash_seed(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False, shards=True)
    hashes = set()
    for seed, threads in (("1", "1"), ("2", "2")):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "lexigraft",
                "merge",
                scene.base,
                scene.adapter,
                "-o",
                tmp_path / seed,
                "-q",
            ],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            check=True,
            timeout=120,
        )
        hashes.add(folder_hash(tmp_path / seed))
    assert len(hashes) == 1


def test_a_dry_run_writes_nothing_and_needs_no_torch(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    code = (
        "import sys, lexigraft\n"
        "result = lexigraft.merge(*sys.argv[1:3], output=sys.argv[3], dry_run=True)\n"
        "assert 'torch' not in sys.modules\n"
        "print('\\n'.join(result.lines()))\n"
    )
    output = tmp_path / "merged"
    shown = subprocess.run(
        [sys.executable, "-c", code, scene.base, scene.adapter, output],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert f"model.embed_tokens.weight: [{TOKENS}, 32] -> [{TOKENS + ADDED}, 32]" in shown
    assert "lm_head.weight: None -> " in shown
    assert not output.exists()


def test_killed_in_the_middle_leaves_no_output(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False, shards=True)
    code = (
        "import os, signal, sys\n"
        "from lexigraft import merge\n"
        "from lexigraft.adapters import merging\n"
        "write_plan, done = merging.write_plan, 0\n"
        "def advance(count):\n"
        "    global done\n"
        "    done += count\n"
        "    if done > 100_000:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "def killed(plan, folder, **options):\n"
        "    write_plan(plan, folder, **{**options, 'advance': advance})\n"
        "merging.write_plan = killed\n"
        "merge(*sys.argv[1:3], output=sys.argv[3])\n"
    )
    output, before = tmp_path / "merged", folder_hash(scene.base)
    run = subprocess.run(
        [sys.executable, "-c", code, scene.base, scene.adapter, output], check=False, timeout=120
    )
    assert run.returncode == -9
    assert not output.exists()
    assert list(tmp_path.glob("merged.partial-*"))
    assert folder_hash(scene.base) == before
    merge(scene.base, scene.adapter, output=output)
    assert not list(tmp_path.glob("merged.partial-*"))


# What is refused, and what is wrong


def refused(base, adapter, output, match):
    with pytest.raises(LexigraftError, match=match) as caught:
        merge(base, adapter, output=output)
    assert not output.exists()
    assert caught.value.needed
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"lora_bias": True}, "it has none"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
    ids=["bias", "olora"],
)
def test_other_forms_of_lora_are_refused_by_name(tmp_path, lora, named):
    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    adapter = adapter_parts.write_adapter(base, base, tmp_path / "adapter", "lora", **lora)
    fault = refused(base, adapter, tmp_path / "merged", named)
    assert isinstance(fault, RefusalError)


def test_other_kinds_of_adapter_are_refused_by_name(tmp_path):
    from peft import LoHaConfig, get_peft_model

    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    config = LoHaConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM")
    get_peft_model(adapter_parts.load(base), config).save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path / "adapter", tmp_path / "merged", "LOHA")


def test_ia3_on_a_head_is_refused_by_name(tmp_path):
    from peft import IA3Config, get_peft_model

    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(adapter_parts.load(base), config).save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path / "adapter", tmp_path / "merged", "IA.3 on a vocabulary tensor")


def test_no_adapter_and_a_dry_run_of_a_stack_are_refused(tmp_path):
    with pytest.raises(RefusalError, match="0 adapters"):
        merge(tmp_path, [], output=tmp_path / "merged")
    with pytest.raises(RefusalError, match="2 adapters and a dry run"):
        merge(tmp_path, [tmp_path, tmp_path], output=tmp_path / "merged", dry_run=True)


def test_a_quantised_base_is_refused(tmp_path):
    scene = adapter_parts.scene(tmp_path, "lora", tied=True, whole=False)
    config = json.loads((scene.grafted / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (scene.grafted / "config.json").write_text(json.dumps(config))
    refused(scene.grafted, scene.adapter, tmp_path / "merged", "quantised")


def test_an_adapter_tensor_that_fits_nothing_is_an_error(tmp_path):
    scene = adapter_parts.scene(tmp_path, "lora", tied=True, whole=False)
    adapter_parts.edit_tensors(scene.adapter, lambda t: renamed(t, "layers.1.", "layers.7."))
    refused(scene.grafted, scene.adapter, tmp_path / "merged", r"layers\.7\..* fits no tensor")


def test_a_base_of_another_size_is_an_error(tmp_path):
    scene = adapter_parts.scene(tmp_path, "lora", tied=True, whole=False)
    other = adapter_parts.parts.write_model(
        tmp_path / "other", tokens=TOKENS + ADDED, hidden=64, tied=True
    )
    adapter_parts.extended_tokenizer(scene.base, other)
    refused(other, scene.adapter, tmp_path / "merged", "the base has")


def wider(*names):
    """A change of an adapter's tensors: those whose names end so get one number more per row."""

    def change(tensors):
        return {
            n: torch.cat([t, t[..., :1]], -1) if n.endswith(names) else t
            for n, t in tensors.items()
        }

    return change


def test_all_that_does_not_fit_is_told_at_once_by_merge_and_by_check(tmp_path):
    scene = adapter_parts.scene(tmp_path, "plain", tied=False, modules_to_save=["model.norm"])
    adapter_parts.edit_tensors(
        scene.adapter, lambda t: renamed(t, "layers.1.mlp.down_proj", "layers.7.mlp.down_proj")
    )
    spoilt = ("0.self_attn.q_proj.lora_A.weight", "norm.weight", "embed_tokens.weight")
    adapter_parts.edit_tensors(scene.adapter, wider(*spoilt))
    fault = refused(scene.base, scene.adapter, tmp_path / "merged", "found:  4 faults: ")
    for found in (
        r"layers\.7\.mlp\.down_proj\.lora_A\.weight fits no tensor of .*",
        r"layers\.0\.self_attn\.q_proj changes a matrix of shape \[32, 33\], .* \[32, 32\]",
        r"norm\.weight has shape \[33\], model\.norm\.weight of the base \[32\]",
        r"embed_tokens\.weight has shape \[384, 33\], .* \[372, 32\]",
    ):
        assert re.search(found, fault.found), fault.found
    (finding,) = [f for f in check(scene.base, adapter=scene.adapter).findings if f.code == "LG408"]
    assert (finding.found, finding.needed) == (fault.found, fault.needed)

    # Numbers of rows are dimensions too, and long lists are cut.
    head = "base_model.model.lm_head.weight"
    adapter_parts.edit_tensors(scene.adapter, lambda t: t | {head: t[head][:-20]})
    adapter_parts.edit_tensors(scene.adapter, wider("v_proj.lora_A.weight"))
    fault = refused(
        scene.base, scene.adapter, tmp_path / "merged", "found:  8 faults: .*; and 3 more\n"
    )
    assert "a row for every token" in fault.needed
    assert "the same number in each" in fault.needed


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "options", "spoilt", "faults"),
    [
        ("gpt2", {"bias": "all"}, ("0.attn.c_attn.base_layer.bias", "ln_f.bias"), 2),
        ("gpt2", {"use_dora": True}, ("c_attn.lora_A.weight",), 2),
        ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}, ("lora_A.weight",), 4),
        ("ia3", {}, ("down_proj.ia3_l",), 2),
    ],
    ids=["biases", "dora", "experts", "ia3"],
)
def test_what_does_not_fit_is_told_at_once_in_every_form(tmp_path, kind, options, spoilt, faults):
    from peft import IA3Config

    if kind == "gpt2":
        base, adapter = gpt2_with_adapter(tmp_path, **options)
    else:
        names = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        config = IA3Config(**names, task_type="CAUSAL_LM") if kind == "ia3" else None
        family = "qwen2" if kind == "ia3" else kind
        base, adapter = other_with_adapter(tmp_path, family, config=config, **options)
    adapter_parts.edit_tensors(adapter, wider(*spoilt))
    fault = refused(base, adapter, tmp_path / "merged", f"found:  {faults} faults: ")
    found = [f.found for f in check(base, adapter=adapter).findings if f.code == "LG408"]
    assert found == [fault.found]


def test_rows_that_are_not_numbers_are_an_error(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows-only", tied=True)

    def spoil(tensors):
        return {n: t * float("nan") if "delta" in n else t for n, t in tensors.items()}

    adapter_parts.edit_tensors(scene.adapter, spoil)
    refused(scene.base, scene.adapter, tmp_path / "merged", "not finite")


def test_ids_and_rows_of_different_number_are_an_error(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows-only", tied=True)
    adapter_parts.edit_adapter_config(scene.adapter, token_indices=list(NEW[1:]))
    refused(scene.base, scene.adapter, tmp_path / "merged", "holds 12 rows, .* names 11 ids")


def test_vocab_size_edited_by_hand_is_an_error(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    config = json.loads((scene.base / "config.json").read_text())
    config["vocab_size"] = TOKENS + ADDED
    (scene.base / "config.json").write_text(json.dumps(config))
    refused(scene.base, scene.adapter, tmp_path / "merged", "vocab_size 384")


def test_an_existing_output_and_an_input_as_output_are_errors(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    (tmp_path / "merged").mkdir()
    with pytest.raises(LexigraftError, match="exists"):
        merge(scene.base, scene.adapter, output=tmp_path / "merged")
    merge(scene.base, scene.adapter, output=tmp_path / "merged", force=True)
    assert Checkpoint.open(tmp_path / "merged")
    for output in (scene.base, scene.adapter, tmp_path, scene.base / "merged"):
        with pytest.raises(LexigraftError, match="input"):
            merge(scene.base, scene.adapter, output=output, force=True)


def test_the_proof_tells_a_wrong_result(tmp_path):
    from lexigraft.models.proof import compare_merged

    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    numbers = {
        "base_tokens": TOKENS,
        "tokens": TOKENS + ADDED,
        "adapter_rows": TOKENS + ADDED,
        "dtype": "F32",
    }
    right = compare_merged(scene.base, scene.adapter, tmp_path / "merged", **numbers)
    wrong = compare_merged(scene.base, scene.adapter, scene.grafted, **numbers)
    assert right.difference < right.limit < wrong.difference


def test_a_proof_reads_back_what_was_written(tmp_path, monkeypatch):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    copied = writing._copy

    def damage(path, begin, count, stream, advance):
        copied(path, begin, count, stream, advance)
        stream.seek(-4, os.SEEK_CUR)
        stream.write(b"\xab\xcd\xef\x99")

    monkeypatch.setattr(writing, "_copy", damage)
    with pytest.raises(LexigraftError, match="read back, is not what was written"):
        merge(scene.base, scene.adapter, output=tmp_path / "merged", prove=True)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("on_text", [False, True])
def test_a_failed_proof_leaves_no_output(tmp_path, monkeypatch, on_text):
    """One number of the result is another than was computed: of a norm, or of a word of the text."""
    from lexigraft.models import proof

    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    text = HAN[:2]
    place = ("model.embed_tokens.weight", TokenMap.read(scene.adapter).ids[text])
    name, row = place if on_text else ("model.norm.weight", 0)
    written = merging.write_plan

    def write_another(plan, folder, **options):
        written(plan, folder, **options)
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        tensors[name][row] += 10
        save_file(tensors, path, {"format": "pt"})

    if on_text:  # what is drawn holds no new token now
        drawn = proof._drawn
        monkeypatch.setattr(proof, "_drawn", lambda old, new: drawn(200, ()))
        monkeypatch.setattr(proof, "TEXT", text)
    monkeypatch.setattr(merging, "write_plan", write_another)
    with pytest.raises(LexigraftError, match="logits of the result differ"):
        merge(scene.base, scene.adapter, output=tmp_path / "merged", prove=True)
    assert not list(tmp_path.glob("merged*"))
    monkeypatch.undo()
    assert (
        merge(scene.base, scene.adapter, output=tmp_path / "merged", prove=True).difference < 1e-4
    )


STRANGE = [None, True, -1, 2**70, "", "\x1b[31m", [], [[]], {}, {"a": {}}, 1e308, "x" * 1000]


def mutate(rng, data):
    """One value of nested JSON replaced, removed, or put under a strange key."""
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        kind = rng.random()
        if kind < 0.7:
            place[key] = rng.choice(STRANGE)
        elif kind < 0.85:
            del place[key]
        elif isinstance(place, dict):
            place[rng.choice(["use_dora", "zz", "r"])] = rng.choice(STRANGE)
        return


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "config.json",
        "tokenizer.json",
        "lexigraft.json",
        "tokenizer_config.json",
    ],
)
def test_mutated_json_is_merged_or_named(tmp_path, name):
    import random

    from lexigraft import graft

    scene = adapter_parts.scene(tmp_path, "rows-both", tied=True)
    graft(scene.base, scene.grafted, output=tmp_path / "model", pad_to=1)
    shutil.copyfile(tmp_path / "model/lexigraft.json", scene.adapter / "lexigraft.json")
    path = (scene.base if name == "config.json" else scene.adapter) / name
    plain, rng = json.loads(path.read_text()), random.Random(name)
    outcomes = set()
    for _ in range(150):
        data = json.loads(json.dumps(plain))
        mutate(rng, data)
        path.write_text(json.dumps(data))
        try:
            merge(scene.base, scene.adapter, output=tmp_path / "out", force=True)
            outcomes.add("merged")
        except LexigraftError:
            outcomes.add("named")
    assert "merged" in outcomes
    if name != "tokenizer_config.json":  # of which hardly any key matters here
        assert "named" in outcomes
    assert not list(tmp_path.glob("out.partial-*"))


@pytest.mark.matrix
def test_mutated_headers_are_merged_or_named(tmp_path):
    import random

    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    path = scene.adapter / "adapter_model.safetensors"
    plain, rng = path.read_bytes(), random.Random(3)
    end = 8 + int.from_bytes(plain[:8], "little")
    for _ in range(300):
        data = bytearray(plain)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(end)] = rng.choice(
                [0, 255, 0x22, 0x30 + rng.randrange(10), rng.randrange(256)]
            )
        path.write_bytes(
            bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        )
        try:
            merge(scene.base, scene.adapter, output=tmp_path / "out", force=True)
        except LexigraftError as fault:
            assert fault.fix
    assert not list(tmp_path.glob("out.partial-*"))


def of_many_layers(folder: Path, layers: int, *, seed: int) -> Path:
    """A model with 8 MB of bfloat16 per layer, and an adapter of it in `adapter`."""
    torch.manual_seed(seed)
    rows, width = 2**16, 64
    base, adapter = parts.write_byte_level(folder / "model", vocab_size=TOKENS), folder / "adapter"
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(layers)]
    saved = {f"{name}.weight": torch.randn(rows, width).bfloat16() for name in names}
    saved["model.embed_tokens.weight"] = torch.randn(TOKENS, width).bfloat16()
    save_file(saved, base / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "vocab_size": TOKENS, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    adapter.mkdir()
    lora = {f"{name}.lora_A.weight": torch.randn(1, width) for name in names}
    lora |= {f"{name}.lora_B.weight": torch.randn(rows, 1) for name in names}
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in lora.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.matrix
@pytest.mark.parametrize(
    "call",
    [
        "merge(a / 'model', a / 'adapter', output=out)",
        "blend([a / 'model', b / 'model'], base=a / 'model', method='linear', output=out)",
    ],
    ids=["merge", "blend"],
)
def test_peak_memory_does_not_grow_with_the_layers(tmp_path, call):
    """Where values are computed: four layers, then twenty, 160 MB of each model."""
    code = "import sys; from pathlib import Path; from lexigraft import blend, merge; "
    code += f"a, b, out = map(Path, sys.argv[1:]); {call}"
    peaks = []
    for layers in (4, 20):
        place = tmp_path / str(layers)
        one, two = (of_many_layers(place / f"{n}", layers, seed=n) for n in range(2))
        peaks.append(launching.peak_megabytes(code, one, two, place / "out"))
    assert peaks[1] < peaks[0] + 64, peaks
