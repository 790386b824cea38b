"""The table of architectures against transformers: `pytest tests/test_architectures.py`.

Tiny real models of many kinds are saved, grafted, loaded and compared; the matrix test proves
every entry of the table against classes built on the meta device.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import parts
from extend import extend
from lexigraft.checkpoints.architectures import table, vocabulary_of
from lexigraft.checkpoints.checkpoint import SINGLE, Checkpoint
from lexigraft.checkpoints.config import config_rows, edit_config
from lexigraft.checkpoints.header import Tensor
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap
from lexigraft.steps.check import check
from lexigraft.steps.graft import graft

TOKENS = 330
PADDING = 23  # rows beyond the tokens; no dimension of these models is 330 or 353
HIDDEN = 32
LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GEMMA = LLAMA | {"head_dim": 8}
GEMMA4 = GEMMA | {
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
QWEN_MOE = LLAMA | {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DEEPSEEK = LLAMA | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2_IDS = {"bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5_IDS = {"decoder_start_token_id": 0, "pad_token_id": 0}
BART = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
    "pad_token_id": 1,
}
BERT = NEOX | {"type_vocab_size": 2, "pad_token_id": 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
DECODER = {"decoder_input_ids": [[0, 5, 9]]}


@dataclass(frozen=True)
class Kind:
    """A class, how to make it small, and what its config.json may say of tying (None: nothing).

    `text` names the config in which the settings of the text model stand, where it is nested.
    """

    model: str
    config: str
    settings: dict
    tied: tuple[bool | None, ...] = (True, False, None)
    text: dict | None = None
    inputs: dict = field(default_factory=dict)
    generates: bool = True


KINDS = {
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", LLAMA, tied=(False, None)),
    "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", LLAMA, tied=(True, False)),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", LLAMA, tied=(True, None)),
    "smollm3": Kind("SmolLM3ForCausalLM", "SmolLM3Config", LLAMA, tied=(None,)),
    "olmo": Kind("OlmoForCausalLM", "OlmoConfig", LLAMA, tied=(False,)),
    "olmo2": Kind("Olmo2ForCausalLM", "Olmo2Config", LLAMA, tied=(None,)),
    "mixtral": Kind("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 2}),
    "qwen2_moe": Kind("Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN_MOE, tied=(False, True)),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_MOE, tied=(None, True)),
    "glm4_moe": Kind(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        LLAMA | {"moe_intermediate_size": 16, "n_routed_experts": 2, "num_experts_per_tok": 1,
                 "n_shared_experts": 1, "head_dim": 8},
        tied=(None,),
    ),
    "qwen3_next": Kind(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        QWEN_MOE | {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        tied=(False,),
    ),
    "deepseek_v3": Kind("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, tied=(False, None)),
    "gemma2": Kind("Gemma2ForCausalLM", "Gemma2Config", GEMMA, tied=(True, None)),
    "gemma3_text": Kind("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, tied=(None,)),
    "gemma4_text": Kind("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4, tied=(None,)),
    "gemma3": Kind(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 7},
        tied=(None, True),
        text=GEMMA,
    ),
    "llava": Kind(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 8},
            "image_token_index": 7,
        },
        tied=(False, True),
        text=LLAMA | {"model_type": "llama"},
    ),
    "paligemma": Kind(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {"vision_config": VISION | {"model_type": "siglip_vision_model", "projection_dim": 32},
         "image_token_index": 7, "projection_dim": 32},
        tied=(None,),
        text=GEMMA | {"model_type": "gemma"},
    ),
    "qwen2_vl": Kind(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"vision_config": QWEN_VISION, "image_token_id": 7, "video_token_id": 8,
         "vision_start_token_id": 9, "vision_end_token_id": 11},
        tied=(True, False),
        text=LLAMA | {"rope_parameters": ROPE},
    ),
    "gpt2": Kind("GPT2LMHeadModel", "GPT2Config", GPT2 | GPT2_IDS),
    "gpt_bigcode": Kind(
        "GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2 | GPT2_IDS, tied=(None,)
    ),
    "gptj": Kind(  # a head bias, untied
        "GPTJForCausalLM", "GPTJConfig", GPT2 | GPT2_IDS | {"rotary_dim": 4}, tied=(None,)
    ),
    "gpt_neox": Kind("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX, tied=(False, None)),
    "phi": Kind("PhiForCausalLM", "PhiConfig", LLAMA, tied=(False, True)),
    "opt": Kind(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        tied=(None, False),
    ),
    "opt-350m": Kind(  # an embedding that is narrower than the layers
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        tied=(None,),
    ),
    "falcon": Kind(
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4} | GPT2_IDS,
        tied=(None, False),
    ),
    "bloom": Kind(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
        tied=(None,),
    ),
    "mamba": Kind(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 4} | GPT2_IDS,
        tied=(None, False),
    ),
    "t5": Kind(
        "T5ForConditionalGeneration", "T5Config", T5 | T5_IDS, tied=(True, False), inputs=DECODER
    ),
    "mt5": Kind(
        "MT5ForConditionalGeneration", "MT5Config", T5 | T5_IDS, tied=(False,), inputs=DECODER
    ),
    "bart": Kind(  # final_logits_bias
        "BartForConditionalGeneration", "BartConfig", BART, tied=(None, True), inputs=DECODER
    ),
    "mbart": Kind(
        "MBartForConditionalGeneration", "MBartConfig", BART, tied=(None,), inputs=DECODER
    ),
    "marian": Kind(  # a second number of rows, decoder_vocab_size
        "MarianMTModel", "MarianConfig", BART, tied=(True,), inputs=DECODER
    ),
    "bert": Kind("BertLMHeadModel", "BertConfig", BERT | {"is_decoder": True}, tied=(None, False)),
    "albert": Kind(
        "AlbertForMaskedLM",
        "AlbertConfig",
        BERT | {"embedding_size": 16},
        tied=(None,),
        generates=False,
    ),
    "roberta": Kind("RobertaForCausalLM", "RobertaConfig", BERT | {"is_decoder": True}),
    "xlm": Kind(  # a second name for the number of rows, n_words
        "XLMWithLMHeadModel",
        "XLMConfig",
        {"emb_dim": HIDDEN, "n_layers": 2, "n_heads": 4, "pad_index": 2, "n_langs": 1},
        tied=(None,),
        generates=False,
    ),
    "distilbert": Kind(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 1},
        tied=(None,),
        generates=False,
    ),
    "modernbert": Kind(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        NEOX | {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 0},
        tied=(None,),
        generates=False,
    ),
    "vision-encoder-decoder": Kind(
        "VisionEncoderDecoderModel",
        "VisionEncoderDecoderConfig",
        {"encoder": VISION | {"model_type": "vit"}},
        tied=(True,),
        text=GPT2 | GPT2_IDS | {"model_type": "gpt2", "add_cross_attention": True,
                                "is_decoder": True},
        generates=False,
    ),
}  # fmt: skip
SHAPES = [(0, None), (PADDING, "20KB"), (PADDING, None), (0, "20KB")]
EVERY = [
    (kind, tied, padding, shards)
    for kind, spec in KINDS.items()
    for tied in spec.tied
    for padding, shards in SHAPES
]
# Each kind and each way of tying once; the shapes take turns over them.
FEW = [
    (kind, tied, *SHAPES[(number + turn) % len(SHAPES)])
    for number, (kind, spec) in enumerate(KINDS.items())
    for turn, tied in enumerate(spec.tied)
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    base = write_tokenizer(folder / "base")
    assert TokenMap.read(base).tokens == TOKENS
    return base, extend(base, folder / "vocab", 70, literal=1)


def write_tokenizer(folder: Path) -> Path:
    """One that names no padding: these models have padding ids of their own, or none."""
    parts.write_byte_level(folder, vocab_size=TOKENS)
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    del stored["pad_token"]
    path.write_text(json.dumps(stored))
    return folder


def build(kind: str, tied: bool | None, folder: Path, *, rows: int = TOKENS, shards=None):
    """A saved tiny model; with `tied` None its config.json does not mention tying at all."""
    import torch
    import transformers

    torch.manual_seed(0)
    spec = KINDS[kind]
    settings = dict(spec.settings)
    sizes = {"vocab_size": rows}
    if kind == "gemma4_text":
        sizes["vocab_size_per_layer_input"] = rows
    if kind == "marian":
        sizes["decoder_vocab_size"] = rows
    if spec.text is None:
        settings |= sizes
    elif kind == "vision-encoder-decoder":
        settings["decoder"] = spec.text | sizes
    else:
        settings["text_config"] = spec.text | sizes
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    config = getattr(transformers, spec.config)(**settings)
    model = getattr(transformers, spec.model)(config).eval()
    generation = getattr(model, "generation_config", None)
    for stated in (model.config, model.config.get_text_config(decoder=True), generation):
        if stated is not None:
            stated.eos_token_id = TOKENS - 2  # as the tokenizer has it
    with torch.no_grad():  # a bias of zeros could be lost without a trace
        for name, tensor in model.state_dict().items():
            if name.endswith(("lm_head.bias", "final_logits_bias", "predictions.bias",
                              "projector.bias", "pred_layer.proj.bias", "decoder.bias")):  # fmt: skip
                tensor.normal_()
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    if tied is None:
        path = folder / "config.json"
        stored = json.loads(path.read_text())
        stored.pop("tie_word_embeddings", None)
        for nested in stored.values():
            if isinstance(nested, dict):
                nested.pop("tie_word_embeddings", None)
        path.write_text(json.dumps(stored))
    return model


def scores(kind, model, ids):
    import torch

    extra = {name: torch.tensor(value) for name, value in KINDS[kind].inputs.items()}
    with torch.no_grad():
        if kind == "vision-encoder-decoder":
            pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
            return model(pixel_values=pixels, decoder_input_ids=torch.tensor([ids])).logits.numpy()
        return model(input_ids=torch.tensor([ids]), **extra).logits.numpy()


def check_a_graft(kind, tied, padding, shards, tokenizer, tmp_path):
    import torch
    import transformers

    base_tokenizer, vocab = tokenizer
    base = Path(shutil.copytree(base_tokenizer, tmp_path / "base"))
    rows = TOKENS + padding
    spec, model = KINDS[kind], build(kind, tied, base, rows=rows, shards=shards)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head.weight is embedding.weight
    checkpoint = Checkpoint.open(base)
    assert len(checkpoint.shards) > 1 or shards is None
    vocabulary = vocabulary_of(checkpoint)
    assert vocabulary.tied == is_tied
    assert vocabulary.rows == config_rows(checkpoint, vocabulary) == rows
    assert set(vocabulary.names) == {n for n, t in checkpoint.tensors.items() if rows in t.shape}
    if not is_tied:
        assert vocabulary.head_name in vocabulary.heads

    result = graft(base, vocab, output=tmp_path / "model")
    assert (result.rows_before, result.rows_after, result.tied) == (rows, 448, is_tied)
    after = Checkpoint.open(tmp_path / "model")
    assert after.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():  # law 7, and law 9 for biases too
        old, new = checkpoint.read(name), after.read(name)
        if name not in vocabulary.names:
            assert old.tobytes() == new.tobytes()
            continue
        if name.endswith("bias"):
            old, new = old.reshape(-1), new.reshape(-1)
        assert tensor.dtype == after.tensors[name].dtype
        assert len(new) == 448
        assert old[:TOKENS].tobytes() == new[:TOKENS].tobytes()
        used = old[:TOKENS].astype(np.float64)
        if used.ndim > 1:  # classes keep the row of the padding token at zero: it is not trained
            used = used[used.any(axis=1)]
        np.testing.assert_allclose(new[TOKENS + 70 :] - used.mean(axis=0), 0, atol=1e-6)
        assert len(np.unique(new[TOKENS : TOKENS + 70], axis=0)) == 70

    kind_of_model = getattr(transformers, spec.model)
    grown, report = kind_of_model.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]
    grown = grown.eval()
    text = grown.config.get_text_config(decoder=True)
    assert text.vocab_size == grown.get_input_embeddings().weight.shape[0] == 448
    same = grown.get_output_embeddings().weight is grown.get_input_embeddings().weight
    assert same == is_tied
    ids = [5, 80, 200, 31, TOKENS - 2]
    old, new = scores(kind, model, ids), scores(kind, grown, ids)
    assert new.shape[-1] == 448
    np.testing.assert_allclose(new[..., :TOKENS], old[..., :TOKENS], rtol=1e-4, atol=1e-5)

    findings = check(tmp_path / "model").findings
    assert [f.line() for f in findings if f.severity != "note"] == []
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    fresh = loaded(f"<term {TOKENS + 69}>", add_special_tokens=False)["input_ids"]
    assert fresh == [TOKENS + 69]
    mixed = loaded("the heart ", add_special_tokens=False)["input_ids"] + fresh
    assert np.isfinite(scores(kind, grown, mixed)).all()
    if spec.generates:
        done = grown.generate(
            torch.tensor([mixed]),
            attention_mask=torch.ones(1, len(mixed), dtype=torch.long),
            max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert done.shape[1] >= 4
        assert isinstance(loaded.decode(done[0]), str)


@pytest.mark.parametrize(("kind", "tied", "padding", "shards"), FEW)
def test_a_real_model_is_grafted_and_loads(kind, tied, padding, shards, tokenizer, tmp_path):
    check_a_graft(kind, tied, padding, shards, tokenizer, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "tied", "padding", "shards"), [case for case in EVERY if case not in FEW]
)
def test_every_shape_of_every_kind(kind, tied, padding, shards, tokenizer, tmp_path):
    check_a_graft(kind, tied, padding, shards, tokenizer, tmp_path)


def fake(tensors: dict[str, tuple[int, ...]], config: dict) -> Checkpoint:
    """Headers alone."""
    listed = {n: Tensor(n, "BF16", shape, Path(SINGLE), 0, 0) for n, shape in tensors.items()}
    return Checkpoint(Path("model"), config, listed, {}, None)


# -- types that the table lacks


BODY = {"layers.0.attention.wqkv.weight": (48, 32), "layers.0.mlp.w1.weight": (96, 32)}


@pytest.mark.parametrize(
    ("embed", "head"),
    [
        ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"),
        ("model.tok_embeddings.weight", "output.weight"),
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.embed_tokens.weight", None),
    ],
)
def test_unknown_types_go_by_name_and_shape(
    embed,
    head,
):
    tensors = {embed: (96, 32), **BODY, "norm.weight": (32,)}
    if head:
        tensors[head] = (96, 32)
    found = vocabulary_of(fake(tensors, {"model_type": "own", "vocab_size": 96}))
    assert found.embeds == (embed,)
    assert found.heads == ((head,) if head else ())
    assert found.tied == (head is None)
    assert found.rows == 96


def test_ambiguity_is_an_error_that_tensor_roles_mend():
    tensors = {"wat.weight": (96, 32), "huh.weight": (96, 32), **BODY}
    checkpoint = fake(tensors, {"model_type": "own", "vocab_size": 96})
    with pytest.raises(LexigraftError) as fault:
        vocabulary_of(checkpoint)
    assert "wat.weight [96, 32]" in fault.value.found
    assert "--tensor wat.weight=embed" in fault.value.fix
    found = vocabulary_of(checkpoint, {"wat.weight": "embed", "huh.weight": "head"})
    assert (found.embeds, found.heads, found.tied) == (("wat.weight",), ("huh.weight",), False)


def test_a_nameless_tensor_of_the_embeddings_shape_is_ambiguous():
    tensors = {"model.embed_tokens.weight": (96, 32), "model.huh.weight": (96, 32)}
    checkpoint = fake(tensors, {"model_type": "own", "vocab_size": 96})
    with pytest.raises(LexigraftError, match=r"model\.huh\.weight"):
        vocabulary_of(checkpoint)
    found = vocabulary_of(checkpoint, {"model.embed_tokens.weight": "embed"})
    assert found.names == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("roles", [{"nope": "embed"}, {"lm_head.weight": "tail"}])
def test_wrong_roles_are_named(roles):
    checkpoint = fake({"lm_head.weight": (96, 32)}, {"model_type": "own"})
    with pytest.raises(LexigraftError, match="--tensor"):
        vocabulary_of(checkpoint, roles)


def test_roles_without_an_embedding_are_no_layout():
    tensors = {"model.embed_tokens.weight": (96, 32), "huh.weight": (96, 32), **BODY}
    checkpoint = fake(tensors, {"model_type": "llama", "vocab_size": 96})
    with pytest.raises(LexigraftError, match=r"input embedding .* model\.embed_tokens") as fault:
        vocabulary_of(checkpoint, {"huh.weight": "head"})
    assert fault.value.fix.startswith("add --tensor model.embed_tokens.weight=embed")


@pytest.mark.parametrize("shape", [(), (96,), (96, 32, 1)])
def test_a_table_has_a_row_of_numbers_per_token(shape):
    checkpoint = fake({"model.embed_tokens.weight": shape}, {"model_type": "llama"})
    with pytest.raises(LexigraftError, match="cannot be the input embedding"):
        vocabulary_of(checkpoint)


def test_different_rows_are_named():
    tensors = {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (100, 32)}
    with pytest.raises(LexigraftError) as fault:
        vocabulary_of(fake(tensors, {"model_type": "llama", "tie_word_embeddings": False}))
    assert "lm_head.weight 100" in fault.value.found


def test_copies_in_prediction_layers_grow_too():
    tensors = {
        "model.embed_tokens.weight": (96, 32),
        "lm_head.weight": (96, 32),
        "model.layers.61.embed_tokens.weight": (96, 32),
        "model.layers.61.shared_head.head.weight": (96, 32),
    }
    found = vocabulary_of(fake(tensors, {"model_type": "deepseek_v3", "vocab_size": 96}))
    assert set(found.names) == set(tensors)
    assert found.head_name == "lm_head.weight"


def test_per_layer_embeddings_grow_too():
    """Gemma 4 has a second table that is indexed by token id, and a second number for it."""
    tensors = {
        "model.embed_tokens.weight": (96, 32),
        "model.embed_tokens_per_layer.weight": (96, 64),
    }
    config = {"model_type": "gemma4_text", "vocab_size": 96, "vocab_size_per_layer_input": 96}
    found = vocabulary_of(fake(tensors, config))
    assert set(found.embeds) == set(tensors)
    edited = edit_config(config, found, rows=128)
    assert edited == config | {"vocab_size": 128, "vocab_size_per_layer_input": 128}


# -- config.json


def test_every_place_of_the_number_is_edited_and_nothing_else():
    config = {
        "model_type": "llava",
        "vocab_size": 96,
        "text_config": {"model_type": "llama", "vocab_size": 96, "odd": [1, {"vocab_size": 3}]},
        "vision_config": {"vocab_size": 96},
        "unknown": {"deep": {"kept": None}},
    }
    tensors = {"language_model.model.embed_tokens.weight": (96, 32)}
    found = vocabulary_of(fake(tensors, config | {"tie_word_embeddings": True}))
    edited = edit_config(config, found, rows=128)
    expected = json.loads(json.dumps(config))
    expected["vocab_size"] = expected["text_config"]["vocab_size"] = 128
    assert edited == expected
    assert config["text_config"]["vocab_size"] == 96  # the input is not touched


def test_a_missing_number_means_the_classs_default_and_is_written():
    """Google's own Gemma 3 files state no vocab_size in their text_config."""
    rows = table()["gemma3"]["default"]
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 32}}
    checkpoint = fake({"language_model.model.embed_tokens.weight": (rows, 32)}, config)
    found = vocabulary_of(checkpoint)
    assert config_rows(checkpoint, found) == rows
    assert found.tied
    edited = edit_config(config, found, rows=rows + 64)
    assert edited["text_config"] == {"hidden_size": 32, "vocab_size": rows + 64}


