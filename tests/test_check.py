"""`check`: healthy folders pass, and each kind of fault is named with what to do about it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lexigraft.checks.codes import CODES, explain, markdown_table
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import BaseTokenizer, GraftRecord, LearnRecord, Manifest
from lexigraft.steps.check import CheckResult, check
from parts import SHARED, mistral_folder, write_byte_level, write_model, write_sentencepiece

TOKENS = 360
ADDED = 6


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """A tied byte-level model of 360 tokens and 360 rows."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("check") / "base"
    write_byte_level(folder, vocab_size=TOKENS)
    write_model(folder, tokens=TOKENS, tied=True, eos=TOKENS - 2)
    edit(folder / "config.json", bos_token_id=None)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """An untied SentencePiece model with both tokenizer files."""
    folder = tmp_path_factory.mktemp("check") / "sp"
    write_sentencepiece(folder, vocab_size=TOKENS)
    write_model(folder, tokens=TOKENS, tied=False, eos=2)
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, bos_token_id=1)
    return folder


@pytest.fixture
def base(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "base"))


@pytest.fixture
def sp(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "sp"))


def extend(source: Path, target: Path, *, added: int = ADDED, skip: int = 0) -> Path:
    """A copy of a tokenizer.json with `added` new merges of existing tokens at the end."""
    target.mkdir(parents=True, exist_ok=True)
    data = json.loads((source / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    plain = [t for t in sorted(vocabulary, key=vocabulary.get) if t.isalpha() and len(t) == 2]
    pairs = [(a, b) for a in plain for b in plain if a + b not in vocabulary][skip : skip + added]
    first = TokenMap.read(source).tokens
    # Loaders number added tokens behind the vocabulary: old ones have to be in it from now on.
    vocabulary |= {token["content"]: token["id"] for token in data["added_tokens"]}
    for place, (a, b) in enumerate(pairs):
        vocabulary[a + b] = first + place
        data["model"]["merges"].append([a, b])
    (target / "tokenizer.json").write_text(json.dumps(data))
    if target != source:
        shutil.copyfile(source / "tokenizer_config.json", target / "tokenizer_config.json")
    return target


def edit(path: Path, **values: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | values))


def codes(result: CheckResult, severity: str = "error") -> list[str]:
    return [f.code for f in result.findings if f.severity == severity]


def only(result: CheckResult, code: str):
    """The one error of a result, which has to carry that code."""
    assert codes(result) == [code], result.lines()
    assert not result.ok
    return next(f for f in result.findings if f.code == code)


def peft_adapter(base: Path, extended: Path, out: Path, *, rows: int, **lora: object) -> Path:
    """An adapter as PEFT saves it, trained on a resized copy of `base`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(r=2, base_model_name_or_path=str(base), **lora)
    get_peft_model(model, config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(extended / name, out / name)
    return out


def test_healthy_folders_have_nothing_above_a_note(base, sp, tmp_path):
    vocab = extend(base, tmp_path / "vocab")
    for folder in (base, sp, vocab):
        result = check(folder)
        assert result.ok
        assert not codes(result) and not codes(result, "warning"), result.lines()
    assert check(vocab, base=base).ok


def test_rows_beyond_the_tokens_are_padding(base):
    grow_rows(base, 448)
    result = check(base)
    assert result.ok
    assert codes(result, "note") == ["LG303"]
    assert "88 rows beyond the 360 tokens" in result.findings[0].found


def grow_rows(folder: Path, rows: int, *, config: bool = True) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old = tensors[name]
            tensors[name] = torch.cat([old, old.mean(0).expand(rows - len(old), -1)]).contiguous()
    save_file(tensors, path, {"format": "pt"})
    if config:
        edit(folder / "config.json", vocab_size=rows)


def test_a_grown_tokenizer_without_rows_names_all_three_numbers(base, tmp_path):
    extend(base, base)
    edit(base / "config.json", vocab_size=TOKENS + ADDED)
    fault = only(check(base), "LG302")
    assert "360 rows" in fault.found and "366 tokens" in fault.found and "says 366" in fault.found
    assert fault.fix.startswith("lexigraft graft BASE")


def test_a_config_edited_by_hand(base):
    edit(base / "config.json", vocab_size=TOKENS + 64)
    fault = only(check(base), "LG201")
    assert "424" in fault.found and "360 rows" in fault.found


def test_a_nested_config_edited_by_hand(base):
    edit(base / "config.json", text_config={"vocab_size": 7})
    assert "text_config.vocab_size = 7" in only(check(base), "LG201").found


def test_embedding_and_head_of_different_length(sp):
    path = sp / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-3].clone()
    save_file(tensors, path, {"format": "pt"})
    fault = only(check(sp), "LG304")
    assert "357" in fault.found and "360" in fault.found


def test_tie_flag_against_the_tensors(sp, base):
    edit(sp / "config.json", tie_word_embeddings=True)
    assert codes(check(sp), "note") == ["LG306"]
    edit(base / "config.json", tie_word_embeddings=False)
    only(check(base), "LG305")


def test_special_ids(base):
    edit(base / "config.json", eos_token_id=TOKENS, pad_token_id=TOKENS - 1)
    edit(base / "generation_config.json", eos_token_id=TOKENS - 2)
    fault = only(check(base), "LG202")
    assert "eos_token_id = 360" in fault.found
    edit(base / "config.json", eos_token_id=5)
    edit(base / "generation_config.json", eos_token_id=5)
    result = check(base)
    assert result.ok
    assert codes(result, "warning") == ["LG203"]
    assert "'<|endoftext|>' (id 358)" in result.findings[0].found


def test_a_stale_tokenizer_json_beside_an_extended_model_file(sp):
    add_pieces(sp / "tokenizer.model", ["▁hospital", "▁patient"])
    fault = only(check(sp), "LG102")
    assert fault.where == "tokenizer.json"
    assert "tokenizer.json is the odd one out" in fault.found


def test_a_stale_model_file_beside_an_extended_tokenizer_json(sp):
    extend(sp, sp)
    grow_rows(sp, TOKENS + ADDED)
    fault = only(check(sp), "LG102")
    assert fault.where == "tokenizer.model"


def add_pieces(path: Path, pieces: list[str], *, score: float = -9999.0) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    for piece in pieces:
        proto.pieces.add(piece=piece, score=score)
    path.write_bytes(proto.SerializeToString())


def test_one_token_of_another_tokenizer(sp):
    data = json.loads((sp / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    one, two = [t for t, i in vocabulary.items() if i in (340, 341)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (sp / "tokenizer.json").write_text(json.dumps(data))
    fault = only(check(sp), "LG102")
    assert "for id 340" in fault.found


def test_added_tokens_that_leave_a_hole(sp):
    (sp / "tokenizer.json").unlink()
    (sp / "added_tokens.json").write_text(json.dumps({"<human>": TOKENS + 120}))
    grow_rows(sp, TOKENS + 192)
    fault = only(check(sp), "LG103")
    assert "tokenizer.model is older than added_tokens.json" in fault.found
    assert "480" in fault.found and "360 tokens" in fault.found


def test_added_tokens_inside_the_vocabulary(sp):
    (sp / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "<s>": 1}))
    result = check(sp)
    assert result.ok
    assert codes(result, "note") == ["LG104"]
    (sp / "added_tokens.json").write_text(json.dumps({"<human>": 7}))
    only(check(sp), "LG102")


def test_an_added_token_that_only_the_settings_know(base):
    edit(
        base / "tokenizer_config.json",
        added_tokens_decoder={"360": {"content": "<new>", "special": True}},
    )
    grow_rows(base, 448)
    assert codes(check(base), "warning") == ["LG105"]


def test_damaged_files_are_findings(base):
    (base / "tokenizer.json").write_text("{")
    (base / "generation_config.json").write_text("[]")
    assert sorted(codes(check(base))) == ["LG101", "LG204"]


@pytest.mark.parametrize("damage", ["cut", "index", "outside", "pickle"])
def test_damaged_weights_are_findings(base, damage):
    weights = base / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":
        weights.rename(base / "pytorch_model.bin")
    else:
        weights.unlink()
        name = "model-00002-of-00002.safetensors" if damage == "index" else "../model.safetensors"
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    fault = only(check(base), "LG301")
    words = {"cut": "truncated", "index": "lacks", "outside": "..", "pickle": "pytorch_model.bin"}
    assert words[damage] in fault.found
    assert fault.needed and fault.fix


def test_empty_tensors_of_the_model(base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = torch.zeros(0)
    save_file(tensors, path, {"format": "pt"})
    assert "ZeRO-3" in only(check(base), "LG307").found


FORMS = {
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "automatic": {"target_modules": ["q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [TOKENS, TOKENS + ADDED - 1]},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_origin_case_is_explained_in_one_line(untied, tmp_path, form):
    extended = extend(untied, tmp_path / "vocab")
    adapter = peft_adapter(
        untied, extended, tmp_path / "adapter", rows=TOKENS + ADDED, **FORMS[form]
    )
    result = check(untied, adapter=adapter)
    fault = only(result, "LG401")
    assert "has 366 rows" in fault.found and "has 360" in fault.found
    assert "6 tokens were added" in fault.found
    assert fault.fix == f"lexigraft merge {untied} {adapter} -o MERGED"
    lines = [line for line in result.lines() if line.startswith("error LG401")]
    assert len(lines) == 1 and "\n" not in lines[0] and fault.fix in lines[0]
    assert check(adapter, base=untied).to_json()["findings"] == result.to_json()["findings"]


@pytest.fixture
def origin(untied, tmp_path):
    """A base, and an adapter of it trained with six tokens more."""
    extended = extend(untied, tmp_path / "vocab")
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    return untied, peft_adapter(untied, extended, tmp_path / "a", rows=TOKENS + ADDED, **lora)


def test_an_adapter_alone_is_healthy(origin):
    result = check(origin[1])
    assert result.ok and not codes(result, "warning"), result.lines()


def test_an_adapter_on_the_grafted_model_is_healthy(origin, tmp_path):
    base, adapter = origin
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "tokenizer.model").unlink()
    extend(base, model)
    grow_rows(model, TOKENS + ADDED)
    result = check(model, adapter=adapter)
    assert result.ok and not codes(result, "warning"), result.lines()


def test_an_adapter_without_tokenizer(origin):
    base, adapter = origin
    (adapter / "tokenizer.json").unlink()
    assert "--tokenizer" in only(check(base, adapter=adapter), "LG405").fix


def test_an_adapter_of_another_extension(origin, tmp_path):
    base, adapter = origin
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "tokenizer.model").unlink()
    extend(base, model, skip=ADDED)
    grow_rows(model, TOKENS + ADDED)
    fault = only(check(model, adapter=adapter), "LG404")
    assert "id 360" in fault.found


def test_an_adapter_whose_trainer_cut_padding_off(origin, tmp_path):
    base, adapter = origin
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "tokenizer.model").unlink()
    extend(base, model)
    grow_rows(model, 448)
    result = check(model, adapter=adapter)
    assert result.ok
    assert codes(result, "warning") == ["LG402"]


def test_new_tokens_on_padding_rows_of_the_base(untied, tmp_path):
    base = Path(shutil.copytree(untied, tmp_path / "base"))
    grow_rows(base, 448)
    extended = extend(base, tmp_path / "vocab")
    lora = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = peft_adapter(base, extended, tmp_path / "a", rows=448, **lora)
    result = check(base, adapter=adapter)
    assert result.ok
    assert codes(result, "warning") == ["LG406"]


def test_new_rows_that_nobody_saved(untied, tmp_path):
    extended = extend(untied, tmp_path / "vocab")
    adapter = peft_adapter(untied, extended, tmp_path / "a", rows=TOKENS, target_modules=["q_proj"])
    only(check(untied, adapter=adapter), "LG407")


def test_an_empty_adapter_tensor(origin):
    base, adapter = origin
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "embed_tokens" in name)
    save_file(tensors | {name: torch.zeros(0)}, path, {"format": "pt"})
    result = check(base, adapter=adapter)
    assert "LG403" in codes(result)
    assert any("ZeRO-3" in f.found for f in result.findings)


def test_an_adapter_of_another_model(origin, tmp_path):
    _, adapter = origin
    other = tmp_path / "other"
    write_sentencepiece(other, vocab_size=TOKENS)
    write_model(other, tokens=TOKENS, hidden=48, eos=2)
    assert "LG408" in codes(check(other, adapter=adapter))


def test_a_kind_of_adapter_that_merge_refuses_is_a_warning(untied, tmp_path):
    adapter = peft_adapter(untied, untied, tmp_path / "a", rows=TOKENS, target_modules=["q_proj"])
    edit(adapter / "adapter_config.json", use_qalora=True)
    result = check(untied, adapter=adapter)
    assert result.ok
    assert codes(result, "warning") == ["LG410"]


def write_manifest(base: Path, folder: Path, *, rows: int) -> None:
    old, new = TokenMap.read(base), TokenMap.read(folder)
    origin = BaseTokenizer(name="base", token_map=old.hash, tokens=old.tokens)
    learned = LearnRecord(
        base=origin,
        family="byte-level BPE",
        token_map=new.hash,
        content="",
        tokens=new.tokens,
        first_id=old.tokens,
        added=new.tokens - old.tokens,
        settings={},
        sources={},
        versions={},
        probe=[],
    )
    grafted = GraftRecord(
        base=origin,
        rows_before=old.tokens,
        tied=True,
        base_rows={},
        token_map=new.hash,
        tokens=new.tokens,
        first_id=old.tokens,
        rows=rows,
        pad_to=1,
        init="mean",
        seed=0,
        new_rows={},
        versions={},
    )
    Manifest(records=[learned, grafted]).write(folder)


@pytest.fixture
def grafted(base, tmp_path) -> Path:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    extend(base, model)
    grow_rows(model, TOKENS + ADDED)
    write_manifest(base, model, rows=TOKENS + ADDED)
    return model


def test_a_folder_that_agrees_with_its_manifest(grafted, base):
    result = check(grafted, base=base)
    assert result.ok and not codes(result, "warning"), result.lines()


def test_a_swapped_tokenizer(grafted, base):
    extend(base, grafted, skip=ADDED)
    fault = only(check(grafted), "LG502")
    assert "its base part agrees" in fault.found


def test_rows_that_the_manifest_does_not_know(grafted):
    grow_rows(grafted, 448)
    only(check(grafted), "LG503")


def test_a_tokenizer_of_another_lineage(grafted):
    edit(grafted / "tokenizer_config.json", lexigraft={"manifest": "0" * 64})
    assert codes(check(grafted), "warning") == ["LG504"]
    manifest = Manifest.read(grafted)
    earlier = Manifest(records=manifest.records[:1]).hash
    edit(grafted / "tokenizer_config.json", lexigraft={"manifest": earlier})
    assert not codes(check(grafted), "warning")


def test_a_damaged_manifest(grafted):
    (grafted / "lexigraft.json").write_text('{"format": 99}')
    only(check(grafted), "LG501")


def test_the_manifest_tells_which_tokenizer_file_is_wrong(sp):
    write_manifest(sp, sp, rows=TOKENS)
    data = json.loads((sp / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    one, two = [t for t, i in vocabulary.items() if i in (340, 341)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (sp / "tokenizer.json").write_text(json.dumps(data))
    result = check(sp)
    assert [f.where for f in result.findings if f.code == "LG102"] == ["tokenizer.json"]


def test_against_the_base(grafted, base):
    path = grafted / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "model.norm.weight" in only(check(grafted, base=base), "LG603").where
    other = base.parent / "other"
    write_byte_level(other, vocab_size=TOKENS - 40)
    assert "LG601" in codes(check(grafted, base=other))


def test_missing_and_empty_folders(tmp_path, base):
    for call in (
        lambda: check(tmp_path / "nowhere"),
        lambda: check(make(tmp_path / "empty")),
        lambda: check(base, adapter=base),
    ):
        with pytest.raises(LexigraftError) as fault:
            call()
        assert fault.value.needed and fault.value.fix


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_every_code_in_the_source_has_a_story_and_every_story_is_raised():
    import re

    import lexigraft.checks

    folder = Path(lexigraft.checks.__file__).parent
    text = "".join(p.read_text() for p in folder.glob("*.py") if p.name != "codes.py")
    assert set(re.findall(r"LG\d\d\d", text)) == set(CODES)
    for code, story in CODES.items():
        assert all((story.meaning, story.cause, story.example, story.mend)), code
        assert explain(code.lower())[0] == f"{code} ({story.severity}): {story.meaning}"


def test_the_docs_hold_the_table_of_codes():
    text = (Path(__file__).parents[1] / "docs" / "check.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| LG")]
    assert rows == markdown_table()


def test_explain_needs_no_folder():
    from typer.testing import CliRunner

    from lexigraft.cli import app

    told = CliRunner().invoke(app, ["check", "--explain", "LG302"])
    assert told.exit_code == 0 and "lexigraft graft BASE VOCAB" in told.output
    for wrong in (["check"], ["check", "--explain", "LG999"]):
        assert isinstance(CliRunner().invoke(app, wrong).exception, LexigraftError)


def test_origin_case_with_the_real_tokenizer(tmp_path):
    """Mistral's 32,000 pieces against rows of 33,296: names the numbers of the report."""
    torch.set_num_threads(1)
    base = mistral_folder(tmp_path / "base")
    write_model(base, tokens=32000, hidden=8, layers=1, eos=2)
    for name in ("config.json", "generation_config.json"):
        edit(base / name, bos_token_id=1)
    adapter = tmp_path / "adapter"
    extend(base, adapter, added=1296)
    rows = {
        f"base_model.model.{name}": torch.zeros(33296, 8)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file(rows, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "lexigraft", "check", str(base), "--adapter", str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("error LG401"))
    assert "33,296 rows" in line and "32,000" in line and "1,296 tokens" in line
    assert f"lexigraft merge {base} {adapter} -o MERGED" in line
    told = explained(base, adapter)
    assert told["lines"] == [line] and not told["heavy"]


def test_the_origin_case_in_half_a_second_without_torch(origin):
    told = explained(*origin)
    assert [line[:11] for line in told["lines"]] == ["error LG401"] and not told["heavy"]
    assert told["seconds"] < 0.5


def test_two_hundred_shards_in_half_a_second_without_torch(tmp_path):
    folder = write_byte_level(tmp_path / "model", vocab_size=TOKENS)
    names = [f"model-{i:05d}-of-00200.safetensors" for i in range(1, 201)]
    weight_map = {}
    for place, name in enumerate(names):
        tensors = {
            f"model.layers.{place}.mlp.{part}_proj.weight": torch.zeros(2, 2)
            for part in ("gate", "up", "down")
        }
        if place == 0:
            tensors["model.embed_tokens.weight"] = torch.zeros(TOKENS, 2)
            tensors["lm_head.weight"] = torch.zeros(TOKENS, 2)
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": TOKENS,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    told = explained(folder)
    assert told["ok"] and not told["heavy"] and told["seconds"] < 0.5


def explained(folder: Path, adapter: Path | None = None) -> dict:
    """A check in a process of its own: its lines, its CPU seconds, and what came in for nothing.

    CPU time, imports of `check` included, so that a busy machine does not decide.
    """
    script = (
        "import json, sys, time; start = time.process_time()\n"
        "from lexigraft.steps.check import check\n"
        "result = check(sys.argv[1], adapter=sys.argv[2:])\n"
        "print(json.dumps({'ok': result.ok, 'lines': [one.line() for one in result.findings],\n"
        "    'seconds': time.process_time() - start,\n"
        "    'heavy': [m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules]}))"
    )
    words = [str(folder), *([str(adapter)] if adapter else [])]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="the shared tokenizers are not here")
def test_real_tokenizers_are_healthy():
    for folder in sorted((SHARED / "tokenizers").iterdir()):
        if any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            result = check(folder)
            assert result.ok and not codes(result, "warning"), (folder, result.lines())


@pytest.mark.real
@pytest.mark.matrix
@pytest.mark.skipif(not SHARED.exists(), reason="the shared tokenizers are not here")
def test_what_the_docs_say_of_tokenizers_that_others_made(tmp_path):
    """Each command of the case study is run, and prints what stands there."""
    folder = SHARED / "tokenizers"
    chinese, llama = folder / "chinese_llama2_merged_sp", folder / "llama2_hf"
    copies = {"chinese-llama-2": chinese, "mixed": chinese, "llama-2": llama,
              "internlm": folder / "internlm_sp", "llama-2-from-npm": folder / "mistral_v1_hf"}  # fmt: skip
    for name, source in copies.items():
        shutil.copytree(source, tmp_path / name)
    shutil.copyfile(llama / "tokenizer.json", tmp_path / "mixed" / "tokenizer.json")
    page = (Path(__file__).parents[1] / "docs" / "check.md").read_text()
    blocks = re.findall(r"```console\n\$ lexigraft (check .*)\n((?s:.*?))```", page)
    assert len(blocks) >= 6
    for command, printed in blocks:
        done = subprocess.run(
            [sys.executable, "-m", "lexigraft", *command.split()],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.stdout == printed, done.stderr
    assert codes(check(folder / "deepseek_v3_hf"), "note") == ["LG109"]
    assert codes(check(folder / "gemma3_hf"), "note") == ["LG106"]
