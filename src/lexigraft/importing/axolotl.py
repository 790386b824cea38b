"""Axolotl's configurations.

Keys, defaults and meanings are those of Axolotl 0.19.0: `utils/schemas/*.py` (keys and defaults),
`utils/config/__init__.py` (types of weights, batch), `utils/data/shared.py` and `streaming.py`
(where texts come from), `loaders/tokenizer.py` (tokens), `core/builders/base.py` (warmup).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexigraft.files import read_settings
from lexigraft.importing import common
from lexigraft.importing.translation import Tool, Translation

NAMES = common.Names(
    rank="lora_r",
    alpha="lora_alpha",
    dropout="lora_dropout",
    rslora="peft_use_rslora",
    targets="lora_target_modules",
    saved="lora_modules_to_save",
    block_size="sequence_len",
    batch_size="micro_batch_size",
    epochs="num_epochs",
    schedule="lr_scheduler",
    optimizer="optimizer",
)
_LORA = "plain LoRA, of one rank and alpha, or full training"

TOOL = Tool(
    name="Axolotl",
    version="0.19.0",
    base="base_model",
    pretraining="`datasets` of `type: completion`, or `pretraining_dataset`",
    defaults={
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "weight_decay": 0.0,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "seed": 42,
    },
    left_out={
        common.NO_CHATS:
            "chat_template chat_template_jinja chat_template_kwargs default_system_message "
            "eot_tokens train_on_inputs role_boundaries",
        common.PACKED:
            "sample_packing* multipack_real_batches pad_to_sequence_len pad_to_multiple_of "
            "batch_flattening group_by_length excess_length_strategy min_sample_len "
            "streaming* pretrain_multipack* pretraining_sample_concatenation "
            "curriculum_sampling eval_sample_packing",
        common.ORDER:
            "shuffle_*",
        common.READING:
            "tokenizer_use_fast tokenizer_legacy tokenizer_type tokenizer_save_jinja_files "
            "tokenizer_use_mistral_common",
        "config.json says what the model is":
            "model_type type_of_model cls_model_config is_*",
        common.NO_CODE:
            "trust_remote_code",
        "each document is read as often as it stands there":
            "dataset_exact_deduplication",
        common.HELD_OUT:
            "val_set_size",
        "rows are a multiple of graft.pad_to, and start as graft.init says":
            "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings "
            "fix_untrained_tokens embeddings_skip_upcast",
        common.PATIENCE:
            "early_stopping_patience",
        "new rows train in mode lora, whatever ids are listed":
            "peft_trainable_token_indices peft_ensure_weight_tying",
        common.VARIANTS:
            "peft_use_dora peft_init_lora_weights peft peft_layers* lora_fan_in_fan_out "
            "loraplus_*",
        common.PLAIN:
            "neftune_noise_alpha noisy_embedding_alpha lr_groups lr_quadratic_warmup "
            "lr_scheduler_kwargs cosine_constant_lr_ratio lr_div_factor jagged_restart_* "
            "grokfast_* optim_args",
        common.SAVING:
            "output_dir save_* saves_per_epoch eval_* evals_per_epoch evaluation_strategy "
            "logging_steps load_best_model_at_end metric_for_best_model greater_is_better "
            "hub_* hf_use_auth_token push_dataset_to_hub use_wandb wandb_* use_mlflow "
            "mlflow_* hf_mlflow_log_artifacts use_comet comet_* use_trackio trackio_* "
            "use_otel_metrics otel_* use_swanlab swanlab_* use_tensorboard profiler_* "
            "include_tokens_per_second include_tkps generate_samples generation_* "
            "num_generation_samples do_causal_lm_eval do_bench_eval bench_* lm_eval_* "
            "gradio_* axolotl_config_path resume_from_checkpoint auto_resume_from_checkpoints "
            "dynamic_checkpoint loss_watchdog_* merge_lora merge_method strict "
            "dataset_prepared_path num_dataset_shards_to_save is_preprocess "
            "preprocess_iterable total_num_tokens total_supervised_tokens llmcompressor",
        common.DEVICES:
            "deepspeed deepcompile fsdp* ddp* device device_map world_size local_rank dp_* "
            "sequence_parallel_degree context_parallel_size tensor_parallel_size "
            "heads_k_stride ring_attn_func use_ray ray_* resources_per_worker "
            "accelerator_config expert_parallel_*",
        common.SPEED:
            "attn_implementation flash_* sdp_attention flex_* xformers_attention "
            "sage_attention eager_attention sdpa_varlen fused_attn_kernel "
            "large_head_attention gemma4_* s2_attention experts_implementation expert_backend "
            "moe_* use_scattermoe use_sonicmoe use_kernels use_dsv4_kernels "
            "use_glm_dsa_kernels dsv4_* dense_mixer ple_cpu_offload liger_* cut_cross_entropy "
            "chunked_cross_entropy* tiled_mlp* llama4_linearized_experts torch_compile* "
            "torch_empty_cache_steps gc_* tf32 gradient_checkpointing_kwargs "
            "selective_checkpointing activation_offloading layer_offloading lora_mlp_kernel "
            "lora_qkv_kernel lora_o_kernel lora_embedding_kernel lora_on_cpu "
            "low_cpu_mem_usage max_memory gpu_memory_limit dataloader_* dataset_processes "
            "dataset_num_proc dataset_keep_in_memory remove_unused_columns "
            "auto_find_batch_size qlora_sharded_model_loading peft_autocast_adapter_dtype "
            "experimental_skip_move_to_device bnb_config_kwargs quantize_moe_experts "
            "fp32_norm*",
        "it says nothing without `rl`, or without the keys of the plugin":
            "trl vllm plugins",
        "AdamW is the optimizer":
            "adam_epsilon2 adam_beta3 dion_* qgalore_* torchdistx_path optim_target_modules",
    },
    stops={
        common.KIND:
            "reward_model process_reward_model center_rewards_coefficient ebft kd_* diffusion "
            "num_labels dpo_* precompute_ref_log_probs rl_beta orpo_alpha simpo_gamma "
            "cpo_alpha kto_* rpo_alpha max_prompt_len nemo_gym_* hatchery trainer_cls "
            "use_eaft eaft_* qat quantization use_pose pose_* scaling_softmax* image_* "
            "processor_* freeze_mm_modules",
        common.MODEL:
            "base_model_config model_config overrides_of_model_config model_kwargs "
            "overrides_of_model_kwargs lora_model_dir reinit_weights peft_layer_replication "
            "use_onebitllms gptq model_quantization_config* rope_scaling "
            "max_packed_sequence_len",
        _LORA:
            "lora_target_parameters lora_rank_pattern lora_alpha_pattern unfrozen_parameters "
            "relora* lisa_* spectrum_* use_mora mora* fp8* nonexpert_quantization nvfp4_*",
        "whole data sets, each document as often as it stands there":
            "dataset_shard_num dataset_shard_idx skip_prepare_dataset",
    },
)  # fmt: skip
_TEXT_TYPES = ("completion", "pretrain")
_FORMATS = ("json", "text", "csv", "parquet")
# Of an entry of `datasets` or `pretraining_dataset`.
_ENTRY = (
    "path", "name", "split", "type", "field", "text_column", "data_files", "ds_type",
    "preprocess_shards", "trust_remote_code",
)  # fmt: skip


def translate(t: Translation) -> None:
    """Take a configuration apart.

    Raises:
        RefusalError: it trains on chats, instructions or preferences.
    """
    if method := t.take("rl"):
        raise t.refuse_kind(f"rl: {method}")
    texts = _datasets(t, "pretraining_dataset")[:1] or _datasets(t, "datasets")
    t.leave_given("datasets", "pretraining_dataset is read instead, as there")
    t.model(t.take("base_model"), t.take("revision_of_model") or t.take("model_revision"))
    _tokenizer(t)
    _texts(t, texts, "corpus")
    if tests := _datasets(t, "test_datasets"):
        _texts(t, tests, "eval")
    listed = _tokens(t)
    mode = _mode(t)
    _batch(t)
    common.method(t, NAMES, mode, listed)
    if t.take("lora_target_linear"):
        t.mapped("lora_target_linear", True, "train.mode: lora", "every linear layer but the head")
    common.loop(t, NAMES)
    _new_rows(t, mode)
    _dtype(t, mode)
    checkpointing = t.take("gradient_checkpointing")
    if checkpointing:
        t.stage["gradient_checkpointing"] = True
        note = "" if checkpointing is True else "without offloading"
        t.mapped("gradient_checkpointing", checkpointing, "train.gradient_checkpointing", note)


def _datasets(t: Translation, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The entries of a list of data sets that is one of plain texts, each with its place."""
    given = t.take(key)
    entries = given if isinstance(given, list) else [given] if given is not None else []
    found: list[tuple[str, Mapping[str, Any]]] = []
    for number, value in enumerate(entries):
        entry = {"path": value} if isinstance(value, str) else value
        if not isinstance(entry, dict):
            t.fault(f"{key}[{number}]: {value}", f"{key}: entries with a `path`")
            continue
        kind = entry.get("type", "pretrain" if key == "pretraining_dataset" else None)
        if kind not in _TEXT_TYPES:
            raise t.refuse_kind(f"{key}[{number}].type: {'none' if kind is None else kind}")
        found.append((f"{key}[{number}]", entry))
    if key == "pretraining_dataset" and len(found) > 1:
        t.leave(key, f"{len(found) - 1} more", f"{t.tool.name} {t.tool.version} reads the first")
    return found


