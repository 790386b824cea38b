"""`import`: configurations of Axolotl and LLaMA-Factory become recipes, key by key, or stop."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

import parts
from lexigraft import LexigraftError, import_config
from lexigraft.errors import RefusalError
from lexigraft.importing import TOOLS
from lexigraft.importing.translation import _by_key, _reason
from lexigraft.recipe import Recipe

AXOLOTL = """
base_model: base
model_type: LlamaForCausalLM
tokenizer_config: base
load_in_4bit: false
datasets:
  - path: texts/field.jsonl
    ds_type: json
    type: completion
    field: body
  - path: owner/notes
    name: en
    split: validation
    type: completion
test_datasets: [{path: texts/held.txt, type: completion, split: train}]
tokens: ["肺炎", "<|diagnosis|>", "angina pectoris"]
special_tokens: {pad_token: "<|pad|>"}
adapter: lora
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head]
sequence_len: 1024
sample_packing: true
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
embedding_lr_scale: 2
warmup_ratio: 0.1
weight_decay: 0.01
bf16: true
gradient_checkpointing: true
flash_attention: true
val_set_size: 0.05
wandb_project:
output_dir: ./out
seed: 7
"""
FACTORY = """
model_name_or_path: owner/model
model_revision: v2
trust_remote_code: true
stage: pt
do_train: true
finetuning_type: lora
lora_target: all
dataset: notes,wiki
eval_dataset: held
cutoff_len: 1024
max_samples: 1000
add_tokens: angina, nephritis
new_special_tokens_config: marks.yaml
init_special_tokens: desc_init
resize_vocab: true
additional_target: embed_tokens,lm_head,norm
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_steps: 20
bf16: true
output_dir: saves
"""
DATASETS = {
    "notes": {"file_name": "notes.jsonl", "columns": {"prompt": "body"}},
    "wiki": {"hf_hub_url": "owner/wiki", "subset": "zh", "columns": {"prompt": "text"}},
    "held": {"file_name": "held.txt", "columns": {"prompt": "text"}},
    "chats": {"file_name": "notes.jsonl", "formatting": "sharegpt"},
    "alpaca": {"file_name": "notes.jsonl"},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which both tools would find their texts; paths start from it."""
    for name in ("base", "texts", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for folder, file in (("texts", "field.jsonl"), ("data", "notes.jsonl")):
        (tmp_path / folder / file).write_text('{"body": "angina"}\n')
    for place in ("texts/held.txt", "data/held.txt"):
        (tmp_path / place).write_text("nephritis\n")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASETS))
    (tmp_path / "marks.yaml").write_text('"<|start|>": begin of a case\n"<|end|>": end of it\n')
    (tmp_path / "axolotl.yml").write_text(AXOLOTL)
    (tmp_path / "llamafactory.yml").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(tool, **values):
    """The tool's configuration above with other values; None takes a key out."""
    path = Path(f"{tool}.yml")
    data = {**yaml.safe_load(path.read_text()), **values}
    data = {key: value for key, value in data.items() if value is not None}
    path.write_text(yaml.safe_dump(data, allow_unicode=True))
    return path


def imported(tool, **values):
    result = import_config(tool, changed(tool, **values), force=True)
    return result, yaml.safe_load(Path("recipe.yaml").read_text())


def fault(tool, **values):
    with pytest.raises(LexigraftError) as caught:
        import_config(tool, changed(tool, **values))
    assert not Path("recipe.yaml").exists()
    return str(caught.value)


def test_axolotl_becomes_a_recipe_that_says_the_same(here):
    result, recipe = imported("axolotl")
    assert recipe == {
        "base": "base",
        "corpus": ["texts/field.jsonl#column=body", "hf:owner/notes:en:validation"],
        "seed": 7,
        "learn": {"tokens": "auto", "pin": ["recipe.pin.txt"], "special": ["recipe.special.txt"]},
        "train": {
            "stages": [
                {
                    "mode": "lora", "lora_rank": 32, "lora_alpha": 64.0, "block_size": 1024,
                    "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 2e-4,
                    "weight_decay": 0.01, "passes": 2, "schedule": "cosine", "warmup": 0.1,
                    "new_row_learning_rate": 4e-4, "dtype": "bfloat16",
                    "gradient_checkpointing": True,
                }
            ]
        },
        "eval": {"corpus": ["texts/held.txt"]},
        "control": True,
    }  # fmt: skip
    assert Path("recipe.pin.txt").read_text() == "肺炎\nangina pectoris\n"
    assert Path("recipe.special.txt").read_text() == "<|diagnosis|>\n"
    told = {row.key: row for row in result.rows}
    assert set(yaml.safe_load(AXOLOTL)) - told.keys() == {
        "wandb_project",
        "load_in_4bit",
        "special_tokens",
    }  # empty, off, and told by its parts
    assert told["special_tokens.pad_token"].place is None
    assert told["lora_dropout"].place is None and "dropout" in told["lora_dropout"].note
    assert all(row.note for row in result.rows if row.place is None)


