"""Time `lexigraft extract` against mergekit's extract-lora, and measure both errors, in one run.

    pip install --no-deps mergekit immutables                       # in an environment of its own
    python bench/extract.py                                         # 2 GB: an hour
    python bench/extract.py --sizes smoke --repeat 1 --results /tmp/extract.md

The base is a random bf16 Llama of 32,000 rows in 4 shards, untied and tied. The fine-tune has seven
tokens more; each weight of its linear layers differs by a matrix whose singular values fall as 1/k,
as those of a real fine-tune do, rounded to bf16. Each job is a child process of its own. The error
is that of the adapter as stored: the Frobenius norm of (tuned - base) - B A over that of
tuned - base, per layer. Without mergekit its formula runs instead, as its 0.1.5 states it
(extract_lora.py): one exact SVD per matrix, sqrt(S) in both factors, embedding and head whole.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from graft import BASE_TOKENS, MAKE, TOKENIZER, write_index
from machine import machine
from merge import installed, run

RESULTS = Path(__file__).parent / "results" / "extract.md"
PACKAGES = ("numpy", "torch", "transformers", "safetensors", "mergekit")
# hidden, ffn, layers
SIZES = {"smoke": (256, 512, 4), "0.5": (1024, 2816, 16), "2": (2048, 5632, 16)}
NEW_TOKENS = 7

TIE = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file

base = Path(sys.argv[1])
path = max(base.glob("*.safetensors"))
shard = load_file(path)
del shard["lm_head.weight"]
save_file(shard, path, metadata={"format": "pt"})
config = json.loads((base / "config.json").read_text())
(base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
"""

TUNE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

base, tuned, new = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(1)
for path in sorted(base.glob("*.safetensors")):
    shard = load_file(path)
    for name, weight in shard.items():
        if weight.shape[0] == 32000:
            shard[name] = torch.cat([weight, torch.randn(new, weight.shape[1]).bfloat16() * 0.02])
        elif weight.dim() == 2:
            rank = 64
            falling = 1 / torch.arange(1, rank + 1)
            left, right = (torch.randn(n, rank) / n**0.5 for n in weight.shape)
            change = (left * falling) @ right.T
            change *= 0.1 * weight.float().norm() / change.norm()
            shard[name] = (weight.float() + change).bfloat16()
    save_file(shard, tuned / path.name, metadata={"format": "pt"})
config = json.loads((base / "config.json").read_text())
(tuned / "config.json").write_text(json.dumps({**config, "vocab_size": 32000 + new}))
"""

MERGEKIT = """
import sys
from mergekit.scripts.extract_lora import main
tuned, base, out, rank = sys.argv[1:5]
main(["--model", tuned, "--base-model", base, "--out-path", out, "--max-rank", rank])
"""

FORMULA = """
import json, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file

tuned, base, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
places = {n: p for p in sorted(base.glob("*.safetensors")) for n in safe_open(p, "pt").keys()}
found = {}
for name, path in places.items():
    with safe_open(path, "pt") as one, safe_open(tuned / path.name, "pt") as other:
        old, new = one.get_tensor(name), other.get_tensor(name)
    key = "base_model.model." + name.removesuffix(".weight")
    if len(old) == 32000:
        found[key + ".weight"] = new
    elif old.dim() == 2:
        u, s, v = torch.linalg.svd(new.float() - old.float(), full_matrices=False)
        root = s[:rank].sqrt()
        found[key + ".lora_A.weight"] = (root[:, None] * v[:rank]).to(old.dtype).contiguous()
        found[key + ".lora_B.weight"] = (u[:, :rank] * root).to(old.dtype).contiguous()
out.mkdir()
save_file(found, out / "adapter_model.safetensors", metadata={"format": "pt"})
(out / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank}))
"""

OURS = """
import sys
from lexigraft.steps.extract import extract
extract(sys.argv[1], base=sys.argv[2], output=sys.argv[3], rank=int(sys.argv[4]))
"""

ERRORS = """
import json, sys
from pathlib import Path
import torch
from safetensors import safe_open

