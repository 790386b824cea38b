"""Published layouts that differ from their class: `pytest tests/test_odd_checkpoints.py`.

Each is a folder as its authors publish it, made small: grafted, and loaded where transformers can.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import parts
from extend import extend
from lexigraft.checkpoints.architectures import table, vocabulary_of
from lexigraft.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from lexigraft.checkpoints.config import config_rows
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import Manifest
from lexigraft.steps.check import check
from lexigraft.steps.graft import graft
from test_architectures import KINDS, TOKENS, build, fake, scores

ADDED = 70
ROWS = 448  # 400 tokens, padded to a multiple of 64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    base = parts.write_byte_level(folder / "base", vocab_size=TOKENS)
    return base, extend(base, folder / "vocab", ADDED, literal=1)


@pytest.fixture
def base(tokenizer, tmp_path) -> Path:
    """A folder with the tokenizer alone."""
    return Path(shutil.copytree(tokenizer[0], tmp_path / "base"))


@pytest.fixture
def vocab(tokenizer) -> Path:
    return tokenizer[1]


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **changes) -> None:
    """Set keys of config.json; None removes one."""
    content = settings_of(folder) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder: Path, change) -> None:
    """Write model.safetensors anew with what `change` makes of its tensors."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})


def written(folder: Path, config: dict, tensors: dict[str, tuple[int, ...]], seed: int = 0) -> Path:
    """A checkpoint of random tensors."""
    rng = np.random.default_rng(seed)
    arrays = {n: rng.normal(size=shape).astype(np.float32) for n, shape in tensors.items()}
    save_file(arrays, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(kind: str, folder: Path):
    import transformers

    return getattr(transformers, KINDS[kind].model).from_pretrained(folder).eval()


def assert_same_scores(kind, before, folder: Path) -> None:
    ids = [5, 80, 200, 31, 9]
    old, new = scores(kind, before, ids), scores(kind, loaded(kind, folder), ids)
    np.testing.assert_allclose(new[..., :TOKENS], old[..., :TOKENS], rtol=1e-4, atol=1e-5)


def refusal(base: Path, vocab: Path, out: Path, **options) -> LexigraftError:
    with pytest.raises(LexigraftError) as fault:
        graft(base, vocab, output=out, **options)
    assert not out.exists()
    assert fault.value.needed
    assert fault.value.fix
    return fault.value


# -- copies of both tables in layers that transformers drops on loading


@pytest.mark.parametrize("init", ["mean", "exponential"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_prediction_layers_are_kept_and_their_copies_grow(kind, init, base, vocab, tmp_path):
    """DeepSeek-V3 stores layer 61 with copies of embedding and head; so does GLM-4-MoE."""
    build(kind, False, base)

    def with_prediction_layer(tensors):
        extra = {
            "model.layers.2.embed_tokens.weight": tensors["model.embed_tokens.weight"].copy(),
            "model.layers.2.shared_head.head.weight": tensors["lm_head.weight"].copy(),
            "model.layers.2.shared_head.norm.weight": np.ones(32, np.float32),
            "model.layers.2.eh_proj.weight": np.ones((32, 64), np.float32),
        }
        return tensors | extra

    change_tensors(base, with_prediction_layer)
    before = loaded(kind, base)
    graft(base, vocab, output=tmp_path / "model", init=init)
    new = load_file(tmp_path / "model" / SINGLE)
    assert new.keys() == load_file(base / SINGLE).keys()
    for copy, source in (
        ("model.layers.2.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.2.shared_head.head.weight", "lm_head.weight"),
    ):
        assert new[copy].shape == (ROWS, 32)
        assert new[copy].tobytes() == new[source].tobytes()
    assert_same_scores(kind, before, tmp_path / "model")


@pytest.mark.parametrize(
    ("model_type", "copy"),
    [
        ("qwen3_next", "mtp.embed_tokens.weight"),
        ("longcat_flash", "model.mtp.embed_tokens.weight"),
        ("glm4_moe", "model.layers.92.embed_tokens.weight"),
        ("glm4_moe", "model.layers.46.shared_head.head.weight"),
        ("llama", "medusa.lm_head.weight"),
    ],
)
def test_copies_are_found_wherever_they_lie(model_type, copy):
    tensors = {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (96, 32), copy: (96, 32)}
    found = vocabulary_of(fake(tensors, {"model_type": model_type, "vocab_size": 96}))
    assert copy in (found.heads if "head" in copy else found.embeds)
    assert set(found.names) == set(tensors)
    assert found.head_name == "lm_head.weight"
    assert not found.tied


def test_a_bias_under_an_older_name_is_found():
    """DeBERTa's own files keep the one of their head elsewhere than its class."""
    tensors = {
        "deberta.embeddings.word_embeddings.weight": (96, 32),
        "lm_predictions.lm_head.bias": (96,),
        "lm_predictions.lm_head.dense.weight": (32, 32),
    }
    found = vocabulary_of(fake(tensors, {"model_type": "deberta-v2", "vocab_size": 96}))
    assert found.biases == ("lm_predictions.lm_head.bias",)
    assert found.tied


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.odd.weight", (96, 32)), ("model.odd.weight", (96, 7)), ("model.odd", (96,))],
)
def test_an_unknown_tensor_with_a_row_per_token_is_named(name, shape):
    """Only where the number may be that of another dimension is it passed over."""
    tensors = {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (96, 32), name: shape}
    config = {"model_type": "llama", "vocab_size": 96}
    with pytest.raises(LexigraftError) as fault:
        vocabulary_of(fake(tensors, config))
    assert name in fault.value.found
    assert f"--tensor {name}=" in fault.value.fix
    roles = {"model.embed_tokens.weight": "embed", "lm_head.weight": "head", name: "bias"}
    assert set(vocabulary_of(fake(tensors, config), roles).names) == set(tensors)
    chance = vocabulary_of(fake(tensors, config | {"intermediate_size": 96}))
    assert name not in chance.names
    nested = vocabulary_of(fake(tensors, config | {"vision_config": {"width": 96}}))
    assert name not in nested.names


def test_a_tensor_on_its_side_is_refused():
    tensors = {"model.embed_tokens.weight": (96, 32), "model.out.kernel": (32, 96)}
    with pytest.raises(RefusalError, match="tokens are its columns"):
        vocabulary_of(fake(tensors, {"model_type": "llama", "vocab_size": 96}))


# -- the tie: flag against tensors


@pytest.mark.parametrize("init", ["mean", "exponential", "gaussian", "random"])
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_stored_copy_of_the_embedding_stays_a_copy(kind, init, base, vocab, tmp_path):
    """The .bin files that older conversions came from held both."""
    build(kind, True, base)
    embedding = "model.shared.weight" if kind == "bart" else "model.embed_tokens.weight"
    change_tensors(base, lambda tensors: tensors | {"lm_head.weight": tensors[embedding].copy()})
    before = loaded(kind, base)
    result = graft(base, vocab, output=tmp_path / "model", init=init)
    assert result.tied
    new = load_file(tmp_path / "model" / SINGLE)
    assert new["lm_head.weight"].tobytes() == new[embedding].tobytes()
    model = loaded(kind, tmp_path / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same_scores(kind, before, tmp_path / "model")


@pytest.mark.parametrize("kind", ["mt5", pytest.param("bart", marks=pytest.mark.matrix)])
def test_encoder_and_decoder_may_store_their_table_thrice(kind, base, vocab, tmp_path):
    """As Google and Facebook publish them; mT5's head is its own, whatever its class says today."""
    build(kind, None if kind == "bart" else False, base)
    shared = "model.shared.weight" if kind == "bart" else "shared.weight"
    copies = [shared.replace("shared", f"{part}.embed_tokens") for part in ("encoder", "decoder")]

    def as_published(tensors):
        table = tensors[shared]
        own = {} if kind == "bart" else {"lm_head.weight": np.flip(table, axis=0).copy()}
        return tensors | {name: table.copy() for name in copies} | own

    change_tensors(base, as_published)
    change_config(base, tie_word_embeddings=kind == "bart")
    before = loaded(kind, base)
    result = graft(base, vocab, output=tmp_path / "model")
    assert result.tied == (kind == "bart")
    new = load_file(tmp_path / "model" / SINGLE)
    assert {new[name].tobytes() for name in copies} == {new[shared].tobytes()}
    assert new[shared].shape == (ROWS, 32)
    if kind == "mt5":
        fresh = slice(TOKENS, TOKENS + ADDED)
        assert (new["lm_head.weight"][fresh] != new[shared][fresh]).any(axis=1).all()
    assert_same_scores(kind, before, tmp_path / "model")


def test_a_tied_model_may_be_stored_under_the_name_of_its_head(base, vocab, tmp_path):
    """Loaders tie in both directions: the name that is there is the source."""
    build("llama", True, base)
    change_tensors(
        base,
        lambda tensors: {
            "lm_head.weight" if "embed" in name else name: t for name, t in tensors.items()
        },
    )
    before = loaded("llama", base)
    result = graft(base, vocab, output=tmp_path / "model")
    assert result.tied
    assert load_file(tmp_path / "model" / SINGLE)["lm_head.weight"].shape == (ROWS, 32)
    assert_same_scores("llama", before, tmp_path / "model")
    change_config(base, tie_word_embeddings=False)
    assert "input embedding" in refusal(base, vocab, tmp_path / "untied").found


def test_a_head_that_differs_is_kept_although_the_config_ties_it(base, vocab, tmp_path, capsys):
    """transformers 5 loads both; the config stays as it is for those who load one."""
    build("llama", False, base)
    change_config(base, tie_word_embeddings=True)
    before = loaded("llama", base)
    result = graft(base, vocab, output=tmp_path / "model")
    assert not result.tied
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err
    assert settings_of(tmp_path / "model")["tie_word_embeddings"] is True
    assert_same_scores("llama", before, tmp_path / "model")


@pytest.mark.parametrize(
    ("model_type", "top", "nested", "tied"),
    [
        ("gemma3", None, None, True),  # the class's default
        ("gemma3", None, False, True),  # the top decides, and is silent
        ("gemma3", False, False, False),
        ("qwen2_vl", None, True, True),  # written by version 4
        ("qwen2_vl", False, True, True),  # handed up by transformers
        ("qwen2_vl", None, None, False),
        ("own", None, True, True),
        ("own", None, False, False),
        ("own", None, None, True),
    ],
)
def test_the_tie_is_where_loaders_look_for_it(model_type, top, nested, tied):
    config: dict = {"model_type": model_type, "text_config": {"vocab_size": 96}}
    if top is not None:
        config["tie_word_embeddings"] = top
    if nested is not None:
        config["text_config"]["tie_word_embeddings"] = nested
    tensors = {"model.language_model.embed_tokens.weight": (96, 32)}
    assert vocabulary_of(fake(tensors, config)).tied == tied


# -- where the number of rows is stated


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        ({"model_type": "qwen3_5", "text_config": {"vocab_size": 96}}, ["text_config.vocab_size"]),
        ({"model_type": "qwen3_5", "vocab_size": 96}, ["vocab_size"]),
        ({"model_type": "llama4", "text_config": {"hidden_size": 8}}, ["text_config.vocab_size"]),
        ({"model_type": "internvl_chat", "llm_config": {"vocab_size": 96}},
         ["llm_config.vocab_size"]),
        ({"model_type": "own", "language_config": {"vocab_size": 96}, "vocab_size": 96},
         ["vocab_size", "language_config.vocab_size"]),
        ({"model_type": "chatglm", "padded_vocab_size": 96}, ["padded_vocab_size"]),
        ({"model_type": "chatglm", "padded_vocab_size": 96, "vocab_size": 96},
         ["vocab_size", "padded_vocab_size"]),
        ({"model_type": "own", "vocab_size": 90, "embedding_size": 96}, ["embedding_size"]),
        ({"model_type": "xlm", "n_words": 96, "vocab_size": 96}, ["vocab_size", "n_words"]),
        ({"model_type": "marian", "vocab_size": 96, "decoder_vocab_size": 96},
         ["vocab_size", "decoder_vocab_size"]),
        ({"model_type": "hunyuan_vl", "vocab_size": 96, "text_config": {"org_vocab_size": 96}},
         ["vocab_size", "text_config.org_vocab_size"]),
        ({"model_type": "llama", "vocab_size": 96, "type_vocab_size": 2,
          "audio_config": {"vocab_size": 96}}, ["vocab_size"]),
    ],
)  # fmt: skip
def test_every_place_of_the_number_is_found(config, paths):
    tensors = {"model.embed_tokens.weight": (96, 32), "transformer.embeddings.weight": (96, 32)}
    name = "transformer.embeddings.weight" if config["model_type"] == "xlm" else ""
    tensors = {n: s for n, s in tensors.items() if not name or n == name}
    if not name:
        del tensors["transformer.embeddings.weight"]
    checkpoint = fake(tensors, config)
    found = vocabulary_of(checkpoint)
    assert [".".join(path) for path in found.config_paths] == paths


def test_logits_are_not_cut_before_the_new_tokens(base, vocab, tmp_path):
    """Inkling cuts its logits at `unpadded_vocab_size`."""
    config = {"model_type": "inkling_text", "vocab_size": 352, "unpadded_vocab_size": TOKENS}
    tensors = {"model.embed_tokens.weight": (352, 8), "lm_head.weight": (352, 8)}
    graft(written(base, config, tensors), vocab, output=tmp_path / "model")
    assert settings_of(tmp_path / "model") == config | {
        "vocab_size": ROWS,
        "unpadded_vocab_size": TOKENS + ADDED,
    }


def test_a_model_of_two_configs_is_grafted_and_loads(base, vocab, tmp_path):
    """One type, qwen3_5, has a class for text alone and one around it."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
              "out_hidden_size": 32}  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=7,
                           video_token_id=8, vision_start_token_id=9, vision_end_token_id=11)  # fmt: skip
    before = Qwen3_5ForConditionalGeneration(config).eval()
    before.save_pretrained(base)
    graft(base, vocab, output=tmp_path / "model")
    assert "vocab_size" not in settings_of(tmp_path / "model")
    after = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([[5, 80, 200, 31, 9]])
    with torch.no_grad():
        old, new = before(input_ids=ids).logits, after(input_ids=ids).logits
    assert new.shape[-1] == ROWS
    np.testing.assert_allclose(new[..., :TOKENS].numpy(), old.numpy(), rtol=1e-4, atol=1e-5)


# -- names


@pytest.mark.parametrize("tied", [None, False])
def test_gpt2s_names_without_prefix(tied, base, vocab, tmp_path):
    """As OpenAI's own files have them: `wte.weight`, `h.0...`, and the causal masks."""
    build("gpt2", tied, base)

    def without_prefix(tensors):
        mask = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
        return {name.removeprefix("transformer."): t for name, t in tensors.items()} | mask

    change_tensors(base, without_prefix)
    before = loaded("gpt2", base)
    graft(base, vocab, output=tmp_path / "model")
    assert load_file(tmp_path / "model" / SINGLE)["wte.weight"].shape == (ROWS, 32)
    assert_same_scores("gpt2", before, tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "embed", "head"),
    [
        (
            {"model_type": "chatglm", "padded_vocab_size": TOKENS, "architectures": ["ChatGLMModel"]},
            "transformer.embedding.word_embeddings.weight",
            "transformer.output_layer.weight",
        ),
        (
            {"model_type": "internlm2", "vocab_size": TOKENS, "tie_word_embeddings": False},
            "model.tok_embeddings.weight",
            "output.weight",
        ),
        (
            {"model_type": "baichuan", "vocab_size": TOKENS, "tie_word_embeddings": False},
            "model.embed_tokens.weight",
            "lm_head.weight",
        ),
        (
            {"model_type": "internvl_chat", "llm_config": {"vocab_size": TOKENS}},
            "language_model.model.tok_embeddings.weight",
            "language_model.output.weight",
        ),
    ],
)  # fmt: skip
def test_layouts_with_code_of_their_own(config, embed, head, base, vocab, tmp_path, capsys):
    body = {"transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": (96, 8)}
    written(base, config, {embed: (TOKENS, 8), head: (TOKENS, 8), **body})
    (base / "modeling_own.py").write_text("class NormHead:\n    pass\n")
    graft(base, vocab, output=tmp_path / "model")
    old, new = load_file(base / SINGLE), load_file(tmp_path / "model" / SINGLE)
    for name in (embed, head):
        assert new[name].shape == (ROWS, 8)
        assert new[name][:TOKENS].tobytes() == old[name].tobytes()
    [(name, shape)] = body.items()
    assert new[name].tobytes() == old[name].tobytes()
    after = Checkpoint.open(tmp_path / "model")
    assert config_rows(after, vocabulary_of(after)) == ROWS
    expected = json.loads(json.dumps(config).replace(f": {TOKENS}", f": {ROWS}"))
    assert after.config == expected
    said = capsys.readouterr().err
    assert "NormHead" in said  # its rows are normalised: told, not refused
    assert "differs" not in said


