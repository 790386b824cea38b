"""Which family a tokenizer folder belongs to; what is not supported is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock, Timer
from typing import TYPE_CHECKING, Any

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import refusals
from lexigraft.families.layouts import ids_are_unreadable, tokenizer_class
from lexigraft.families.rank_files import rank_file
from lexigraft.families.tokenmap import SENTENCEPIECE_FILES, parse_sentencepiece, tokenizer_data
from lexigraft.files import python_child, require_folder, sha256_file

if TYPE_CHECKING:
    from lexigraft.families import Family

_OPEN_IN_CHILD = """
import json, os, sys
engines = []
for path in sys.argv[1:]:
    engine = None
    if path.endswith(".json"):
        from tokenizers import Tokenizer
        engine = Tokenizer.from_file(path)
        engine.encode("probe 冠状")
    else:
        import sentencepiece
        sentencepiece.SentencePieceProcessor(model_file=path).encode("probe 冠状")
    engines.append(engine)
for line in sys.stdin:
    place, asked = json.loads(line)
    engine, added, spelled = engines[place], {}, []
    if engine is not None:
        added = {one.content: i for i, one in engine.get_added_tokens_decoder().items()}
    if asked:
        model = engine.model
        model.ignore_merges = False
        read = Tokenizer(model).encode_batch(asked, add_special_tokens=False)
        spelled = [one.ids for one in read]
    print(json.dumps([added, spelled]), flush=True)