def _texts(t: Translation, entries: list[tuple[str, Mapping[str, Any]]], place: str) -> None:
    specs = [spec for where, entry in entries for spec in _specs(t, where, entry) if spec]
    if place == "eval":
        t.recipe["eval"] = {"corpus": specs}
        t.texts_read(specs, "test_datasets", f"{len(specs)} texts", "eval.corpus")
        return
    if not entries:
        t.fault("no datasets", t.tool.pretraining)
    t.recipe["corpus"] = specs
    key = entries[0][0].partition("[")[0] if entries else "datasets"
    t.texts_read(specs, key, f"{len(specs)} texts", "corpus")


def _specs(t: Translation, where: str, entry: Mapping[str, Any]) -> list[str | None]:
    """The specs of one entry; an unknown or unusable key of it is a fault."""
    for key, value in entry.items():
        if key not in _ENTRY and value:
            t.fault(f"{where}.{key}: {value}", f"{where} with no key but {', '.join(_ENTRY)}")
    path, column = entry.get("path"), entry.get("field") or entry.get("text_column") or "text"
    if not isinstance(path, str):
        t.fault(f"{where} has no path", f"{where}.path: a file, a folder or a data set of the hub")
        return []
    files = entry.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    if files and path not in _FORMATS and not Path(path).is_dir():
        t.fault(
            f"{where}.data_files of {path}", f"{where}: whole data sets of the hub, or files here"
        )
        return []
    names = entry.get("name")
    configs = names if isinstance(names, list) else [names]
    return [
        t.text(place, column, key=where, config=config, split=entry.get("split"))
        for place in files or [path]
        for config in configs
    ]