def test_an_unknown_layout_needs_names_and_takes_them(base, vocab, tmp_path):
    config = {"model_type": "own", "vocab_size": TOKENS, "tie_word_embeddings": False}
    written(base, config, {"wat.weight": (TOKENS, 8), "huh.weight": (TOKENS, 8)})
    fault = refusal(base, vocab, tmp_path / "model")
    assert "wat.weight" in fault.found
    assert "--tensor" in fault.fix
    roles = {"wat.weight": "embed", "huh.weight": "head"}
    result = graft(base, vocab, output=tmp_path / "model", tensor_roles=roles)
    assert (result.rows_after, result.tied) == (ROWS, False)
    # What was told is in the manifest, so that nobody is asked again.
    model = Checkpoint.open(tmp_path / "model")
    assert Manifest.read(tmp_path / "model").last("graft").roles == roles
    assert vocabulary_of(model).heads == ("huh.weight",)
    assert check(tmp_path / "model").ok
    # Nor by the graft after the next one.
    larger = extend(vocab, tmp_path / "larger", 10, literal=1)
    graft(tmp_path / "model", larger, output=tmp_path / "again")
    assert Manifest.read(tmp_path / "again").last("graft").roles == roles
    assert vocabulary_of(Checkpoint.open(tmp_path / "again")).heads == ("huh.weight",)


