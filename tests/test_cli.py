"""The command line: exit codes, messages, --json, and nothing written on a fault."""

import json
import subprocess
import sys

import pytest

import parts


def lexigraft(*arguments, cwd=None):
    command = [sys.executable, "-m", "lexigraft", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    base = parts.write_byte_level(root / "base")
    parts.write_model(base, tokens=382, tied=True)
    (root / "c.txt").write_text(parts.corpus_text(documents=60))
    done = lexigraft("learn", base, "--corpus", root / "c.txt", "--tokens", 20, "--min-count", 5,
                     "-o", root / "vocab")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = lexigraft("graft", base, root / "vocab", "-o", root / "model")
    assert done.returncode == 0, done.stderr
    return root


def test_results_go_to_standard_output(made, tmp_path):
    done = lexigraft("learn", made / "base", "--corpus", made / "c.txt", "--tokens", 5, "-o",
                     tmp_path / "v", "--min-count", 5)  # fmt: skip
    assert "5 new tokens" in done.stdout
    assert done.stderr == ""


def test_json_is_one_object_with_the_documented_keys(made, tmp_path):
    done = lexigraft("learn", made / "base", "--corpus", made / "c.txt", "--general",
                     parts.ENGLISH, "--tokens", "5%", "--min-count", 5, "--json", "-o", tmp_path / "v")  # fmt: skip
    result = json.loads(done.stdout)
    assert {"added", "tokens_before", "tokens_after", "first_id", "domain", "general", "drift", "dead",
            "bridges", "parity", "curve"} <= result.keys()  # fmt: skip
    done = lexigraft("graft", made / "base", tmp_path / "v", "--json", "-o", tmp_path / "m")
    result = json.loads(done.stdout)
    assert {
        "rows_before",
        "rows_after",
        "tokens",
        "init",
        "bytes_copied",
        "bytes_written",
        "seconds",
    } <= result.keys()
    done = lexigraft("check", tmp_path / "m", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["ok"] is True
    assert {"ok", "findings", "table"} <= result.keys()


def test_dry_run_writes_nothing(made, tmp_path):
    done = lexigraft("graft", made / "base", made / "vocab", "--dry-run", "-o", tmp_path / "m")
    assert done.returncode == 0 and "model.embed_tokens.weight" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_starts_of_new_rows_can_be_named(made, tmp_path):
    first = (made / "vocab" / "new_tokens.jsonl").read_text().splitlines()[0]
    token = json.loads(first)["token"]
    (tmp_path / "list.tsv").write_text(f"{token}\tĠgarden\n", "utf-8")
    done = lexigraft("graft", made / "base", made / "vocab", "--init-from", tmp_path / "list.tsv",
                     "--json", "-o", tmp_path / "copied")  # fmt: skip
    assert json.loads(done.stdout)["init"] == "copy"
    done = lexigraft("graft", made / "base", made / "vocab", "--donor", made / "model", "--json",
                     "-o", tmp_path / "given")  # fmt: skip
    assert json.loads(done.stdout)["init"] == "donor"
    assert "20 of the 20 new tokens" in done.stderr
    shown = " ".join(lexigraft("graft", "--help").stdout.split())
    assert "--init-from" in shown and "--donor" in shown and "exponential" in shown


def test_version_and_help():
    from lexigraft import __version__

    assert lexigraft("--version").stdout.strip() == f"lexigraft {__version__}"
    shown = lexigraft("--help").stdout
    for verb in (
        "learn",
        "graft",
        "train",
        "merge",
        "split",
        "extract",
        "align",
        "prune",
        "check",
        "eval",
        "show",
        "report",
        "serve",
        "card",
        "upload",
        "run",
        "demo",
    ):
        assert verb in shown
        assert lexigraft(verb, "--help").returncode == 0


FAULTS = [
    ("no base", ["learn", "{root}/none", "--corpus", "{root}/c.txt", "-o", "{out}/o"], "none"),
    (
        "no corpus",
        ["learn", "{root}/base", "--corpus", "{root}/none.txt", "-o", "{out}/o"],
        "none.txt",
    ),
    (
        "bad number",
        ["learn", "{root}/base", "--corpus", "{root}/c.txt", "--tokens", "many", "-o", "{out}/o"],
        "many",
    ),
    ("no vocab", ["graft", "{root}/base", "{root}/none", "-o", "{out}/o"], "none"),
    ("no adapter", ["merge", "{root}/base", "{root}/none", "-o", "{out}/o"], "none"),
    ("not an adapter", ["merge", "{root}/base", "{root}/vocab", "-o", "{out}/o"], "adapter"),
    ("no recipe", ["run", "{root}/none.yaml", "-o", "{out}/o"], "none.yaml"),
    ("no run", ["report", "{root}/none"], "none"),
    ("no model", ["eval", "{root}/none", "--corpus", "{root}/c.txt"], "none"),
    (
        "no mode",
        ["train", "{root}/model", "--corpus", "{root}/c.txt", "--mode", "head", "-o", "{out}/o"],
        "'rows', 'lora' or 'full'",
    ),
    (
        "no method",
        ["graft", "{root}/base", "{root}/vocab", "--init", "best", "-o", "{out}/o"],
        "no method 'best'",
    ),
    (
        "text for a start that reads none",
        ["graft", "{root}/base", "{root}/vocab", "--corpus", "{root}/c.txt", "-o", "{out}/o"],
        "--corpus with --init auto",
    ),
    (
        "distill without text",
        ["graft", "{root}/base", "{root}/vocab", "--init", "distill", "-o", "{out}/o"],
        "--init distill without --corpus",
    ),
    (
        "no donor",
        ["graft", "{root}/base", "{root}/vocab", "--donor", "{root}/none", "-o", "{out}/o"],
        "none",
    ),
    ("output exists", ["graft", "{root}/base", "{root}/vocab", "-o", "{root}/model"], "exists"),
]


@pytest.mark.parametrize(("arguments", "word"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_bad_input_is_one_message_and_exit_2(made, tmp_path, arguments, word):
    filled = [a.format(root=made, out=tmp_path) for a in arguments]
    done = lexigraft(*filled)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in ("found:", "needed:", "try:"):
        assert done.stderr.count(part) == 1, done.stderr
    assert word in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_check_exits_1_with_the_fault_and_a_command(made, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(made / "base", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    done = lexigraft("check", broken)
    assert done.returncode == 1
    assert "999" in done.stdout and "382" in done.stdout and "vocab_size" in done.stdout
