"""What both tools have: options of transformers' Trainer and of PEFT, under other keys."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

from lexigraft.importing.translation import Translation

# transformers' SchedulerType and Axolotl's RexLR and one_cycle -> ours, and what is different.
_SCHEDULES = {
    "cosine": ("cosine", "falls to 10% of the peak here, to 0 there"),
    "cosine_with_min_lr": ("cosine", "falls to 10% of the peak"),
    "cosine_warmup_with_min_lr": ("cosine", "falls to 10% of the peak, after a linear warmup"),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "warmup_stable_decay": ("wsd", "falls in the last 20% of the steps here"),
}
# Optimizers whose step is AdamW's: names of transformers' OptimizerNames.
_ADAMW = ("adamw_", "paged_adamw_")
_VOCABULARY = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
# Reasons for which keys are left out, or stop an import.
NO_CHATS = "no chats are read, and a chat template of the base stays as it is"
PACKED = "texts are always packed into blocks that see nothing of each other, and streamed"
ORDER = "documents are read in an order that depends on their content and the seed"
HELD_OUT = "5% of the documents, chosen by their content, are held out"
READING = "the tokenizer is read as its files say"
NO_CODE = "a run never executes a model folder's own code"
PATIENCE = "`train.patience` counts measurements, `train.measurements` says how many"
VARIANTS = "LoRA here has no further variants"
PLAIN = "training is without noise and smoothing, with one rate for the body"
SAVING = "`train` measures, saves and reports in its own way"
DEVICES = "how processes are started decides it: accelerate launch -m lexigraft train"
SPEED = "speed or memory, not what is learned"
KIND = "continued pretraining of the language model, no other kind of training"
MODEL = "the base as it is: another model, adapter or shape of it is made beforehand"
_NOT_IN_FULL = "LoRA is off, as everything trains"


@dataclass(frozen=True)
class Names:
    """The keys of one tool."""

    rank: str
    alpha: str
    dropout: str
    rslora: str
    targets: str
    saved: str
    block_size: str
    batch_size: str
    epochs: str
    schedule: str
    optimizer: str


def method(t: Translation, keys: Names, mode: str, tokens_listed: bool) -> None:
    """Full training or LoRA, and what of the vocabulary trains."""
    t.stage["mode"] = mode
    saved, targets = t.take(keys.saved), t.take(keys.targets)
    lora = f"{keys.rank} {keys.alpha} {keys.dropout} {keys.rslora}"
    if mode == "full":
        t.stage.update(old_rows="slow", old_row_scale=1.0)
        t.beyond("all rows", "train.old_rows: slow, old_row_scale: 1.0", "train at the body's rate")
        for key, value in ((keys.saved, saved), (keys.targets, targets)):
            if value is not None:
                t.leave(key, value, _NOT_IN_FULL)
        t.leave_given(lora, _NOT_IN_FULL)
        return
    rank = t.number(keys.rank, "lora_rank", int, least=1)
    alpha = t.number(keys.alpha, None, least=0)
    if rank is None or alpha is None:
        t.fault(f"no {keys.rank} or {keys.alpha}", f"{keys.rank} and {keys.alpha}, for LoRA")
    else:
        _scale(t, keys, rank, alpha)
    t.leave_given(keys.dropout, "LoRA has no dropout here")
    _modules(t, keys.targets, targets)
    _modules(t, keys.saved, saved)
    if saved is not None or tokens_listed:
        t.beyond("old rows", "train.mode: lora", "stay as they are; new rows train, tied or not")


def _scale(t: Translation, keys: Names, rank: int, alpha: float) -> None:
    if t.take(keys.rslora):
        t.stage["lora_alpha"] = round(alpha * math.sqrt(rank), 6)
        t.mapped(
            keys.rslora, True, "train.lora_alpha", "alpha x sqrt(r), over r: the scale of rsLoRA"
        )
    else:
        t.stage["lora_alpha"] = alpha
    t.mapped(keys.alpha, alpha, "train.lora_alpha")


def _modules(t: Translation, key: str, value: Any) -> None:
    """Modules that LoRA goes on, or that train whole."""
    if value is None:
        return
    named = names(value)
    rows = [name for name in named if name.rpartition(".")[2] in _VOCABULARY]
    others = [name for name in named if name not in rows]
    if rows:
        t.mapped(key, ",".join(rows), "train.mode: lora", "of the vocabulary, the new rows train")
    if others in (["all"], ["all-linear"]):
        t.mapped(key, "all", "train.mode: lora", "every linear layer but the head")
    elif others:
        t.leave(key, ",".join(others), "LoRA goes on every linear layer but the head, nothing else")


def loop(t: Translation, keys: Names) -> None:
    """Block, batch, steps, rates."""
    t.number(keys.block_size, "block_size", int, least=8)
    t.number(
        keys.batch_size, "batch_size", int, "of each process: times the devices, as there", least=1
    )
    t.number("gradient_accumulation_steps", "gradient_accumulation", int, least=1)
    t.number("learning_rate", "learning_rate", note="of the body")
    t.number("weight_decay", "weight_decay", note="of the body's matrices, never of rows")
    steps = _length(t, keys.epochs)
    _schedule(t, keys.schedule)
    _warmup(t, steps)
    _optimizer(t, keys.optimizer)
    seed = t.number("seed", None, int)
    if seed is not None:
        t.recipe["seed"] = seed
        t.mapped("seed", seed, "seed", "other libraries draw other numbers from it")


def _length(t: Translation, epochs_key: str) -> int | None:
    """How long it trains; the number of steps where it is known."""
    if t.rest.get("max_steps") in (-1, "-1"):
        t.take("max_steps")
    steps: int | None = t.number("max_steps", "max_steps", int, least=1)
    if steps is not None:
        t.leave_given(epochs_key, "max_steps decides, as there")
        return steps
    epochs = t.number(epochs_key, None)
    if epochs is None:
        return None
    if epochs < 1 or epochs != int(epochs):
        t.fault(f"{epochs_key}: {epochs:g}", f"{epochs_key}: a whole number, or max_steps")
        return None
    t.stage["passes"] = int(epochs)
    t.mapped(epochs_key, epochs, "train.passes")
    return None


def _schedule(t: Translation, key: str) -> None:
    given = t.take(key)
    name = str(given if given is not None else t.defaults[key])
    ours, note = _SCHEDULES.get(name, (None, ""))
    floor = t.take("cosine_min_lr_ratio")
    if ours is None:
        t.leave(key, name, "no such schedule here: cosine, which falls to 10% of the peak")
    else:
        t.stage["schedule"] = ours
        t.mapped(key, name, "train.schedule", note)
    if floor is not None:
        t.leave("cosine_min_lr_ratio", floor, "cosine falls to 0.1 of the peak")
    if name == "constant":  # transformers' has no warmup, whatever is asked
        t.leave_given("warmup_steps warmup_ratio", "constant has no warmup")
        t.stage["warmup"] = 0.0


def _warmup(t: Translation, steps: int | None) -> None:
    if "warmup" in t.stage:
        return
    count = t.number("warmup_steps", None)
    if count is None:
        share = t.number("warmup_ratio", "warmup")
    elif 0 < count < 1:  # a share, in transformers 5
        share = t.stage["warmup"] = count
        t.mapped("warmup_steps", count, "train.warmup")
    elif count == 0 or steps is not None:
        share = t.stage["warmup"] = round(count / steps, 6) if steps else 0.0
        t.mapped("warmup_steps", count, "train.warmup", "a share of the steps")
    else:
        t.leave(
            "warmup_steps",
            count,
            "a share of the steps here, and how many there are is not known: 5%; set train.warmup",
        )
        share = None
    if share is not None and share >= 1:
        t.fault(f"a warmup over {share:g} of the steps", "a warmup shorter than the training")
    t.leave_given("warmup_ratio", "warmup_steps decides, as there")


def _optimizer(t: Translation, key: str) -> None:
    name = t.take(key)
    if name is not None:
        name = str(name)
        if not name.startswith(_ADAMW):
            t.fault(f"{key}: {name}", f"{key}: adamw_torch, with a learning rate for it")
        else:
            t.mapped(key, name, "AdamW", "states in float32" if "bit" in name else "")
    for name, ours in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8),
                       ("max_grad_norm", 1.0)):  # fmt: skip
        value = t.number(name, None)
        if value is not None and value != ours:
            t.leave(name, value, f"{ours:g} here")


def names(value: Any) -> list[str]:
    """A list, or a text with commas between, as a list."""
    return [str(v).strip() for v in (value.split(",") if isinstance(value, str) else value or [])]


def words(t: Translation, key: str, listed: Any, *, special: bool = False) -> bool:
    """Listed tokens as pinned words or as new special tokens; True if there are some."""
    found = names(listed)
    marks = [token for token in found if special or not _is_word(token)]
    pins = [token for token in found if token not in marks]
    if pins:
        t.lists.setdefault("pin", []).extend(pins)
        note = "as words of the vocabulary, not found inside other words"
        t.mapped(key, f"{len(pins)} words", "learn.pin", note)
    if marks:
        t.lists.setdefault("special", []).extend(marks)
        note = "" if special else "skip_special_tokens leaves them out of decoded text"
        t.mapped(key, f"{len(marks)} marks", "learn.special", note)
    return bool(found)


def _is_word(token: str) -> bool:
    """True for letters and numbers of any script, with spaces, hyphens and apostrophes between."""
    kinds = {"'" if c in " -'’" else unicodedata.category(c)[0] for c in token}
    return bool(kinds & {"L", "N"}) and kinds <= {"L", "M", "N", "'"}
