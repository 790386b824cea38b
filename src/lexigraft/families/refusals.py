"""Tokenizers that are refused by name: what each is, why it cannot be right, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexigraft.errors import RefusalError
from lexigraft.files import read_settings

_SUPPORTED = (
    "byte-level BPE (tokenizer.json, vocab.json + merges.txt, tiktoken ranks), SentencePiece BPE "
    "with byte fallback, Unigram or WordPiece"
)
_OTHER_BASE = "choose a base whose tokenizer is one of these"


def _other_base(found: str) -> RefusalError:
    return RefusalError(found, needed=_SUPPORTED, fix=_OTHER_BASE)


def tekken(path: Path) -> RefusalError:
    """Mistral's own format, beside which no other file may be extended alone."""
    return RefusalError(
        f"{path} is Mistral's tekken format: its ids are ranks behind a reserved block of special "
        "tokens, and its readers cut the list at a size stated in the file, so that appended "
        "tokens are not read",
        needed="the same tokenizer as tokenizer.json, without the tekken.json that mistral-common "
        "and vLLM would read first",
        fix=f"save it with transformers into another folder and leave {path.name} out",
    )


def marked_bpe(path: Path, model: Mapping[str, Any]) -> RefusalError:
    """CLIP and GPT-1: where a word ends is part of its last token's name."""
    suffix = model.get("end_of_word_suffix")
    mark = suffix or model.get("continuing_subword_prefix")
    kind = "CLIP's kind" if suffix else "word-inner marks"
    return RefusalError(
        f"{path} is BPE with the mark {mark!r} ({kind}): the same letters are other symbols at a "
        "word's end than inside it, and spaces are no part of any token, so that a text cannot be "
        "had back from its tokens",
        needed=_SUPPORTED,
        fix=_OTHER_BASE + "; CLIP's text encoder has no language-model loss to train new rows with",
    )


def random_bpe(path: Path, dropout: float) -> RefusalError:
    """BPE-dropout: the same text has other ids at each reading."""
    return RefusalError(
        f"{path} is BPE with dropout {dropout}: merges are skipped at random, so that one text has "
        "many segmentations and no count or proof holds",
        needed="a tokenizer that gives a text the same ids every time",
        fix=f'set "dropout": null in the model of {path}; it is meant for training only',
    )


def character_bpe(path: Path) -> RefusalError:
    """BPE over characters, in which a missing character is lost."""
    return _other_base(
        f"{path} is BPE without byte-level and without byte fallback: a character that it lacks "
        "is lost, and how its tokens spell spaces is not stated, so that neither the text nor the "
        "pieces of a new token are certain",
    )


def sentencepiece_without_bytes(path: Path) -> RefusalError:
    """SentencePiece BPE whose missing characters become <unk>."""
    return _other_base(
        f"{path} is SentencePiece BPE without byte fallback: a new token with a character that "
        "the model lacks has no pieces, so no row to start from",
    )


def sentencepiece_kind(path: Path, kind: str) -> RefusalError:
    """SentencePiece models that join nothing."""
    return _other_base(
        f"{path} is a SentencePiece {kind} model: each {kind} is one piece whatever the "
        "vocabulary holds, so that nothing can be joined to a new token",
    )


def unknown_model(path: Path, kind: object) -> RefusalError:
    """A tokenizer.json whose model is of another type, or of none."""
    named = f"holds a {kind} model" if kind else "holds a nameless model (no model.type)"
    return RefusalError(
        f"{path} {named}: how it cuts words, and so what a new token would do, is not known",
        needed=_SUPPORTED,
        fix=_OTHER_BASE
        if kind
        else f"open {path} with tokenizers.Tokenizer.from_file and save it: it writes the type",
    )


def remote_class(folder: Path) -> RefusalError | None:
    """A tokenizer that only the repository's own Python code can read, if that is what it is."""
    remote = read_settings(folder / "tokenizer_config.json").get("auto_map")
    if not remote:
        return None
    named = remote.get("AutoTokenizer") if isinstance(remote, dict) else remote
    classes = [name for name in (named if isinstance(named, list) else [named]) if name]
    return RefusalError(
        f"{folder}: the tokenizer is the class {', '.join(map(str, classes)) or 'unnamed'} in the "
        "folder's own Python code (auto_map), and no file here says what its tokens are: code that "
        "is never run by learn cannot be extended or proved",
        needed=f"a tokenizer file that needs no code: {_SUPPORTED}",
        fix="save the tokenizer as tokenizer.json, if its class can, or use another base",
    )