def test_llamafactory_becomes_a_recipe_that_says_the_same(here):
    result, recipe = imported("llamafactory")
    assert recipe["base"] == "owner/model@v2"
    assert recipe["corpus"] == ["data/notes.jsonl#column=body", "hf:owner/wiki:zh"]
    assert recipe["eval"] == {"corpus": ["data/held.txt"]}
    assert recipe["graft"] == {"init_from": "recipe.starts.txt"}
    assert recipe["train"]["stages"] == [
        {
            "mode": "lora", "lora_rank": 8, "lora_alpha": 16.0, "block_size": 1024, "batch_size": 1,
            "gradient_accumulation": 8, "learning_rate": 1e-4, "weight_decay": 0.0, "passes": 3,
            "schedule": "cosine", "dtype": "bfloat16", "gradient_checkpointing": True,
        }
    ]  # fmt: skip
    assert Path("recipe.starts.txt").read_text() == (
        "<|start|>\tbegin of a case\n<|end|>\tend of it\n"
    )
    assert Path("recipe.pin.txt").read_text() == "angina\nnephritis\n"
    told = {row.key: row for row in result.rows}
    assert told["lora_rank"].default and told["lora_alpha"].default
    assert told["warmup_steps"].place is None and "not known" in told["warmup_steps"].note
    assert told["max_samples"].place is None
    kept, left = (row for row in result.rows if row.key == "additional_target")
    assert (kept.value, left.value, left.place) == ("embed_tokens,lm_head", "norm", None)


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_written_is_read_by_the_recipes_own_parser_from_any_folder(here, tool):
    result = import_config(tool, f"{tool}.yml", output="made/here.yaml")
    recipe = Recipe.read(here / "made" / "here.yaml")
    local = [spec.partition("#")[0] for spec in recipe.corpus if not spec.startswith("hf:")]
    lists = [*recipe.learn.pin, *recipe.learn.special]
    assert local and lists and all(Path(place).is_file() for place in [*local, *lists])
    assert [path.name for path in result.files[:2]] == ["here.pin.txt", "here.special.txt"]
    head = [line for line in result.recipe.splitlines() if line.startswith("#")]
    assert f"From {tool}.yml" in head[0]
    assert any("output_dir" in line for line in head)


@pytest.mark.parametrize("tool", TOOLS)
def test_defaults_of_the_tool_are_written_out(here, tool):
    """A recipe's own defaults would be another training."""
    small = {
        "axolotl": ("base_model", "datasets", "learning_rate"),
        "llamafactory": ("model_name_or_path", "stage", "dataset"),
    }[tool]
    data = yaml.safe_load(Path(f"{tool}.yml").read_text())
    Path("small.yml").write_text(yaml.safe_dump({key: data[key] for key in small}))
    result = import_config(tool, "small.yml")
    stage = yaml.safe_load(result.recipe)["train"]["stages"][0]
    expected = {
        "axolotl": {
            "mode": "full", "old_rows": "slow", "old_row_scale": 1.0, "block_size": 512,
            "batch_size": 1, "gradient_accumulation": 1, "learning_rate": 2e-4, "weight_decay": 0.0,
            "passes": 1, "schedule": "cosine", "warmup": 0.03, "dtype": "auto",
        },
        "llamafactory": {
            "mode": "lora", "lora_rank": 8, "lora_alpha": 16.0, "block_size": 2048, "batch_size": 8,
            "gradient_accumulation": 1, "learning_rate": 5e-5, "weight_decay": 0.0, "passes": 3,
            "warmup": 0.0, "dtype": "auto", "gradient_checkpointing": True,
        },
    }[tool]  # fmt: skip
    assert stage == expected
    defaults = {row.key for row in result.rows if row.default}
    assert defaults >= TOOLS[tool][0].defaults.keys() - set(small) - {"lr_scheduler_type"}