tuned, base, adapter = map(Path, sys.argv[1:4])
file = safe_open(adapter / "adapter_model.safetensors", "pt")
config = json.loads((adapter / "adapter_config.json").read_text())
scaling = config["lora_alpha"] / config["r"]
errors = []
for path in sorted(base.glob("*.safetensors")):
    one, other = safe_open(path, "pt"), safe_open(tuned / path.name, "pt")
    for name in one.keys():
        key = "base_model.model." + name.removesuffix(".weight")
        if key + ".lora_A.weight" not in file.keys():
            continue
        change = other.get_tensor(name).float() - one.get_tensor(name).float()
        a, b = (file.get_tensor(f"{key}.lora_{x}.weight").float() for x in "AB")
        errors.append(float((change - scaling * b @ a).norm() / change.norm()))
print(json.dumps([sorted(errors)[len(errors) // 2], max(errors), len(errors)]))
"""


def measured(size: str, rank: int, repeat: int, folder: Path, *, tied: bool) -> list[str]:
    """Rows of the table."""
    base, tuned, out = folder / "base", folder / "tuned", folder / "out"
    python = [sys.executable, "-c"]
    for place in (base, tuned):
        place.mkdir()
    subprocess.run([*python, MAKE, str(base), *map(str, SIZES[size]), str(BASE_TOKENS)], check=True)
    if tied:
        subprocess.run([*python, TIE, str(base)], check=True)
    subprocess.run([*python, TUNE, str(base), str(tuned), str(NEW_TOKENS)], check=True)
    for place, tokens in ((base, BASE_TOKENS), (tuned, BASE_TOKENS + NEW_TOKENS)):
        write_index(place)
        subprocess.run([*python, TOKENIZER, str(place), str(tokens)], check=True)
    gigabytes = sum(path.stat().st_size for path in base.iterdir()) / 1e9
    known = installed("mergekit")
    peer = ("mergekit extract-lora", MERGEKIT) if known else ("mergekit's formula", FORMULA)
    label = f"{gigabytes:.2f} GB, {'tied' if tied else 'untied'}"
    rows = []
    for name, code in (peer, ("lexigraft extract (fsync)", OURS)):
        command = [*python, code, str(tuned), str(base), str(out), str(rank)]
        kept = folder / name.split(maxsplit=1)[0]
        timing = run(command, out, repeat, kept)
        told = subprocess.run(
            [*python, ERRORS, str(tuned), str(base), str(kept)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        middle, most, layers = json.loads(told.splitlines()[-1])
        megabytes = (kept / "adapter_model.safetensors").stat().st_size / 1e6
        rows.append(
            f"| {label} | {name} | {timing.wall:.1f} | {timing.cpu:.1f} | "
            f"{timing.rss:,.0f} | {megabytes:,.1f} | {middle:.4f} | {most:.4f} | {layers} |"
        )
        print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Benchmark of lexigraft extract")
    parser.add_argument("--sizes", nargs="*", default=["2"], choices=SIZES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where to work; by default the system's temporary folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    head = machine(PACKAGES, " (CPU seconds are the robust column of a shared machine)")
    rows = []
    for size, tied in itertools.product(options.sizes, (False, True)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measured(size, options.rank, options.repeat, Path(folder), tied=tied)
    text = "\n".join(
        [
            "# Extracting an adapter, beside mergekit",
            "",
            f"`python bench/extract.py --sizes {' '.join(options.sizes)} --rank {options.rank} "
            f"--repeat {options.repeat}`: a fine-tune with {NEW_TOKENS} added tokens of a random "
            "bf16 Llama; changes whose singular values fall as 1/k. Medians; errors are relative "
            "Frobenius norms of what LoRA leaves of a layer's change.",
            "",
            *head,
            "",
            "| base | job | wall s | CPU s | RSS MB | adapter MB | error, median | most | layers |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(text)


if __name__ == "__main__":
    main()
