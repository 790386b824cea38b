"""What lexigraft writes is taken by other tools as it is; the snippets of docs/ecosystem.md have their keys.

Tools that are not installed are skipped: the default environment has none of them.
"""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import adapter_parts
from lexigraft import check, merge, split
from test_import import AXOLOTL_CLASSES, FACTORY_CLASSES, package, schema_keys

ROOT = Path(__file__).parents[1]


def needed(module, pip):
    """A module of a tool, or a skip that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        pytest.skip(f"{module}: {fault} (pip install --no-deps {pip})")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A base, an adapter with new rows, and what merge and split make of the two."""
    root = tmp_path_factory.mktemp("ecosystem")
    made = adapter_parts.scene(root, "saved-both", tied=False)
    merge(made.base, made.adapter, output=root / "merged")
    split(made.base, made.adapter, output=root / "pair")
    return root


@pytest.mark.matrix
def test_trl_trains_what_merge_wrote(scene, tmp_path):
    """SFTTrainer takes the folder by its path; its adapter goes back into it."""
    trl = needed("trl", "trl==1.16.0")
    from datasets import Dataset
    from peft import LoraConfig

    word = adapter_parts.HAN[:2]
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=1, use_cpu=True,
        max_length=32, report_to="none", save_strategy="no", bf16=False, logging_steps=1,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=str(scene / "merged"),
        args=config,
        train_dataset=Dataset.from_list([{"text": f"the coronary {word} artery {word}"}] * 4),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    seen = {i for row in trainer.train_dataset for i in row["input_ids"]}
    assert seen & set(adapter_parts.NEW)
    rows = trainer.model.get_input_embeddings().weight.shape[0]
    assert rows == json.loads((scene / "merged" / "config.json").read_text())["vocab_size"]
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    merge(scene / "merged", tmp_path / "adapter", output=tmp_path / "again", prove=True)
    assert check(tmp_path / "again").ok


def test_axolotl_merges_onto_what_split_wrote(scene, tmp_path):
    """A served pair is LoRA on linear layers beside a base with its rows: others merge it rightly."""
    tool = needed("axolotl.cli.utils.lora_merge", "axolotl==0.19.0 colorama")
    tool.merge_lora_sharded_efficient(scene / "pair" / "base", scene / "pair" / "adapter", tmp_path)
    theirs, ours = adapter_parts.tensors(tmp_path), adapter_parts.tensors(scene / "merged")
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] == ours[name]).all() for name in ours)


@pytest.mark.matrix
def test_llamafactory_loads_what_merge_wrote(scene, tmp_path, monkeypatch):
    """With neither `add_tokens` nor `resize_vocab`: the rows are there."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    hparams = needed("llamafactory.hparams", "llamafactory==0.9.5 omegaconf==2.3.0")
    tool = needed("llamafactory.model", "llamafactory==0.9.5 trl==0.24.0")
    folder = Path(shutil.copytree(scene / "merged", tmp_path / "merged"))
    arguments = {"model_name_or_path": str(folder), "template": "default", "infer_dtype": "float32",
                 "export_dir": str(tmp_path / "out")}  # fmt: skip
    model_args, _, finetuning_args, _ = hparams.get_infer_args(arguments)
    tokenizer = tool.load_tokenizer(model_args)["tokenizer"]
    model = tool.load_model(tokenizer, model_args, finetuning_args)
    ids = tokenizer(adapter_parts.HAN[:2], add_special_tokens=False)["input_ids"]
    assert set(ids) & set(adapter_parts.NEW)
    ours = adapter_parts.load(folder)
    assert model.get_input_embeddings().weight.shape == ours.get_input_embeddings().weight.shape
    assert (adapter_parts.logits(model, 384) == adapter_parts.logits(ours, 384)).all()


@pytest.mark.parametrize("consumer", ["vllm", "gguf", "tgi"])
def test_programs_that_serve_have_nothing_to_refuse(scene, consumer):
    whole = check(scene / "merged", consumer=consumer)
    pair = check(
        scene / "pair" / "base", adapter=[str(scene / "pair" / "adapter")], consumer=consumer
    )
    assert whole.ok and pair.ok


def snippets(key):
    """The configurations of the page that have a key."""
    text = (ROOT / "docs" / "ecosystem.md").read_text("utf-8")
    found = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    return [content for content in found if key in content]


def test_the_snippets_for_axolotl_have_its_keys():
    keys = schema_keys(package("axolotl") / "utils" / "schemas", AXOLOTL_CLASSES)
    assert len(snippets("base_model")) == 2
    for content in snippets("base_model"):
        assert content.keys() - keys == set()


def test_the_snippet_for_llamafactory_has_its_keys():
    keys = schema_keys(package("llamafactory") / "hparams", FACTORY_CLASSES)
    keys |= schema_keys(package("transformers"), {"TrainingArguments"}, "training_args.py")
    [content] = snippets("model_name_or_path")
    assert content.keys() - keys == set()