@pytest.mark.parametrize(
    ("tool", "values", "word"),
    [
        ("axolotl", {"rl": "dpo"}, "rl: dpo"),
        ("axolotl", {"datasets": [{"path": "owner/chats", "type": "chat_template"}]}, "chat_template"),
        ("axolotl", {"datasets": [{"path": "owner/chats"}]}, "datasets[0].type: none"),
        ("llamafactory", {"stage": "sft"}, "stage: sft"),
        ("llamafactory", {"stage": None}, "stage: sft"),
        ("llamafactory", {"dataset": "chats"}, "chats in dataset_info.json"),
    ],
)  # fmt: skip
def test_training_on_chats_stops_and_says_what_to_do(here, tool, values, word):
    said = fault(tool, **values)
    assert word in said and "RUN/merged" in said and "continued pretraining" in said


@pytest.mark.parametrize(
    ("tool", "values", "found", "needed"),
    [
        ("axolotl", {"lora_alhpa": 8}, "unknown key lora_alhpa", "lora_alpha?"),
        ("llamafactory", {"cut_off_len": 8}, "unknown key cut_off_len", "cutoff_len?"),
        ("axolotl", {"qqqqqqq": 8}, "unknown key qqqqqqq", "a key of Axolotl"),
        ("axolotl", {"adapter": "llama-adapter"}, "adapter: llama-adapter", "lora or qlora"),
        ("axolotl", {"tokenizer_config": "other"}, "tokenizer_config: other", "the base's own"),
        ("axolotl", {"lora_model_dir": "old"}, "lora_model_dir: old", "beforehand"),
        ("axolotl", {"optimizer": "lion_8bit"}, "optimizer: lion_8bit", "adamw_torch"),
        ("axolotl", {"num_epochs": 0.5}, "num_epochs: 0.5", "max_steps"),
        ("axolotl", {"learning_rate": "fast"}, "learning_rate: fast", "a number"),
        ("axolotl", {"base_model": "nothing here"}, "nothing here", "base_model"),
        ("axolotl", {"unfrozen_parameters": ["x"]}, "unfrozen_parameters", "plain LoRA"),
        ("axolotl", {"special_tokens": {"eos_token": "<end>"}}, "eos_token: <end>", "eos_token"),
        ("axolotl", {"datasets": [{"path": "texts/no.jsonl", "type": "completion"}]}, "texts/no.jsonl", "here"),
        ("axolotl", {"datasets": [{"path": "texts/field.jsonl", "type": "completion", "shards": 4}]}, "shards: 4", "no key but"),
        ("axolotl", {"datasets": [{"path": "owner/x", "type": "completion", "split": "train[:9]"}]}, "train[:9]", "whole split"),
        ("axolotl", {"datasets": [{"path": "axolotl.yml", "type": "completion"}]}, "axolotl.yml", "jq"),
        ("llamafactory", {"finetuning_type": "freeze"}, "finetuning_type: freeze", "lora or full"),
        ("llamafactory", {"adapter_name_or_path": "old"}, "adapter_name_or_path", "beforehand"),
        ("llamafactory", {"dataset": "alpaca"}, "alpaca", '"prompt": "text"'),
        ("llamafactory", {"dataset": "nowhere"}, "nowhere", "notes"),
        ("llamafactory", {"dataset_dir": "elsewhere"}, "dataset_info.json", "dataset_dir"),
        ("llamafactory", {"quantization_bit": 3}, "quantization_bit: 3", "4 bits"),
        ("llamafactory", {"use_muon": True}, "use_muon", "AdamW"),
        ("llamafactory", {"interleave_probs": "0.5,0.5"}, "interleave_probs", "#weight=2"),
    ],
)  # fmt: skip
def test_what_no_recipe_can_say_stops(here, tool, values, found, needed):
    said = fault(tool, **values)
    assert found in said.partition("needed:")[0] and needed in said


def test_all_faults_are_told_together(here):
    said = fault("axolotl", lora_rr=8, optimizer="lion", gptq=True)
    assert all(word in said for word in ("lora_rr", "lion", "gptq"))


