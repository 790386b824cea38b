"""`check --for`: each rule against the program itself, where it can be had here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import parts
from lexigraft import learn
from lexigraft.checks.codes import CODES
from lexigraft.checks.consumers import THETA
from lexigraft.checks.conversion import _convert, _round_trip
from lexigraft.checks.facts import read_facts
from lexigraft.cli import app
from lexigraft.errors import LexigraftError
from lexigraft.steps.check import check
from test_check import ADDED, TOKENS, edit, extend, grow_rows
from test_check_gallery import Ground, source, with_piece, written_gguf  # noqa: F401 - a fixture
from test_compat import PYTHON


@pytest.fixture
def ground(source, tmp_path):  # noqa: F811
    return Ground(source, tmp_path)


def found(path, **options):
    return {f.code for f in check(path, **options).findings if f.code.startswith("LG9")}


def test_every_rule_has_its_source():
    rules = {code: story for code, story in CODES.items() if code.startswith("LG9")}
    assert len(rules) >= 16 and all(story.source for story in rules.values())
    for name in ("gguf", "vllm", "transformers-4", "tgi"):
        assert any(f"`--for {name}`" in story.meaning for story in rules.values())


def test_the_command_line_names_the_consumers(ground):
    run = CliRunner().invoke(app, ["check", str(ground.adapter), "--for", "vllm", "--json"])
    assert run.exit_code == 1
    assert [f["code"] for f in json.loads(run.output)["findings"]] == ["LG921"]
    assert CliRunner().invoke(app, ["check", str(ground.base), "--for", "ollama"]).exit_code == 2
    with pytest.raises(LexigraftError, match="--for ollama"):
        check(ground.base, consumer="ollama")


# -- gguf


@pytest.mark.parametrize("name", ["base", "sp", "model", "sp without its model file"])
def test_the_conversion_holds_every_id_and_the_package_reads_it_back(ground, tmp_path, name):
    """Our reader and the package's give one list; the text of each id is in its place."""
    from gguf import GGUFReader, GGUFWriter

    folder = ground.copy(name.split()[0])
    if name.endswith("file"):
        (folder / "tokenizer.model").unlink()
    facts = read_facts(folder)
    converted = _convert(facts)
    ours = _round_trip(folder, converted)
    assert {i: ours[i] for i in facts.tokens.texts} == dict(facts.tokens.texts)
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_token_list(converted.texts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert GGUFReader(tmp_path / "v.gguf").fields["tokenizer.ggml.tokens"].contents() == ours


def test_the_lists_are_those_of_the_packages_own_readers(ground):
    """gguf.vocab, with which llama.cpp's older converter filled the same lists."""
    from gguf.vocab import BpeVocab, LlamaHfVocab, SentencePieceVocab

    cases = [(ground.base, BpeVocab), (ground.sp, SentencePieceVocab)]
    alone = Path(shutil.copytree(ground.sp, ground.sp.parent / "alone"))
    (alone / "tokenizer.model").unlink()
    for folder, reader in [*cases, (alone, LlamaHfVocab)]:
        theirs = list(reader(folder).all_tokens())
        ours = _convert(read_facts(folder))
        texts = [t if isinstance(t, str) else t.decode() for t, _, _ in theirs]
        assert texts == ours.texts
        if reader is not BpeVocab:  # its scores and types are filled in otherwise
            assert [score for _, score, _ in theirs] == ours.scores


@pytest.mark.parametrize("write", [parts.write_byte_level, parts.write_sentencepiece])
def test_extensions_of_learn_are_converted_and_read_id_for_id(tmp_path, write):
    """Nothing but what the base has already, and no token of llama.cpp's check text."""
    base = write(tmp_path / "base")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(parts.corpus_text(documents=40))
    result = learn(base, corpus=[corpus], tokens="30", output=tmp_path / "vocab")
    assert result.added == 30
    assert found(tmp_path / "vocab", base=base, consumer="gguf") <= {"LG916"}
    assert found(tmp_path / "vocab", consumer="gguf") <= {"LG916"}  # the manifest knows the base


def test_pieces_of_one_score_are_read_in_another_order(ground):
    """Merge scripts give new pieces the score 0: transformers ranks them, llama.cpp does not."""
    grown = with_piece(ground, "gard", "arden", "en▁that")
    codes = found(grown, base=ground.sp, consumer="gguf")
    alike = {f.code for f in check(ground.sp, consumer="gguf").findings} - {"LG916"}
    assert codes <= {"LG912", "LG916"} and not alike


def test_a_base_of_padded_rows_is_converted_where_its_model_file_is_there(ground):
    """`[PAD360]` and so on stand for rows without a token."""
    grow_rows(ground.sp, 384)
    assert found(ground.sp, consumer="gguf") <= {"LG916"}
    converted = _convert(read_facts(ground.sp))
    assert len(converted.texts) == 384 and converted.texts[-1] == "[PAD383]"


@pytest.mark.parametrize("name", ["base", "sp"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_numbers_beyond_reason_are_told_and_not_written(ground, name, file):
    """A size or an id that a file states costs no memory of its own."""
    folder, number = ground.copy(name), 2**31 - 1
    if file == "config.json":
        edit(folder / file, vocab_size=number)
    else:
        edit(folder / file, added_tokens_decoder={str(number - 1): {"content": "<far>"}})
    told = [f for f in check(folder, consumer="gguf").findings if f.code.startswith("LG9")]
    assert [f.code for f in told] == ["LG913"] and f"{number:,}" in told[0].found


def test_a_gguf_file_for_gguf_is_what_it_is(ground):
    assert not found(written_gguf(ground), consumer="gguf")


# -- vllm and tgi


def test_tied_copies_and_embedding_factors(ground):
    """llama.cpp passes over `base_layer` copies; vLLM and TGI do not."""
    path = ground.adapter / "adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if "lora_" in n}
    extra = {"base_model.model.model.embed_tokens.base_layer.weight": tensors[min(tensors)].clone()}
    save_file(tensors | extra, path, {"format": "pt"})
    assert not found(ground.adapter, consumer="gguf")
    assert found(ground.adapter, consumer="vllm") == {"LG921"}
    assert found(ground.adapter, consumer="tgi") == {"LG942"}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"use_dora": True}, "use_dora"), ({"bias": "lora_only"}, "bias"), ({"r": 64}, "rank 64")],
)
def test_what_vllm_refuses_by_the_config(ground, change, words):
    path = ground.adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "lora_" in n}, path, {"format": "pt"})
    edit(ground.adapter / "adapter_config.json", **change)
    [one] = [f for f in check(ground.adapter, consumer="vllm").findings if f.code > "LG9"]
    assert words in one.found and one.fix


