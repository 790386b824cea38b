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
from lexigraft.steps.graft import graft

TOKENS = 330
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
GEMMA = LLAMA | {"head_dim": 8}
GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128}
T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Kind:
    """A class, how to make it small, and what its config.json may say of tying (None: nothing)."""

    model: str
    config: str
    settings: dict
    tied: tuple[bool | None, ...] = (True, False, None)
    nested: str = ""
    inputs: dict = field(default_factory=dict)


KINDS = {
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", LLAMA, tied=(False, None)),
    "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", LLAMA, tied=(True,)),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", LLAMA, tied=(True, None)),
    "smollm3": Kind("SmolLM3ForCausalLM", "SmolLM3Config", LLAMA, tied=(None,)),
    "olmo": Kind("OlmoForCausalLM", "OlmoConfig", LLAMA, tied=(False,)),
    "olmo2": Kind("Olmo2ForCausalLM", "Olmo2Config", LLAMA, tied=(None,)),
    "mixtral": Kind("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 2}),
    "gemma2": Kind("Gemma2ForCausalLM", "Gemma2Config", GEMMA, tied=(True, None)),
    "gemma3_text": Kind("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, tied=(None,)),
    "gemma3": Kind(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 7},
        tied=(None,),
        nested="text_config",
    ),
    "llava": Kind(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 8},
            "image_token_index": 7,
        },
        tied=(False,),
        nested="text_config",
    ),
    "gpt2": Kind("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": Kind(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
        tied=(False, None),
    ),
    "phi": Kind(
        "PhiForCausalLM",
        "PhiConfig",
        LLAMA,
        tied=(False, True),
    ),
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
    "falcon": Kind(
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4},
        tied=(None, False),
    ),
    "bloom": Kind(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
        tied=(None,),
    ),
    "t5": Kind(
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        tied=(True, False),
        inputs={"decoder_input_ids": [[0, 5, 9]]},
    ),
    "bart": Kind(
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
        tied=(None,),
        inputs={"decoder_input_ids": [[0, 5, 9]]},
    ),
}
CASES = [(kind, tied) for kind, spec in KINDS.items() for tied in spec.tied]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    base = parts.write_byte_level(folder / "base", vocab_size=TOKENS)
    assert TokenMap.read(base).tokens <= TOKENS
    return base, extend(base, folder / "vocab", 70)


def build(kind: str, tied: bool | None, folder: Path):
    """A saved tiny model; with `tied` None its config.json does not mention tying at all."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = KINDS[kind]
    settings = dict(spec.settings)
    if spec.nested:
        text = GEMMA if kind == "gemma3" else LLAMA | {"model_type": "llama"}
        settings[spec.nested] = text | {"vocab_size": TOKENS}
    else:
        settings["vocab_size"] = TOKENS
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    config = getattr(transformers, spec.config)(**settings)
    model = getattr(transformers, spec.model)(config).eval()
    with torch.no_grad():  # a bias of zeros could be lost without a trace
        for name, tensor in model.state_dict().items():
            if name.endswith(("lm_head.bias", "final_logits_bias")):
                tensor.normal_()
    model.save_pretrained(folder)
    if tied is None:
        path = folder / "config.json"
        stored = json.loads(path.read_text())
        stored.pop("tie_word_embeddings", None)
        for nested in stored.values():
            if isinstance(nested, dict):
                nested.pop("tie_word_embeddings", None)
        path.write_text(json.dumps(stored))
    return model


def scores(model, inputs):
    import torch

    extra = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 80, 200, 31, 9]]), **extra).logits.numpy()


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_a_real_model_is_grafted_and_loads(kind, tied, tokenizer, tmp_path):
    import transformers

    base_tokenizer, vocab = tokenizer
    base = Path(shutil.copytree(base_tokenizer, tmp_path / "base"))
    spec, model = KINDS[kind], build(kind, tied, base)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    checkpoint = Checkpoint.open(base)
    vocabulary = vocabulary_of(checkpoint)
    assert vocabulary.tied == is_tied
    assert vocabulary.rows == config_rows(checkpoint, vocabulary) == TOKENS
    # No other dimension of these models is 330.
    assert set(vocabulary.names) == {n for n, t in checkpoint.tensors.items() if TOKENS in t.shape}
    if not is_tied:
        assert vocabulary.head_name in vocabulary.heads

    result = graft(base, vocab, output=tmp_path / "model")
    assert result.rows_after == 448
    kind_of_model = getattr(transformers, spec.model)
    grown, report = kind_of_model.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]
    text = grown.config.get_text_config()
    assert text.vocab_size == grown.get_input_embeddings().weight.shape[0] == 448
    old, new = scores(model, spec.inputs), scores(grown.eval(), spec.inputs)
    assert new.shape[-1] == 448
    np.testing.assert_allclose(new[..., :TOKENS], old, atol=1e-5)
    # law 9, and the same rule for biases
    assert np.isfinite(new).all()
    after = Checkpoint.open(tmp_path / "model")
    tokens = TokenMap.read(base).tokens
    for name in vocabulary.names:
        if name.endswith("bias"):
            values = after.read(name).reshape(-1).astype(np.float64)
            np.testing.assert_allclose(values[-1], values[:tokens].mean(), rtol=1e-6)


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
        stored = {"model_type": model_type, "vocab_size": entry["default"]}
        found = vocabulary_of(fake(tensors, stored))
        assert set(found.names) == expected, model_type
        assert (found.rows, found.tied) == (entry["default"], entry["tied"]), model_type
        checked += 1
    assert checked > 200
