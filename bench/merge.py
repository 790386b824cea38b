"""Time `lexigraft merge` against PEFT, mergekit and Axolotl, and tell who is right.

    pip install --no-deps mergekit immutables axolotl colorama   # peers that are absent are named
    python bench/merge.py                                  # 1.7 GB and the origin case: an hour
    python bench/merge.py --sizes smoke --repeat 1 --results /tmp/merge.md

Timing: a random bf16 Llama, untied, of 32,000 rows in 4 shards, and an adapter that was trained on
33,296: LoRA r=16 on the 7 linear layers of each block, embedding and head saved whole. Each job is
a child process of its own, in a temporary folder that is deleted afterwards; the peak is that of
its largest process. PEFT is given the right resize and mergekit the base with the new rows already
in it, without which they stop.

Correctness: 12 cases on tiny models, in `merge_cases.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from graft import BASE_TOKENS, MAKE, NEW_TOKENS, TOKENIZER, Timing, run_once, write_index
from machine import machine

RESULTS = Path(__file__).parent / "results" / "merge.md"
CASES = Path(__file__).parent / "merge_cases.py"
PACKAGES = ("numpy", "torch", "transformers", "peft", "safetensors")
PEERS = ("mergekit", "axolotl")
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

# A recipe that names BASE+ADAPTER: mergekit loads the base as it is, so that it needs the grafted.
MERGEKIT = """
import shutil, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, adapter, out = sys.argv[1:4]
recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
shutil.rmtree(out + "-cache", ignore_errors=True)
options = MergeOptions(lora_merge_cache=out + "-cache", quiet=True)
run_merge(MergeConfiguration.model_validate({**recipe, "dtype": "bfloat16"}), out, options)
"""

# What `axolotl merge-lora` calls by default.
AXOLOTL = """
import sys
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
merge_lora_sharded_efficient(*sys.argv[1:4])
"""

GRAFT_BEFORE = """
import sys
from lexigraft.steps.graft import graft
graft(sys.argv[1], sys.argv[2], output=sys.argv[3], init="mean", pad_to=1)
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
    jobs = {"PEFT, given the resize": [*python, PEFT, *places, str(TOKENS)]}
    if installed("mergekit"):
        grafted = str(folder / "grafted")
        subprocess.run([*python, GRAFT_BEFORE, *places[:2], grafted], check=True)
        jobs["mergekit, given the grafted base"] = [*python, MERGEKIT, grafted, *places[1:]]
    if installed("axolotl"):
        jobs["Axolotl, per shard"] = [*python, AXOLOTL, *places]
    jobs["lexigraft merge (fsync)"] = [*python, OURS, *places]
    found, equal, peft_s = {}, {}, folder / "peft"
    for name, command in jobs.items():
        kept = folder / "kept" if equal else peft_s
        found[name] = run(command, out, repeat, kept)
        print(f"{gigabytes:.2f} GB  {name}: {found[name].wall:.2f} s", file=sys.stderr)
        compare = [*python, COMPARE, str(peft_s), str(kept)]
        done = subprocess.run(compare, check=True, capture_output=True, text=True)
        equal[name] = " of ".join(done.stdout.split())
        if kept != peft_s:
            shutil.rmtree(kept)
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


def installed(peer: str) -> bool:
    """True where a peer can be imported."""
    return importlib.util.find_spec(peer) is not None


def correctness() -> list[str]:
    """The table of who is right, made in a child process: this one stays small."""
    done = subprocess.run([sys.executable, CASES], check=True, stdout=subprocess.PIPE, text=True)
    table = json.loads(done.stdout)
    tools = [name for name in table[0] if name not in ("case", "said")]
    counts = [str(sum(row[tool] == "right" for row in table)) for tool in tools]
    return [
        "| case | " + " | ".join(tools) + " |",
        "|---|" + "---|" * len(tools),
        *(f"| {row['case']} | " + " | ".join(row[tool] for tool in tools) + " |" for row in table),
        f"| right, of {len(table)} | " + " | ".join(counts) + " |",
        "",
        *(f"- {row['case']}: {tool}: {t}" for row in table for tool, t in row["said"].items()),
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Benchmark of lexigraft merge")
    parser.add_argument("--sizes", nargs="*", default=["1.7", "origin"], choices=SIZES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where to work; by default the system's temporary folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    packages = (*PACKAGES, *filter(installed, PEERS))
    head = machine(packages, " (CPU seconds are the robust column of a shared machine)")
    rows: list[str] = []
    targets: list[str] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            more, met = timings(size, options.repeat, Path(folder))
        rows, targets = rows + more, targets + met
    text = "\n".join(
        [
            "# Merge against PEFT, mergekit and Axolotl",
            "",
            f"`python bench/merge.py --sizes {' '.join(options.sizes)} --repeat {options.repeat}`: "
            f"an adapter of {TOKENS:,} rows (LoRA r=16 on 7 linear layers, embedding and head "
            f"whole) into the un-grafted base of {BASE_TOKENS:,}; random bf16 Llama, untied, 4 "
            "shards. Page cache warm; medians; the others without fsync.",
            *(f"{peer} is not installed, and left out." for peer in PEERS if not installed(peer)),
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
            "Who is right: logits of the result beside those of base + adapter, unmerged, on a "
            "text with new words in the ids of the adapter's tokenizer. Stale tokenizer: the "
            "result's own gives other ids. Refused: the reason is named and nothing is written; in "
            "the last case lexigraft's names --remap, with which it is right.",
            "",
            *correctness(),
            "",
        ]
    )
    print(text)
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(text)


if __name__ == "__main__":
    main()
