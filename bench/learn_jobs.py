"""What bench/learn.py runs in child processes: preparing texts, the other tools, evaluation.

    python bench/learn_jobs.py JOB ARGUMENTS...

The other tools are given what makes them strongest: they train on the same documents, may
propose more tokens than are wanted, and keep the best that the base does not have.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Encode = Callable[[Sequence[str]], list[list[int]]]
SPACE = "\u2581"
BATCH = 4096
_CLAUSE = re.compile(r"[.!?;。！？；，\n]+\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


def prepare(target: str, *corpora: str) -> None:
    """Documents of `corpora` -> learning.txt and held_out.txt, by lexigraft's own split."""
    from lexigraft.corpus import held_out, read_documents

    folder = Path(target)
    folder.mkdir(parents=True)
    sizes = Counter[str]()
    with (
        (folder / "learning.txt").open("w") as learning,
        (folder / "held_out.txt").open("w") as out,
    ):
        for document in read_documents(corpora):
            stream = out if held_out(document) else learning
            sizes[stream.name] += stream.write(document + "\n\n")
    print(json.dumps({Path(name).stem: size for name, size in sizes.items()}))


def multiply(corpus: str, target: str, size: str) -> None:
    """At least `size` bytes of text made of the clauses of `corpus`, seeded.

    A clause is the first half of one and the second half of another, and every ninth carries a
    number, so that the distinct stretches between marks, and words, grow with the text.
    """
    clauses = [c for c in _CLAUSE.split(Path(corpus).read_text("utf-8")) if 2 < len(c) < 200]
    rng = random.Random(0)
    with Path(target).open("w") as stream:
        while stream.tell() < int(size):
            firsts, seconds = (iter(rng.choices(clauses, k=9000)) for _ in range(2))
            joined = (
                a[: len(a) // 2] + b[len(b) // 2 :] for a, b in zip(firsts, seconds, strict=True)
            )
            for count, clause in enumerate(joined):
                stream.write(
                    clause + ("\n\n" if count % 60 == 0 else ". " if clause.isascii() else "。")
                )
                if count % 9 == 0:
                    stream.write(f"{rng.randrange(10**6)} ")


def give_digit_rule(folder: str) -> None:
    """The true pre-tokenizer of SmolLM2, which a conversion from its GGUF file leaves out."""
    from lexigraft.models.smollm import PRE_TOKENIZER

    path = Path(folder) / "tokenizer.json"
    data = {**json.loads(path.read_text("utf-8")), "pre_tokenizer": PRE_TOKENIZER}
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")


def bpe_continue(base: str, learning: str, tokens: str, output: str) -> None:
    """bpe-continue: the merge loop of the tokenizers library, on top of the base's tokens."""
    from bpe_continue import continue_training

    data = json.loads((Path(base) / "tokenizer.json").read_text())
    ids = {*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])}
    extended = continue_training(
        str(Path(base) / "tokenizer.json"),
        files=[learning],
        vocab_size=len(ids) + int(tokens),
        show_progress=False,
    )
    _finish(base, output)
    extended.save(str(Path(output) / "tokenizer.json"))


def sentencepiece_append(base: str, learning: str, tokens: str, output: str) -> None:
    """Chinese-LLaMA's recipe: train SentencePiece alone, append its pieces with score 0."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = Path(base) / "tokenizer.model"
    if not model.is_file():
        sys.exit("the base has no tokenizer.model to append pieces to")
    wanted = int(tokens)
    _finish(base, output)
    prefix = Path(output) / "trained"
    sentencepiece.SentencePieceTrainer.train(
        input=learning,
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=2 * wanted + 16000,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        max_sentence_length=2**20,
        minloglevel=2,
    )
    proto, trained = sentencepiece_model_pb2.ModelProto(), sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    trained.ParseFromString(prefix.with_suffix(".model").read_bytes())
    known = {piece.piece for piece in proto.pieces}
    added = 0
    for text in [piece.piece for piece in trained.pieces if piece.type == piece.NORMAL]:
        # Characters that the base lacks come in with the first piece that needs them.
        missing = [part for part in dict.fromkeys([*text, text]) if part not in known]
        if added + len(missing) > wanted:
            break
        for part in missing:
            proto.pieces.add(piece=part, score=0.0)
        known.update(missing)
        added += len(missing)
    (Path(output) / "tokenizer.model").write_bytes(proto.SerializeToString())
    for path in prefix.parent.glob("trained.*"):
        path.unlink()


def trainer_append(base: str, learning: str, tokens: str, output: str) -> None:
    """tokenizers' BpeTrainer alone, its new tokens and their merges appended to the base's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    wanted = int(tokens)
    path = Path(base) / "tokenizer.json"
    engine = Tokenizer.from_file(str(path))
    byte_level = "ByteLevel" in str(engine.pre_tokenizer)
    fresh = Tokenizer(models.BPE())
    if byte_level:
        fresh.pre_tokenizer = engine.pre_tokenizer
        if engine.normalizer:
            fresh.normalizer = engine.normalizer
    else:
        fresh.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=2 * wanted + 32000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    fresh.train([learning], trainer)
    data = json.loads(path.read_text())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    vocabulary.update({token["content"]: token["id"] for token in data["added_tokens"]})
    spaced = bool(merges) and isinstance(merges[0], str)
    listed = {tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges}
    first = max(vocabulary.values()) + 1
    added = 0
    for left, right in json.loads(fresh.to_str())["model"]["merges"]:
        # Characters that the base lacks come in with the first merge that needs them.
        missing = [part for part in (left, right) if len(part) == 1 and part not in vocabulary]
        missing += [left + right] if left + right not in vocabulary else []
        if added + len(missing) > wanted:
            break
        for token in dict.fromkeys(missing):
            vocabulary[token] = first + added
            added += 1
        if (left, right) not in listed and left in vocabulary and right in vocabulary:
            merges.append(f"{left} {right}" if spaced else [left, right])
    _finish(base, output)
    (Path(output) / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))


