"""What bench/comparison.py has other tools do.

By themselves where they can be installed, else written here after the file and version that each
function names.

    python bench/peers.py JOB ARGUMENTS...      # jobs that bench/comparison.py runs as processes
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


# --- merging --------------------------------------------------------------------------------------


def medicalgpt_merge(base: Path, adapter: Path, out: Path) -> None:
    """After MedicalGPT's tools/merge_peft_adapter.py at 2f1008c, given both flags that it needs.

    `--resize_emb` makes the rows as many as the tokenizer has tokens, whichever are more, and
    `--tokenizer_path` is the adapter's folder.
    """
    tokenizer, model = _tokenizer(adapter), _model(base)
    if model.get_input_embeddings().weight.shape[0] != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    model = _with_adapter(model, adapter)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, out / name)


def chinese_llama_merge(base: Path, adapter: Path, out: Path) -> None:
    """After Chinese-LLaMA-Alpaca's scripts/merge_llama_with_chinese_lora.py at 11e5d1f.

    In the type of the base instead of float16, so that rounding decides nothing.
    """
    import torch

    tokenizer, model = _tokenizer(adapter), _model(base)
    if model.get_input_embeddings().weight.shape[0] != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    first = model.model.layers[0].self_attn.q_proj.weight
    before = first.detach().clone()
    model = _with_adapter(model, adapter)
    after = model.model.layers[0].self_attn.q_proj.weight
    if torch.allclose(before, after):
        raise AssertionError("the first query weight did not change")
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def llamafactory_merge(base: Path, adapter: Path, out: Path) -> None:
    """LLaMA-Factory itself: tokens repeated as `add_tokens`, then what `export` loads and saves.

    The two lines of `export_model` (train/tuner.py) that save are here, because its module imports
    torchaudio.
    """
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    import torch
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    arguments: dict[str, Any] = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "finetuning_type": "lora",
        "template": "default",
        "infer_dtype": "float32",
        "export_dir": str(out),
    }
    if words := _words(base, adapter):
        arguments.update(add_tokens=",".join(words), resize_vocab=True)
    torch.manual_seed(0)  # of the rows that it adds
    model_args, _, finetuning_args, _ = get_infer_args(arguments)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    model = load_model(tokenizer, model_args, finetuning_args)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _words(base: Path, adapter: Path) -> list[str]:
    """The tokens that an adapter's tokenizer has beyond the base's, by id."""
    from lexigraft.families import TokenMap

    known, found = TokenMap.read(base).ids, TokenMap.read(adapter).texts
    return [found[i] for i in sorted(found) if found[i] not in known]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)  # of the rows that a resize adds
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


# --- starts of new rows ---------------------------------------------------------------------------


def resized_rows(base: Path, tokens: int, *, mean_resizing: bool) -> Any:
    """transformers' `resize_token_embeddings`: rows (N, D) of the new tokens.

    Axolotl passes `mean_resizing_embeddings`, which is off (utils/schemas/config.py, 0.19.0);
    MedicalGPT and PEFT's users take the default, which is on.
    """
    model = _model(base)
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(tokens, mean_resizing=mean_resizing)
    return model.get_input_embeddings().weight.detach()[before:].float()


def llamafactory_rows(base: Path, tokens: int) -> Any:
    """LLaMA-Factory's `noise_init`: its own function where it is installed."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    import torch
    from llamafactory.model.model_utils.embedding import _noisy_mean_initialization

    old = _model(base).get_input_embeddings().weight.detach().float()
    table = torch.cat([old, torch.zeros(tokens - len(old), old.shape[1])])
    torch.manual_seed(0)
    _noisy_mean_initialization(table, tokens - len(old))
    return table[len(old) :]


def unsloth_rows(base: Path, tokens: int) -> Any:
    """After unsloth_zoo's tokenizer_utils.py, `add_new_tokens(method="mean")`, 2026.10.9.

    Each row is the mean of all trained rows: those that are not zero throughout.
    """
    old = _model(base).get_input_embeddings().weight.detach().float()
    trained = old[(old.amax(1) > 1e-16) | (old.amin(1) < -1e-16)]
    return trained.mean(0).expand(tokens - len(old), -1).clone()


