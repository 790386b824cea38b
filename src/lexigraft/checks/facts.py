"""Everything a folder says of itself, read from headers and small files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexigraft.checkpoints.architectures import VocabularyTensors, vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.gguf_header import GgufHeader, gguf_files, read_gguf_header
from lexigraft.checkpoints.header import Tensor, read_header
from lexigraft.checks.findings import Finding, from_error
from lexigraft.checks.gguf_files import gguf_rows, token_map
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap, joined, read_token_maps
from lexigraft.files import MANIFEST, read_object, require_folder
from lexigraft.manifest import Manifest, NewIds

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = re.compile(r"(model|pytorch_model|consolidated).*\.(safetensors|bin|json)|.*\.gguf")


@dataclass
class Facts:
    """A model, vocabulary or adapter folder, or a GGUF file.

    Attributes:
        folder: where it lies.
        maps: the token map of each tokenizer file, by file name.
        tokens: what the tokenizer as a whole can emit; None where there is no tokenizer.
        config: config.json, generation_config.json and tokenizer_config.json, by file name.
        checkpoint: the weights; None where there are none, or they cannot be read.
        vocabulary: which tensors are vocabulary tensors.
        adapter: the tensors of an adapter, by name.
        manifest: lexigraft.json.
        gguf: the header of a GGUF file.
        unreadable: what could not be read.
    """

    folder: Path
    maps: Mapping[str, TokenMap] = field(default_factory=dict)
    tokens: TokenMap | None = None
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    vocabulary: VocabularyTensors | None = None
    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    manifest: Manifest | None = None
    gguf: GgufHeader | None = None
    unreadable: list[Finding] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        """True for a PEFT adapter folder."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def has_weights(self) -> bool:
        """True where files of a model's weights lie, in whatever format."""
        return any(_WEIGHTS.fullmatch(path.name) for path in self.folder.iterdir())

    @property
    def rows(self) -> int | None:
        """Rows of the vocabulary tensors."""
        if self.gguf is not None:
            return max(gguf_rows(self.gguf).values(), default=None)
        return self.vocabulary.rows if self.vocabulary else None

    def new_ids(self, base: Facts | None, stage: str) -> NewIds | None:
        """The ids of new tokens, by the base or the stage's record; None if unknown."""
        if base is not None and base.tokens is not None:
            first = base.tokens.tokens
            stop = self.tokens.tokens if self.tokens else first
            return NewIds(self.replaced(base), first, max(first, stop))
        record = self.manifest.last(stage) if self.manifest else None
        return record.new_ids if record else None

    def replaced(self, earlier: Facts) -> tuple[int, ...]:
        """Ids that had other tokens in `earlier`, where the manifest here tells of it."""
        if self.manifest is None or self.tokens is None or earlier.tokens is None:
            return ()
        return self.manifest.replaced(earlier.tokens.hash, self.tokens.hash)


def read_facts(folder: Path) -> Facts:
    """Read a folder or a GGUF file; what cannot be read becomes a finding.

    Raises:
        LexigraftError: there is no such folder.
    """
    files = gguf_files(folder)
    if len(files) == 1:
        return _read_gguf(files[0])
    facts = Facts(require_folder(folder, "a model, a vocabulary or an adapter"))
    _read_tokenizer(facts)
    _read_configs(facts)
    _read_manifest(facts)
    if facts.is_adapter:
        _read_adapter(facts)
    elif "config.json" in facts.config or facts.has_weights:
        _read_weights(facts)
    return facts


def _read_gguf(path: Path) -> Facts:
    facts = Facts(path)
    try:
        facts.gguf = read_gguf_header(path)
        facts.tokens = token_map(facts.gguf)
    except LexigraftError as fault:
        facts.unreadable.append(from_error("LG801", path.name, fault))
    return facts


def _read_tokenizer(facts: Facts) -> None:
    try:
        facts.maps = read_token_maps(facts.folder)
        facts.tokens = joined(facts.maps)
    except LexigraftError as fault:
        facts.unreadable.append(from_error("LG101", "tokenizer", fault))


def _read_configs(facts: Facts) -> None:
    names = ("config.json", "generation_config.json", "tokenizer_config.json", ADAPTER_CONFIG)
    for name in names:
        if not (facts.folder / name).is_file():
            continue
        try:
            facts.config[name] = read_object(facts.folder / name)
        except LexigraftError as fault:
            facts.unreadable.append(from_error("LG204", name, fault))


def _read_manifest(facts: Facts) -> None:
    try:
        facts.manifest = Manifest.read(facts.folder)
    except LexigraftError as fault:
        facts.unreadable.append(from_error("LG501", MANIFEST, fault))


def _read_weights(facts: Facts) -> None:
    try:
        facts.checkpoint = Checkpoint.open(facts.folder)
    except LexigraftError as fault:
        facts.unreadable.append(from_error("LG301", "weights", fault))
        return
    if any(0 in tensor.shape for tensor in facts.checkpoint.tensors.values()):
        return  # rows of empty tensors mean nothing; LG307 names them
    try:
        # A manifest that cannot be read is a finding already.
        roles: dict[str, str] | None = {} if facts.manifest is None else None
        facts.vocabulary = vocabulary_of(facts.checkpoint, roles)
    except RefusalError as fault:  # a model that cannot be extended may be sound
        facts.unreadable.append(from_error("LG310", "weights", fault))
    except LexigraftError as fault:
        facts.unreadable.append(from_error("LG304", "weights", fault))


def _read_adapter(facts: Facts) -> None:
    path = facts.folder / ADAPTER_WEIGHTS
    try:
        if not path.exists() and (facts.folder / "adapter_model.bin").exists():
            raise RefusalError(
                f"{facts.folder} holds its tensors only as adapter_model.bin, a pickle",
                needed=ADAPTER_WEIGHTS,
                fix="save the adapter with a current version of PEFT",
            )
        facts.adapter = {tensor.name: tensor for tensor in read_header(path).tensors}
    except LexigraftError as fault:
        facts.unreadable.append(from_error("LG409", ADAPTER_WEIGHTS, fault))
