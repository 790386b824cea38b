"""A checkpoint folder as a transformers model: no pickle, and no remote code unless trusted."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft.checkpoints.architectures import vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.console import working
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import token_text
from lexigraft.files import read_object

if TYPE_CHECKING:
    from lexigraft.families import Family

FLOATS = ("float32", "bfloat16", "float16")
QUANTISED = ("int8", "nf4")
_LOAD_FAULTS = (OSError, ValueError, KeyError, RuntimeError, ImportError)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No notices and no progress bars of transformers inside the block; errors still raise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def device() -> str:
    """Where models run: `cuda` if there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@working("loading the model")
def load_model(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    labels: int | None = None,
) -> Any:
    """The causal language model in `folder`, which may see images too, frozen and in eval mode.

    Args:
        labels: make it a classifier of so many labels instead, whose head is random where the
            folder has none.
        dtype: of its weights, by name; without it float32 on a CPU, which computes fastest in it,
            and the stored one on a GPU. `int8` and `nf4` store the linear layers of the body in 8
            or 4 bits (bitsandbytes; Dettmers et al. 2022, arXiv 2208.07339, and 2023, arXiv
            2305.14314); embedding and head keep their type.
        trust_remote_code: run the Python files that the folder brings for its architecture.

    Raises:
        LexigraftError: files are missing, damaged or of an unknown architecture, or bitsandbytes
            is not installed where it is asked for.
        RefusalError: the folder needs code of its own, which was not allowed to run; or the model
            tells of no tokens.
    """
    import torch
    import transformers

    Checkpoint.open(folder)  # no pickle, and no index that names files of other folders
    if not trust_remote_code:
        _refuse_remote_code(folder)
    place = device()
    used: Any = (torch.float32 if place == "cpu" else "auto") if dtype is None else dtype
    more: dict[str, Any] = {}
    if dtype in QUANTISED:
        used = torch.float32 if place == "cpu" else torch.bfloat16
        more = _quantised(dtype, used)
    loader: Any = getattr(transformers, reading_class(folder) or "AutoModelForCausalLM")
    if labels is not None:
        loader = transformers.AutoModelForSequenceClassification
        more = {**more, "num_labels": labels}
    try:
        with quiet_transformers():
            model = loader.from_pretrained(
                folder,
                dtype=used,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,  # never a pickle that lies beside another .safetensors
                **more,
            )
    except _LOAD_FAULTS as fault:
        kind = "a causal language model" if labels is None else "a classifier"
        raise _not_loaded(folder, fault, kind) from None
    if labels is None and model.get_output_embeddings() is None:
        raise RefusalError(
            f"{folder}: transformers finds no head over tokens in a {type(model).__name__}",
            needed="a language model, with or without images, that tells what comes next",
            fix="choose another model",
        )
    return (model if dtype in QUANTISED else model.to(place)).eval().requires_grad_(False)


def text_part(model: Any) -> Any:
    """What of a language model reads text: all of it, or the decoder in one that sees images too.

    That decoder's head may stand outside of it.
    """
    config = model.config
    return model if config.get_text_config() is config else model.get_decoder()


