"""What several files of tests read and none of them changes: made once."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

import parts

# The commands of the environment that runs the tests, also where it is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def pytest_collection_modifyitems(items):
    """The demo first, which takes minutes; then files with many tests before those with few.

    So processes that share the files (`--dist loadfile --no-loadscope-reorder`) end together.
    """
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != "test_demo.py", -sizes[item.path], item.path))


@pytest.fixture(scope="session")
def extended(tmp_path_factory):
    """corpus.txt, general.txt; a tied base of 382 tokens and as many rows; vocab: 40 new tokens."""
    from lexigraft import learn

    folder = tmp_path_factory.mktemp("extended")
    (folder / "corpus.txt").write_text(parts.corpus_text(documents=60), "utf-8")
    everyday = parts.plain_english().splitlines()[:300]
    (folder / "general.txt").write_text("\n\n".join(everyday), "utf-8")
    base = parts.write_byte_level(folder / "base")
    parts.write_model(base, tokens=382, tied=True, eos=380)
    learn(
        base, corpus=[folder / "corpus.txt"], tokens=40, min_count=5, allow_more=True,
        output=folder / "vocab",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def grafted_models(tmp_path_factory):
    """corpus.txt; `base_tied` and `base_untied`; the same two grafted: `tied` and `untied`.

    The new tokens have ids 382 to 421, the grafted models 448 rows.
    """
    from lexigraft import graft, learn

    folder = tmp_path_factory.mktemp("grafted")
    (folder / "corpus.txt").write_text(parts.corpus_text(documents=40), "utf-8")
    vocab = folder / "vocab"
    for name, tied in (("tied", True), ("untied", False)):
        base = parts.write_byte_level(folder / f"base_{name}")
        parts.write_model(base, tokens=400, rows=416, tied=tied, eos=380)
        if not vocab.exists():
            learn(
                base, corpus=[folder / "corpus.txt"], tokens=40, min_count=5, allow_more=True,
                output=vocab,
            )  # fmt: skip
        graft(base, vocab, output=folder / name)
    return folder