def _finish(base: str, output: str) -> None:
    """The output folder with what every loader needs beside the vocabulary."""
    Path(output).mkdir(parents=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (Path(base) / name).is_file():
            shutil.copyfile(Path(base) / name, Path(output) / name)


def evaluate(base: str, learning: str, domain: str, general: str, *extended: str) -> None:
    """Measure extended folders, by the same code whoever made them. Prints a JSON list."""
    from lexigraft.families.loader import TransformersLoader

    texts = {"domain": _lines(domain), "general": _sentences(general)}
    distinct = list(dict.fromkeys(_lines(learning)))
    with TransformersLoader() as loader:
        readings = _read(Path(base), texts, loader)
        print(
            json.dumps(
                [
                    _measure(Path(base), readings, Path(one), texts, distinct, loader)
                    for one in extended
                ]
            )
        )


Texts = dict[str, list[str]]
Readings = dict[str, dict[str, list[list[int]]]]  # text -> engine -> ids of each line


def _read(folder: Path, texts: Texts, loader: Any) -> Readings:
    engines = _engines(folder, loader)
    return {
        which: {n: read(lines) for n, read in engines.items()} for which, lines in texts.items()
    }


def _measure(
    base: Path, old: Readings, extended: Path, texts: Texts, learning: list[str], loader: Any
) -> dict[str, Any]:
    from lexigraft.families import first_difference
    from lexigraft.families.tokenmap import TokenMap

    old_map, new_map = TokenMap.read(base), TokenMap.read(extended)
    first = old_map.tokens
    new = _read(extended, texts, loader)
    names = list(new["domain"])
    name = names[0]
    answer: dict[str, Any] = {
        "added": new_map.tokens - first,
        "moved": first_difference(old_map, new_map) is not None,
        "engines": names,
        "decoded_otherwise": 0,
        "base_differences": 0,
        "new_differences": 0,
    }
    for which, lines in texts.items():
        pairs = list(zip(old[which][name], new[which][name], strict=True))
        answer[which] = {
            "before": sum(len(a) for a, _ in pairs),
            "after": sum(len(b) for _, b in pairs),
            "bytes": sum(len(line.encode()) for line in lines),
            "characters": sum(map(len, lines)),
            "lines": len(lines),
            "changed": sum(a != b for a, b in pairs),
            "drift": sum(a != b and max(b, default=0) < first for a, b in pairs),
            "longer": sum(len(b) > len(a) for a, b in pairs),
        }
        decode, decode_new = _decoder(base, name), _decoder(extended, name)
        answer["decoded_otherwise"] += sum(decode(a) != decode_new(b) for a, b in pairs)
        alike = _alike([old[which][one] for one in names if one in old[which]])
        still = _alike([new[which][one] for one in names if one in old[which]])
        answer["base_differences"] += alike.count(False)
        answer["new_differences"] += sum(a and not b for a, b in zip(alike, still, strict=True))
    read = _engines(extended, None)[name]
    # SentencePiece's trainer reads lines without their ends, those of tokenizers with them.
    end = "" if name == "sentencepiece" else "\n"
    emitted = set[int]()
    for start in range(0, len(learning), BATCH):
        for ids in read([line + end for line in learning[start : start + BATCH]]):
            emitted.update(i for i in ids if i >= first)
    new_ids = [i for i in new_map.texts if i >= first]
    byte_level = "\u0120the" in old_map.ids
    shown = [_shown(new_map.texts[i], byte_level=byte_level) for i in new_ids]
    return {**answer, "dead": len(new_ids) - len(emitted), "odd": sum(map(_is_odd, shown))}


def _engines(folder: Path, loader: Any) -> dict[str, Encode]:
    """Every reader of the files in `folder`; the first one is what compression is measured with."""
    readers: dict[str, Encode] = {}
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
        readers["tokenizers"] = lambda texts: [
            encoding.ids for encoding in engine.encode_batch(texts, add_special_tokens=False)
        ]
    if (folder / "tokenizer.model").is_file():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        readers["sentencepiece"] = lambda texts: processor.encode(list(texts))
    if loader and loader.encode(folder, ["a"]) is not None:
        readers["transformers"] = lambda texts: loader.encode(folder, texts)
    return readers


def _decoder(folder: Path, engine: str) -> Callable[[list[int]], str]:
    if engine == "tokenizers":
        from tokenizers import Tokenizer

        decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
        return lambda ids: decode(ids, skip_special_tokens=False)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    to_text: Callable[[list[int]], str] = processor.decode
    return to_text


def _lines(path: str) -> list[str]:
    """The lines of a text that are not blank: SentencePiece cannot be asked about line ends."""
    return [line for line in Path(path).read_text("utf-8").split("\n") if line.strip()]


def _sentences(path: str) -> list[str]:
    """The sentences of a text: in a long line some new token always hides what drifts."""
    parts = (_SENTENCE_END.split(line) for line in _lines(path))
    return [part for line in parts for part in line if part.strip()]


def _alike(readings: Sequence[list[list[int]]]) -> list[bool]:
    """For each text, whether all engines read it alike."""
    return [all(ids == all_ids[0] for ids in all_ids) for all_ids in zip(*readings, strict=True)]


def _shown(token: str, *, byte_level: bool) -> str:
    """What a reader sees of a token; a part of a character shows as U+FFFD."""
    from lexigraft.families.tokenmap import CHARACTER_TO_BYTE

    if byte_level and all(character in CHARACTER_TO_BYTE for character in token):
        return bytes(map(CHARACTER_TO_BYTE.__getitem__, token)).decode("utf-8", "replace")
    return token.replace(SPACE, " ")


def _is_odd(text: str) -> bool:
    """A digit, a control character, or letters of two scripts: no word of any field."""
    kinds = {unicodedata.category(character) for character in text}
    scripts = {unicodedata.name(c, "?").split(" ")[0] for c in text if c.isalpha()}
    return bool(kinds & {"Nd", "Nl", "No", "Cc", "Co", "Cn"}) or len(scripts) > 1


def profile(base: str, corpus: str, tokens: str, output: str) -> None:
    """Learn, and print in which functions of lexigraft the seconds go.

    A thread looks at the main thread's stack a hundred times a second and books the time since
    its last look, and this process's CPU time, on every function in it: unlike a tracing profiler
    it does not slow plain Python down beside native code. Worker processes are not seen.
    """
    import lexigraft

    root = str(Path(lexigraft.__file__).parent)
    wall, cpu = Counter[str](), Counter[str]()
    main_thread = threading.main_thread().ident
    done = threading.Event()

    def look() -> None:
        last = time.perf_counter(), time.process_time()
        while not done.wait(0.01):
            now = time.perf_counter(), time.process_time()
            frame = sys._current_frames().get(main_thread or 0)
            names = set()
            while frame is not None:
                if frame.f_code.co_filename.startswith(root):
                    where = Path(frame.f_code.co_filename).relative_to(root)
                    names.add(f"{where}: {frame.f_code.co_qualname}")
                frame = frame.f_back
            for name in names:
                wall[name] += now[0] - last[0]
                cpu[name] += now[1] - last[1]
            last = now

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    lexigraft.learn(base, corpus=[corpus], output=output, tokens=int(tokens), allow_more=True)
    done.set()
    watcher.join()
    print("    wall       CPU")
    for name, seconds in wall.most_common(40):
        print(f"{seconds:8.2f}  {cpu[name]:8.2f}  {name}")


def main(job: str, *arguments: str) -> None:
    """Run one job by its name."""
    jobs: Iterable[Callable[..., None]] = (
        prepare, multiply, give_digit_rule, bpe_continue, sentencepiece_append, trainer_append,
        evaluate, profile,
    )  # fmt: skip
    {run.__name__: run for run in jobs}[job](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
