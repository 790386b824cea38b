"""Documents in one block do not see each other, whatever the architecture makes of positions."""

import re

import numpy as np
import pytest
import torch
import transformers

from lexigraft.models.packing import KEEPS_APART, collate, pack

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": None, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
GPT = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
KINDS = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]]},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {},
    "biogpt": {},
}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# Those that see images too: their settings, and the type of their language model.
SEEING = {
    "gemma3": (VISION, "gemma3_text"),
    "idefics3": (VISION, "llama"),
    "internvl": ({**VISION, "image_size": [28, 28], "patch_size": [14, 14]}, "qwen2"),
    "llava": ({**VISION, "model_type": "clip_vision_model", "projection_dim": 8}, "llama"),
    "llava_next": ({**VISION, "model_type": "clip_vision_model", "projection_dim": 8}, "llama"),
    "llava_onevision": ({**VISION, "model_type": "siglip_vision_model"}, "qwen2"),
    "mistral3": ({**VISION, "model_type": "pixtral"}, "mistral"),
    "qwen2_vl": ({"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
                 "qwen2_vl_text"),
    "smolvlm": (VISION, "llama"),
}  # fmt: skip
IMAGE = {"mm_tokens_per_image": 4, "image_token_id": 7, "image_token_index": 7}
COMMON = ("llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "falcon", "llava")
LEAKING = ("opt", "bloom", "mamba", "biogpt", "qwen2_vl")


def model_of(kind):
    torch.manual_seed(0)
    sizes = {**SIZES, **KINDS.get(kind, {})}
    if kind.startswith("deepseek"):
        del sizes["head_dim"]
    if kind in SEEING:
        vision, text = SEEING[kind]
        stated = {**SIZES, "model_type": text}
        if kind == "qwen2_vl":
            stated["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            }
        sizes = {**IMAGE, "vision_config": vision, "text_config": stated}
    while True:
        try:
            config = transformers.CONFIG_MAPPING[kind](**sizes)
            break
        except AttributeError as fault:  # a size that this type computes from others
            del sizes[re.search(r"property '(\w+)'", str(fault))[1]]
    loader = transformers.AutoModelForCausalLM
    if kind in SEEING:
        loader = transformers.AutoModelForImageTextToText
    model = loader.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is not even
            parameter.mul_(3.0) if parameter.dim() >= 2 else None
    return model


def documents():
    random = np.random.default_rng(3)
    return [(random.integers(3, 120, size=n).tolist(), n) for n in (7, 6, 9)]


@torch.no_grad()
def difference(model, *, apart):
    """How far logits in packed blocks are from those of each document alone, relative."""
    blocks = pack(documents(), 32, start=[1], end=2, apart=apart)
    batch = collate([blocks[place] for place in range(len(blocks))])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    packed = model(**inputs, use_cache=False).logits[batch["labels"] != -100]
    alone = [
        model(input_ids=torch.tensor([[1, *ids]]), use_cache=False).logits[0]
        for ids, _ in documents()
    ]
    found = torch.cat(alone)
    assert packed.shape == found.shape
    return float((packed - found).abs().max() / found.abs().max())


@pytest.mark.parametrize("kind", COMMON)
def test_what_is_said_to_keep_documents_apart_does(kind):
    assert kind in KEEPS_APART
    assert difference(model_of(kind), apart=False) < 1e-4


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(KEEPS_APART - {*COMMON}))
def test_every_type_that_is_said_to_keep_documents_apart_does(kind):
    assert difference(model_of(kind), apart=False) < 1e-4


@pytest.mark.parametrize("kind", LEAKING)
def test_other_types_get_a_block_for_each_document(kind):
    """Packed closely, their documents see each other: then this would be the wrong list."""
    assert kind not in KEEPS_APART
    model = model_of(kind)
    assert difference(model, apart=False) > 1e-3
    assert difference(model, apart=True) < 1e-4


def test_apart_loses_no_token_and_no_byte():
    blocks = pack(documents(), 8, start=[1], end=2, apart=True)
    lines = [[1, *ids, 2] for ids, _ in documents()]
    assert len(blocks) == sum(-(-(len(line) - 1) // 8) for line in lines)
    assert blocks.targets[blocks.targets >= 0].tolist() == [t for line in lines for t in line[1:]]
    assert blocks.inputs[blocks.targets >= 0].tolist() == [t for line in lines for t in line[:-1]]
    assert blocks.tokens[-1] == sum(len(line) - 1 for line in lines)
    assert blocks.text_bytes[-1] == sum(size for _, size in documents())
