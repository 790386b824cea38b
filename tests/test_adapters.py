"""Adapters on disk: names, kinds, duplicates, scaling, and the delta formulas against PEFT."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adapter_parts
from lexigraft.adapters.config import AdapterConfig
from lexigraft.adapters.delta import changed_blocks, to_numpy, to_torch
from lexigraft.adapters.folder import Adapter
from lexigraft.adapters.keys import parse
from lexigraft.adapters.special import with_special_ids
from lexigraft.errors import LexigraftError, RefusalError

torch.set_num_threads(1)
LAYER = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"


@pytest.mark.parametrize(
    ("name", "part", "target"),
    [
        (f"base_model.model.{LAYER}.lora_A.weight", "lora_A", LAYER),
        (f"base_model.model.{LAYER}.lora_B.default.weight", "lora_B", LAYER),
        (f"base_model.model.{EMBED}.weight", "full", f"{EMBED}.weight"),
        (f"{EMBED}.weight", "full", f"{EMBED}.weight"),
        (f"base_model.model.{EMBED}.modules_to_save.weight", "saved", f"{EMBED}.weight"),
        (f"base_model.model.{EMBED}.modules_to_save.default.weight", "saved", f"{EMBED}.weight"),
        (f"base_model.model.{EMBED}.original_module.weight", "original", f"{EMBED}.weight"),
        ("base_model.model.lm_head.modules_to_save.bias", "saved", "lm_head.bias"),
        ("base_model.model.mlp.modules_to_save.up.weight", "saved", "mlp.up.weight"),
        (f"base_model.model.{EMBED}.token_adapter.trainable_tokens_delta", "rows", EMBED),
        (f"base_model.model.{EMBED}.trainable_tokens_delta", "rows", EMBED),
        (f"base_model.model.{EMBED}.token_adapter.base_layer.weight", "base", f"{EMBED}.weight"),
        (f"base_model.model.{EMBED}.base_layer.weight", "base", f"{EMBED}.weight"),
        (f"base_model.model.{LAYER}.lora_magnitude_vector", "magnitude", LAYER),
        (f"base_model.model.{LAYER}.lora_magnitude_vector.default.weight", "magnitude", LAYER),
        ("base_model.model.mlp.experts.lora_A.weight", "lora_A", "mlp.experts"),
        (
            "base_model.model.mlp.experts.base_layer.lora_B.weight",
            "lora_B",
            "mlp.experts.base_layer",
        ),
        (f"base_model.model.{LAYER}.ia3_l", "scale", LAYER),
        (f"base_model.model.{LAYER}.lora_B.bias", "lora_bias", LAYER),
        (f"base_model.model.{LAYER}.base_layer.bias", "full", f"{LAYER}.bias"),
        (f"base_model.model.{EMBED}.lora_embedding_A", "embedding_A", EMBED),
        (f"base_model.model.{EMBED}.lora_embedding_B.default", "embedding_B", EMBED),
    ],
)
def test_each_layout_of_peft_is_read(name, part, target):
    key = parse(name)
    assert (key.part, key.target) == (part, target)


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        ("base_layer.lora_A.weight", "LoRA beneath another adapter"),
        ("lora_E", "AdaLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("hada_w1_a", "LoHa"),
        ("oft_R.weight", "OFT"),
    ],
)
def test_forms_that_are_not_supported_have_a_name(ending, form):
    assert parse(f"base_model.model.{LAYER}.{ending}").form == form


def config(tmp_path, **values):
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "lora_bias": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, **values}))
    return tmp_path


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"layer_replication": [[0, 2], [1, 3]]}, "replicates layers"),
        ({"use_qalora": True}, "QALoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "invented"}, "invented"),
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"peft_type": "PREFIX_TUNING"}, "type PREFIX_TUNING"),
        ({"an_option_of_tomorrow": {"x": 1}}, "an_option_of_tomorrow"),
    ],
)
def test_options_that_change_the_meaning_are_refused_by_name(tmp_path, values, named):
    with pytest.raises(RefusalError, match=r"adapter_config\.json") as caught:
        AdapterConfig.read(config(tmp_path, **values))
    assert named in caught.value.found
    assert caught.value.fix


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_accepted(tmp_path, start):
    assert AdapterConfig.read(config(tmp_path, init_lora_weights=start)).rank == 8


def test_scaling_follows_alpha_rank_and_patterns(tmp_path):
    plain = AdapterConfig.read(config(tmp_path))
    assert plain.scaling(LAYER, 8) == 2.0
    assert AdapterConfig.read(config(tmp_path, use_rslora=True)).scaling(LAYER, 8) == 16 / 8**0.5
    patterns = config(
        tmp_path, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.0\..*q_proj": 2}
    )
    assert AdapterConfig.read(patterns).scaling(LAYER, 4) == 0.5
    assert AdapterConfig.read(patterns).scaling("model.layers.1.self_attn.q_proj", 4) == 4.0


def test_a_rank_that_the_config_denies_is_an_error(tmp_path):
    with pytest.raises(LexigraftError, match="rank 4"):
        AdapterConfig.read(config(tmp_path)).scaling(LAYER, 4)


def test_patterns_that_contradict_each_other_are_refused(tmp_path):
    """PEFT saves its config with sorted keys, so which pattern came first is lost."""
    folder = config(tmp_path, alpha_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 400})
    with pytest.raises(RefusalError, match="alpha_pattern"):
        AdapterConfig.read(folder).scaling(LAYER, 8)


def test_token_ids_keep_the_order_of_the_stored_rows(tmp_path):
    read = AdapterConfig.read(config(tmp_path, trainable_token_indices=[9, 3, 5]))
    assert read.ids_of(EMBED) == (9, 3, 5)
    both = config(tmp_path, trainable_token_indices={"embed_tokens": [1], "lm_head": [2, 0]})
    assert AdapterConfig.read(both).ids_of("lm_head") == (2, 0)


@pytest.mark.parametrize(
    "values",
    [
        {"r": "eight"},
        {"r": 2.5},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"lora_alpha": float("inf")},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": [4]},
        {"alpha_pattern": {"q_proj": None}},
        {"trainable_token_indices": {"embed_tokens": 3}},
        {"trainable_token_indices": [-1]},
        {"modules_to_save": 3},
    ],
    ids=str,
)
def test_damaged_configs_are_errors(tmp_path, values):
    with pytest.raises(LexigraftError, match="damaged"):
        AdapterConfig.read(config(tmp_path, **values))


def test_token_ids_that_occur_twice_are_an_error(tmp_path):
    with pytest.raises(LexigraftError, match="no set"):
        AdapterConfig.read(config(tmp_path, trainable_token_indices=[3, 3]))


@pytest.fixture(scope="module")
def saved_both(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return adapter_parts.scene(root, "saved-both", tied=False)


@pytest.fixture
def adapter(saved_both, tmp_path):
    import shutil

    return shutil.copytree(saved_both.adapter, tmp_path / "adapter")


def test_three_copies_of_a_saved_module_are_one_change(adapter):
    opened = Adapter.open(adapter)
    assert set(opened.full) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("modules_to_save" in tensor.name for tensor in opened.full.values())
    assert len(opened.low_rank) == 2 * len(adapter_parts.LINEAR)


def test_copies_that_disagree_are_an_error(adapter):
    def spoil(tensors):
        tensors["base_model.model.lm_head.weight"][0, 0] += 1
        return tensors

    adapter_parts.edit_tensors(adapter, spoil)
    with pytest.raises(LexigraftError, match=r"two different copies of lm_head\.weight"):
        Adapter.open(adapter)


def test_an_untrained_copy_alone_is_an_error(adapter):
    def only_original(tensors):
        return {n: t for n, t in tensors.items() if "lm_head" not in n or "original" in n}

    adapter_parts.edit_tensors(adapter, only_original)
    with pytest.raises(LexigraftError, match="original_module"):
        Adapter.open(adapter)


def test_half_a_lora_is_an_error(adapter):
    gone = f"base_model.model.{LAYER}.lora_B.weight"
    adapter_parts.edit_tensors(
        adapter, lambda tensors: {n: t for n, t in tensors.items() if n != gone}
    )
    with pytest.raises(LexigraftError, match="no lora_B"):
        Adapter.open(adapter)


@pytest.mark.parametrize("shape", [(0,), (0, 32)])
def test_tensors_of_a_zero3_rank_are_named_as_such(adapter, shape):
    def empty(tensors):
        tensors[f"base_model.model.{LAYER}.lora_A.weight"] = torch.zeros(shape)
        return tensors

    adapter_parts.edit_tensors(adapter, empty)
    with pytest.raises(LexigraftError, match="ZeRO-3") as caught:
        Adapter.open(adapter)
    assert "zero_to_fp32" in caught.value.fix


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    with pytest.raises(RefusalError, match="pickle") as caught:
        Adapter.open(adapter)
    import subprocess
    import sys

    command = caught.value.fix.replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True, timeout=120)
    assert set(Adapter.open(adapter).full) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_run_folder_names_its_last_checkpoint(adapter):
    with pytest.raises(LexigraftError) as caught:
        Adapter.open(adapter.parent)
    assert "adapter_config.json" in caught.value.found
    assert str(adapter) in caught.value.fix


def test_special_ids_reach_nested_configs_and_lists():
    nested = {"text_config": {"eos_token_id": 1}, "eos_token_id": [1, 4]}
    assert with_special_ids(nested, {"eos_token_id": 9}) == {
        "text_config": {"eos_token_id": 9},
        "eos_token_id": [9, 1, 4],
    }


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_torch_and_numpy_see_the_same_bits(dtype):
    from lexigraft.checkpoints.header import numpy_dtype

    array = np.random.default_rng(0).normal(size=(3, 5)).astype(numpy_dtype(dtype))
    tensor = to_torch(array, dtype)
    assert tensor.float().tolist() == array.astype(np.float32).tolist()
    assert to_numpy(tensor, dtype).tobytes() == array.tobytes()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_give_the_bits_of_the_whole(tmp_path, monkeypatch, dtype, transposed):
    from safetensors.torch import save_file

    from lexigraft.adapters import delta
    from lexigraft.adapters.folder import Addition, LowRank
    from lexigraft.checkpoints.header import read_header

    torch.manual_seed(0)
    values = {
        "w": torch.randn((48, 200) if transposed else (200, 48)).to(dtype),
        "a": torch.randn(7, 48),
        "b": torch.randn(200, 7),
    }
    save_file(values, tmp_path / "x.safetensors")
    tensors = {tensor.name: tensor for tensor in read_header(tmp_path / "x.safetensors").tensors}
    addition = Addition(LowRank("m", tensors["a"], tensors["b"]), 0.3, transposed)
    monkeypatch.setattr(delta, "BLOCK_BYTES", 1)
    blocks = list(changed_blocks(tensors["w"], addition))
    change = values["b"] @ values["a"]
    expected = values["w"].clone()
    expected += (change.T if transposed else change) * 0.3
    assert len(blocks) == (1 if transposed else 4)
    assert (
        b"".join(block.tobytes() for block in blocks)
        == to_numpy(expected, tensors["w"].dtype).tobytes()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_groups_of_columns_have_the_bits_of_the_whole(tmp_path, monkeypatch, dtype):
    """DoRA of an embedding, against PEFT's layer."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    from lexigraft.adapters import delta
    from lexigraft.adapters.folder import Addition, LowRank
    from lexigraft.checkpoints.header import read_header

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(1003, 200)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=5, target_modules=["0"], use_dora=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    layer = model.base_model.model[0]
    values = {
        "w": layer.base_layer.weight,
        "a": layer.lora_embedding_A["default"],
        "b": layer.lora_embedding_B["default"],
        "m": layer.lora_magnitude_vector["default"].weight,
    }
    values = {name: tensor.detach().clone().contiguous() for name, tensor in values.items()}
    save_file(values, tmp_path / "x.safetensors")
    tensors = {tensor.name: tensor for tensor in read_header(tmp_path / "x.safetensors").tensors}
    low_rank = LowRank("m", tensors["a"], tensors["b"], True, tensors["m"])
    addition = Addition(low_rank, layer.scaling["default"])
    monkeypatch.setattr(delta, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(delta, "NORM_BYTES", 1)
    blocks = list(changed_blocks(tensors["w"], addition))
    with torch.no_grad():
        expected = model.merge_and_unload()[0].weight
    assert len(blocks) > 1
    assert (
        b"".join(block.tobytes() for block in blocks)
        == to_numpy(expected.detach(), tensors["w"].dtype).tobytes()
    )


def test_a_magnitude_and_the_config_have_to_agree(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "layer.lora_A.weight": torch.ones(2, 4),
        "layer.lora_B.weight": torch.ones(6, 2),
        "layer.lora_magnitude_vector": torch.ones(6),
    }
    for use_dora, kept in ((False, 3), (True, 2)):
        config(tmp_path, use_dora=use_dora)
        file = dict(list(tensors.items())[:kept])
        save_file(file, tmp_path / "adapter_model.safetensors")
        with pytest.raises(LexigraftError, match="magnitude"):
            Adapter.open(tmp_path)
    config(tmp_path, use_dora=True)
    save_file(
        {**tensors, "layer.lora_magnitude_vector": torch.ones(5)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(LexigraftError, match="no LoRA of that size"):
        Adapter.open(tmp_path)


def test_a_result_beyond_the_type_is_an_error(tmp_path):
    from safetensors.torch import save_file

    from lexigraft.adapters.folder import Addition, LowRank
    from lexigraft.checkpoints.header import read_header

    values = {
        "w": torch.ones(2, 2, dtype=torch.float16),
        "a": torch.full((1, 2), 300.0),
        "b": torch.full((2, 1), 300.0),
    }
    save_file(values, tmp_path / "x.safetensors")
    tensors = {tensor.name: tensor for tensor in read_header(tmp_path / "x.safetensors").tensors}
    addition = Addition(LowRank("m", tensors["a"], tensors["b"]), 1.0)
    with pytest.raises(LexigraftError, match="not finite"):
        list(changed_blocks(tensors["w"], addition))
