"""`graft`: laws 6 to 11, 17 and 18 on tiny real models. `pytest tests/test_graft.py`."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import launching
import parts
from extend import extend
from lexigraft.checkpoints.architectures import vocabulary_of
from lexigraft.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from lexigraft.checkpoints.header import header_bytes
from lexigraft.embeddings import choose
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap
from lexigraft.files import sha256_file
from lexigraft.manifest import Manifest
from lexigraft.steps.graft import graft

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer and its number of tokens."""
    folder = parts.write_byte_level(tmp_path_factory.mktemp("tokenizer"), vocab_size=330)
    return folder, TokenMap.read(folder).tokens


@pytest.fixture
def make(tokenizer, tmp_path):
    """make(added, padding=..., **model) -> (BASE, VOCAB)."""

    def build(added: int, *, padding: int = 0, **model):
        folder, tokens = tokenizer
        base = Path(shutil.copytree(folder, tmp_path / "base"))
        parts.write_model(base, tokens=tokens, rows=tokens + padding, **model)
        return base, extend(base, tmp_path / "vocab", added, literal=min(1, added))

    return build


def logits(folder: Path, ids: list[int]):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (sha256_file(path), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def snapshot_hashes(folder: Path) -> dict[str, str]:
    return {name: content for name, (content, _) in snapshot(folder).items()}


# -- laws 7 to 11


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("added", "padding", "pad_to", "dtype", "shard_size"),
    [
        (5, 28, 1, "float32", None),  # lands on the base's padding rows
        (40, 28, 64, "bfloat16", "20KB"),  # fills them and grows
        (7, 0, 64, "float16", None),
        (7, 0, 1, "bfloat16", "20KB"),
        (1, 1, 1, "float32", "20KB"),  # fills exactly
    ],
)
def test_laws_of_the_checkpoint(tied, added, padding, pad_to, dtype, shard_size, make, tmp_path):
    base, vocab = make(added, padding=padding, tied=tied, dtype=dtype, shard_size=shard_size)
    inputs = snapshot(base), snapshot(vocab)
    result = graft(base, vocab, output=tmp_path / "model", pad_to=pad_to)
    assert (snapshot(base), snapshot(vocab)) == inputs

    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "model")
    old, new = vocabulary_of(before), vocabulary_of(after)
    tokens = TokenMap.read(base).tokens
    total = tokens + added
    expected_rows = max(tokens + padding, -(-total // pad_to) * pad_to)
    told = result.to_json() | {"seconds": 0}
    assert [found["rows"] for found in told.pop("row_statistics")] == [added] * (1 if tied else 2)
    assert told == {
        "output": str(tmp_path / "model"),
        "rows_before": tokens + padding,
        "rows_after": expected_rows,
        "tokens": total,
        "added": added,
        "init": str(choose("auto", tied=tied)),
        "tied": tied,
        "bytes_copied": result.bytes_copied,
        "bytes_written": sum((after.folder / name).stat().st_size for name in after.shards),
        "seconds": 0,
    }
    assert after.tensors.keys() == before.tensors.keys()  # law 10: tied stays tied
    assert (old.tied, new.tied) == (tied, tied)
    assert after.config["vocab_size"] == new.rows == expected_rows  # laws 8, 11
    changed = {"vocab_size": expected_rows}
    assert after.config == before.config | changed
    for name in before.tensors:
        a, b = before.read(name), after.read(name)
        if name not in old.names:
            assert a.tobytes() == b.tobytes()
            continue
        assert a[:tokens].tobytes() == b[:tokens].tobytes()  # law 7
        assert a[total:].tobytes() == b[total : len(a)].tobytes()  # the base's padding rows
        mean = a[:tokens].astype(np.float64).mean(axis=0)
        padding_rows = b[max(len(a), total) :]
        assert (padding_rows == mean.astype(DTYPES[dtype])).all()  # law 9
        assert len(np.unique(b[tokens:total], axis=0)) == added  # initialised, and not alike

    plain = logits(base, list(range(20)))[:, :tokens]
    grown = logits(tmp_path / "model", list(range(20)))
    np.testing.assert_allclose(grown[:, :tokens], plain, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_of_the_pieces_of_each_matrix(tied, make, tmp_path):
    base, vocab = make(12, tied=tied)
    graft(base, vocab, output=tmp_path / "model", init="mean")
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokens, new = TokenMap.read(base).tokens, TokenMap.read(vocab)
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "model")
    for name in vocabulary_of(before).names:
        old_rows, rows = before.read(name), after.read(name)
        for token_id in range(tokens, new.tokens):
            pieces = engine.encode(new.texts[token_id]).ids
            np.testing.assert_allclose(
                rows[token_id], old_rows[pieces].mean(axis=0), rtol=1e-5, atol=1e-7
            )


def test_padding_rows_of_a_head_take_little_probability(make, tmp_path):
    base, vocab = make(3, tied=False)
    result = graft(base, vocab, output=tmp_path / "model", pad_to=256)
    scores = logits(tmp_path / "model", list(range(40))).astype(np.float64)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    padding = result.rows_after - result.tokens
    assert padding > 100
    assert (shares[:, result.tokens :].sum(axis=1) <= padding / result.rows_after).all()


def test_generation_settings_and_chat_template_stay(make, tmp_path):
    base, vocab = make(3)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    generation = json.loads((base / "generation_config.json").read_text()) | {"top_k": 7}
    (base / "generation_config.json").write_text(json.dumps(generation))
    graft(base, vocab, output=tmp_path / "model")
    from transformers import AutoTokenizer, GenerationConfig

    old, new = (
        AutoTokenizer.from_pretrained(base),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    settings = GenerationConfig.from_pretrained(tmp_path / "model")
    assert settings.top_k == 7
    assert new.decode([settings.eos_token_id]) == old.decode([generation["eos_token_id"]])
    assert (new.eos_token, new.pad_token) == (old.eos_token, old.pad_token)
    assert new.chat_template == template
    assert len(new) == len(old) + 3


def test_side_files_are_copied_and_other_weights_are_not(make, tmp_path, capsys):
    base, vocab = make(3)
    for name in (
        "README.md",
        "modeling_own.py",
        "extra/notes.txt",
        "onnx/model.onnx",
        ".gitattributes",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("x")
    for name in ("model.gguf", "consolidated.safetensors"):
        (base / name).write_text("x")
    (base / "added_tokens.json").write_text("{}")  # a tokenizer file that VOCAB does not have
    graft(base, vocab, output=tmp_path / "model")
    out = tmp_path / "model"
    kept = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert kept == {
        *("README.base.md", "modeling_own.py", "extra/notes.txt", "config.json", "lexigraft.json"),
        *("generation_config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"),
    }
    said = capsys.readouterr().err
    assert all(name in said for name in ("model.gguf", "consolidated.safetensors", "onnx/"))
    assert "README.md is about the base" in said  # which the result is not


def test_the_manifest_binds_rows_and_tokenizer(make, tmp_path):
    base, vocab = make(6, padding=2, dtype="bfloat16")
    (vocab / "new_tokens.jsonl").write_text('{"id": 1}\n')
    out = tmp_path / "model"
    graft(base, vocab, output=out, init="mean", seed=3)
    manifest = Manifest.read(out)
    record = manifest.last("graft")
    tokens = TokenMap.read(base).tokens
    after = Checkpoint.open(out)
    for name in vocabulary_of(after).names:
        rows = after.read(name)
        assert record.base_rows[name] == hashlib.sha256(rows[:tokens].tobytes()).hexdigest()
        fresh = rows[tokens : tokens + 6].tobytes()
        assert record.new_rows[name] == hashlib.sha256(fresh).hexdigest()
    assert record.base.token_map == TokenMap.read(base).hash
    assert record.token_map == TokenMap.read(out).hash == TokenMap.read(vocab).hash
    assert (record.first_id, record.tokens, record.rows, record.pad_to, record.seed) == (
        *(tokens, tokens + 6, after.config["vocab_size"], 64, 3),
    )
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["lexigraft"] == {"manifest": manifest.hash, "init": "mean", "seed": 3}
    assert settings["eos_token"] == "<|endoftext|>"
    assert (out / "new_tokens.jsonl").read_text() == '{"id": 1}\n'
    assert not any(str(tmp_path) in path.read_text() for path in out.glob("*.json"))


def test_sharded_and_single_give_the_same_tensors(make, tmp_path):
    base, vocab = make(40, padding=3)
    single = tmp_path / "single"
    graft(base, vocab, output=single)
    (base / SINGLE).unlink()
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens, rows=tokens + 3, shard_size="20KB")
    graft(base, vocab, output=tmp_path / "sharded")
    one, many = Checkpoint.open(single), Checkpoint.open(tmp_path / "sharded")
    assert len(many.shards) > 2
    assert one.tensors.keys() == many.tensors.keys()
    assert all(one.read(name).tobytes() == many.read(name).tobytes() for name in one.tensors)
    index = json.loads((many.folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == many.bytes
    names = sorted(path.name for path in base.glob("model-*"))
    assert many.shards == names


def test_sentencepiece_tokenizers_without_a_fast_file(tmp_path):
    base = parts.write_sentencepiece(tmp_path / "base", fast=False)
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens, eos=2)
    vocab = extend(base, tmp_path / "vocab", 9)
    result = graft(base, vocab, output=tmp_path / "model")
    assert (result.tokens, result.rows_after) == (tokens + 9, 448)
    assert not (tmp_path / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize("settings_of_vocab", [True, False])
def test_an_added_token_is_read_by_classes_that_believe_their_settings(
    settings_of_vocab, make, tmp_path
):
    """VOCAB may come from a tool that writes tokenizer.json alone."""
    from transformers import AutoTokenizer

    base, vocab = make(5)
    known = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    listed = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in known}
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": listed}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (vocab / "tokenizer_config.json").unlink()
    if settings_of_vocab:
        shutil.copyfile(base / "tokenizer_config.json", vocab / "tokenizer_config.json")
    graft(base, vocab, output=tmp_path / "model")
    last = TokenMap.read(vocab).tokens - 1
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded(f"<term {last}>")["input_ids"] == [last]
    after = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert after["added_tokens_decoder"].items() >= listed.items()


def test_no_stale_tokenizer_file_is_left(tmp_path):
    base = parts.write_sentencepiece(tmp_path / "base", fast=True)
    parts.write_model(base, tokens=400, eos=2)
    vocab = extend(base, tmp_path / "vocab", 9)
    graft(base, vocab, output=tmp_path / "model")
    assert (base / "tokenizer.json").exists()
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    assert TokenMap.read(tmp_path / "model").tokens == 409


@pytest.mark.parametrize("init", ["mean", "mean-all", "first", "last", "random"])
def test_every_method_can_be_asked_for(init, make, tmp_path):
    base, vocab = make(4)
    result = graft(base, vocab, output=tmp_path / "model", init=init, seed=5)
    assert result.init == init
    again = graft(base, vocab, output=tmp_path / "again", init=init, seed=5)
    assert again.init == init
    assert filecmp.cmp(tmp_path / "model" / SINGLE, tmp_path / "again" / SINGLE, shallow=False)


def test_link_shares_untouched_shards(make, tmp_path, capsys):
    base, vocab = make(4, tied=True, layers=4, shard_size="40KB")
    plain = graft(base, vocab, output=tmp_path / "plain")
    assert "--link" not in capsys.readouterr().err
    linked = graft(base, vocab, output=tmp_path / "linked", link=True)
    for name in Checkpoint.open(base).shards:
        assert filecmp.cmp(tmp_path / "plain" / name, tmp_path / "linked" / name, shallow=False)
    shared = [p for p in (tmp_path / "linked").glob("*.safetensors") if p.samefile(base / p.name)]
    assert shared
    saved = sum(path.stat().st_size for path in shared)
    assert plain.bytes_written - linked.bytes_written == saved
    said = capsys.readouterr().err
    assert f"{len(shared)} of {len(Checkpoint.open(base).shards)} files of weights" in said
    assert f"those of {base}: a program that writes into one in place changes both" in said


def test_link_says_where_nothing_can_be_linked(make, tmp_path, capsys):
    base, vocab = make(4, tied=True)
    graft(base, vocab, output=tmp_path / "model", link=True)
    assert "nothing to link" in capsys.readouterr().err  # the only file holds the embedding
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == base.stat().st_dev:
        pytest.skip("this machine has no second file system at /dev/shm")
    (base / SINGLE).unlink()
    parts.write_model(base, tokens=TokenMap.read(base).tokens, layers=4, shard_size="20KB")
    with tempfile.TemporaryDirectory(dir=other) as place:
        dry = graft(base, vocab, output=f"{place}/model", link=True, dry_run=True)
        assert "on another disk" in capsys.readouterr().err
        real = graft(base, vocab, output=f"{place}/model", link=True)
        assert "could be linked" in capsys.readouterr().err
    assert dry.bytes_written == real.bytes_written > Checkpoint.open(base).bytes


def test_a_dry_run_tells_the_truth_and_writes_nothing(make, tmp_path):
    base, vocab = make(40, padding=4, tied=False, shard_size="20KB")
    before = sorted(tmp_path.rglob("*"))
    dry = graft(base, vocab, output=tmp_path / "model", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    real = graft(base, vocab, output=tmp_path / "model")
    assert (dry.bytes_copied, dry.bytes_written) == (real.bytes_copied, real.bytes_written)
    plan = {entry["tensor"]: entry for entry in dry.to_json()["plan"]}
    after = Checkpoint.open(tmp_path / "model")
    assert {name: entry["shape"] for name, entry in plan.items()} == {
        name: list(tensor.shape) for name, tensor in after.tensors.items()
    }
    assert sum(entry["bytes_copied"] for entry in plan.values()) == real.bytes_copied
    tensors, tables = Checkpoint.open(base).tensors, vocabulary_of(after).names
    for name, entry in plan.items():
        assert entry["source"] == tensors[name].path.name
        whole = entry["bytes_copied"] + entry["bytes_computed"]
        assert whole == entry["bytes_written"] == after.tensors[name].bytes
        assert entry["rule"] == ("copied and computed" if name in tables else "copied")
    assert [plan[name]["init"] for name in tables] == real.init.split(",")
    line = next(line for line in dry.lines() if "lm_head.weight" in line)
    assert line.endswith(f"computed {plan['lm_head.weight']['bytes_computed']:,} "
                         "(new rows by half-first)")  # fmt: skip
    linked = graft(base, vocab, output=tmp_path / "model", link=True, force=True, dry_run=True)
    assert {entry["rule"] for entry in linked.plan} == {"linked", "copied and computed"}
    assert "plan" not in real.to_json()


# -- law 6


def test_the_same_inputs_give_the_same_bytes(make, tmp_path):
    base, vocab = make(30, shard_size="20KB", dtype="bfloat16")
    code = (
        "import sys\n"
        "from lexigraft.checkpoints import write\n"
        "write.WRITERS = int(sys.argv[4])\n"
        "from lexigraft.steps.graft import graft\n"
        "graft(sys.argv[1], sys.argv[2], output=sys.argv[3])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    for seed, threads in (("0", "1"), ("1", "4")):
        command = [sys.executable, "-c", code, base, vocab, tmp_path / f"out{seed}", threads]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    one, other = snapshot(tmp_path / "out0"), snapshot(tmp_path / "out1")
    assert {name: h for name, (h, _) in one.items()} == {name: h for name, (h, _) in other.items()}


# -- bad input: one message, nothing written


def refused(base, vocab, out, **options) -> LexigraftError:
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    with pytest.raises(LexigraftError) as fault:
        graft(base, vocab, output=out, **options)
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} == before
    assert fault.value.needed
    assert fault.value.fix
    return fault.value


def test_a_foreign_tokenizer_is_named_by_its_first_differing_id(make, tmp_path):
    base, vocab = make(5)
    path = vocab / "tokenizer.json"
    data = json.loads(path.read_text())
    moved = next(token for token, i in data["model"]["vocab"].items() if i == 270)
    data["model"]["vocab"]["zyx"] = data["model"]["vocab"].pop(moved)
    data["model"]["merges"] = []
    path.write_text(json.dumps(data))
    fault = refused(base, vocab, tmp_path / "model")
    assert "270" in fault.found
    assert repr(moved) in fault.found
    assert "'zyx'" in fault.found


def test_a_smaller_tokenizer_is_named_by_the_first_missing_id(tokenizer, make, tmp_path):
    base, vocab = make(5)
    tokens = TokenMap.read(base).tokens
    shutil.copyfile(vocab / "tokenizer.json", base / "tokenizer.json")
    parts.write_model(base, tokens=tokens + 5)
    fault = refused(base, tokenizer[0], tmp_path / "model")
    assert f"id {tokens} is" in fault.found
    assert "nothing" in fault.found


def test_nothing_to_add(make, tmp_path):
    base, _ = make(5)
    fault = refused(base, extend(base, tmp_path / "same", 0), tmp_path / "model")
    assert "adds no token" in fault.found


def test_a_config_edited_by_hand_is_set_right(make, tmp_path, capsys):
    """The weights are believed; all numbers are named, and the result is that of a sound base."""
    base, vocab = make(5)
    sound = tmp_path / "sound"
    graft(base, vocab, output=sound)
    config = json.loads((base / "config.json").read_text())
    rows = config["vocab_size"]
    config["vocab_size"] = rows + 14
    (base / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    graft(base, vocab, output=tmp_path / "model")
    said = capsys.readouterr().err
    for words in (f"{rows} rows", f"says {rows + 14}", f"VOCAB has {rows + 5}", "are believed"):
        assert words in said
    assert snapshot_hashes(tmp_path / "model") == snapshot_hashes(sound)


def test_a_half_edited_base_is_explained(make, tmp_path):
    """Tokenizer and config were replaced, the weights were not."""
    base, vocab = make(5)
    rows = Checkpoint.open(base).config["vocab_size"]
    shutil.copyfile(vocab / "tokenizer.json", base / "tokenizer.json")
    fault = refused(base, extend(base, tmp_path / "more", 2), tmp_path / "model")
    assert f"{rows} rows" in fault.found
    assert f"{rows + 5} tokens" in fault.found
    assert "original tokenizer files" in fault.fix


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"model_type": "gemma3n"},
        {"model_type": "mllama"},
    ],
)
def test_what_cannot_be_grown_is_refused(settings, make, tmp_path):
    base, vocab = make(5)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | settings))
    assert isinstance(refused(base, vocab, tmp_path / "model"), RefusalError)


def test_output_exists(make, tmp_path):
    base, vocab = make(5)
    out = tmp_path / "model"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert "exists" in refused(base, vocab, out).found
    graft(base, vocab, output=out, force=True)
    assert not (out / "mine.txt").exists()
    for place in (base, vocab):
        assert "itself" in refused(base, vocab, place, force=True).found


@pytest.mark.parametrize("options", [{"init": "best"}, {"pad_to": 0}])
def test_options_out_of_range(options, make, tmp_path):
    base, vocab = make(5)
    refused(base, vocab, tmp_path / "model", **options)


@pytest.mark.parametrize("what", ["base", "vocab"])
def test_missing_folders(what, make, tmp_path):
    base, vocab = make(5)
    given = {"base": base, "vocab": vocab} | {what: tmp_path / "nowhere"}
    assert "nowhere" in refused(given["base"], given["vocab"], tmp_path / "model").found


def test_odd_entries_of_a_folder_are_passed_over(make, tmp_path):
    base, vocab = make(5)
    (base / "empty").mkdir()
    os.mkfifo(base / "pipe")  # neither a file nor a folder: passed over
    (base / "dangling.txt").symlink_to(tmp_path / "nowhere")
    result = graft(base, vocab, output=tmp_path / "model")
    assert result.tokens == TokenMap.read(vocab).tokens
    assert not (tmp_path / "model" / "pipe").exists()


def test_no_pickle_is_opened(make, tmp_path):
    """Law 18: a hostile pickle beside the weights is neither run nor copied."""
    import pickle

    base, vocab = make(5)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    (base / "training_args.bin").write_bytes(pickle.dumps(Evil()))
    graft(base, vocab, output=tmp_path / "model")
    assert not (tmp_path / "owned").exists()
    assert not list((tmp_path / "model").glob("*.bin"))


# -- law 17


def large(base: Path, tokens: int, gigabytes: float) -> Path:
    """Give `base` weights that take a while to copy: mostly zeros, which take no room here."""
    width = 64
    rest = int(gigabytes * 1e9) // 2 // width
    tensors = [
        ("model.embed_tokens.weight", "BF16", (tokens, width)),
        ("model.layers.0.mlp.up_proj.weight", "BF16", (rest, width)),
    ]
    head = header_bytes(tensors, {"format": "pt"})
    table = np.random.default_rng(0).standard_normal((tokens, width)).astype(ml_dtypes.bfloat16)
    (base / SINGLE).write_bytes(head + table.tobytes())
    os.truncate(base / SINGLE, len(head) + 2 * width * (tokens + rest))
    config = {"model_type": "llama", "vocab_size": tokens, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    return base


def kill_during(base: Path, vocab: Path, out: Path, after: float) -> bool:
    """Start graft, kill it `after` seconds from when its partial folder appears."""
    code = "import sys; from lexigraft.steps.graft import graft; "
    code += "graft(sys.argv[1], sys.argv[2], output=sys.argv[3])"
    with subprocess.Popen([sys.executable, "-c", code, base, vocab, out]) as child:
        while child.poll() is None and not list(out.parent.glob(f"{out.name}.partial-*")):
            time.sleep(0.002)
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
    return child.returncode == -signal.SIGKILL


def assert_killed_cleanly(base, vocab, out, after):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in base.iterdir()}
    names = {path.name: sha256_file(path) for path in base.iterdir() if path.name != SINGLE}
    was_killed = kill_during(base, vocab, out, after)
    if out.exists():  # it came too late: then the output is whole, down to the last row
        record, model = Manifest.read(out).last("graft"), Checkpoint.open(out)
        for name, expected in record.new_rows.items():
            rows = model.read(name, record.first_id, record.tokens)
            assert hashlib.sha256(rows.tobytes()).hexdigest() == expected
        assert {"config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    else:
        assert was_killed
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in base.iterdir()}
    assert names == {p.name: sha256_file(p) for p in base.iterdir() if p.name != SINGLE}
    return not out.exists()


def refused_for_room(base, vocab, place):
    out = place / "out" / "model"
    out.parent.mkdir()
    with pytest.raises(LexigraftError, match="GB free"):
        graft(base, vocab, output=out)
    assert not list(out.parent.iterdir())


def test_a_disk_that_is_too_small_is_foreseen(make, tmp_path):
    base, vocab = make(5)
    try:
        large(base, TokenMap.read(base).tokens, 2 * shutil.disk_usage(tmp_path).free / 1e9)
    except OSError:
        pytest.skip("this file system holds no sparse file larger than itself")
    refused_for_room(base, vocab, tmp_path)


def test_room_for_what_lies_beside_the_weights_is_foreseen(make, tmp_path):
    base, vocab = make(5)
    beside = parts.fill_beside(base)
    refused_for_room(base, vocab, tmp_path)
    beside.rename(base / ".cache")  # is not copied
    graft(base, vocab, output=tmp_path / "out" / "model")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_in_the_middle_leaves_no_output(make, tmp_path):
    base, vocab = make(5)
    large(base, TokenMap.read(base).tokens, 1.0)
    out = tmp_path / "out" / "model"
    out.parent.mkdir()
    assert assert_killed_cleanly(base, vocab, out, 0.05)
    assert list(out.parent.glob("model.partial-*"))
    large(base, TokenMap.read(base).tokens, 0.001)
    graft(base, vocab, output=out)
    assert [path.name for path in out.parent.iterdir()] == ["model"]  # the dead partial is gone


@pytest.mark.matrix
def test_kill_at_many_moments(make, tmp_path):
    base, vocab = make(5)
    large(base, TokenMap.read(base).tokens, 0.4)
    killed = 0
    for number in range(20):
        out = tmp_path / "out" / f"model{number}"
        out.parent.mkdir(exist_ok=True)
        killed += assert_killed_cleanly(base, vocab, out, number * 0.02)
        shutil.rmtree(out.parent)
    assert killed >= 5


# -- targets


def test_peak_memory_does_not_grow_with_the_model(make, tmp_path):
    base, vocab = make(5)
    code = (
        "import sys; from lexigraft.steps.graft import graft; "
        "graft(sys.argv[1], sys.argv[2], output=sys.argv[3], force=True)"
    )
    peaks = []
    for gigabytes in (0.01, 0.5):
        large(base, TokenMap.read(base).tokens, gigabytes)
        peaks.append(launching.peak_megabytes(code, base, vocab, tmp_path / "model"))
    assert peaks[1] < peaks[0] + 20
    assert peaks[1] < 250


def test_base_and_vocab_in_the_wrong_order_are_told_with_the_right_command(make, tmp_path):
    base, vocab = make(3)
    with pytest.raises(LexigraftError, match="holds no model") as fault:
        graft(vocab, base, output=tmp_path / "model")
    assert fault.value.fix == f"lexigraft graft {base} {vocab} -o {tmp_path / 'model'}"


def test_a_name_that_no_tensor_has_is_answered_with_names(make, tmp_path):
    base, vocab = make(3)
    with pytest.raises(LexigraftError) as fault:
        graft(base, vocab, output=tmp_path / "model", tensor_roles={"nothing": "embed"})
    assert "model.embed_tokens.weight" in fault.value.needed
