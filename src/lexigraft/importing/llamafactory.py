"""LLaMA-Factory's configurations.

Keys, defaults and meanings are those of LLaMA-Factory 0.9.5: `hparams/*.py` (keys and defaults; the
rest are transformers' Seq2SeqTrainingArguments), `data/parser.py`, `data/loader.py` and
`data/converter.py` (where texts come from), `data/processor/pretrain.py` (how they are read),
`model/patcher.py` and `model/model_utils/embedding.py` (tokens), `model/adapter.py` (what trains).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexigraft.files import is_there, read_object
from lexigraft.importing import common
from lexigraft.importing.translation import Tool, Translation
from lexigraft.recipe import read_yaml

NAMES = common.Names(
    rank="lora_rank",
    alpha="lora_alpha",
    dropout="lora_dropout",
    rslora="use_rslora",
    targets="lora_target",
    saved="additional_target",
    block_size="cutoff_len",
    batch_size="per_device_train_batch_size",
    epochs="num_train_epochs",
    schedule="lr_scheduler_type",
    optimizer="optim",
)
_SERVING = "serving and exporting: RUN/merged is an ordinary folder, lexigraft merge writes it"
_LORA = "plain LoRA or full training"

TOOL = Tool(
    name="LLaMA-Factory",
    version="0.9.5",
    base="model_name_or_path",
    pretraining="`stage: pt`",
    defaults={
        "lora_rank": 8,
        "cutoff_len": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "num_train_epochs": 3,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "seed": 42,
    },
    left_out={
        common.NO_CHATS:
            "template tool_format default_system enable_thinking preserve_thinking "
            "train_on_prompt mask_history ignore_pad_token_for_loss media_dir",
        common.PACKED:
            "packing neat_packing streaming buffer_size preprocessing_* overwrite_cache "
            "tokenized_path data_shared_file_system group_by_length length_column_name "
            "train_sampling_strategy sortish_sampler",
        common.ORDER:
            "disable_shuffling data_seed",
        "`train.max_bytes` limits the text":
            "max_samples",
        common.HELD_OUT:
            "val_size",
        common.READING:
            "use_fast_tokenizer split_special_tokens",
        common.NO_CODE:
            "trust_remote_code",
        "`graft` adds rows, a multiple of graft.pad_to":
            "resize_vocab",
        common.VARIANTS:
            "use_dora loraplus_* pissa_* create_new_adapter",
        common.PLAIN:
            "neftune_noise_alpha label_smoothing_factor moe_aux_loss_coef lr_scheduler_kwargs "
            "optim_args",
        common.PATIENCE:
            "early_stopping_steps",
        "weights that do not train have the type of `train.dtype`":
            "upcast_* double_quantization quantization_device_map tf32",
        common.SAVING:
            "do_train do_eval do_predict output_dir overwrite_output_dir logging_* log_* "
            "save_* eval_* per_device_eval_batch_size plot_loss report_to run_name project "
            "trackio_* disable_tqdm push_to_hub* hub_* hf_hub_token ms_hub_token om_hub_token "
            "use_swanlab swanlab_* load_best_model_at_end metric_for_best_model "
            "greater_is_better resume_from_checkpoint ignore_data_skip "
            "restore_callback_states_from_checkpoint include_* compute_accuracy "
            "prediction_loss_only predict_with_generate print_param_status "
            "enable_torch_profiler profiler_* profile_modules batch_eval_metrics "
            "enable_jit_checkpoint debug skip_memory_metrics cache_dir label_names past_index "
            "fp16_full_eval bf16_full_eval",
        common.DEVICES:
            "deepspeed fsdp* ddp_* local_rank parallelism_config ray_* resources_per_worker "
            "placement_strategy master_addr master_port accelerator_config "
            "average_tokens_across_devices use_cpu no_cuda full_determinism",
        common.SPEED:
            "flash_attn enable_liger_kernel use_liger_kernel liger_kernel_config use_unsloth* "
            "use_v1_kernels use_reentrant_gc gradient_checkpointing* "
            "activation_checkpointing* low_cpu_mem_usage offload_folder dataloader_* "
            "torch_compile* torch_empty_cache_steps auto_find_batch_size "
            "remove_unused_columns use_cache use_kv_cache use_kt kt_*",
        _SERVING:
            "infer_* vllm_* sglang_* export_* do_sample temperature top_p top_k num_beams "
            "max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens "
            "generation_*",
        "nothing here reads pictures, sound or video":
            "image_* video_* audio_* crop_to_patches use_audio_in_video freeze_vision_tower "
            "freeze_multi_modal_projector",
        "it belongs to an optimizer, a stage or a method that is off":
            "galore_* apollo_* badam_* oft_* module_dropout freeze_trainable_* pref_* ppo_* "
            "kto_* simpo_gamma ld_alpha dpo_label_smoothing ref_model* reward_model* "
            "asft_alpha eaft_alpha optim_target_modules quantization_type quantization_method "
            "hyper_parallel_args",
    },
    stops={
        common.KIND:
            "use_dft_loss use_asft_loss use_eaft_loss freeze_language_model mixture_of_depths",
        common.MODEL:
            "adapter_name_or_path adapter_folder rope_scaling shift_attn train_from_scratch "
            "use_llama_pro freeze_extra_modules",
        "AdamW":
            "use_galore use_apollo use_badam use_adam_mini use_muon adafactor",
        "training by Trainer, with weights of 4, 8, 16 or 32 bits":
            "use_mca use_hyper_parallel fp8*",
        "data sets one after another, each document as often as it stands there: write "
        "weights behind the texts of the recipe (FILE#weight=2)":
            "interleave_probs",
    },
)  # fmt: skip
_DATA_CONFIG = "dataset_info.json"
# Keys of an entry of dataset_info.json; all others describe chats or other hubs.
_ENTRY = (
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "subset",
    "split",
    "columns",
    "formatting",
)


def translate(t: Translation) -> None:
    """Take a configuration apart.

    Raises:
        RefusalError: it trains on chats, instructions or preferences.
    """
    stage = t.take("stage") or "sft"
    if stage != "pt":
        raise t.refuse_kind(f"stage: {stage}")
    t.mapped("stage", stage, "train.objective: lm")
    revision = t.take("model_revision")
    t.model(t.take("model_name_or_path"), None if revision == "main" else revision)
    _texts(t)
    listed = _tokens(t)
    mode = _mode(t)
    if str(rank := t.rest.get("lora_rank", TOOL.defaults["lora_rank"])).isdecimal():
        t.defaults["lora_alpha"] = 2 * int(rank)
    common.method(t, NAMES, mode, listed)
    common.loop(t, NAMES)
    t.beyond("rate of new rows", "train.new_row_learning_rate", "by mode and size")
    _dtype(t, mode)
    if t.take("disable_gradient_checkpointing"):
        t.mapped("disable_gradient_checkpointing", True, "train.gradient_checkpointing: false")
    else:
        t.stage["gradient_checkpointing"] = True
        t.mapped("disable_gradient_checkpointing", False, "train.gradient_checkpointing: true")


def _texts(t: Translation) -> None:
    folder = t.take("dataset_dir") or "data"
    strategy = t.take("mix_strategy")
    if strategy not in (None, "concat"):
        t.fault(f"mix_strategy: {strategy}", "mix_strategy: concat; weights: FILE#weight=2")
    names = common.names(t.take("dataset"))
    t.recipe["corpus"] = _specs(t, str(folder), names)
    if not names:
        t.fault("no dataset", "dataset: names of plain texts")
    t.texts_read(t.recipe["corpus"], "dataset", ",".join(names), "corpus")
    if held := common.names(t.take("eval_dataset")):
        specs = _specs(t, str(folder), held)
        t.recipe["eval"] = {"corpus": specs}
        t.texts_read(specs, "eval_dataset", ",".join(held), "eval.corpus")


def _specs(t: Translation, folder: str, names: list[str]) -> list[str]:
    """The specs of the named data sets, as dataset_info.json describes them."""
    table = Path(folder, _DATA_CONFIG)
    if not names:
        return []
    if not is_there(table):
        t.fault(
            f"no file {table}",
            f"{_DATA_CONFIG} in dataset_dir; paths start from the folder where this is run",
        )
        return []
    known = read_object(table)
    found = []
    for name in names:
        entry = known.get(name)
        if not isinstance(entry, dict):
            t.fault(f"{table} has no {name}", f"one of {', '.join(sorted(known)[:20])}")
            continue
        spec = _spec(t, folder, name, entry)
        found += [spec] if spec is not None else []
    return found


def _spec(t: Translation, folder: str, name: str, entry: Mapping[str, Any]) -> str | None:
    columns = entry.get("columns") or {}
    other = [key for key, value in entry.items() if key not in _ENTRY and value]
    if entry.get("formatting", "alpaca") != "alpaca" or entry.get("ranking"):
        raise t.refuse_kind(f"{name} in {_DATA_CONFIG}")
    if other:
        t.fault(f"{name}: {', '.join(other)}", f"{name} with no key but {', '.join(_ENTRY)}")
        return None
    if not columns.get("prompt") or columns.get("query") or columns.get("history"):
        t.fault(
            f"{name}: its text is more than one column",
            f'{_DATA_CONFIG}: the column that holds the text, alone: "columns": '
            '{"prompt": "text"}',
        )
        return None
    place = entry.get("hf_hub_url") or entry.get("file_name")
    if not place:
        t.fault(f"{name} is on another hub", f"{name}: file_name or hf_hub_url")
        return None
    if not entry.get("hf_hub_url"):
        place = os.path.join(folder, place)  # noqa: PTH118 - Path would drop a leading ./
    return t.text(
        place, columns["prompt"], key=name, config=entry.get("subset"), split=entry.get("split")
    )


def _tokens(t: Translation) -> bool:
    """Tokens that it adds; True if there are some."""
    listed = common.words(t, "add_tokens", t.take("add_tokens"))
    described, special = t.take("new_special_tokens_config"), t.take("add_special_tokens")
    start = t.take("init_special_tokens")
    if described is None:
        if start not in (None, "noise_init"):
            t.leave(
                "init_special_tokens", start, "no descriptions: new rows start as graft.init says"
            )
        return common.words(t, "add_special_tokens", special, special=True) or listed
    if special is not None:
        t.leave("add_special_tokens", special, "new_special_tokens_config decides, as there")
    texts = read_yaml(Path(str(described)), "tokens and their descriptions")
    if not isinstance(texts, dict):
        t.fault(f"{described} is no mapping", "TOKEN: description, one a line")
        return listed
    common.words(t, "new_special_tokens_config", list(texts), special=True)
    if start in ("desc_init", "desc_init_w_noise"):
        t.lists["starts"] = [
            f"{token}\t{' '.join(str(text).split())}" for token, text in texts.items()
        ]
        note = "" if start == "desc_init" else "without noise"
        t.mapped("init_special_tokens", start, "graft.init_from", note)
    elif start is not None:
        t.leave("init_special_tokens", start, "new rows start as graft.init says")
    return True


def _mode(t: Translation) -> str:
    kind = t.take("finetuning_type") or "lora"
    if kind not in ("lora", "full"):
        t.fault(f"finetuning_type: {kind}", "finetuning_type: lora or full")
    t.mapped("finetuning_type", kind, f"train.mode: {kind}")
    return "full" if kind == "full" else "lora"


def _dtype(t: Translation, mode: str) -> None:
    """The type of the weights; what trains is float32 there too, unless `pure_bf16`."""
    bits = t.take("quantization_bit")
    if bits is not None:
        way, kind = t.take("quantization_method"), t.take("quantization_type")
        dtype = {4: "nf4", 8: "int8"}.get(bits)
        if dtype is None or kind == "fp4" or way not in (None, "bnb"):
            t.fault(
                f"quantization_bit: {bits} ({kind or 'nf4'}, {way or 'bnb'})",
                "4 bits of nf4, or 8, by bnb",
            )
            return
        t.stage["dtype"] = dtype
        t.mapped("quantization_bit", bits, f"train.dtype: {dtype}")
        for key in ("bf16", "fp16", "pure_bf16"):
            if value := t.take(key):
                t.leave(key, value, "the type of what is not quantised is the stored one")
        return
    pure, bf16, fp16 = t.take("pure_bf16"), t.take("bf16"), t.take("fp16")
    frozen = "bfloat16" if bf16 or pure else "float16" if fp16 else "auto"
    dtype = frozen if mode == "lora" or pure else "auto"
    t.stage["dtype"] = dtype
    for key, value in (("pure_bf16", pure), ("bf16", bf16), ("fp16", fp16)):
        if value:
            note = "float32, as all of it trains" if dtype == "auto" else ""
            t.mapped(key, value, f"train.dtype: {dtype}", note)