def _tokenizer(t: Translation) -> None:
    tokenizer, base = t.take("tokenizer_config"), t.recipe.get("base")
    if tokenizer is None or base is None:
        return
    if tokenizer in (base, str(base).partition("@")[0]) or t.relative(str(tokenizer)) == base:
        t.mapped("tokenizer_config", tokenizer, "base", "the base's own tokenizer")
    else:
        t.fault(
            f"tokenizer_config: {tokenizer}",
            "the base's own tokenizer; one that is extended already goes with it through "
            "lexigraft graft BASE VOCAB -o MODEL",
        )


def _tokens(t: Translation) -> bool:
    """Tokens that it adds; True if there are some."""
    listed = common.words(t, "tokens", t.take("tokens"))
    overrides = t.take("added_tokens_overrides")
    if isinstance(overrides, dict):
        t.leave(
            "added_tokens_overrides", ", ".join(map(str, overrides)), "they get new ids, not these"
        )
        listed |= common.words(t, "added_tokens_overrides", list(overrides.values()), special=True)
    special = t.take("special_tokens")
    if not isinstance(special, dict):
        return listed
    more = special.get("additional_special_tokens")
    listed |= common.words(t, "special_tokens.additional_special_tokens", more, special=True)
    own = _own_special(t)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value, key = special.get(name), f"special_tokens.{name}"
        if not value:
            continue
        if name == "pad_token" or value == own.get(name):
            t.leave(key, value, "nothing is padded" if name == "pad_token" else "the base's own")
        else:
            t.fault(
                f"{key}: {value}",
                f"the base's own {name}: set it in tokenizer_config.json of a copy of the base, or "
                "leave the key out if it is that already",
            )
    return listed


