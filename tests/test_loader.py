"""transformers' loader as an engine of the proof: what it reads, what it proves, how it fails."""

import json
import shutil
import subprocess
import sys
import time

import pytest

import parts
from lexigraft import families
from lexigraft.errors import LexigraftError
from lexigraft.families import loader as loading
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.loader import TransformersLoader, _spare, prove_loader
from lexigraft.families.proof import HARD_TEXTS

TEXTS = [*HARD_TEXTS, "The patient was treated for bronchitis. 患者冠状动脉正常。"]
WORDS = ["bronchitis", "cardiomyopathy", "encephalitis", "hypertension"]


def extension(base, output):
    """`base` extended by WORDS, with and without a space before, each built from its left."""
    space = "\u2581" if base.implicit else "\u0120"
    merges = {}
    for word in [*WORDS, *(space + word for word in WORDS)]:
        left, *others = [base.map.texts[token_id] for token_id in base.pieces(word)]
        for right in others:
            token = base.join(left, right)
            if token is None:
                break
            merges.setdefault(token, Merge(token, left, right, 1))
            left = token
    output.mkdir()
    base.extend(base.admits(list(merges.values())), output)
    extended = families.load(output)
    assert set(WORDS) <= set(extended.map.texts.values())
    return extended


@pytest.fixture(scope="module")
def loader():
    with TransformersLoader() as child:
        yield child


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    return {
        "llama2-kind": parts.mistral_folder(root / "llama2-kind"),
        "llama2-kind, model alone": parts.mistral_folder(root / "model", fast=False),
        "byte-level": parts.write_byte_level(root / "byte-level"),
    }


@pytest.mark.parametrize("name", ["llama2-kind", "llama2-kind, model alone", "byte-level"])
def test_reads_and_decodes_as_transformers_in_this_process(folders, loader, name):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folders[name])
    reading = loader.read(folders[name], TEXTS)
    assert loader.reason is None
    assert reading.ids == [reference.encode(t, add_special_tokens=False) for t in TEXTS]
    assert reading.decoded == [reference.decode(ids) for ids in reading.ids]
    assert reading.without_special == [
        reference.decode(ids, skip_special_tokens=True) for ids in reading.ids
    ]
    assert reading.tokens == families.load(folders[name]).map.tokens
    assert loader.encode(folders[name], TEXTS) == reading.ids
    assert loader.encode(folders[name], []) == []


def test_brings_neither_transformers_nor_torch_into_this_process(folders):
    code = (
        "import sys; from pathlib import Path\n"
        "from lexigraft.families.loader import TransformersLoader\n"
        "with TransformersLoader() as loader:\n"
        "    assert loader.encode(Path(sys.argv[1]), ['a patient'])\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folders["byte-level"])], check=True)


@pytest.mark.parametrize("name", ["llama2-kind", "llama2-kind, model alone", "byte-level"])
def test_an_extension_is_proved_on_the_texts_that_the_base_reads_alike(
    folders, loader, tmp_path, name
):
    base = families.load(folders[name])
    extended = extension(base, tmp_path / "extended")
    texts = [*TEXTS, *WORDS, *(f"a {word}, or {word} of old" for word in WORDS)]
    proof = prove_loader(base, extended, texts, loader)
    assert proof.reason is None
    assert proof.compared + proof.base_differences == len(texts)
    assert proof.compared > len(texts) // 2


def test_an_extension_that_transformers_reads_otherwise_is_refused(folders, loader, tmp_path):
    base = families.load(folders["llama2-kind"])
    extended = extension(base, tmp_path / "extended")
    path = extended.folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = data["model"]["merges"][:-1]
    path.write_text(json.dumps(data))
    with pytest.raises(LexigraftError, match="law 5"):
        prove_loader(base, extended, [*TEXTS, *WORDS], loader)


def test_an_extension_that_transformers_cannot_load_is_refused(folders, loader, tmp_path):
    base = families.load(folders["byte-level"])
    extended = extension(base, tmp_path / "extended")
    (extended.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LexigraftError, match=r"could not load .* it loads the base"):
        prove_loader(base, extended, TEXTS, loader)


def test_a_base_that_transformers_cannot_load_is_reported_not_fatal(folders, loader, tmp_path):
    base = families.load(folders["byte-level"])
    extended = extension(base, tmp_path / "extended")
    broken = tmp_path / "broken"
    shutil.copytree(base.folder, broken)
    base.folder = broken
    (broken / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    proof = prove_loader(base, extended, TEXTS, loader)
    assert (proof.compared, proof.base_differences) == (0, 0)
    assert "transformers could not load" in proof.reason
    assert loader.encode(folders["byte-level"], ["a patient"])  # the child has survived it


def test_remote_code_is_neither_run_nor_asked_for(folders, loader, tmp_path):
    folder = shutil.copytree(folders["byte-level"], tmp_path / "remote")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Strange"
    config["auto_map"] = {"AutoTokenizer": ["strange.Strange", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(
        "from pathlib import Path\nPath(__file__, '..', 'ran').touch()\n"
    )
    start = time.perf_counter()
    loader.read(folder, ["a"])
    assert time.perf_counter() - start < 10  # a question on the terminal would wait 15 s
    assert not (folder / "ran").exists()


def test_a_hanging_child_is_ended_and_the_next_question_answered(folders):
    _spare.drop()  # a child that has started already may answer in time
    with TransformersLoader(seconds=0.01) as loader:
        assert loader.encode(folders["byte-level"], ["a"]) is None
        assert "no answer in" in loader.reason
        loader._seconds = 120
        assert loader.encode(folders["byte-level"], ["a"]) is not None
        assert loader.reason is None


def test_a_killed_child_is_reported_with_its_status(folders):
    with TransformersLoader() as loader:
        assert loader.encode(folders["byte-level"], ["a"]) is not None
        loader._child.process.kill()
        assert loader.encode(folders["byte-level"], ["a"]) is None
        assert "status -9" in loader.reason


def test_a_child_is_used_again_and_reads_a_changed_folder_anew(folders, tmp_path):
    folder = shutil.copytree(folders["byte-level"], tmp_path / "folder")
    with TransformersLoader() as loader:
        child = loader._child.process
        before = loader.read(folder, ["a patient"])
    extension(families.load(folders["byte-level"]), tmp_path / "extended")
    shutil.copyfile(tmp_path / "extended" / "tokenizer.json", folder / "tokenizer.json")
    with TransformersLoader() as loader:
        assert loader._child.process is child
        after = loader.read(folder, ["a patient"])
    assert after.tokens > before.tokens


def test_a_child_that_met_a_fault_is_not_used_again(folders, tmp_path):
    with TransformersLoader() as loader:
        child = loader._child.process
        assert loader.encode(tmp_path, ["a"]) is None
        assert loader.encode(folders["byte-level"], ["a"]) is not None
    assert child.poll() is not None


def test_a_child_that_nobody_needs_ends(folders, monkeypatch):
    monkeypatch.setattr(loading, "_IDLE_SECONDS", 0.1)
    with TransformersLoader() as loader:
        child = loader._child.process
        assert loader.encode(folders["byte-level"], ["a"]) is not None
        assert child.poll() is None
    assert child.wait(timeout=10) is not None
