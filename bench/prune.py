"""What `lexigraft prune` takes out of published tokenizers, and what text costs afterwards.

    python bench/prune.py --data ../shared/data                       # minutes for each tokenizer
    python bench/prune.py --data ../shared/data --only t5_unigram_sp --results /tmp/prune.md

Each tokenizer stands beside a Llama of its size and width 8. Kept is English and Chinese medical
text. By use, everything goes that this text never has; by script, what is neither Latin nor Han.
The cost is told on the kept text, on English everyday text, and on a paragraph of other scripts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lexigraft import families, prune
from lexigraft.selection.pruning import Reading
from lexigraft.steps.prune import PruneResult
from machine import machine

RESULTS = Path(__file__).parent / "results" / "prune.md"
PACKAGES = ("numpy", "tokenizers", "sentencepiece", "tiktoken")
# Folder in --data/tokenizers -> what it is called.
TOKENIZERS = {
    "qwen3_hf": "Qwen3",
    "gemma3_hf": "Gemma 3",
    "llama3_1_hf": "Llama 3.1",
    "llama3_tiktoken": "Llama 3, rank file",
    "t5_unigram_sp": "T5",
    "bert_base_chinese_wordpiece": "BERT, Chinese",
}
# File, bytes that are read.
KEPT = (("en_med_medquad.txt", 400_000), ("zh_med_medqa_exam.txt", 400_000))
EVERYDAY = ("en_gen_wikitext2_valid_test.txt", 200_000)
# Article 1 of the Universal Declaration of Human Rights.
OTHERS = """\
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и
совестью и должны поступать в отношении друг друга в духе братства.
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을
부여받았으며 서로 형제애의 정신으로 행동하여야 한다.
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم
بعضا بروح الإخاء.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है।
"""
HEAD = (
    *("tokenizer", "tokens", "rows", "kept text, tokens/byte", "kept texts that changed"),
    "{} text, tokens/byte",
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="What lexigraft prune takes out")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(TOKENIZERS), choices=TOKENIZERS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    by_use, by_script = [], []
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        texts = write_texts(options.data / "corpora", work)
        for name in options.only:
            base = write_base(options.data / "tokenizers" / name, work / name)
            *corpus, everyday, others = texts
            scripts = ["Latin"] if name == "t5_unigram_sp" else ["Latin", "Han"]
            for rows, general, given in ((by_use, everyday, []), (by_script, others, scripts)):
                found = prune(
                    base, corpus=corpus, general=[general], scripts=given, dry_run=True,
                    output=work / "out",
                )  # fmt: skip
                rows.append(row(TOKENIZERS[name], found))
                print(rows[-1], file=sys.stderr)
            shutil.rmtree(base)
    text = "\n".join(
        [
            "# What prune takes out",
            "",
            f"`python bench/prune.py --data ../shared/data`: kept is text of {KEPT[0][0]} and "
            f"{KEPT[1][0]}, {KEPT[0][1]:,} bytes each. (T5 has no Chinese: there all of that is "
            "unknown before and after.)",
            "",
            *machine(PACKAGES),
            "",
            "## All that the kept text never has",
            "",
            *table("everyday English", by_use),
            "",
            "## Tokens with letters of other scripts than Latin and Han (T5: than Latin)",
            "",
            *table("Russian, Korean, Arabic and Hindi", by_script),
            "",
        ]
    )
    print(text)
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(text, "utf-8")


def write_texts(corpora: Path, work: Path) -> list[Path]:
    """The texts, cut: the kept ones, everyday English, other scripts."""
    paths = []
    for name, size in (*KEPT, EVERYDAY):
        paths.append(work / name)
        data = (corpora / name).read_bytes()[:size].decode("utf-8", "ignore")
        paths[-1].write_text(data, "utf-8")
    paths.append(work / "others.txt")
    paths[-1].write_text(OTHERS, "utf-8")
    return paths


def write_base(tokenizer: Path, folder: Path) -> Path:
    """A tokenizer beside a model whose rows are a multiple of 64."""
    shutil.copytree(tokenizer, folder)
    if tokenizer.name == "t5_unigram_sp":  # whose files do not say what class reads them
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-families.load(folder).map.tokens // 64) * 64, hidden_size=8,
        intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def row(name: str, found: PruneResult) -> str:
    """A row of a table."""
    kept, other = found.domain, found.general
    assert kept is not None and other is not None
    cells = (
        name,
        f"{found.tokens_before:,} -> {found.tokens_after:,}",
        f"{found.rows_before:,} -> {found.rows_after:,}",
        per_byte(kept),
        f"{kept.changed:,} of {kept.texts:,}",
        per_byte(other),
    )
    return f"| {' | '.join(cells)} |"


def per_byte(reading: Reading) -> str:
    """Tokens per byte before and after."""
    before, after = (n / reading.bytes for n in (reading.tokens_before, reading.tokens_after))
    return f"{before:.4f} -> {after:.4f}"


def table(other: str, rows: Sequence[str]) -> Iterator[str]:
    """Head and rows."""
    yield "| " + " | ".join(HEAD).format(other) + " |"
    yield "|" + "---|" * len(HEAD)
    yield from rows


if __name__ == "__main__":
    main()