# -- biases


@pytest.mark.parametrize("tied", [True, False])
def test_the_bias_of_a_new_token_is_the_mean_of_its_pieces(tied, base, vocab, tmp_path):
    """transformers pads it with 0 in a tied Phi and draws it in an untied one. A new token's score
    should start where its pieces' scores are, and these include their biases."""
    from tokenizers import Tokenizer

    build("phi", tied, base)
    graft(base, vocab, output=tmp_path / "model", init="mean")
    old = load_file(base / SINGLE)["lm_head.bias"]
    new = load_file(tmp_path / "model" / SINGLE)["lm_head.bias"]
    engine, texts = Tokenizer.from_file(str(base / "tokenizer.json")), TokenMap.read(vocab).texts
    for token_id in range(TOKENS, TOKENS + ADDED):
        pieces = engine.encode(texts[token_id]).ids
        np.testing.assert_allclose(new[token_id], old[pieces].mean(), rtol=1e-5, atol=1e-6)
    assert not (new[TOKENS : TOKENS + ADDED] == 0).any()


def test_all_kinds_with_final_logits_bias_are_known():
    kinds = {"bart", "mbart", "led", "blenderbot", "blenderbot-small", "plbart", "pegasus",
             "bigbird_pegasus", "marian", "mvp"}  # fmt: skip
    assert {kind for kind in kinds if table()[kind]["biases"] != ["final_logits_bias"]} == set()