def _own_special(t: Translation) -> dict[str, Any]:
    """Special tokens of a base that is a folder here."""
    folder = t.home / str(t.recipe.get("base", ""))
    own = read_settings(folder / "tokenizer_config.json")
    return {
        k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in own.items()
    }


def _mode(t: Translation) -> str:
    adapter = t.take("adapter")
    if adapter is None:
        t.mapped("adapter", "none", "train.mode: full")
        return "full"
    if adapter not in ("lora", "qlora"):
        t.fault(f"adapter: {adapter}", "adapter: lora or qlora, or none for full training")
    if adapter == "qlora" and not t.rest.get("load_in_4bit"):
        t.fault("adapter: qlora without load_in_4bit", "load_in_4bit: true")
    t.mapped("adapter", adapter, "train.mode: lora")
    return "lora"


def _batch(t: Translation) -> None:
    """`batch_size`, of all accumulated batches, where nothing says how many there are."""
    whole = t.number("batch_size", None, int, least=1)
    if whole is None:
        return
    if t.rest.get("gradient_accumulation_steps"):
        t.leave("batch_size", whole, "gradient_accumulation_steps decides, as there")
        return
    one = t.rest.get("micro_batch_size") or 1
    t.rest["gradient_accumulation_steps"] = max(1, whole // int(one))
    t.mapped("batch_size", whole, "train.gradient_accumulation")


def _new_rows(t: Translation, mode: str) -> None:
    """The rate of the rows; in full training of all of them there, of the new ones here."""
    key, body = "embedding_lr_scale", t.stage.get("learning_rate")
    scale = t.number(key, None)
    if scale and body:
        rate = scale * body
        t.leave_given("embedding_lr", "embedding_lr_scale decides, as there")
    else:
        key = "embedding_lr"
        rate = t.number(key, None)
    if rate is None:
        t.beyond("rate of new rows", "train.new_row_learning_rate", "by mode and size")
        return
    t.stage["new_row_learning_rate"] = rate
    t.mapped(key, rate, "train.new_row_learning_rate", "of the new rows")
    if mode == "full" and body:
        t.stage["old_row_scale"] = round(rate / body, 6)


def _dtype(t: Translation, mode: str) -> None:
    """The type of the weights: `resolve_dtype` of Axolotl, without asking a GPU."""
    given = {key: value for key in ("load_in_4bit", "load_in_8bit", "bf16", "bfloat16", "fp16",
             "float16", "float32") if (value := t.take(key))}  # fmt: skip
    bf16 = given.setdefault("bf16", "auto")
    if "load_in_4bit" in given:
        dtype = "nf4"
    elif "load_in_8bit" in given:
        dtype = "int8"
    elif bf16 != "auto" or "bfloat16" in given:
        dtype = "bfloat16"
    elif "fp16" in given or "float16" in given:
        dtype = "float16" if mode == "lora" else "float32"
    else:
        dtype = "float32" if "float32" in given else "auto"
    t.stage["dtype"] = dtype
    for key, value in given.items():
        half = dtype == "float32" and key in ("fp16", "float16")
        note = "weights that train cannot be float16" if half else ""
        t.mapped(key, value, f"train.dtype: {dtype}", note)
