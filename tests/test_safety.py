"""The promises of docs/safety.md: what a stranger's folder can and cannot do."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import parts
from lexigraft import (
    align,
    check,
    evaluate,
    extract,
    graft,
    learn,
    merge,
    prune,
    split,
    train,
)
from lexigraft import cli as command_line
from lexigraft.errors import LexigraftError
from lexigraft.files import publish
from lexigraft.hub import local_folder
from test_check_formats import cached
from test_check_gallery import Ground, source  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[1]
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"


@pytest.fixture
def ground(source, tmp_path):  # noqa: F811
    return Ground(source, tmp_path / "ground")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(parts.corpus_text(documents=4))
    return path


class Marks:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "opened"))


def calls(base: Path, vocab: Path, adapter: Path, corpus: Path, out: Path) -> dict:
    """Every verb that opens folders, on these."""
    return {
        "check": lambda: check(base, base=base, adapter=adapter, deep=True),
        "graft": lambda: graft(base, vocab, output=out / "graft"),
        "merge": lambda: merge(base, [adapter], output=out / "merge"),
        "learn": lambda: learn(base, corpus=[corpus], tokens="4", output=out / "learn"),
        "learn --replace": lambda: learn(
            base, corpus=[corpus], general=[corpus], replace=2, output=out / "replace"
        ),
        "train": lambda: train(base, corpus=[corpus], max_steps=1, output=out / "train"),
        "eval": lambda: evaluate([base], corpus=[corpus], speed_characters=0),
        "split": lambda: split(base, adapter, output=out / "split"),
        "extract": lambda: extract(base, base=base, output=out / "extract"),
        "align": lambda: align([base, shutil.copytree(base, out / "copy")], output=out / "align"),
        "prune": lambda: prune(base, corpus=[corpus], adapters=[adapter], output=out / "prune"),
    }


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another safetensors"])
def test_no_verb_opens_a_pickle(ground, corpus, tmp_path, beside):
    mark = tmp_path / "mark"
    hostile = pickle.dumps(Marks(mark))
    base, adapter = ground.sp, ground.adapter
    for folder, names in (
        (base, ["model.safetensors", "pytorch_model.bin", "training_args.bin"]),
        (adapter, ["adapter_model.safetensors", "adapter_model.bin", "optimizer.pt"]),
    ):
        weights, *pickles = names
        (folder / weights).rename(folder / "other.safetensors") if beside else (
            folder / weights
        ).unlink()
        for name in pickles:
            (folder / name).write_bytes(hostile)
    pickle.loads(hostile)
    assert mark.read_text() == "opened"  # it would work
    mark.unlink()
    for name, call in calls(base, ground.copy("vocab"), adapter, corpus, tmp_path / "out").items():
        if name == "check":
            assert {"LG301", "LG409"} <= {f.code for f in call().findings}
        elif name == "learn --replace":  # without weights nothing is known to be untrained
            call()
        elif name != "learn":  # which reads the tokenizer alone
            with pytest.raises(LexigraftError) as fault:
                call()
            assert fault.value.fix
        assert not mark.exists(), name


def test_no_verb_runs_code_of_a_folder_without_the_flag(ground, corpus, tmp_path):
    mark = tmp_path / "mark"
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\nclass A: pass\n"
    base = ground.sp
    for name in (
        "modeling_own.py",
        "configuration_own.py",
        "tokenization_own.py",
        "sitecustomize.py",
    ):
        (base / name).write_text(code)
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.A", "AutoModelForCausalLM": "modeling_own.A"}
    (base / "config.json").write_text(json.dumps({**config, "auto_map": own, "model_type": "own"}))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.A", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, **tokenizer}))
    verbs = calls(base, ground.copy("vocab"), ground.adapter, corpus, tmp_path / "out")
    for name, call in verbs.items():
        try:
            call()
        except LexigraftError as fault:
            assert fault.fix
        assert not mark.exists(), name


def test_inputs_that_are_links_are_read_and_never_written_through(ground, corpus, tmp_path):
    """A hub cache is made of links, to files that are called by a hash and have no ending. What is
    behind them stays; what is written are files."""
    hub = tmp_path / "hub"
    commit = cached(hub, "someone/sp", ground.sp)
    cached(hub, "someone/vocab", ground.copy("vocab"))
    linked, vocab = (hub / f"models--someone--{n}" / "snapshots" / commit for n in ("sp", "vocab"))
    real = hub / "models--someone--sp" / "blobs"
    kept = {p.name: p.read_bytes() for p in real.iterdir()}
    adapter = ground.adapter
    graft(linked, vocab, output=tmp_path / "model")
    merge(linked, [adapter], output=tmp_path / "merged")
    split(linked, adapter, output=tmp_path / "pair")
    extract(tmp_path / "merged", base=linked, rank=2, output=tmp_path / "found")
    align([linked, tmp_path / "model"], output=tmp_path / "aligned")
    prune(linked, corpus=[corpus], output=tmp_path / "small")
    assert {p.name: p.read_bytes() for p in real.iterdir()} == kept
    for out in ("model", "merged", "pair", "found", "aligned", "small"):
        assert not any(p.is_symlink() for p in (tmp_path / out).rglob("*"))


def test_an_output_that_is_a_link_is_replaced_and_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    out = tmp_path / "out"
    out.symlink_to(precious)
    with pytest.raises(LexigraftError, match="exists"), publish(out):
        pass
    with publish(out, force=True) as partial:
        (partial / "new").write_text("x")
    assert (out / "new").exists() and not out.is_symlink()
    assert (precious / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "name", ["../../escaped.safetensors", "/tmp/escaped.safetensors", "a/b.safetensors"]
)
def test_no_index_makes_a_verb_write_or_read_outside(ground, corpus, tmp_path, name):
    index = ground.shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    verbs = calls(ground.shards, ground.copy("vocab"), ground.adapter, corpus, tmp_path / "out")
    for verb in ("graft", "merge", "train", "eval", "split", "extract", "align", "prune"):
        with pytest.raises(LexigraftError) as fault:
            verbs[verb]()
        assert "bare name" in fault.value.needed, verb
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{" * 200,
        struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
        struct.pack("<Q", 78)
        + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,99]}}  '
        + b"x" * 99,
    ],
    ids=["exabytes", "cut", "nested", "a shape of exabytes"],
)
def test_hostile_headers_cost_nothing(ground, tmp_path, content):
    """Memory and time of the whole command, of a header that lies."""
    (ground.base / "model.safetensors").write_bytes(content)
    script = (
        "import sys, time, resource\n"
        "from lexigraft.steps.check import check\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.process_time()\n"
        "codes = [f.code for f in check(sys.argv[1], deep=True).findings if f.severity == 'error']\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(*codes, time.process_time() - start < 1, grown < 100_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, ground.base], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["LG301", "True", "True"]


def run_main(capsys, monkeypatch, *words: object) -> tuple[int, str]:
    """The command line in this process: exit status, and all that reached the terminal."""
    monkeypatch.setattr(sys, "argv", ["lexigraft", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out + told.err


def hostile_folder(ground: Ground) -> Path:
    """A model whose tokens, keys and names are escape sequences, in every place that is quoted."""
    base = ground.sp
    data = json.loads((base / "tokenizer.json").read_text())
    data["model"]["vocab"][ESCAPE] = data["model"]["vocab"].pop("▁the")
    data["model"]["merges"] = [["▁", ESCAPE], *data["model"]["merges"]]
    (base / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "model_type": ESCAPE, "architectures": [ESCAPE]})
    )
    settings = {"tokenizer_class": ESCAPE, "pad_token": ESCAPE + "p", "auto_map": {"x": ESCAPE}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    return base


def test_no_verb_echoes_escape_sequences_of_files(ground, corpus, tmp_path, capsys, monkeypatch):
    base, vocab, out = hostile_folder(ground), ground.copy("vocab"), tmp_path / "out"
    shutil.copyfile(base / "tokenizer.json", vocab / "tokenizer.json")
    adapter = ground.adapter
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": ESCAPE}))
    words = tmp_path / "words.txt"
    words.write_text(f"{ESCAPE}\nangina\n{ESCAPE}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"base": ESCAPE, "corpus": ESCAPE, ESCAPE: 1}))
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "run.json").write_text(json.dumps({"format": ESCAPE, ESCAPE: 1}))
    odd_text = tmp_path / "odd.jsonl"
    odd_text.write_text(json.dumps({ESCAPE: "x"}) + "\n")
    commands = {
        "check": ["check", base, "--base", base, "--adapter", adapter, "--deep"],
        "check --for": ["check", base, "--for", "transformers-4"],
        "check --json": ["check", base, "--json"],
        "check --sarif": ["check", base, "--sarif"],
        "learn": ["learn", base, "--corpus", corpus, "--terms", words, "-o", out / "l"],
        "learn a key": ["learn", ground.base, "--corpus", odd_text, "-o", out / "l2"],
        "graft": ["graft", base, vocab, "-o", out / "g"],
        "merge": ["merge", base, adapter, "-o", out / "m"],
        "split": ["split", base, adapter, "-o", out / "s"],
        "extract": ["extract", base, "--base", ground.base, "-o", out / "x"],
        "align": ["align", base, ground.base, "-o", out / "a"],
        "prune": ["prune", base, "--corpus", corpus, "-o", out / "p"],
        "train": ["train", base, "--corpus", corpus, "-o", out / "t", "--max-steps", "1"],
        "eval": ["eval", base, "--corpus", corpus],
        "report": ["report", run_folder],
        "run": ["run", recipe, "-o", out / "r"],
        "a name": ["check", str(tmp_path / ESCAPE)],
    }
    for name, command in commands.items():
        status, told = run_main(capsys, monkeypatch, *command)
        assert status in (0, 1, 2), name
        assert not set(told) & set("\x1b\x07\x9b\u202e"), (name, told)
        assert told.strip(), name


def test_json_of_strangers_is_bounded_in_depth_and_size(ground, corpus, tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    odd = tmp_path / "deep.jsonl"
    odd.write_text('{"text": "fine words here"}\n' + '{"text": ' + deep + "}\n")
    for call in (
        lambda: learn(ground.base, corpus=[odd], tokens="4", output=tmp_path / "a"),
        lambda: graft(deep_file(ground.base, deep), ground.copy("vocab"), output=tmp_path / "b"),
        lambda: merge(ground.sp, [deep_file(ground.adapter, deep)], output=tmp_path / "c"),
    ):
        with pytest.raises((LexigraftError, RecursionError)):  # main() tells of the latter
            call()
    assert not any((tmp_path / name).exists() for name in "abc")


def deep_file(folder: Path, text: str) -> Path:
    for path in folder.glob("*config.json"):
        path.write_text('{"a": ' + text + "}")
    return folder


def test_a_folder_beside_which_commands_run_gives_them_no_modules(ground, tmp_path):
    """Children import nothing from the current folder."""
    mark = tmp_path / "mark"
    for name in ("json", "transformers", "tokenizers", "lexigraft", "numpy"):
        (ground.model / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lexigraft", "check", ".", "--deep"],
        cwd=ground.model, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "lexigraft.json" in done.stdout and not mark.exists()


def test_temporary_folders_are_private():
    """Each is made by `tempfile`, whose folders are 0700, and none has a name that can be known."""
    used = set()
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text()
        assert '"/tmp' not in text and "'/tmp" not in text, path
        for node in ast.walk(ast.parse(text)):
            is_call = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if is_call and node.value.id == "tempfile":
                used.add(node.attr)
    # A SpooledTemporaryFile is a TemporaryFile, which has no name, once it is on the disk at all.
    assert used <= {"TemporaryDirectory", "TemporaryFile", "SpooledTemporaryFile", "mkdtemp"}


def test_a_download_is_pinned_by_its_revision(ground, tmp_path, monkeypatch):
    """The folder is that of one commit; a branch that moves later changes nothing in it."""
    hub = tmp_path / "hub"
    commit = cached(hub, "someone/tiny", ground.base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    script = "import sys\nfrom lexigraft.hub import local_folder\nprint(local_folder(sys.argv[1]))"
    home = hub / "models--someone--tiny"
    later = "f" * 40
    shutil.copytree(home / "snapshots" / commit, home / "snapshots" / later, symlinks=True)
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}

    def folder_of(name: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", script, name],
            capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
        ).stdout.strip()  # fmt: skip

    assert folder_of("someone/tiny") == str(home / "snapshots" / commit)
    (home / "refs" / "main").write_text(later)
    assert folder_of("someone/tiny") == str(home / "snapshots" / later)
    assert folder_of(f"someone/tiny@{commit}") == str(home / "snapshots" / commit)
    with pytest.raises(LexigraftError):
        local_folder("someone/../../etc")


def test_every_promise_of_the_page_has_a_test():
    import re

    page = (ROOT / "docs" / "safety.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    existing = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert len(named) >= 12 and named <= existing
    assert "docs/safety.md" in (ROOT / "SECURITY.md").read_text()