# -- ids with a meaning


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"pad_token_id": TOKENS + 3}),
        ("config.json", {"eos_token_id": [0, TOKENS]}),
        ("config.json", {"image_token_index": TOKENS + 1}),
        ("config.json", {"text_config": {"image_token_id": TOKENS}}),
        ("generation_config.json", {"decoder_start_token_id": TOKENS}),
    ],
)
def test_a_padding_row_with_a_meaning_is_not_given_away(file, settings, base, vocab, tmp_path):
    """An id that only a config knows would become a word of running text."""
    parts.write_model(base, tokens=TOKENS, rows=TOKENS + 20)
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(content | settings))
    fault = refusal(base, vocab, tmp_path / "model")
    assert isinstance(fault, RefusalError)
    assert file in fault.found
    assert "token_i" in fault.found


def test_ids_that_do_not_move_stay_in_every_list(base, vocab, tmp_path):
    parts.write_model(base, tokens=TOKENS, rows=TOKENS + 20)
    generation = {
        "suppress_tokens": [1, 2, TOKENS + 5],
        "begin_suppress_tokens": [220],
        "forced_decoder_ids": [[1, 50]],
        "bad_words_ids": [[7], [8, 9]],
        "eos_token_id": [0, 5],
        "max_new_tokens": TOKENS + 2,
        "pad_token_id": -1,
    }
    (base / "generation_config.json").write_text(json.dumps(generation))
    change_config(base, image_token_id=-200, bad_words_ids=[[3]], bos_token_id=TOKENS + ADDED)
    old = settings_of(base)
    graft(base, vocab, output=tmp_path / "model")
    after = (tmp_path / "model" / "generation_config.json").read_bytes()
    assert after == (base / "generation_config.json").read_bytes()
    assert settings_of(tmp_path / "model") == old | {"vocab_size": ROWS}


