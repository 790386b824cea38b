"""What cannot be extended is refused by name: what it is, why it cannot be right, what to do."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import parts
from lexigraft import families, learn
from lexigraft.errors import LexigraftError, RefusalError


def save(folder: Path, model: models.Model) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def clip(folder: Path) -> None:
    vocabulary = {"a": 0, "b</w>": 1, "ab</w>": 2}
    save(folder, models.BPE(vocabulary, [("a", "b</w>")], end_of_word_suffix="</w>"))


def tekken(folder: Path) -> None:
    """The real file that mistral-common ships, beside a tokenizer.json that would be readable."""
    import mistral_common

    data = Path(mistral_common.__file__).parent / "data"
    shutil.copyfile(data / "tekken_240911.json", folder / "tekken.json")
    parts.write_byte_level(folder)


def remote_code(folder: Path) -> None:
    """ChatGLM's and Baichuan's way: the class is Python in the folder."""
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_glm.GLMTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_glm.py").write_text("raise SystemExit('must never run')\n")


def dropout(folder: Path) -> None:
    parts.write_byte_level(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(data))


def characters(folder: Path) -> None:
    save(folder, models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))


def nameless(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')


def word_level(folder: Path) -> None:
    save(folder, models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def sentencepiece(kind: str, **options: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts.plain_english().splitlines()[:300]),
            model_writer=model, vocab_size=60, model_type=kind, hard_vocab_limit=False,
            minloglevel=2, num_threads=1, **options,
        )  # fmt: skip
        (folder / "tokenizer.model").write_bytes(model.getvalue())

    return write


def plain_bpe(folder: Path) -> None:
    sentencepiece("bpe")(folder)


def phobert(folder: Path) -> None:
    """vocab.txt and BPE codes: the file name is BERT's, the content is not."""
    (folder / "vocab.txt").write_text("a 10\nb 8\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}')


@pytest.mark.parametrize(
    ("write", "what", "why", "what_to_do"),
    [
        (clip, "</w>", "cannot be had back", "choose a base"),
        (tekken, "tekken", "appended tokens are not read", "tokenizer.json"),
        (remote_code, "tokenization_glm.GLMTokenizer", "never run", "save the tokenizer"),
        (dropout, "dropout 0.1", "no count or proof holds", '"dropout": null'),
        (characters, "without byte-level and without byte fallback", "is lost", "choose a base"),
        (plain_bpe, "SentencePiece BPE without byte fallback", "no row to start", "choose a base"),
        (sentencepiece("word"), "word model", "nothing can be joined", "choose a base"),
        (sentencepiece("char"), "character model", "nothing can be joined", "choose a base"),
        (nameless, "nameless model", "is not known", "it writes the type"),
        (word_level, "WordLevel model", "is not known", "choose a base"),
        (phobert, "PhobertTokenizer", "in its own way", "save the tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused_by_name_with_the_reason_and_a_way_out(tmp_path, write, what, why, what_to_do):
    base = tmp_path / "base"
    base.mkdir()
    write(base)
    with pytest.raises(RefusalError) as caught:
        families.load(base)
    assert what in caught.value.found
    assert why in caught.value.found + caught.value.needed
    assert what_to_do in caught.value.needed + caught.value.fix
    output = tmp_path / "out"
    with pytest.raises(RefusalError):
        learn(base, corpus=[parts.ENGLISH], output=output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]  # and nothing was written


def test_dropout_taken_out_as_the_message_says_is_accepted(tmp_path):
    dropout(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["dropout"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert families.load(tmp_path).name == "byte-level BPE"


def test_remote_code_beside_a_readable_file_is_no_obstacle(tmp_path):
    """InternLM's and Qwen's folders name a class of their own, but their files say it all."""
    parts.write_sentencepiece(tmp_path, fast=False)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert families.load(tmp_path).name == "SentencePiece BPE"


def test_a_model_file_of_another_kind_beside_tokenizer_json_is_refused(tmp_path):
    parts.write_sentencepiece(tmp_path)
    sentencepiece("unigram")(tmp_path)
    with pytest.raises(RefusalError, match="of another kind"):
        families.load(tmp_path)


@pytest.mark.real
def test_the_real_clip_is_refused(tmp_path):
    folder = parts.SHARED / "tokenizers" / "clip_bpe_hf"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data (CLIP's tokenizer)")
    with pytest.raises(LexigraftError, match="</w>"):
        families.load(folder)
