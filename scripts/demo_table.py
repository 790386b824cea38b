"""Put the table of a finished demo into both READMEs: python scripts/demo_table.py runs/demo

The sentences around it hold figures too: `tests/test_chinese.py` fails until both READMEs have the
same ones.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lexigraft.reporting import state_of
from lexigraft.reporting.facts import model_rows
from lexigraft.reporting.tables import HEADERS, cells, pipes

ROOT = Path(__file__).parents[1]
# README -> its words for the table's; what is missing is as it is.
READMES: Mapping[str, Mapping[str, str]] = {
    "README.md": {},
    "README.zh-CN.md": {
        "model": "模型",
        "tokens/byte": "token/字节",
        "domain bpb": "领域 bpb",
        "general bpb": "通用 bpb",
        "generated characters/s": "生成字符/秒",
        "trained on bytes": "训练字节",
        "trained tokens": "训练 token",
        "training seconds": "训练秒数",
        "base": "基座",
        "grafted": "嫁接后",
        "merged": "合并后",
        "control, equal text": "对照组，同文本",
        "control, equal compute": "对照组，同算力",
    },
}
_TABLE = re.compile(r"(<!-- demo table -->.*?\n)\|.*\|\n(?=\n.*?<!-- end -->)", re.DOTALL)


def with_table(text: str, rows: Sequence[Sequence[str]], words: Mapping[str, str]) -> str:
    """A README with the rows of the table of models, in its own words."""
    header, *lines = ([words.get(cell, cell) for cell in row] for row in (HEADERS, *rows))
    table = "".join(f"{line}\n" for line in pipes(header, lines))
    return _TABLE.sub(lambda match: match[1] + table, text)


if __name__ == "__main__":
    measured = [cells(row) for row in model_rows(state_of(Path(sys.argv[1])))]
    for name, words in READMES.items():
        readme = ROOT / name
        readme.write_text(with_table(readme.read_text("utf-8"), measured, words), "utf-8")
