"""A GGUF file as the base of `graft`: real files, written by gguf's own writer or shipped."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import parts
from extend import extend
from lexigraft import check, graft_distilled, learn
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap, parse_sentencepiece
from lexigraft.manifest import Manifest
from lexigraft.models import gguf_base, smollm
from lexigraft.steps.graft import graft

if importlib.util.find_spec("gguf") is None:
    pytest.skip(f"needs gguf: {gguf_base.INSTALL}", allow_module_level=True)

WIDTH, LAYERS, HEADS, PADDING = 64, 2, 4, 6


def write_gguf(path: Path, tokenizer: Path, kind: str, *, pre: str = "gpt-2") -> Path:
    """A tiny Llama as llama.cpp's converter writes it, padding rows `[PAD<id>]` included."""
    import gguf

    tokens = TokenMap.read(tokenizer)
    rows = tokens.tokens + PADDING
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(rows)
    _add_tokenizer(writer, tokenizer, tokens, rows, pre)
    rng = np.random.default_rng(0)
    stored = {"F32": np.float32, "F16": np.float16}.get(kind)
    shapes = {"token_embd": (rows, WIDTH), "output": (rows, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{n}": (WIDTH, WIDTH) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{n}": (2 * WIDTH, WIDTH) for n in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (WIDTH, 2 * WIDTH)}
        shapes |= {f"blk.{i}.{n}_norm": (WIDTH,) for n in ("attn", "ffn")}
    for name, shape in (shapes | {"output_norm": (WIDTH,)}).items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        elif stored is not None:
            writer.add_tensor(f"{name}.weight", values.astype(stored))
        else:
            of_kind = gguf.GGMLQuantizationType[kind]
            packed = gguf.quantize(values, of_kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, folder: Path, tokens: TokenMap, rows: int, pre: str) -> None:
    """SentencePiece where the folder has a tokenizer.model, else byte-level BPE."""
    texts = [tokens.texts.get(i, f"[PAD{i}]") for i in range(rows)]
    unused, model = 5, folder / "tokenizer.model"
    if model.exists():
        pieces = parse_sentencepiece(model.read_bytes(), model).pieces
        padding = rows - len(pieces)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([piece.score for piece in pieces] + [-1000.0] * padding)
        writer.add_token_types([piece.type for piece in pieces] + [unused] * padding)
        start, end = tokens.ids["<s>"], tokens.ids["</s>"]
    else:
        data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
        kinds = (3 if i in tokens.special else 1 if i in tokens.texts else 5 for i in range(rows))
        writer.add_token_types(list(kinds))
        start = end = tokens.ids["<|endoftext|>"]
    writer.add_token_list(texts)
    writer.add_bos_token_id(start)
    writer.add_eos_token_id(end)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer and its extension, as ordinary folders."""
    root = tmp_path_factory.mktemp("tokenizer")
    base = parts.write_byte_level(root / "base", vocab_size=330)
    return base, extend(base, root / "vocab", 20, literal=1)


@pytest.mark.parametrize(
    ("kind", "dtype", "said"),
    [("Q8_0", "BF16", "de-quantised from Q8_0"), ("F16", "F16", "converted from F16")],
)
def test_a_gguf_file_is_grafted(kind, dtype, said, tokenizer, tmp_path, capsys):
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, vocab = tokenizer
    source = write_gguf(tmp_path / f"tiny.{kind}.gguf", folder, kind)
    content = source.read_bytes()
    out = tmp_path / "model"
    capsys.readouterr()
    result = graft(source, vocab, output=out)
    shown = capsys.readouterr().err
    assert said in shown
    assert "shards" not in shown  # no bars of transformers
    assert source.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "model"}

    old = TokenMap.read(folder)
    assert (result.tokens, result.added) == (old.tokens + 20, 20)
    assert result.rows_before == old.tokens + PADDING
    checkpoint = Checkpoint.open(out)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {dtype}
    assert "quantization_config" not in checkpoint.config
    record = Manifest.read(out).last("graft")
    assert record.base.name == f"tiny.{kind}"
    assert record.base.token_map == old.hash

    reader = gguf.GGUFReader(source)
    packed = next(t for t in reader.tensors if t.name == "token_embd.weight")
    values = gguf.dequantize(packed.data, packed.tensor_type)
    expected = torch.from_numpy(values.copy()).to(
        getattr(torch, {"BF16": "bfloat16", "F16": "float16"}[dtype])
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[: old.tokens], expected[: old.tokens])
    new = AutoTokenizer.from_pretrained(out)
    assert len(new) == old.tokens + 20
    ids = new("the house of the garden", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    ours, theirs = model.float()(ids).logits, plain(ids).logits
    torch.testing.assert_close(
        ours[..., : old.tokens], theirs[..., : old.tokens], atol=0.05, rtol=0.05
    )


def test_a_folder_with_one_gguf_file_and_a_dry_run(tokenizer, tmp_path):
    folder, vocab = tokenizer
    (tmp_path / "base").mkdir()
    write_gguf(tmp_path / "base" / "tiny.gguf", folder, "F16")
    (tmp_path / "base" / "mmproj-tiny.gguf").write_bytes(b"the eyes of a model")
    dry = graft(tmp_path / "base", vocab, output=tmp_path / "out", dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    real = graft(tmp_path / "base", vocab, output=tmp_path / "out", max_shard_size="50KB")
    assert dry.rows_after == real.rows_after
    assert len(Checkpoint.open(tmp_path / "out").shards) > 2


def refused(base: Path, vocab: Path, out: Path, **options) -> LexigraftError:
    before = set(out.parent.rglob("*"))
    with pytest.raises(LexigraftError) as fault:
        graft(base, vocab, output=out, **options)
    assert set(out.parent.rglob("*")) == before
    assert fault.value.needed
    assert fault.value.fix
    return fault.value


def test_what_is_no_whole_model(tokenizer, tmp_path, monkeypatch):
    folder, vocab = tokenizer
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    one = write_gguf(base / "a-Q8_0.gguf", folder, "Q8_0")
    shutil.copyfile(one, base / "a-F16.gguf")
    assert "2 GGUF files: a-F16.gguf, a-Q8_0.gguf" in refused(base, vocab, out).found
    part = tmp_path / "a-00001-of-00003.gguf"
    shutil.copyfile(one, part)
    assert isinstance(refused(part, vocab, out), RefusalError)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(one.read_bytes()[:2000])
    assert "damaged.gguf" in refused(damaged, vocab, out).found
    liar = tmp_path / "liar.gguf"
    liar.write_bytes(one.read_bytes()[:8] + struct.pack("<QQ", 2**62, 2**62))
    assert "announces" in refused(liar, vocab, out).found
    other = tmp_path / "other.gguf"
    other.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "other.gguf" in refused(other, vocab, out).found
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name)
    )
    fault = refused(one, vocab, out)
    assert "gguf is not installed" in fault.found
    assert "pip install" in fault.fix


def test_room_for_both_models_is_asked_for_before_the_first(tokenizer, tmp_path):
    source = write_gguf(tmp_path / "a.gguf", tokenizer[0], "F16")
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(LexigraftError, match="GB free"):
        gguf_base.write_folder(source, target, models=10**9)
    assert not list(target.iterdir())


def test_a_tokenizer_of_another_model_is_named(tokenizer, tmp_path):
    folder, _ = tokenizer
    source = write_gguf(tmp_path / "tiny.gguf", folder, "F16")
    other = parts.write_byte_level(tmp_path / "other", vocab_size=360)
    foreign = extend(other, tmp_path / "foreign", 3)
    assert "id" in refused(source, foreign, tmp_path / "out").found


def test_new_rows_of_a_gguf_file_are_distilled(tokenizer, tmp_path):
    folder, _ = tokenizer
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(parts.corpus_text(documents=40), "utf-8")
    vocab, out = tmp_path / "vocab", tmp_path / "model"
    learn(folder, corpus=[corpus], tokens=20, min_count=5, allow_more=True, output=vocab)
    source = write_gguf(tmp_path / "tiny.gguf", folder, "F16")
    content = source.read_bytes()
    result = graft_distilled(source, vocab, corpus=[corpus], output=out, max_bytes=4000)
    assert result.train.rows_moved == result.graft.added == 20
    assert check(out).ok
    assert source.read_bytes() == content


def test_a_sentencepiece_tokenizer_in_a_gguf_file(tmp_path):
    """As of Llama 2 and Mistral: VOCAB has a tokenizer.model, the GGUF file pieces and scores."""
    folder = parts.write_sentencepiece(tmp_path / "folder", fast=False)
    vocab = extend(folder, tmp_path / "vocab", 9)
    source = write_gguf(tmp_path / "tiny.gguf", folder, "F16")
    result = graft(source, vocab, output=tmp_path / "out")
    old = TokenMap.read(folder)
    assert (result.tokens, result.rows_before) == (old.tokens + 9, old.tokens + PADDING)
    record = Manifest.read(tmp_path / "out").last("graft")
    assert record.base.token_map == old.hash
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (
        vocab / "tokenizer.model"
    ).read_bytes()


@pytest.mark.matrix
def test_smollm_out_of_its_wheel(tmp_path):
    """The real file, Q4_1; VOCAB extends the tokenizer of its safetensors form."""
    try:
        source = smollm._gguf_folder() / smollm.GGUF_FILE
    except LexigraftError:
        pytest.skip(f"the wheel that holds SmolLM2 is not installed: {smollm.INSTALL}")
    base = smollm.write_base(tmp_path / "base")
    vocab = extend(base, tmp_path / "vocab", 30)
    graft(base, vocab, output=tmp_path / "of-folder")
    graft(source, vocab, output=tmp_path / "of-file")
    one, other = Checkpoint.open(tmp_path / "of-folder"), Checkpoint.open(tmp_path / "of-file")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(one.read(name).tobytes() == other.read(name).tobytes() for name in one.tensors)
    text = "In 2024 x"
    from transformers import AutoTokenizer

    ids = [AutoTokenizer.from_pretrained(c.folder)(text).input_ids for c in (one, other)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 7  # digits one by one
