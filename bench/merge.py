"""Time `lexigraft merge` against PEFT and Axolotl's per-shard algorithm, and tell who is right.

    python bench/merge.py                                  # 1.7 GB and the origin case: an hour
    python bench/merge.py --sizes smoke --forms lora rows --repeat 1 --results /tmp/merge.md

Timing: a random bf16 Llama, untied, of 32,000 rows in 4 shards, and an adapter that was trained on
33,296: LoRA r=16 on the 7 linear layers of each block, embedding and head saved whole. Each job is
a child process of its own, in a temporary folder that is deleted afterwards; the peak is that of
its largest process. PEFT is given the right resize, without which it stops.

Correctness: every form of adapter on tiny models, {tied, untied} x {padded, not} x {grafted,
un-grafted base}. A result is right if its logits are those of base and adapter, unmerged, on the
model that was trained. The forms come from tests/adapter_parts.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from graft import BASE_TOKENS, MAKE, NEW_TOKENS, TOKENIZER, Timing, run_once, write_index
from machine import machine

RESULTS = Path(__file__).parent / "results" / "merge.md"
TESTS = Path(__file__).parents[1] / "tests"
PACKAGES = ("numpy", "torch", "transformers", "peft", "safetensors")
# hidden, ffn, layers; the last is Llama 2's width at few layers
SIZES = {"smoke": (256, 512, 4), "1.7": (2048, 5632, 16), "origin": (4096, 11008, 4)}
TOKENS = BASE_TOKENS + NEW_TOKENS

ADAPTER = """
import json, sys
from pathlib import Path
import numpy as np, ml_dtypes
from lexigraft.checkpoints.plan import Compute, Plan, PlannedFile, PlannedTensor
from lexigraft.checkpoints.write import write_plan

folder, (hidden, ffn, layers, rows) = Path(sys.argv[1]), map(int, sys.argv[2:6])
rng = np.random.default_rng(1)

def random(name, dtype, kind, scale, *shape):
    count, size = int(np.prod(shape)), np.dtype(kind).itemsize
    def blocks():
        for start in range(0, count, 2**22):
            block = rng.standard_normal(min(2**22, count - start), np.float32) * np.float32(scale)
            yield block.astype(kind)
    name = "base_model.model." + name
    return PlannedTensor(name, dtype, shape, (Compute(size * count, blocks),))

kv, shapes = hidden // 4, {}
for name, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
    shapes[f"self_attn.{name}_proj"] = (out, hidden)
shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
shapes["mlp.down_proj"] = (hidden, ffn)
tensors = []
for i in range(layers):
    for name, (out, width) in shapes.items():
        module = f"model.layers.{i}.{name}"
        tensors.append(random(f"{module}.lora_A.weight", "F32", np.float32, 0.05, 16, width))
        tensors.append(random(f"{module}.lora_B.weight", "F32", np.float32, 0.05, out, 16))
for name in ("model.embed_tokens.weight", "lm_head.weight"):
    tensors.append(random(name, "BF16", ml_dtypes.bfloat16, 0.02, rows, hidden))
file = PlannedFile("adapter_model.safetensors", tuple(tensors), {"format": "pt"})
write_plan(Plan((file,), None, {}), folder, threads=1)
config = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "bias": "none",
    "target_modules": [name.split(".")[1] for name in shapes], "inference_mode": True,
    "modules_to_save": ["embed_tokens", "lm_head"], "base_model_name_or_path": None,
}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.resize_token_embeddings(int(sys.argv[4]), mean_resizing=False)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""

# What axolotl/cli/utils/lora_merge.py does (its pull request 3095): each shard is loaded whole,
# LoRA is added to what it holds, plain weights of the adapter replace it, and it is saved. Names
# that the base lacks and forms other than these two are not looked at.
PER_SHARD = """
import json, shutil, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

base, folder, out = map(Path, sys.argv[1:4])
config = json.loads((folder / "adapter_config.json").read_text())
adapter = load_file(folder / "adapter_model.safetensors")
scale = config.get("lora_alpha", 0) / (config.get("r") or 1)
out.mkdir()
rows = None
for path in sorted(base.glob("*.safetensors")):
    shard = load_file(path)
    for name, weight in shard.items():
        key = "base_model.model." + name.removesuffix(".weight")
        a, b = adapter.get(key + ".lora_A.weight"), adapter.get(key + ".lora_B.weight")
        if key + ".weight" in adapter:
            weight = adapter[key + ".weight"].to(weight.dtype)
            rows = len(weight) if "embed" in name else rows
        elif a is not None and b is not None:
            change = scale * (b.float() @ a.float())
            weight = (weight.float() + change).to(weight.dtype)
        shard[name] = weight.contiguous()
    save_file(shard, out / path.name, metadata={"format": "pt"})
for path in base.iterdir():
    if path.suffix != ".safetensors" and path.is_file():
        shutil.copyfile(path, out / path.name)
if rows:
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, "vocab_size": rows}))
"""

