"""`check` on its gallery: what each broken folder should give and gives; and how long it takes.

`python bench/check.py [--quick]` prints a confusion table of all codes (quick: of every tenth
folder), healthy folders with a finding above a note, and the seconds of the origin case and of a
checkpoint of 200 shards, each as a whole command in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import test_check_gallery as gallery
from lexigraft.steps.check import check
from machine import machine

TIMED = """
import sys, time
begin = time.perf_counter()
from lexigraft.steps.check import check
result = check(sys.argv[1], adapter=sys.argv[2] or None)
print(time.perf_counter() - begin, "torch" in sys.modules, *(f.code for f in result.findings))
"""


def confusion(source: Path, place: Path, step: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """(expected, found) codes -> how many folders; and the healthy ones that were accused."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, (codes, make) in list(gallery.BROKEN.items())[::step]:
        found = sorted(f.code for f in make(gallery.Ground(source, place / name)).findings)
        counts[" ".join(sorted(codes)), " ".join(found) or "nothing"] += 1
    accused = []
    for name, make in list(gallery.HEALTHY.items())[::step]:
        result = make(gallery.Ground(source, place / name))
        above = [f.code for f in result.findings if f.severity != "note"]
        counts["healthy", " ".join(above) or "nothing above a note"] += 1
        accused += [f"{name}: {code}" for code in above]
    return counts, accused


def two_hundred_shards(folder: Path, source: Path) -> Path:
    """The tokenizer of the gallery beside 200 shards that are all header."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / "base" / name).read_bytes())
    weight_map: dict[str, str] = {}
    for place in range(200):
        shard = f"model-{place + 1:05d}-of-00200.safetensors"
        tensors = {
            f"model.layers.{place}.mlp.{n}_proj.weight": torch.zeros(2, 2) for n in ("gate", "up")
        }
        if place == 0:
            for name in (gallery.EMBED, gallery.HEAD):
                tensors[name] = torch.zeros(gallery.TOKENS, 2)
        save_file(tensors, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "vocab_size": gallery.TOKENS, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert check(folder).ok
    return folder


def timed(folder: Path, adapter: Path | str, repeats: int) -> str:
    """The best of some runs, imports included, as a line of the table."""
    seconds, told = [], ""
    for _ in range(repeats):
        command = [sys.executable, "-c", TIMED, folder, adapter]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        whole = time.perf_counter() - began
        inside, torch_loaded, *codes = done.stdout.split()
        seconds.append((float(inside), whole))
        told = f"torch imported: {torch_loaded}; {' '.join(codes) or 'no finding'}"
    inside, whole = min(seconds)
    return f"{inside:.2f} s (whole process {whole:.2f} s) | {told}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="every tenth folder, one repeat")
    quick = options.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="lexigraft-bench-") as scratch:
        place = Path(scratch)
        source = gallery.write_gallery(place / "source")
        counts, accused = confusion(source, place / "work", 10 if quick else 1)
        repeats = 1 if quick else 5
        shards = two_hundred_shards(place / "shards", source)
        times = {
            "the origin case": timed(source / "sp", source / "adapter", repeats),
            "200 shards": timed(shards, "", repeats),
        }
    print(
        "\n".join(machine(["safetensors", "tokenizers"])),
        "\n\n| expected | found | folders |\n|---|---|---|",
    )
    for (expected, found), count in sorted(counts.items()):
        print(f"| {expected} | {found} | {count} |")
    right = sum(n for (a, b), n in counts.items() if a == b or b == "nothing above a note")
    print(
        f"\n{right} of {counts.total()} as expected; healthy folders accused: {accused or 'none'}"
    )
    print("\n| job | seconds | |\n|---|---|---|")
    for name, line in times.items():
        print(f"| {name} | {line} |")


if __name__ == "__main__":
    main()