os._exit(0)  # taking engines apart takes as long as reading their files
"""
_CHILD_SECONDS = 120
_OWN: ContextVar[bool] = ContextVar("own files", default=False)
_UNIGRAM, _BPE = 1, 2  # sentencepiece_model.proto, TrainerSpec.ModelType
_SENTENCEPIECE_KINDS = {_UNIGRAM: "Unigram", 3: "word", 4: "character"}


def load_family(folder: Path, spell: Sequence[str] = ()) -> Family:
    """See `lexigraft.families.load`."""
    folder = require_folder(Path(folder), "tokenizer files")
    if (folder / "tekken.json").is_file():
        raise refusals.tekken(folder / "tekken.json")
    model_file = next((folder / n for n in SENTENCEPIECE_FILES if (folder / n).is_file()), None)
    ranks = rank_file(folder)
    json_file = folder / "tokenizer.json"
    if json_file.is_file():
        return _from_json(folder, json_file, model_file, ranks, spell)
    if model_file is not None:
        if model_file == ranks:
            return _tiktoken(folder, ranks, None)
        return _from_model(folder, model_file, None)
    if ranks is not None:
        return _tiktoken(folder, ranks, None)
    if (folder / "vocab.txt").is_file():
        return _wordpiece(folder, None)
    if (folder / "vocab.json").is_file():
        return _gpt2_files(folder)
    remote = refusals.remote_class(folder)
    if remote is not None:
        raise remote
    raise LexigraftError(
        f"no tokenizer in {folder}",
        needed="tokenizer.json or a SentencePiece tokenizer.model",
        fix="copy the tokenizer files of this model into the folder",
    )


def _from_json(
    folder: Path,
    json_file: Path,
    model_file: Path | None,
    ranks: Path | None,
    spell: Sequence[str],
) -> Family:
    data = tokenizer_data(json_file)
    model = data.get("model") if isinstance(data, dict) else None
    kind = model.get("type") if isinstance(model, dict) else None
    if kind is None and isinstance(model, dict) and "merges" in model:
        kind = "BPE"  # files of tokenizers < 0.9 name no type
    if kind is None and isinstance(model, dict) and "max_input_chars_per_word" in model:
        kind = "WordPiece"
    if kind == "WordPiece":
        open_safely(json_file)
        return _wordpiece(folder, data)
    if kind == "Unigram":
        open_safely(json_file)
        return _unigram(folder, model_file, data)
    if kind != "BPE":
        raise refusals.unknown_model(json_file, kind)
    assert isinstance(model, dict)
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise refusals.marked_bpe(json_file, model)
    if model.get("dropout"):
        raise refusals.random_bpe(json_file, model["dropout"])
    told = open_safely(json_file, spell if _has_byte_level(data) else ())
    if model.get("byte_fallback"):
        return _from_model(folder, model_file, data)
    if _has_byte_level(data):
        if model_file not in (None, ranks):
            raise RefusalError(
                f"{folder} holds a byte-level tokenizer.json and a SentencePiece {model_file.name}",
                needed="files of one tokenizer",
                fix=f"remove the one that does not belong to this model, for example {model_file}",
            )
        if ranks is not None:
            return _tiktoken(folder, ranks, data)
        from lexigraft.families.agreement import require_agreement
        from lexigraft.families.byte_level import ByteLevelBPE

        require_agreement(folder, data)
        return ByteLevelBPE(folder, data, told)
    raise refusals.character_bpe(json_file)


def _from_model(folder: Path, model_file: Path | None, data: dict[str, Any] | None) -> Family:
    if model_file is not None:
        proto = parse_sentencepiece(model_file.read_bytes(), model_file)
        if proto.trainer_spec.model_type == _UNIGRAM and data is None:
            return _unigram(folder, model_file, None)
        if data is not None and proto.trainer_spec.model_type != _BPE:
            raise RefusalError(
                f"{folder} holds a BPE tokenizer.json and a {model_file.name} of another kind",
                needed="files of one tokenizer",
                fix=f"remove the one that does not belong to this model, for example {model_file}",
            )
        if proto.trainer_spec.model_type != _BPE:
            kind = _SENTENCEPIECE_KINDS.get(proto.trainer_spec.model_type, "unnamed")
            raise refusals.sentencepiece_kind(model_file, kind)
        if not proto.trainer_spec.byte_fallback:
            raise refusals.sentencepiece_without_bytes(model_file)
        open_safely(model_file)
    from lexigraft.families.sentencepiece_bpe import SentencePieceBPE

    return SentencePieceBPE(folder, model_file=model_file, data=data)


def _unigram(folder: Path, model_file: Path | None, data: dict[str, Any] | None) -> Family:
    if model_file is not None:
        proto = parse_sentencepiece(model_file.read_bytes(), model_file)
        if proto.trainer_spec.model_type != _UNIGRAM:
            raise RefusalError(
                f"{folder} holds a Unigram tokenizer.json and a {model_file.name} of another kind",
                needed="files of one tokenizer",
                fix=f"remove the one that does not belong to this model, for example {model_file}",
            )
        open_safely(model_file)
    name = tokenizer_class(folder)
    if data is None and ids_are_unreadable(folder):
        raise RefusalError(
            f"{folder}: {name} puts tokens of its own behind the pieces of a .model, "
            "after new ones too, so that their ids would move",
            needed="a tokenizer.json, which says which id is what",
            fix=f'python -c \'from transformers import AutoTokenizer as A; d="{folder}"; '
            "A.from_pretrained(d).save_pretrained(d)'",
        )
    from lexigraft.families.unigram import Unigram

    return Unigram(folder, model_file=model_file, data=data)


def _gpt2_files(folder: Path) -> Family:
    from lexigraft.families.byte_level import ByteLevelBPE
    from lexigraft.families.gpt2_files import read_gpt2_files

    return ByteLevelBPE(folder, read_gpt2_files(folder))


def _tiktoken(folder: Path, ranks: Path, data: dict[str, Any] | None) -> Family:
    from lexigraft.families.agreement import require_agreement
    from lexigraft.families.tiktoken_ranks import TiktokenBPE

    require_agreement(folder, data)
    return TiktokenBPE(folder, ranks, data)


def _wordpiece(folder: Path, data: dict[str, Any] | None) -> Family:
    from lexigraft.families.wordpiece import WordPiece

    return WordPiece(folder, data)


def _has_byte_level(data: dict[str, Any]) -> bool:
    """True if the pre-tokenizer maps bytes to characters (GPT-2's byte level)."""
    stack = [data.get("pre_tokenizer")]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        if part.get("type") == "ByteLevel":
            return True
        stack.extend(part.get("pretokenizers") or [])
    return False


@contextmanager
def own_files() -> Iterator[None]:
    """Inside, the files that are loaded are lexigraft's own output: no child process is needed."""
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


def open_safely(path: Path, spell: Sequence[str] = ()) -> Told | None:
    """Open a tokenizer file in a child process first; what the engine says there of it.

    The engines are native code: a hostile file can end the process that reads it, which no
    exception handler here could catch.

    Files that lexigraft itself has just written are opened at once (`own_files`); then None.

    Args:
        path: the file.
        spell: texts of which the merges' ids are wanted, of a `tokenizer.json` of BPE.

    Raises:
        LexigraftError: the child failed, was killed or hung.
    """
    if _OWN.get():
        return None
    told = _opening(_at(path), sha256_file(path)).told(spell)
    if told.fault is not None:
        raise LexigraftError(
            f"{path} cannot be opened ({told.fault})",
            needed="a tokenizer file that its own engine reads",
            fix="copy this file again from the model it belongs to",
        )
    return told


@contextmanager
def open_ahead(folders: Iterable[Path]) -> Iterator[None]:
    """Start a child process that opens what `load` of each folder will ask for; do not wait."""
    asked: dict[str, _Opening] = {}
    with ExitStack() as stack:
        for folder in folders:
            names = ("tokenizer.json", *SENTENCEPIECE_FILES)
            path = next((folder / name for name in names if (folder / name).is_file()), None)
            if path is not None:
                with suppress(OSError):  # `load` will say it
                    asked[_at(path)] = _opening(_at(path), sha256_file(path))
        asked = {path: opening for path, opening in asked.items() if not opening.is_told}
        if asked:
            with suppress(OSError):
                child = _Child([*asked])
                stack.callback(child.close)
                for place, opening in enumerate(asked.values()):
                    opening.ahead = (child, place)
        yield


def _at(path: Path) -> str:
    """Where a file lies, under its own name: in a hub cache the file behind it is called a hash."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow the link


@lru_cache(maxsize=64)
def _opening(path: str, _content: str) -> _Opening:
    return _Opening(path)


@dataclass(frozen=True)
class Told:
    """What a child process says of a tokenizer file.

    Attributes:
        fault: what is wrong with it; None if nothing is.
        added: added token -> the id that the engine gives it.
        spelled: text -> its ids by the merges alone, for those that were asked.
    """

    fault: str | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    spelled: Mapping[str, list[int]] = field(default_factory=dict)


class _Child:
    """A process that opens tokenizer files one after another, and then says what is asked of it."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._lock = Lock()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            python_child(_OPEN_IN_CHILD, *paths),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def ask(self, place: int, spell: Sequence[str]) -> Told:
        """What its engine says of a file, by its place among them."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with self._lock:
            if process.stdin.closed:
                return Told("its reader has ended")
            # Killing the child ends a blocked write as well as a blocked read.
            watch = Timer(_CHILD_SECONDS, process.kill)
            watch.start()
            try:
                said = b""
                with suppress(OSError):  # it has ended
                    process.stdin.write(json.dumps([place, list(spell)]).encode() + b"\n")
                    process.stdin.flush()
                    said = process.stdout.readline()
                if said.endswith(b"\n"):
                    added, spelled = json.loads(said)
                    return Told(None, added, dict(zip(spell, spelled, strict=False)))
                process.wait()
                late = not watch.is_alive()
            finally:
                watch.cancel()
            return Told(f"no answer in {_CHILD_SECONDS} s" if late else self._last_words())

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "the reader crashed"

    def close(self) -> None:
        """End the process, once who is asking it has an answer."""
        with self._lock:
            self._process.kill()
            self._process.communicate()
            self._errors.close()


class _Opening:
    """A tokenizer file that is opened in a child process, once.

    Attributes:
        ahead: a child that opens several files, and this one's place among them.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = Lock()
        self._told: Told | None = None
        self.ahead: tuple[_Child, int] | None = None

    @property
    def is_told(self) -> bool:
        """Whether it needs no child any more."""
        return self._told is not None

    def told(self, spell: Sequence[str]) -> Told:
        """What it says; who asks first is told what `spell` is read as."""
        with self._lock:
            if self._told is None and self.ahead is not None:
                child, place = self.ahead
                told = child.ask(place, spell)
                # Another file may be what ended that child.
                self._told = told if told.fault is None else None
            if self._told is None:
                with closing(_Child([self._path])) as child:
                    self._told = child.ask(0, spell)
            return self._told