@pytest.mark.parametrize(
    ("tool", "values", "expected"),
    [
        ("axolotl", {"adapter": "qlora", "load_in_4bit": True}, {"dtype": "nf4", "mode": "lora"}),
        ("axolotl", {"load_in_8bit": True}, {"dtype": "int8"}),
        ("axolotl", {"adapter": None, "bf16": False, "fp16": True}, {"dtype": "float32", "old_row_scale": 2.0}),
        ("axolotl", {"peft_use_rslora": True}, {"lora_alpha": 362.038672}),
        ("axolotl", {"max_steps": 100, "warmup_steps": 10, "warmup_ratio": None}, {"max_steps": 100, "warmup": 0.1}),
        ("axolotl", {"batch_size": 32, "gradient_accumulation_steps": None}, {"gradient_accumulation": 8}),
        ("axolotl", {"lr_scheduler": "constant"}, {"schedule": "constant", "warmup": 0.0}),
        ("axolotl", {"embedding_lr": 1e-3, "embedding_lr_scale": None}, {"new_row_learning_rate": 1e-3}),
        ("llamafactory", {"quantization_bit": 4}, {"dtype": "nf4"}),
        ("llamafactory", {"finetuning_type": "full"}, {"mode": "full", "dtype": "auto", "old_rows": "slow"}),
        ("llamafactory", {"finetuning_type": "full", "pure_bf16": True}, {"dtype": "bfloat16"}),
        ("llamafactory", {"warmup_steps": 0.2}, {"warmup": 0.2}),
        ("llamafactory", {"lr_scheduler_type": "warmup_stable_decay"}, {"schedule": "wsd"}),
        ("llamafactory", {"disable_gradient_checkpointing": True}, {"gradient_checkpointing": None}),
    ],
)  # fmt: skip
def test_one_key_more(here, tool, values, expected):
    stage = imported(tool, **values)[1]["train"]["stages"][0]
    assert {key: stage.get(key) for key in expected} == expected


def test_a_schedule_that_is_not_here_is_told(here):
    result, recipe = imported("llamafactory", lr_scheduler_type="linear")
    row = next(row for row in result.rows if row.key == "lr_scheduler_type")
    assert row.place is None and "cosine" in row.note
    assert "schedule" not in recipe["train"]["stages"][0]


def test_pretraining_texts_are_the_first_entry(here):
    entries = [{"path": "owner/web", "name": "en", "type": "pretrain"}, {"path": "owner/more"}]
    result, recipe = imported("axolotl", pretraining_dataset=entries, max_steps=10)
    assert recipe["corpus"] == ["hf:owner/web:en"]
    left = {row.key for row in result.rows if row.place is None}
    assert {"pretraining_dataset", "datasets", "num_epochs"} <= left


def test_added_tokens_get_new_ids(here):
    result, _ = imported("axolotl", added_tokens_overrides={128011: "<|case|>"})
    assert Path("recipe.special.txt").read_text() == "<|diagnosis|>\n<|case|>\n"
    row = next(row for row in result.rows if row.key == "added_tokens_overrides")
    assert row.place is None and "new ids" in row.note


def test_nothing_is_overwritten_and_a_dry_run_writes_nothing(here):
    result = import_config("axolotl", "axolotl.yml", dry_run=True)
    assert not Path("recipe.yaml").exists() and "would write" in result.lines()[0]
    import_config("axolotl", "axolotl.yml")
    with pytest.raises(LexigraftError, match="exists"):
        import_config("axolotl", "axolotl.yml")
    assert import_config("axolotl", "axolotl.yml", force=True).recipe == result.recipe
    with pytest.raises(LexigraftError, match="input"):
        import_config("axolotl", "axolotl.yml", output="axolotl.yml", force=True)
    json.dumps(result.to_json())


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "1: 2\n"])
def test_no_configuration_is_one_message(here, text):
    Path("axolotl.yml").write_text(text)
    with pytest.raises(LexigraftError):
        import_config("axolotl", "axolotl.yml")
    with pytest.raises(LexigraftError, match="configurations of unsloth"):
        import_config("unsloth", "axolotl.yml")


def schema_keys(folder, names, pattern="*.py"):
    """The fields of classes in a package's sources, their aliases included; nothing is imported."""
    found = set()
    for path in folder.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name in names:
                for line in node.body:
                    if isinstance(line, ast.AnnAssign):
                        options = {k.arg: k.value for k in getattr(line.value, "keywords", [])}
                        off = options.get("init")
                        if not (isinstance(off, ast.Constant) and off.value is False):
                            found.add(line.target.id)
                        if isinstance(options.get("alias"), ast.Constant):
                            found.add(options["alias"].value)
    return found