# --- tokens ---------------------------------------------------------------------------------------


def added_tokens(base: str, words: str, output: str) -> None:
    """A list of words as added tokens: what LLaMA-Factory, Axolotl and Unsloth do with one.

    `tokenizer.add_tokens(words)`: model/patcher.py (0.9.5), loaders/tokenizer.py (0.19.0) and
    tokenizer_utils.py (2026.10.9).
    """
    tokenizer = _tokenizer(Path(base))
    tokenizer.add_tokens(Path(words).read_text("utf-8").splitlines())
    tokenizer.save_pretrained(output)


def tokenizer_extension(base: str, learning: str, tokens: str, output: str) -> None:
    """After tokenizer-extension's train_vocab_extension.py (05d4296) and extension.py (24381cd).

    Continued BPE over the base's tokens of each pre-token, by count and then by the pair; with
    `keep_added_token_positions`. Its lists of words per pair are kept whole here: a pair whose
    words were dropped too early makes no difference to its counts.
    """
    from tokenizers import Tokenizer

    path, wanted = Path(base) / "tokenizer.json", int(tokens)
    engine = Tokenizer.from_file(str(path))
    words = Counter[tuple[str, ...]]()
    for line in Path(learning).read_text("utf-8").split("\n"):
        if engine.normalizer is not None:
            line = engine.normalizer.normalize_str(line)  # noqa: PLW2901
        for piece, _ in engine.pre_tokenizer.pre_tokenize_str(line):
            words[tuple(token.value for token in engine.model.tokenize(piece))] += 1
    data = json.loads(path.read_text("utf-8"))
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    known = {*vocabulary, *(token["content"] for token in data["added_tokens"])}
    first = 1 + max([*vocabulary.values(), *(token["id"] for token in data["added_tokens"])])
    listed = {tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges}
    spaced = bool(merges) and isinstance(merges[0], str)
    added = 0
    for left, right in _continued(words):
        if left + right not in known:
            if added == wanted:
                break
            known.add(left + right)
            vocabulary[left + right] = first + added
            added += 1
        if (left, right) not in listed:
            merges.append(f"{left} {right}" if spaced else [left, right])
    for token in data["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])
    Path(output).mkdir(parents=True)
    for name in TOKENIZER_FILES[1:]:
        if (Path(base) / name).is_file():
            shutil.copyfile(Path(base) / name, Path(output) / name)
    (Path(output) / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), "utf-8")


def _continued(words: Counter[tuple[str, ...]]) -> Iterable[tuple[str, str]]:
    """The merges of BPE over `words`, most frequent pair first."""
    splits = [list(word) for word in words]
    counts = list(words.values())
    pairs, places = Counter[tuple[str, str]](), defaultdict[tuple[str, str], set[int]](set)
    for place, split in enumerate(splits):
        for pair in pairwise(split):
            pairs[pair] += counts[place]
            places[pair].add(place)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapify(queue)
    while queue:
        count, pair = heappop(queue)
        if -count != pairs.get(pair) or not count:
            continue
        changed = Counter[tuple[str, str]]()
        for place in sorted(places.pop(pair)):
            old = splits[place]
            new = _joined(old, pair)
            splits[place] = new
            for some, sign in ((old, -1), (new, 1)):
                for one in pairwise(some):
                    changed[one] += sign * counts[place]
                    if sign > 0:
                        places[one].add(place)
        for one, change in changed.items():
            if change and one != pair:
                pairs[one] += change
                heappush(queue, (-pairs[one], one))
        del pairs[pair]
        yield pair


def _joined(split: list[str], pair: tuple[str, str]) -> list[str]:
    new: list[str] = []
    for token in split:
        if new and (new[-1], token) == pair:
            new[-1] += token
        else:
            new.append(token)
    return new


def main(job: str, *arguments: str) -> None:
    """Run one job by its name."""
    jobs: tuple[Callable[..., None], ...] = (added_tokens, tokenizer_extension)
    {run.__name__: run for run in jobs}[job](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