OURS = """
import sys
from lexigraft.steps.merge import merge
merge(sys.argv[1], sys.argv[2], output=sys.argv[3])
"""

COMPARE = """
import sys
from pathlib import Path
import torch
from safetensors import safe_open

def tensors(folder):
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, (path, name)

def read(place):
    with safe_open(place[0], "pt") as file:
        return file.get_tensor(place[1])

one, other = dict(tensors(sys.argv[1])), dict(tensors(sys.argv[2]))
equal = sum(n in other and torch.equal(read(p), read(other[n])) for n, p in one.items())
print(equal, len(one))
"""


def run(command: list[str], output: Path, repeat: int, keep: Path | None = None) -> Timing:
    """Medians of some runs; a further one, not measured, leaves its output at `keep`."""
    all_runs = [run_once(command, output) for _ in range(repeat)]
    if keep is not None:
        subprocess.run(command, check=True, capture_output=True)
        output.rename(keep)
    return Timing(*(statistics.median(getattr(t, k) for t in all_runs) for k in vars(all_runs[0])))


def timings(size: str, repeat: int, folder: Path) -> tuple[list[str], list[str]]:
    """Rows of the table of times and of that of the targets."""
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    python = [sys.executable, "-c"]
    for place, code, rows in ((base, MAKE, BASE_TOKENS), (adapter, ADAPTER, TOKENS)):
        place.mkdir()
        subprocess.run([*python, code, str(place), *map(str, SIZES[size]), str(rows)], check=True)
        subprocess.run([*python, TOKENIZER, str(place), str(rows)], check=True)
    write_index(base)
    gigabytes = sum(path.stat().st_size for path in base.iterdir()) / 1e9
    places = [str(base), str(adapter), str(out)]
    jobs = {
        "PEFT, given the resize": [*python, PEFT, *places, str(TOKENS)],
        "per shard, as Axolotl": [*python, PER_SHARD, *places],
        "lexigraft merge (fsync)": [*python, OURS, *places],
    }
    found, equal = {}, {}
    for name, command in jobs.items():
        kept = folder / name.split(maxsplit=1)[0]
        found[name] = run(command, out, repeat, kept)
        print(f"{gigabytes:.2f} GB  {name}: {found[name].wall:.2f} s", file=sys.stderr)
        compare = [*python, COMPARE, str(folder / "PEFT,"), str(kept)]
        done = subprocess.run(compare, check=True, capture_output=True, text=True)
        equal[name] = " of ".join(done.stdout.split())
    label = f"{gigabytes:.2f} GB" + (", origin" if size == "origin" else "")
    rows = [
        f"| {label} | {name} | {t.wall:.2f} | {t.cpu:.2f} | {t.rss:,.0f} | {equal[name]} |"
        for name, t in found.items()
    ]
    peft, ours = found["PEFT, given the resize"], found["lexigraft merge (fsync)"]
    targets = [
        f"| {label} | lexigraft / PEFT, wall | {ours.wall / peft.wall:.2f} | <= 0.4 at 1.7 GB |",
        f"| {label} | lexigraft / PEFT, CPU | {ours.cpu / peft.cpu:.2f} | |",
        f"| {label} | lexigraft, peak RSS in MB | {ours.rss:,.0f} | <= 500 |",
    ]
    return rows, targets


def cells(forms: list[str]) -> list[dict[str, Any]]:
    """The cells of the table of correctness, each with what every tool made of it."""
    import torch

    sys.path.insert(0, str(TESTS))
    import adapter_parts

    torch.set_num_threads(1)
    found = []
    for form, tied, padded in itertools.product(forms, (True, False), (False, True)):
        with tempfile.TemporaryDirectory() as place:
            scene = adapter_parts.scene(Path(place), form, tied=tied, padded=padded)
            unmerged = adapter_parts.unmerged(scene.grafted, scene.adapter)
            rows = adapter_parts.TOKENS + adapter_parts.ADDED
            expected = adapter_parts.logits(unmerged, rows)
            for ungrafted in (False, True):
                start = scene.start(ungrafted=ungrafted)
                cell = {"form": form, "tied": tied, "padded": padded, "ungrafted": ungrafted}
                for tool in ("PEFT", "per shard", "lexigraft"):
                    cell[tool] = _verdict(tool, start, scene.adapter, Path(place), expected)
                found.append(cell)
    return found


