"""Time `lexigraft graft` against `cp -r` and against transformers, side by side in one run.

    python bench/graft.py                       # 0.5, 2 and 8 GB: a quarter of an hour, 20 GB
    python bench/graft.py --sizes 0.5 --repeat 1

Each job runs in a child process of its own, on the same random bf16 Llama checkpoint (32,000 rows
-> 33,296 tokens), in a temporary folder that is deleted afterwards. The largest checkpoints are not
given to transformers (`--peers-up-to`), which needs their size in memory. Prints a Markdown table
and writes it, with the machine, to bench/results/graft.md.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import machine

# This process stays small: Linux counts a parent's memory into its children's peak.
RESULTS = Path(__file__).parent / "results" / "graft.md"
BASE_TOKENS, NEW_TOKENS = 32_000, 1_296
PACKAGES = ("numpy", "torch", "transformers", "safetensors", "tokenizers")
LLAMAS = {"0.5": (1024, 2816, 16), "2": (2048, 5632, 19), "8": (4096, 11008, 19)}

MAKE = """
import json, sys
from pathlib import Path
import numpy as np, ml_dtypes
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.plan import Compute, Plan, PlannedFile, PlannedTensor
from lexigraft.checkpoints.write import write_plan

folder, (hidden, ffn, layers, rows) = Path(sys.argv[1]), map(int, sys.argv[2:6])
rng = np.random.default_rng(0)

def random(name, *shape):
    count = int(np.prod(shape))
    def blocks():
        for start in range(0, count, 2**22):
            block = rng.standard_normal(min(2**22, count - start), np.float32) * np.float32(0.02)
            yield block.astype(ml_dtypes.bfloat16)
    return PlannedTensor(name, "BF16", shape, (Compute(2 * count, blocks),))

kv = hidden // 4
shards = [[random("model.embed_tokens.weight", rows, hidden)], [], [], []]
for i in range(layers):
    name = f"model.layers.{i}."
    shards[i * 4 // layers] += [
        random(name + "self_attn.q_proj.weight", hidden, hidden),
        random(name + "self_attn.k_proj.weight", kv, hidden),
        random(name + "self_attn.v_proj.weight", kv, hidden),
        random(name + "self_attn.o_proj.weight", hidden, hidden),
        random(name + "mlp.gate_proj.weight", ffn, hidden),
        random(name + "mlp.up_proj.weight", ffn, hidden),
        random(name + "mlp.down_proj.weight", hidden, ffn),
        random(name + "input_layernorm.weight", hidden),
        random(name + "post_attention_layernorm.weight", hidden),
    ]
shards[3] += [random("model.norm.weight", hidden), random("lm_head.weight", rows, hidden)]
files = tuple(
    PlannedFile(f"model-{i:05}-of-00004.safetensors", tuple(tensors), {"format": "pt"})
    for i, tensors in enumerate(shards, 1)
)
write_plan(Plan(files, None, {}), folder, threads=1)
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows,
    "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
    "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
}
(folder / "config.json").write_text(json.dumps(config))
"""

TOKENIZER = """
import json, sys
from itertools import islice, product
from pathlib import Path
from lexigraft.families.tokenmap import BYTE_TO_CHARACTER