AXOLOTL_CLASSES = {
    "AxolotlInputConfig", "ModelInputConfig", "ModelOutputConfig", "LoraConfig", "ReLoRAConfig",
    "JaggedLRConfig", "HyperparametersConfig", "WandbConfig", "MLFlowConfig", "CometConfig",
    "TrackioConfig", "OpenTelemetryConfig", "LISAConfig", "GradioConfig", "RayConfig",
    "MultiModalConfig", "RemappedParameters", "DeprecatedParameters",
}  # fmt: skip
FACTORY_CLASSES = {
    "BaseModelArguments", "QuantizationArguments", "ProcessorArguments", "ExportArguments",
    "VllmArguments", "SGLangArguments", "KTransformersArguments", "ModelArguments",
    "DataArguments", "FreezeArguments", "LoraArguments", "OFTArguments", "RLHFArguments",
    "GaloreArguments", "ApolloArguments", "BAdamArgument", "SwanLabArguments",
    "FinetuningArguments", "RayArguments", "ProfilerArguments", "Fp8Arguments",
    "TrainingArguments", "GeneratingArguments",
}  # fmt: skip


def untold(tool, keys):
    """Keys that are in no table and that the translation does not look at itself."""
    sources = "".join(
        Path(sys.modules[f"lexigraft.importing.{name}"].__file__).read_text()
        for name in (tool, "common")
    )
    known = {**_by_key(TOOLS[tool][0].left_out), **_by_key(TOOLS[tool][0].stops)}
    return {k for k in keys if _reason(known, k) is None and f'"{k}"' not in sources} - {
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "warmup_steps", "warmup_ratio"
    }  # fmt: skip


def package(name):
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"no {name}: pip install --no-deps {name}=={TOOLS[name][0].version}")
    return Path(found.submodule_search_locations[0])


def test_every_key_of_axolotl_has_its_place():
    folder = package("axolotl") / "utils" / "schemas"
    keys = schema_keys(folder, AXOLOTL_CLASSES)
    assert len(keys) > 350
    assert untold("axolotl", keys) == set()


def test_every_key_of_llamafactory_has_its_place():
    keys = schema_keys(package("llamafactory") / "hparams", FACTORY_CLASSES)
    assert len(keys) > 200
    assert untold("llamafactory", keys) == set()


def test_every_option_of_trainer_has_its_place():
    """LLaMA-Factory's configurations hold them too."""
    classes = {"TrainingArguments", "Seq2SeqTrainingArguments"}
    keys = schema_keys(package("transformers"), classes, "training_args*.py")
    assert len(keys) > 100
    assert untold("llamafactory", keys) == set()


@pytest.mark.matrix
@pytest.mark.parametrize("tool", TOOLS)
def test_an_imported_recipe_runs(tmp_path, monkeypatch, tool):
    """From a configuration to a merged model, on a tiny one."""
    from lexigraft import check, run

    base = parts.write_byte_level(tmp_path / "base")
    parts.write_model(base, tokens=382, tied=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "field.txt").write_text(parts.corpus_text(documents=60))
    info = {"field": {"file_name": "field.txt", "columns": {"prompt": "text"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    shared = {"learning_rate": "1e-3", "max_steps": 2, "warmup_steps": 1, "bf16": False}
    configs = {
        "axolotl": {
            **shared, "base_model": "base", "adapter": "lora", "lora_r": 4, "lora_alpha": 8,
            "datasets": [{"path": "data/field.txt", "type": "completion"}], "sequence_len": 64,
            "tokens": ["<|case|>"], "float32": True, "fp16": False,
        },
        "llamafactory": {
            **shared, "model_name_or_path": "base", "stage": "pt", "dataset": "field",
            "cutoff_len": 64, "lora_rank": 4, "per_device_train_batch_size": 1,
            "add_special_tokens": "<|case|>",
        },
    }  # fmt: skip
    Path("config.yml").write_text(yaml.safe_dump(configs[tool]))
    import_config(tool, "config.yml", output="made/recipe.yaml")
    result = run("made/recipe.yaml", output="run")
    assert result is not None and check("run/merged").ok
    tokenizer = json.loads(Path("run/merged/tokenizer.json").read_text())
    assert "<|case|>" in {token["content"] for token in tokenizer["added_tokens"]}


def test_refusals_are_refusals(here):
    with pytest.raises(RefusalError):
        import_config("axolotl", changed("axolotl", rl="grpo"))