# -- transformers 4


def test_numbers_that_transformers_4_reads_itself_are_no_finding(ground):
    rotary = {"rope_type": "default", "rope_theta": 500000.0}
    edit(ground.base / "config.json", rope_parameters=rotary, rope_theta=500000.0, torch_dtype="x")
    assert not found(ground.base, consumer="transformers-4")
    edit(ground.base / "config.json", rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    assert not found(ground.base, consumer="transformers-4")


READ = """
import json, sys, transformers
from transformers import AutoConfig, AutoTokenizer
assert transformers.__version__.startswith("4.57.")
told = {}
try:
    AutoTokenizer.from_pretrained(sys.argv[1])
except Exception as fault:
    told["fault"] = str(fault)
told["theta"] = AutoConfig.from_pretrained(sys.argv[1]).rope_theta
print(json.dumps(told))
"""


def told_by_4(folder: Path) -> dict:
    done = subprocess.run(
        [PYTHON, "-c", READ, folder], capture_output=True, text=True, check=True,
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.compat
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-compat: `make compat` builds it")
def test_transformers_4_does_what_the_rules_say(ground):
    base = ground.base
    assert "fault" not in told_by_4(base) and not found(base, consumer="transformers-4") - {"LG934"}
    edit(base / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    assert "TokenizersBackend does not exist" in told_by_4(base)["fault"]
    assert "LG931" in found(base, consumer="transformers-4")
    edit(
        base / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=["<|im_end|>"],
    )  # fmt: skip
    assert "no attribute 'keys'" in told_by_4(base)["fault"]
    assert "LG932" in found(base, consumer="transformers-4")
    edit(base / "tokenizer_config.json", extra_special_tokens={})
    assert "fault" not in told_by_4(base)
    edit(base / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert told_by_4(base)["theta"] == 1e4
    assert "LG933" in found(base, consumer="transformers-4")


@pytest.mark.compat
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-compat: `make compat` builds it")
def test_the_default_frequencies_are_those_of_transformers_4():
    script = """
import json
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
found = {}
for kind in CONFIG_MAPPING.keys():
    try:
        theta = getattr(CONFIG_MAPPING[kind](), "rope_theta", None)
    except Exception:
        continue
    if isinstance(theta, (int, float)) and theta != 10000:
        found[kind] = theta
print(json.dumps(found))
"""
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    assert {kind: theirs.get(kind) for kind in THETA} == THETA
    assert set(theirs) - set(THETA) <= {"dinov3_vit"}  # which reads no text


def test_an_extension_needs_no_rule(ground):
    """What lexigraft writes is loaded by all four as its base is."""
    grown = extend(ground.base, ground.base.parent / "v")
    assert read_facts(grown).tokens.tokens == TOKENS + ADDED
    for name in ("vllm", "transformers-4", "tgi"):
        assert not found(grown, base=ground.base, consumer=name)
