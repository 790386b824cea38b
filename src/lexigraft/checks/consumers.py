"""What a program that is to load a folder will refuse or garble (`--for`).

Each rule names the function of that program that it was read from, in the table of codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lexigraft.checks.adapters import adapter_rows
from lexigraft.checks.facts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.checks.weights import stated_rows
from lexigraft.errors import LexigraftError

CONSUMERS = ("gguf", "vllm", "transformers-4", "tgi")
# The two factors of a LoRA on a layer, as servers know them.
_FACTOR = re.compile(r"\.lora_[AB]\.weight$")
_EMBEDDING_FACTOR = re.compile(r"\.lora_embedding_[AB]$")
_COPY = re.compile(r"\.base_layer\.weight$")
VLLM_RANK = 16  # LoRAConfig.max_lora_rank
VLLM_ROWS = 258_048
VLLM_BLOCK = 64  # DEFAULT_VOCAB_PADDING_SIZE
# Classes that transformers 5 writes into tokenizer_config.json and 4 does not have.
NEW_CLASSES = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")
# transformers 4.57: rope_theta of the classes whose default is not 10,000.
THETA = {
    **dict.fromkeys(("bitnet", "blt", "csm", "ernie4_5", "ernie4_5_moe", "evolla"), 5e5),
    **dict.fromkeys(("flex_olmo", "llama4_text"), 5e5),
    **dict.fromkeys(("falcon_h1", "helium", "kyutai_speech_to_text"), 1e5),
    **dict.fromkeys(("gemma3_text", "gemma3n_text", "lfm2", "minimax", "mixtral", "phimoe"), 1e6),
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), 1e6),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), 1.6e5),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text"), 5e6),
    **dict.fromkeys(("fuyu", "persimmon"), 2.5e4),
    "apertus": 1.2e7,
    "gpt_oss": 1.5e5,
    "longcat_flash": 1e7,
    "smollm3": 2e6,
}


def consumer_findings(
    consumer: str, model: Facts | None, origin: Facts | None, part: Facts
) -> Iterator[Finding]:
    """What `consumer` will not do with `part`: `model` itself, or an adapter to be used on it.

    Raises:
        LexigraftError: no such consumer, or the gguf package is not installed.
    """
    if consumer not in CONSUMERS:
        raise LexigraftError(
            f"--for {consumer}",
            needed=f"one of {', '.join(CONSUMERS)}",
            fix=f"--for {CONSUMERS[0]}",
        )
    if part is model:
        yield from _of_model(consumer, part, origin)
    else:
        yield from _of_adapter(consumer, model, part)


def _of_model(consumer: str, model: Facts, origin: Facts | None) -> Iterator[Finding]:
    if consumer == "gguf" and model.gguf is None:
        from lexigraft.checks.conversion import conversion_findings  # a child process, and numpy

        yield from conversion_findings(model, origin)
    elif consumer == "vllm":
        yield from _vllm_rows(model)
    elif consumer == "tgi":
        yield from _tgi_tokenizer(model)
    elif consumer == "transformers-4":
        yield from _transformers_4(model)


def _of_adapter(consumer: str, model: Facts | None, adapter: Facts) -> Iterator[Finding]:
    if consumer == "gguf":
        what = "convert_lora_to_gguf.py stops"
        yield from _beyond_factors("LG914", adapter, what, embeddings=True, copies=True)
    elif consumer == "vllm":
        yield from _vllm_adapter(model, adapter)
    elif consumer == "tgi":
        yield from _beyond_factors("LG942", adapter, "TGI leaves it out and only warns")


def _beyond_factors(
    code: str,
    adapter: Facts,
    what: str,
    *,
    embeddings: bool = False,
    copies: bool = False,
) -> Iterator[Finding]:
    """Tensors of an adapter besides the LoRA factors that a program takes."""
    strange = [
        name
        for name in adapter.adapter
        if not _FACTOR.search(name)
        and not (embeddings and _EMBEDDING_FACTOR.search(name))
        and not (copies and _COPY.search(name))
    ]
    if strange:
        yield finding(
            code,
            ADAPTER_WEIGHTS,
            f"holds {strange[0]}"
            + (f" and {len(strange) - 1} others" if len(strange) > 1 else "")
            + f" beside LoRA factors: {what}",
            needed="LoRA factors alone; rows of the vocabulary belong into the model",
            fix=_way_out(adapter),
        )


def _way_out(adapter: Facts) -> str:
    """LoRA beside a base that holds the rest; DoRA has to be merged."""
    if adapter.config.get(ADAPTER_CONFIG, {}).get("use_dora"):
        return f"lexigraft merge BASE {adapter.folder} -o MERGED, and serve MERGED"
    return f"lexigraft split BASE {adapter.folder} -o PAIR, and serve its base and adapter"


def _vllm_rows(model: Facts) -> Iterator[Finding]:
    if model.rows is not None and model.rows % VLLM_BLOCK:
        yield finding(
            "LG924",
            "weights",
            f"have {model.rows:,} rows, no multiple of {VLLM_BLOCK}: versions before 0.7 stop "
            "where the model is spread over several GPUs",
        )


def _vllm_adapter(model: Facts | None, adapter: Facts) -> Iterator[Finding]:
    if ADAPTER_CONFIG not in adapter.config:
        return
    config = adapter.config[ADAPTER_CONFIG]
    refused = _refused_by_vllm(config)
    if refused:
        yield finding(
            "LG921",
            ADAPTER_CONFIG,
            f"has {refused}: vLLM refuses such an adapter",
            needed="LoRA alone, without modules_to_save, DoRA and bias",
            fix=_way_out(adapter),
        )
    else:
        yield from _beyond_factors(
            "LG921", adapter, "vLLM ends in `unsupported LoRA weight`", embeddings=True
        )
    rank = config.get("r")
    if isinstance(rank, int) and rank > VLLM_RANK:
        yield finding(
            "LG922",
            ADAPTER_CONFIG,
            f"has rank {rank}, vLLM takes {VLLM_RANK} unless it is told otherwise",
            needed=f"--max-lora-rank {rank} or more",
            fix=f"vllm serve MODEL --enable-lora --max-lora-rank {_rank_option(rank)}",
        )
    rows = max((model and model.rows) or 0, adapter_rows(adapter).rows)
    if rows > VLLM_ROWS:
        yield finding(
            "LG923",
            "weights",
            f"have {rows:,} rows, vLLM serves adapters on at most {VLLM_ROWS:,}",
            needed="a merged model",
            fix=f"lexigraft merge BASE {adapter.folder} -o MERGED, and serve MERGED",
        )


def _refused_by_vllm(config: dict[str, Any]) -> str | None:
    if config.get("modules_to_save"):
        return "modules_to_save"
    if config.get("use_dora"):
        return "use_dora"
    return "bias" if config.get("bias") not in (None, "none") else None


def _rank_option(rank: int) -> int:
    """The least value that --max-lora-rank offers for a rank."""
    return next((size for size in (16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def _tgi_tokenizer(model: Facts) -> Iterator[Finding]:
    if model.maps and "tokenizer.json" not in model.maps:
        yield finding(
            "LG941",
            "tokenizer",
            "has no tokenizer.json: the router warns `Could not find a fast tokenizer "
            "implementation` and no longer limits and truncates long prompts",
            needed="tokenizer.json beside the other files",
            fix='python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained(r'{model.folder}').save_pretrained('NEW')\"",
        )


def _transformers_4(model: Facts) -> Iterator[Finding]:
    settings = model.config.get("tokenizer_config.json", {})
    where = model.folder / "tokenizer_config.json"
    kind = settings.get("tokenizer_class")
    if kind in NEW_CLASSES:
        yield finding(
            "LG931",
            "tokenizer_config.json",
            f"says tokenizer_class = {kind}, a class of transformers 5",
            needed="PreTrainedTokenizerFast, which both know",
            fix=f"set tokenizer_class to PreTrainedTokenizerFast in {where}",
        )
    if isinstance(settings.get("extra_special_tokens"), list):
        yield finding(
            "LG932",
            "tokenizer_config.json",
            "has extra_special_tokens as a list, transformers 4 reads a map from names to tokens",
            needed="additional_special_tokens, which both know",
            fix=f"rename the key extra_special_tokens to additional_special_tokens in {where}",
        )
    yield from _rotary(model)
    config = model.config.get("config.json", {})
    if isinstance(config.get("dtype"), str) and "torch_dtype" not in config:
        yield finding(
            "LG934",
            "config.json",
            f"has dtype = {config['dtype']} and no torch_dtype: versions before 4.56 load the "
            "model in float32",
        )


def _rotary(model: Facts) -> Iterator[Finding]:
    """`rope_parameters` is of transformers 5; 4 reads `rope_theta` and `rope_scaling`."""
    config = model.config.get("config.json", {})
    parts = {"": config, **{key: config[key] for key in _parts(config)}}
    for path, part in parts.items():
        rotary = part.get("rope_parameters")
        if not isinstance(rotary, dict) or "rope_theta" in part:
            continue
        theta = rotary.get("rope_theta")
        usual = THETA.get(str(part.get("model_type")), 1e4)
        scaled = rotary.get("rope_type", "default") != "default" and "rope_scaling" not in part
        if scaled or (isinstance(theta, int | float) and theta != usual):
            key = f"{path}.rope_parameters" if path else "rope_parameters"
            said = f"rope_type = {rotary.get('rope_type')}" if scaled else f"rope_theta = {theta:,}"
            yield finding(
                "LG933",
                "config.json",
                f"has {said} in {key} alone: transformers 4 does not read it and computes "
                f"positions with rope_theta = {usual:,.0f}",
                needed="rope_theta and rope_scaling beside it",
                fix=f"copy rope_theta (and rope_scaling, if scaled) out of {key} in "
                f"{model.folder / 'config.json'}",
            )
            return


def _parts(config: dict[str, Any]) -> list[str]:
    """Keys of the parts of a composite model that have a text."""
    return [path.rsplit(".", 1)[0] for path in stated_rows(config) if path.count(".") == 1]