# -- what cannot be right


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model_type": "whisper"}, "timestamps"),
        ({"model_type": "encoder-decoder"}, "two models"),
        ({"model_type": "speech-encoder-decoder"}, "two models"),
        ({"model_type": "musicgen"}, "two models"),
        ({"model_type": "transfo-xl"}, "adaptive softmax"),
        ({"model_type": "xlm", "asm": True}, "adaptive softmax"),
        ({"model_type": "gemma3n"}, "image and audio"),
        ({"model_type": "deepseek_v4"}, "tid2eid"),
        ({"model_type": "qwen4_exp"}, "hashes"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"llm_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(settings, word, base, vocab, tmp_path):
    parts.write_model(base, tokens=TOKENS)
    change_config(base, **settings)
    fault = refusal(base, vocab, tmp_path / "model")
    assert isinstance(fault, RefusalError)
    assert word in fault.found


def test_tokens_with_rows_of_their_own_are_refused(base, vocab, tmp_path):
    """IDEFICS keeps its image tokens in a second table behind the first."""
    parts.write_model(base, tokens=TOKENS)
    extra = {"model.embed_tokens.additional_embedding.weight": np.ones((2, 32), np.float32)}
    change_tensors(base, lambda tensors: tensors | extra)
    change_config(base, model_type="idefics")
    assert "rows of their own" in refusal(base, vocab, tmp_path / "model").found


def test_quantised_rows_are_refused_without_a_config_that_says_so(base, vocab, tmp_path):
    parts.write_model(base, tokens=TOKENS)
    change_tensors(
        base, lambda tensors: tensors | {"lm_head.weight": np.ones((TOKENS, 32), np.int8)}
    )
    assert "I8" in refusal(base, vocab, tmp_path / "model").found


def test_a_tensor_in_two_shards_is_refused(base, vocab, tmp_path):
    """Loaders take the last shard, whatever the index says."""
    parts.write_model(base, tokens=TOKENS, shard_size="20KB")
    index = json.loads((base / INDEX).read_text())
    stale = "model-00009-of-00009.safetensors"
    save_file(
        {"model.embed_tokens.weight": np.ones((TOKENS, 32), np.float32),
         "other.weight": np.ones(3, np.float32)},
        base / stale, metadata={"format": "pt"},
    )  # fmt: skip
    index["weight_map"]["other.weight"] = stale
    (base / INDEX).write_text(json.dumps(index))
    assert "is both in" in refusal(base, vocab, tmp_path / "model").found


# -- padding rows


def wordpiece(folder: Path, words: int) -> Path:
    """A WordPiece tokenizer of 100 tokens and further words behind them."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    lines += [f"the{letter}" for letter in letters[: 100 - len(lines)]]
    assert len(lines) == 100
    lines += [f"heart{a}{b}" for a in letters for b in letters][:words]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in lines))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("added", "rows"), [(5, 128), (40, 192)])
def test_128_rows_for_100_tokens(added, rows, tied, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = wordpiece(tmp_path / "base", 0)
    parts.write_model(base, tokens=100, rows=128, tied=tied)
    vocab = wordpiece(tmp_path / "vocab", added)
    result = graft(base, vocab, output=tmp_path / "model")
    assert (result.rows_before, result.rows_after, result.tokens) == (128, rows, 100 + added)
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "model")
    for name in vocabulary_of(before).names:
        old, new = before.read(name), after.read(name)
        assert new[:100].tobytes() == old[:100].tobytes()
        assert new[100 + added : 128].tobytes() == old[100 + added :].tobytes()
        for token_id in range(100, 100 + added):  # initialised, although the row was there
            assert token_id >= 128 or new[token_id].tobytes() != old[token_id].tobytes()
        assert len(np.unique(new[100 : 100 + added], axis=0)) == added
        mean = old[:100].astype(np.float64).mean(axis=0)  # without the padding rows
        np.testing.assert_allclose(new[max(128, 100 + added) :] - mean, 0, atol=1e-6)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval()
              for folder in (base, tmp_path / "model")]  # fmt: skip
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        old, new = (model(ids).logits[..., :100].numpy() for model in models)
    np.testing.assert_allclose(new, old, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = tokenizer("hearta0 the", return_tensors="pt", add_special_tokens=False)
    done = models[1].generate(text["input_ids"], max_new_tokens=3, pad_token_id=0)
    assert done.shape[1] >= text["input_ids"].shape[1]


QWEN3 = Path(__file__).parents[2] / "shared/data/tokenizers/qwen3_hf"


@pytest.mark.real
@pytest.mark.matrix
@pytest.mark.skipif(not QWEN3.exists(), reason="needs ../shared/data/tokenizers/qwen3_hf")
@pytest.mark.parametrize(
    ("added", "tied", "rows"), [(40, True, 151_936), (40, False, 151_936), (400, True, 152_128)]
)
def test_the_padding_rows_of_qwen3(added, tied, rows, tmp_path):
    """151,936 rows for 151,669 tokens: new tokens fill padding rows, nothing shrinks."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "base"
    shutil.copytree(QWEN3, base)
    vocab = extend(base, tmp_path / "vocab", added, literal=1)
    tokens = TokenMap.read(base).tokens
    assert tokens == 151_669
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
        bos_token_id=151_643, eos_token_id=151_645,
    )  # fmt: skip
    before = Qwen3ForCausalLM(config).eval()
    before.save_pretrained(base)
    result = graft(base, vocab, output=tmp_path / "model")
    assert (result.rows_before, result.rows_after) == (151_936, rows)
    assert (result.tokens, result.added) == (tokens + added, added)
    old, new = Checkpoint.open(base), Checkpoint.open(tmp_path / "model")
    for name in vocabulary_of(old).names:
        a, b = old.read(name), new.read(name)
        assert a[:tokens].tobytes() == b[:tokens].tobytes()
        assert a[tokens + added :].tobytes() == b[tokens + added : 151_936].tobytes()
        fresh = b[tokens : tokens + added]
        assert len(np.unique(fresh, axis=0)) > 0.9 * added
        filled = min(added, 151_936 - tokens)
        assert not (fresh[:filled] == a[tokens : tokens + filled]).all(axis=1).any()
    after = Qwen3ForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("The heart <|im_start|>user", return_tensors="pt")["input_ids"]
    assert ids.max() >= 151_643
    with torch.no_grad():
        first, second = before(ids).logits[..., :tokens], after(ids).logits[..., :tokens]
    np.testing.assert_allclose(second.numpy(), first.numpy(), atol=1e-5)
    term = tokenizer(f"<term {tokens + added - 1}>")["input_ids"]
    assert term == [tokens + added - 1]
    done = after.generate(torch.tensor([term]), max_new_tokens=2, min_new_tokens=2)
    assert done.shape == (1, 3)