def _verdict(tool: str, base: Path, adapter: Path, place: Path, expected: Any) -> str:
    """right, wrong, stops (an error), or refused: the rows that nobody holds are named."""
    import adapter_parts
    from lexigraft import LexigraftError, merge

    out = place / "result"
    shutil.rmtree(out, ignore_errors=True)
    try:
        if tool == "PEFT":
            _merge_with_peft(base, adapter, out, expected.shape[-1])
        elif tool == "lexigraft":
            merge(base, adapter, output=out)
        else:
            command = [sys.executable, "-c", PER_SHARD, str(base), str(adapter), str(out)]
            subprocess.run(command, check=True, capture_output=True)
        got = adapter_parts.logits(adapter_parts.load(out), expected.shape[-1])
    except LexigraftError as fault:
        return "refused" if "no row of" in fault.found else "stops"
    except Exception:  # whatever a tool says instead of a result
        return "stops"
    return "right" if (got - expected).abs().max() < 1e-4 else "wrong"


def _merge_with_peft(base: Path, adapter: Path, out: Path, rows: int) -> None:
    """As users do it who know the sizes; new rows are what the resize makes them."""
    import torch
    from peft import PeftModel

    import adapter_parts

    model = adapter_parts.load(base)
    torch.manual_seed(0)
    if model.get_input_embeddings().weight.shape[0] < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def correctness(forms: list[str]) -> list[str]:
    """The table of who is right, made in a child process: this one stays small."""
    command = [sys.executable, __file__, "--cells", *forms]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    table = json.loads(done.stdout.splitlines()[-1])
    tools = ("PEFT", "per shard", "lexigraft")
    lines = [
        "| form | " + " | ".join(tools) + " |",
        "|---|" + "---|" * len(tools),
    ]
    for form in forms:
        rows = [cell for cell in table if cell["form"] == form]
        lines.append(f"| {form} | " + " | ".join(_counts(rows, tool) for tool in tools) + " |")
    return [*lines, "| all | " + " | ".join(_counts(table, tool) for tool in tools) + " |"]


def _counts(rows: list[dict[str, Any]], tool: str) -> str:
    counts = Counter(row[tool] for row in rows)
    words = ("right", "refused", "wrong", "stops")
    return ", ".join(f"{counts[word]} {word}" for word in words if counts[word])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Benchmark of lexigraft merge")
    parser.add_argument("--sizes", nargs="*", default=["1.7", "origin"], choices=SIZES)
    parser.add_argument("--forms", nargs="*", help="of adapters; by default all, none for no table")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where to work; by default the system's temporary folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cells", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cells is not None:
        print(json.dumps(cells(options.cells)))
        return
    forms = options.forms
    if forms is None:
        sys.path.insert(0, str(TESTS))
        from adapter_parts import FORMS

        forms = [form for form in FORMS if not form.endswith("-shared")]
    head = machine(PACKAGES, " (CPU seconds are the robust column of a shared machine)")
    rows: list[str] = []
    targets: list[str] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            more, met = timings(size, options.repeat, Path(folder))
        rows, targets = rows + more, targets + met
    text = "\n".join(
        [
            "# Merge against PEFT and a merge per shard",
            "",
            f"`python bench/merge.py --sizes {' '.join(options.sizes)} --repeat {options.repeat}`: "
            f"an adapter of {TOKENS:,} rows (LoRA r=16 on 7 linear layers, embedding and head "
            f"whole) into the un-grafted base of {BASE_TOKENS:,}; random bf16 Llama, untied, 4 "
            "shards. Page cache warm; medians; PEFT and the merge per shard without fsync.",
            "",
            *head,
            "",
            "| base | job | wall s | CPU s | RSS MB | tensors equal to PEFT's |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "| base | ratio | measured | target |",
            "|---|---|---|---|",
            *targets,
            "",
            "Who is right: each form on {tied, untied} x {padded, not} x {grafted, un-grafted}; "
            "refused: rows that no file holds are named, and nothing is written.",
            "",
            *(correctness(forms) if forms else []),
            "",
        ]
    )
    print(text)
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(text)


if __name__ == "__main__":
    main()