def reading_class(folder: Path) -> str | None:
    """The auto class of transformers for a model that tells of each token what comes next.

    A causal language model, also one that sees images beside its text; None for any other. Where
    the config does not say, or names code of its own, it is taken for one.
    """
    from transformers.models.auto import modeling_auto as auto

    config = read_object(folder / "config.json")
    named = {str(name) for name in config.get("architectures") or []}
    if config.get("is_encoder_decoder"):
        return None
    if not named or "auto_map" in config or named & _listed(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return "AutoModelForCausalLM"
    # A nested language model: what stands beside it, such as Pix2Struct, joins two models.
    seeing = named & _listed(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return "AutoModelForImageTextToText" if seeing and "text_config" in config else None


def _listed(names: Mapping[str, Any]) -> set[str]:
    """The classes of a table of transformers, which has one or several per type."""
    return {n for some in names.values() for n in ([some] if isinstance(some, str) else some)}


def _not_loaded(folder: Path, fault: Exception, kind: str) -> LexigraftError:
    first = str(fault).strip().splitlines()[0] if str(fault).strip() else ""
    return LexigraftError(
        f"transformers cannot load {folder} ({type(fault).__name__}: {first})",
        needed=f"{kind} of an architecture that transformers ships",
        fix=f"lexigraft check {folder}",
    )


def absent_weights(folder: Path, labels: int) -> list[str]:
    """Weights that a classifier has and `folder` has not: transformers makes them at random.

    No weight is read.

    Args:
        folder: a model of any class.
        labels: how many the classifier has.

    Raises:
        LexigraftError: transformers cannot load it, or has no classifier of this architecture.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_transformers():
            _, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=labels,
                local_files_only=True,
                device_map="meta",
                output_loading_info=True,
            )
    except _LOAD_FAULTS as fault:
        raise _not_loaded(folder, fault, "a classifier") from None
    return sorted(found["missing_keys"])


def require_packages(dtype: str) -> None:
    """Raise where what computes with weights of this type is not installed.

    Raises:
        LexigraftError: bitsandbytes is missing.
    """
    if dtype in QUANTISED and importlib.util.find_spec("bitsandbytes") is None:
        raise LexigraftError(
            f"--dtype {dtype} without bitsandbytes",
            needed="the package that computes with such weights",
            fix="pip install 'lexigraft[quantised]'",
        )


def _quantised(dtype: str, computed: Any) -> dict[str, Any]:
    """How transformers is told to store linear layers in few bits, and where."""
    import torch
    from transformers import BitsAndBytesConfig

    require_packages(dtype)
    place = "cpu" if device() == "cpu" else torch.cuda.current_device()
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if dtype == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computed,
        )
    )
    return {"quantization_config": config, "device_map": {"": place}}


def _refuse_remote_code(folder: Path) -> None:
    """Stop where only code from the folder itself knows the architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_object(folder / "config.json")
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise RefusalError(
            f"{folder} needs code of its own to load (auto_map in config.json)",
            needed="an architecture that transformers ships, or leave to run that code",
            fix="read the .py files in the folder, then add --trust-remote-code",
        )


def require_row(folder: Path, model: Any, family: Family, token_id: int) -> None:
    """Raise, before the model meets it, if a text holds an id that the model has no row for.

    Raises:
        LexigraftError: it does; the id is named with its text.
    """
    require_rows(folder, model.get_input_embeddings().weight.shape[0], family, token_id)


def require_rows(folder: Path, rows: int, family: Family, token_id: int) -> None:
    """`require_row`, of a model of which only the number of rows is known."""
    if token_id >= rows:
        raise LexigraftError(
            f"the text holds {family.map.texts.get(token_id)!r} (token id {token_id}), "
            f"the model has {rows:,} rows: its tokenizer was extended, its weights were not",
            needed="a row for every id of the tokenizer",
            fix=f"lexigraft graft BASE {folder} -o MODEL (BASE is this model before its tokenizer "
            "was extended)",
        )


def rows_on_disk(folder: Path) -> int | None:
    """Rows of the vocabulary tensors, by the headers of the files; None where they do not tell."""
    try:
        return vocabulary_of(Checkpoint.open(folder)).rows
    except LexigraftError:  # an architecture that transformers may still load, or explain
        return None


def text_config(folder: Path) -> dict[str, Any]:
    """What the config in `folder` says of its language model, which may be one part of several."""
    config = read_object(folder / "config.json")
    return {**config, **config.get("text_config", {})}


def context_limit(model: Any) -> int:
    """The most tokens that the positions of a model, or of the config in a folder, allow."""
    if isinstance(model, Path):
        stored = text_config(model)  # the older kinds, GPT-2 among them, have a name of their own
        found = stored.get("max_position_embeddings") or stored.get("n_positions")
    else:
        found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found or 2**20)


def start_and_end(family: Family) -> tuple[list[int], int | None]:
    """What stands before a document, and the id that ends one, if the files name any.

    The start is what the tokenizer's own template adds (bos), else the end-of-text token.

    Raises:
        LexigraftError: neither is known, so that a first token could not be predicted.
    """
    end = _end_id(family.folder, family.map.ids)
    start = family.start_ids() or ([] if end is None else [end])
    if not start:
        raise LexigraftError(
            f"{family.folder}: the tokenizer names neither bos nor eos",
            needed="a token that stands before a text",
            fix='add "eos_token" to tokenizer_config.json',
        )
    return start, end


def _end_id(folder: Path, ids: dict[str, int]) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            text = token_text(read_object(folder / name).get("eos_token"))
            if text in ids:
                return ids[text]
    if not (folder / "config.json").is_file():
        return None
    declared = read_object(folder / "config.json").get("eos_token_id")
    first = declared[0] if isinstance(declared, list) and declared else declared
    return first if isinstance(first, int) else None
