"""Run the README's command lines with the lexigraft that this Python has installed.

    python tests/installed.py [FOLDER]

FOLDER, or a temporary one, is outside the repository: BASE in it is a tiny model, beside its texts.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import parts

ROOT = Path(__file__).parents[1]


def command_lines() -> list[list[str]]:
    """The words of each line of the README's second block, from a base to a merged model."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    return [shlex.split(line, comments=True) for line in blocks[1].splitlines()]


def main(work: Path) -> None:
    """Make what the lines name in the folder `work`, and run them there."""
    import lexigraft

    assert not Path(lexigraft.__file__).is_relative_to(ROOT / "src"), "that is not installed"
    base = parts.write_byte_level(work / "BASE")
    parts.write_model(base, tokens=382, tied=True)
    (work / "field.txt").write_text(parts.corpus_text(documents=60), "utf-8")
    (work / "everyday.txt").write_text("\n\n".join(parts.plain_english().splitlines()[:300]))
    (work / "heldout.txt").write_text(parts.corpus_text(seed=1, documents=3), "utf-8")
    scripts = Path(sys.executable).parent
    lines = command_lines()
    assert len(lines) == 6
    for words in lines:
        subprocess.run([scripts / words[0], *words[1:]], check=True, cwd=work)
    assert (work / "MERGED" / "model.safetensors").is_file()


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