letters = "abcdefghijklmnopqrstuvwxyz"
pairs = [(a, b) for a, b in product(letters, repeat=2)]
triples = [(a + b, c) for (a, b), c in product(pairs, letters)]
quads = ((a + b, c + d) for (a, b), (c, d) in product(pairs, repeat=2))
tokens = int(sys.argv[2])
merges = [*pairs, *triples, *islice(quads, tokens - 256 - len(pairs) - len(triples))]
vocab = {t: i for i, t in enumerate([*BYTE_TO_CHARACTER.values(), *map("".join, merges)])}
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
content = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges]},
}
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
(folder / "tokenizer.json").write_text(json.dumps(content))
(folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
"""

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.resize_token_embeddings(int(sys.argv[3]), mean_resizing=sys.argv[4] == "True")
model.save_pretrained(sys.argv[2])
"""

GRAFT = """
import sys
from lexigraft.steps.graft import graft
graft(sys.argv[1], sys.argv[2], output=sys.argv[3], pad_to=1, link="link" in sys.argv)
"""


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats of one job."""

    wall: float
    cpu: float
    rss: float
    written: float


def run_once(command: list[str], output: Path) -> Timing:
    """One child process; what it wrote to `output` is measured and deleted."""
    os.sync()  # the disk starts idle
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        errors = child.stderr.read() if child.stderr else b""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if child.returncode:
        sys.exit(errors.decode())
    files = [path for path in output.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
    shutil.rmtree(output)
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return Timing(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / scale, written / 1e6)


def run(command: list[str], output: Path, repeat: int) -> Timing:
    """Medians of `repeat` runs."""
    all_runs = [run_once(command, output) for _ in range(repeat)]
    return Timing(*(statistics.median(getattr(t, k) for t in all_runs) for k in vars(all_runs[0])))


def measure(
    size: str, repeat: int, folder: Path, *, peers: bool
) -> tuple[list[str], list[str], float]:
    """Rows of both tables for one checkpoint size, and the peak memory of graft in MB."""
    base, vocab, out = folder / "base", folder / "vocab", folder / "out"
    base.mkdir()
    python = [sys.executable, "-c"]
    subprocess.run(
        [*python, MAKE, str(base), *map(str, LLAMAS[size]), str(BASE_TOKENS)], check=True
    )
    write_index(base)
    for place, tokens in ((base, BASE_TOKENS), (vocab, BASE_TOKENS + NEW_TOKENS)):
        subprocess.run([*python, TOKENIZER, str(place), str(tokens)], check=True)
    gigabytes = sum(path.stat().st_size for path in base.iterdir()) / 1e9
    copy = f"cp -r {shlex.quote(str(base))} {shlex.quote(str(out))}"
    resize = [*python, TRANSFORMERS, str(base), str(out), str(BASE_TOKENS + NEW_TOKENS)]
    ours = [*python, GRAFT, str(base), str(vocab), str(out)]
    jobs = {
        "cp -r": (["sh", "-c", copy], repeat),
        "cp -r, fsync": (["sh", "-c", f"{copy} && sync {shlex.quote(str(out))}/*"], repeat),
        "lexigraft graft (fsync)": (ours, repeat),
        "lexigraft graft --link (fsync)": ([*ours, "link"], repeat),
    }
    if peers:
        jobs["transformers, mean_resizing=False"] = ([*resize, "False"], max(1, repeat // 3))
        jobs["transformers, mean_resizing=True"] = ([*resize, "True"], 1)
    found: dict[str, Timing] = {}
    for name, (command, times) in jobs.items():
        found[name] = run(command, out, times)
        print(f"{gigabytes:.2f} GB  {name}: {found[name].wall:.2f} s", file=sys.stderr)
    limit = found["cp -r, fsync"].wall
    rows = [
        f"| {gigabytes:.2f} GB | {name} | {t.wall:.2f} | {t.cpu:.2f} | {t.rss:,.0f} | "
        f"{t.written:,.0f} | {t.wall / limit:.2f} |"
        for name, t in found.items()
    ]
    vocabulary, neighbours = vocabulary_megabytes(base, size)
    shutil.rmtree(base)
    lines = ratios(f"{gigabytes:.2f} GB", found, vocabulary, neighbours)
    return rows, lines, found["lexigraft graft (fsync)"].rss


def vocabulary_megabytes(base: Path, size: str) -> tuple[float, float]:
    """Size of both grown vocabulary tensors, and of what lies in the same files as they do."""
    row = 2 * LLAMAS[size][0] / 1e6
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    files = {index[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    held = sum((base / name).stat().st_size for name in files) / 1e6
    return 2 * row * (BASE_TOKENS + NEW_TOKENS), held - 2 * row * BASE_TOKENS


def ratios(size: str, found: dict[str, Timing], vocabulary: float, neighbours: float) -> list[str]:
    """The targets, with what was measured."""
    graft, link = found["lexigraft graft (fsync)"], found["lexigraft graft --link (fsync)"]
    lines = [
        ("graft / (cp -r + fsync), wall", graft.wall / found["cp -r, fsync"].wall, "<= 2"),
        ("graft, peak RSS in MB", graft.rss, "<= 250"),
        ("graft --link (fsync) / cp -r, wall", link.wall / found["cp -r"].wall, "<= 1"),
        ("graft --link / (cp -r + fsync), wall", link.wall / found["cp -r, fsync"].wall, ""),
        (
            "graft --link, MB written beyond the vocabulary tensors",
            link.written - vocabulary,
            f"<= 1, and {neighbours:,.1f} of other tensors in the same files",
        ),
    ]
    peers = {
        "transformers' default": ("True", ">= 40 at 2 GB"),
        "transformers without mean": ("False", ">= 5 at 2 GB"),
    }
    for name, (mean, target) in peers.items():
        peer = found.get(f"transformers, mean_resizing={mean}")
        if peer is not None:
            lines.append((f"{name} / graft, wall", peer.wall / graft.wall, target))
            lines.append((f"{name} / graft, CPU", peer.cpu / graft.cpu, target))
    return [f"| {size} | {name} | {value:.2f} | {target} |" for name, value, target in lines]


def write_index(base: Path) -> None:
    """The index of the shards in `base`."""
    code = (
        "import json, sys; from pathlib import Path; "
        "from lexigraft.checkpoints.header import read_header; f = Path(sys.argv[1]); "
        "h = {p.name: read_header(p).tensors for p in sorted(f.glob('*.safetensors'))}; "
        "json.dump({'metadata': {'total_size': sum(t.bytes for ts in h.values() for t in ts)}, "
        "'weight_map': {t.name: n for n, ts in h.items() for t in ts}}, "
        "(f / 'model.safetensors.index.json').open('w'))"
    )
    subprocess.run([sys.executable, "-c", code, str(base)], check=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Benchmark of lexigraft graft")
    parser.add_argument("--sizes", nargs="+", default=[*LLAMAS], choices=LLAMAS)
    parser.add_argument(
        "--peers-up-to", type=float, default=2, help="GB of the largest checkpoint for transformers"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where to work; by default the system's temporary folder")
    options = parser.parse_args()
    package = importlib.util.find_spec("lexigraft")
    for place in package.submodule_search_locations or () if package else ():
        compileall.compile_dir(place, quiet=1)  # as an installation does
    head = machine(PACKAGES, " (a shared machine: CPU seconds are the robust column)")
    rows: list[str] = []
    targets: list[str] = []
    peaks: list[float] = []
    for size in sorted(options.sizes, key=float):
        peers = float(size) <= options.peers_up_to
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            more, met, peak = measure(size, options.repeat, Path(folder), peers=peers)
        rows, targets, peaks = rows + more, targets + met, [*peaks, peak]
    if len(peaks) > 1:
        growth = peaks[-1] - peaks[0]
        targets.append(f"| all | graft, MB more memory for the largest | {growth:.0f} | < 64 |")
    text = "\n".join(
        [
            "# Graft against cp and transformers",
            "",
            f"`python bench/graft.py --sizes {' '.join(options.sizes)} --repeat {options.repeat}`: "
            f"random bf16 Llama, untied, 4 shards, {BASE_TOKENS:,} rows + {NEW_TOKENS:,} tokens; "
            "the first and the last shard hold a vocabulary tensor and layers. Page cache warm; "
            "medians. transformers loads, resizes and saves, without fsync.",
            "",
            *head,
            "",
            "| checkpoint | job | wall s | CPU s | RSS MB | MB written | wall / (cp + fsync) |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "| checkpoint | ratio | measured | target |",
            "|---|---|---|---|",
            *targets,
            "",
        ]
    )
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