def test_untying_is_written_wherever_it_is_stored():
    config = {"model_type": "llava", "text_config": {"tie_word_embeddings": True}}
    checkpoint = fake({"language_model.model.embed_tokens.weight": (96, 32)}, config)
    edited = edit_config(config, vocabulary_of(checkpoint), rows=96, tied=False)
    assert edited["tie_word_embeddings"] is False
    assert edited["text_config"]["tie_word_embeddings"] is False


# -- the table


def test_entries_are_complete():
    assert len(table()) > 250
    for name, entry in table().items():
        if "refused" in entry:
            with pytest.raises(RefusalError, match=entry["refused"].split()[0]):
                vocabulary_of(fake({"x": (1, 1)}, {"model_type": name}))
        else:
            assert entry["embeds"]
            assert entry["default"] > 0


@pytest.mark.matrix
def test_the_whole_table_against_the_meta_device():
    path = Path(__file__).parents[1] / "scripts" / "make_architectures.py"
    spec = importlib.util.spec_from_file_location("make_architectures", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.make()
    assert made.keys() == table().keys()
    for name, entry in table().items():
        assert made[name] == entry, name


@pytest.mark.matrix
def test_the_names_that_transformers_saves_are_found():
    """For every class of the table, the names on disk, which are not always those in memory."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto import configuration_auto

    checked = 0
    for model_type, entry in table().items():
        if "refused" in entry:
            continue
        kind = getattr(transformers, entry["class"])
        config = configuration_auto.CONFIG_MAPPING[model_type]()
        if not isinstance(config, kind.config_class):
            config = kind.config_class()
        with torch.device("meta"):
            model = kind(config)
        state = model.state_dict()
        try:
            saved = revert_weight_conversion(model, dict(state))
        except Exception:  # some conversions need values
            saved = state
        if entry["tied"]:
            heads = [state[name] for name in entry["heads"] if name in state]
            saved = {n: t for n, t in saved.items() if not any(t is head for head in heads)}
        roles = [*entry["embeds"], *entry["heads"], *entry["biases"]]
        wanted = [state[name] for name in roles if name in state]
        expected = {n for n, t in saved.items() if any(t is other for other in wanted)}
        tensors = {n: tuple(t.shape) for n, t in saved.items()}
        stored = {**config.to_dict(), "model_type": model_type}
        found = vocabulary_of(fake(tensors, stored))
        assert set(found.names) == expected, model_type
        assert found.rows == entry["default"], model_type
        assert found.config_paths[0] == tuple(entry["vocab_size"]), model_type
        if entry["heads"]:  # the class says which module is its head
            assert found.tied == entry["tied"], model_type
        checked += 1
    assert checked > 200
