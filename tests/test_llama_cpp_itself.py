"""llama.cpp itself: its converter writes GGUF files of extensions, its tokenizer reads them.

Every id has the text that our files give it, and texts are read id for id as transformers reads
them, wherever llama.cpp reads the base so. `check --for gguf` foretells the rest without it. Models
that were pruned, and pairs of base and adapter, say the same there as in transformers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import adapter_parts
import parts
from lexigraft import graft, learn, merge, prune, split
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.gguf_header import read_gguf_header
from lexigraft.checks.conversion import _convert
from lexigraft.checks.facts import read_facts
from lexigraft.checks.gguf_files import TOKENS
from lexigraft.families.llama_cpp import simulate
from lexigraft.families.loader import TransformersLoader
from lexigraft.families.proof import HARD_TEXTS
from lexigraft.families.tokenmap import TokenMap, parse_sentencepiece
from lexigraft.manifest import Manifest
from lexigraft.steps.check import check

HOME = Path(__file__).resolve().parents[1] / ".venv-llama"
PYTHON, CONVERT = HOME / "bin" / "python", HOME / "llama.cpp" / "convert_hf_to_gguf.py"
CONVERT_LORA = CONVERT.with_name("convert_lora_to_gguf.py")
ROOT = Path(__file__).resolve().parents[1]
READ = """
import json, sys
from llama_cpp import Llama
texts = json.load(sys.stdin)
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(t.encode(), add_bos=False, special=True) for t in texts]))
"""
WRITE = """
import json, sys
from itertools import islice
from llama_cpp import Llama
model = Llama(sys.argv[1], lora_path=sys.argv[2] or None, n_ctx=256, n_threads=1, verbose=False)
print(json.dumps([
    list(islice(model.generate(ids, top_k=1, temp=0.0), 12)) for ids in json.load(sys.stdin)
]))
"""

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(
        not (PYTHON.exists() and CONVERT.exists()),
        reason="no .venv-llama: `make llama` builds llama.cpp and its converter (long)",
    ),
]


def converter(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}, **options,
    )  # fmt: skip


def converted(folder: Path) -> Path:
    """What llama.cpp's own converter makes of a folder."""
    target = folder.parent / f"{folder.name}.gguf"
    done = converter(CONVERT, folder, "--outfile", target, "--outtype", "f32")
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def named_and_converted(folder: Path, name: str) -> Path:
    """The same by the command of docs/prune.md, which names the pre-tokenizer."""
    page = (ROOT / "docs" / "prune.md").read_text("utf-8")
    command = re.search(r"python - SMALL (.*) <<'END'\n(.*?)^END$", page, re.M | re.S)
    assert command is not None
    code = command[2].replace('"llama.cpp', f'"{CONVERT.parent}').replace("smollm", name)
    target = folder.parent / f"{folder.name}.gguf"
    options = command[1].replace("small.gguf", str(target)).split()
    done = converter("-", folder, *options, input=code)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def lora_converted(pair: Path) -> Path:
    """What llama.cpp makes of the adapter of a split, beside its base."""
    target = pair / "adapter.gguf"
    done = converter(CONVERT_LORA, pair / "adapter", "--base", pair / "base", "--outfile", target)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def written_by_llama_cpp(
    file: Path, prompts: Sequence[Sequence[int]], lora: Path | str = ""
) -> list[list[int]]:
    """The twelve likeliest next ids, one after another."""
    done = subprocess.run(
        [PYTHON, "-c", WRITE, file, lora], input=json.dumps(prompts), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    ids: list[list[int]] = json.loads(done.stdout)
    return ids


def written_by_transformers(folder: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    model = adapter_parts.load(folder)
    model.generation_config.eos_token_id = None
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]


def read_by_llama_cpp(file: Path, texts: Sequence[str]) -> list[list[int]]:
    done = subprocess.run(
        [PYTHON, "-c", READ, file], input=json.dumps(texts), capture_output=True, text=True, check=True
    )  # fmt: skip
    ids: list[list[int]] = json.loads(done.stdout)
    return ids


def read_by_transformers(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    with TransformersLoader() as loader:
        ids = loader.encode(folder, texts)
        assert ids is not None, loader.reason
    return ids


def smollm2(folder: Path) -> Path:
    """A byte-level tokenizer that llama.cpp knows by name."""
    source = parts.SHARED / "tokenizers" / "smollm2_hf"
    if not source.is_dir():
        pytest.skip(
            "../shared/data is not here: the converter knows no byte-level tokenizer of ours"
        )
    return Path(shutil.copytree(source, folder))


@pytest.mark.parametrize(
    "kind", ["sentencepiece", pytest.param("byte level", marks=pytest.mark.real)]
)
def test_extensions_are_converted_loaded_and_read_id_for_id(tmp_path, kind):
    write = parts.write_sentencepiece if kind == "sentencepiece" else smollm2
    base = write(tmp_path / "base")
    parts.write_model(base, tokens=TokenMap.read(base).tokens, tied=False, eos=2)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(parts.corpus_text(documents=40))
    learned = learn(base, corpus=[corpus], tokens="30", output=tmp_path / "vocab")
    grown = graft(base, tmp_path / "vocab", output=tmp_path / "model").output
    foretold = {f.code for f in check(grown, base=base, consumer="gguf").findings}
    assert learned.added == 30 and not foretold & {"LG911", "LG912", "LG913"}
    tokens = TokenMap.read(grown)
    texts = [*filter(None, HARD_TEXTS), *corpus.read_text().split("\n\n")]

    file = converted(grown)
    read = read_facts(file).tokens
    assert read is not None
    assert {i: read.texts[i].replace(" ", "▁") for i in tokens.texts} == {
        i: text.replace(" ", "▁") for i, text in tokens.texts.items()
    }
    there, here = read_by_llama_cpp(file, texts), read_by_transformers(grown, texts)
    old_there = read_by_llama_cpp(converted(base), texts)
    old_here = read_by_transformers(base, texts)
    alike = [one == two for one, two in zip(old_there, old_here, strict=True)]
    assert sum(alike) >= 40
    for text, one, two, base_agrees in zip(texts, there, here, alike, strict=True):
        assert one == two or not base_agrees, text
    used = {i for ids in there for i in ids if i >= learned.first_id}
    assert len(used) >= 20  # bridges are parts of others
    if kind == "sentencepiece":
        proto = parse_sentencepiece((grown / "tokenizer.model").read_bytes(), grown)
        simulated = simulate(proto)(texts)
        special = [tokens.texts[i] for i in tokens.special | tokens.added]
        for text, one, two in zip(texts, there, simulated, strict=True):
            assert one == two or any(s in text for s in special), text
        foreseen = _convert(read_facts(grown))
        assert foreseen is not None
        assert foreseen.texts == read_gguf_header(file).texts(TOKENS)


@pytest.mark.real
@pytest.mark.skipif(not parts.SHARED.exists(), reason="the shared tokenizers are not here")
def test_what_the_case_study_says_that_llama_cpp_reads_is_what_it_reads(tmp_path):
    """Chinese-LLaMA-2, whose new pieces all have the score 0; docs/check.md has the ids."""
    folder = tmp_path / "model"
    shutil.copytree(parts.SHARED / "tokenizers" / "chinese_llama2_merged_sp", folder)
    parts.write_model(folder, tokens=55_296, tied=False, eos=2)
    [told] = [f for f in check(folder, consumer="gguf").findings if f.code in ("LG912", "LG916")]
    [text] = re.findall(r"scores: '(.*)' is ", told.found)
    there, here = (json.loads(ids) for ids in re.findall(r"(\[.*?\]) (?:there|in)", told.found))
    assert read_by_llama_cpp(converted(folder), [text]) == [there]
    assert read_by_transformers(folder, [text]) == [here]


def base_of(kind: str, folder: Path, *, tied: bool) -> Path:
    base = (parts.write_sentencepiece if kind == "sentencepiece" else smollm2)(folder)
    return parts.write_model(base, tokens=TokenMap.read(base).tokens, tied=tied, eos=2)


KINDS = ["sentencepiece", pytest.param("byte level", marks=pytest.mark.real)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_base_and_adapter_says_there_what_the_merge_says(kind, tmp_path):
    """`split`: rows in the base, LoRA beside it, each converted by llama.cpp's own programs."""
    tied = kind == "byte level"
    base = base_of(kind, tmp_path / "start", tied=tied)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(parts.corpus_text(documents=40))
    learned = learn(base, corpus=[corpus], tokens="30", output=tmp_path / "vocab")
    grown = graft(base, tmp_path / "vocab", output=tmp_path / "model").output
    new = list(range(learned.first_id, learned.first_id + 30))
    adapter = adapter_parts.write_adapter(
        grown, grown, tmp_path / "adapter", "rows", trainable_token_indices=[3, *new]
    )
    pair = split(grown, adapter, output=tmp_path / "pair")
    merge(grown, adapter, output=tmp_path / "merged")
    texts = corpus.read_text().split("\n\n")[:3]
    served, whole = converted(pair.base), converted(tmp_path / "merged")
    ids = read_by_llama_cpp(served, texts)
    assert ids == read_by_llama_cpp(whole, texts) == read_by_transformers(pair.base, texts)
    assert set(new) & {i for line in ids for i in line}
    prompts = [line[:20] for line in ids]
    there = written_by_llama_cpp(served, prompts, lora_converted(tmp_path / "pair"))
    assert there == written_by_llama_cpp(whole, prompts)
    assert there == written_by_transformers(tmp_path / "merged", prompts)
    assert there != written_by_llama_cpp(served, prompts)  # the adapter counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_converted_and_says_the_same(kind, tmp_path):
    """Every row of the GGUF file, ids of texts, and the text that follows them."""
    gguf = pytest.importorskip("gguf")
    base = base_of(kind, tmp_path / "base", tied=False)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(parts.ENGLISH.read_text("utf-8").splitlines()[:30]))
    small = prune(base, corpus=[corpus], output=tmp_path / "small").output
    foretold = {f.code for f in check(small, consumer="gguf").findings}
    assert ("LG911" in foretold) == (kind == "byte level") and not foretold & {"LG912", "LG913"}
    if kind == "sentencepiece":
        file = converted(small)
    else:
        assert "not recognized" in converter(CONVERT, small, "--vocab-only").stderr
        file = named_and_converted(small, "smollm")
    rows = Checkpoint.open(small).read("model.embed_tokens.weight")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    assert np.array_equal(stored["token_embd.weight"].reshape(rows.shape), rows)
    texts = corpus.read_text().split("\n\n")
    ids = read_by_llama_cpp(file, texts)
    places = Manifest.read(small).last("prune").places
    before = read_by_transformers(base, texts)
    assert ids == [[places[i] for i in line] for line in before]
    prompts = [line[:20] for line in ids[:3]]
    there = written_by_llama_cpp(file, prompts)
    assert there == written_by_transformers(small, prompts)
