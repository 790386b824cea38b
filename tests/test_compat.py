"""transformers 4.57, slow and fast, in an environment of its own: it reads what learn writes.

Users of older trainers and servers load an extended folder with that version: its slow classes
read `tokenizer.model` or `vocab.json` and `merges.txt` themselves, its fast ones `tokenizer.json`
or a conversion. Wherever they read the base as lexigraft does, they must read the extension so.
"""

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest

import parts
from lexigraft import families, learn
from lexigraft.corpus import held_out, read_documents
from lexigraft.families.proof import HARD_TEXTS

PYTHON = Path(__file__).resolve().parents[1] / ".venv-compat" / "bin" / "python"
# Family, its files, and whether 4.57 has a slow class for it.
CASES = [
    ("byte", "fast"),
    ("byte-files", "slow"),
    ("byte-files", "fast"),
    ("gpt2-files", "slow"),
    ("gpt2-files", "fast"),
    ("ranks", "fast"),
    ("wordpiece", "slow"),
    ("wordpiece", "fast"),
    ("unigram", "slow"),
    ("unigram", "fast"),
    ("sp-both", "slow"),
    ("sp-both", "fast"),
    ("sp-model", "slow"),
    ("sp-model", "fast"),
    ("mistral", "slow"),
    ("mistral", "fast"),
]

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-compat: `make compat` builds it"),
]

READ = """
import json, sys
from transformers import AutoTokenizer, __version__
assert __version__.startswith("4.57."), __version__
request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], use_fast=sys.argv[2] == "fast")
assert tokenizer.is_fast == (sys.argv[2] == "fast"), type(tokenizer)
ids = [tokenizer.encode(text, add_special_tokens=False) for text in request]
decoded = [[tokenizer.decode(i, skip_special_tokens=s) for s in (False, True)] for i in ids]
json.dump({"ids": ids, "decoded": decoded, "tokens": len(tokenizer)}, sys.stdout)
"""


def read(folder, speed, texts):
    """What 4.57 makes of `texts`: ids, both decodings, and its number of tokens."""
    command = [str(PYTHON), "-c", READ, str(folder), speed]
    child = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout)


def make_base(kind, folder):
    if kind == "mistral":
        return parts.mistral_folder(folder)
    if kind.startswith("sp"):
        return parts.write_sentencepiece(folder, fast=kind == "sp-both")
    if kind == "gpt2-files":
        return parts.write_byte_level_files(folder)
    if kind == "ranks":
        return parts.write_ranks(folder, every_split=False)
    if kind == "wordpiece":
        return parts.write_wordpiece(folder)
    if kind == "unigram":
        return parts.write_unigram(folder)
    parts.write_byte_level(folder)
    if kind == "byte-files":  # as GPT-2 is stored, whose specials stand behind the merges
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        path.write_text(json.dumps({**config, **special, "tokenizer_class": "GPT2Tokenizer"}))
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """kind -> base folder, VOCAB folder, texts to read; each learned once."""
    root = tmp_path_factory.mktemp("compat")
    corpus = root / "medical.txt"
    corpus.write_text(parts.corpus_text())
    texts = [document for document in read_documents([corpus]) if held_out(document)]

    @cache
    def of(kind):
        base = make_base(kind, root / kind)
        result = learn(base, corpus=[corpus], output=root / f"{kind}-vocab", tokens=25)
        assert 20 < result.added <= 25
        lines = (result.output / "new_tokens.jsonl").read_text("utf-8").splitlines()
        words = [json.loads(line)["text"] for line in lines]
        new = [text for word in words if word for text in (word, f"a {word.strip()} b")]
        return base, result.output, [*HARD_TEXTS, *texts, *new]

    return of


@pytest.mark.parametrize(("kind", "speed"), CASES)
def test_reads_the_extension_as_lexigraft_does_where_it_so_reads_the_base(learned, kind, speed):
    base, vocab, texts = learned(kind)
    old, new = read(base, speed, texts), read(vocab, speed, texts)
    family = families.load(base)
    before = family.encode_batch(texts)
    extended = families.load(vocab)
    after = extended.encode_batch(texts)
    alike = [place for place, ids in enumerate(old["ids"]) if ids == before[place]]
    assert len(alike) > 0.6 * len(texts)
    for place in alike:
        assert new["ids"][place] == after[place], texts[place]
        if family.unknown_id not in before[place]:  # what was unknown may come closer
            assert new["decoded"][place] == old["decoded"][place], texts[place]
    assert any(new["ids"][place] != old["ids"][place] for place in alike)
    assert old["tokens"] == family.map.tokens
    assert new["tokens"] == extended.map.tokens
