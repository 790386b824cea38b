"""Do the files of one tokenizer say the same?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Edit, Finding, finding
from lexigraft.families.tokenmap import SENTENCEPIECE_FILES, TokenMap, joined

if TYPE_CHECKING:
    from lexigraft.manifest import Manifest

# In the order in which loaders look for them.
VOCABULARIES = ("tokenizer.json", *SENTENCEPIECE_FILES, "vocab.json", "vocab.txt")
ADDED = "added_tokens.json"
SETTINGS = "tokenizer_config.json"
# Above so many, readers that enter added tokens one by one took minutes to load a tokenizer
# (huggingface/tokenizers#914). transformers 4.57, the oldest tested, loads 5,000 in 0.2 s.
MANY_ADDED = 500


def tokenizer_findings(facts: Facts) -> Iterator[Finding]:
    """Faults between the tokenizer files of one folder."""
    names = [name for name in VOCABULARIES if name in facts.maps]
    for other in names[1:]:
        yield from _compare(facts, names[0], other)
    if names:
        yield from _added_tokens(facts, names)
        yield from _settings(facts, names[0])
        yield from _many_added(facts, names[0])


def _compare(facts: Facts, first: str, other: str) -> Iterator[Finding]:
    """Two files that each hold a whole vocabulary; `first` is what loaders read."""
    one, two = facts.maps[first], facts.maps[other]
    differing = [i for i in _model_ids(one) if i in two.texts and two.texts[i] != one.texts[i]]
    if len(differing) > len(one.texts) // 2 and _same_words(one, two):
        return  # XLM-R and Pegasus number the pieces of their model file anew
    missing = [i for i in _model_ids(one) if i not in two.texts]
    extra = [i for i in _model_ids(two) if i not in one.texts]
    if not (differing or missing or extra):
        return
    odd, differs = _odd_one(facts, first, other), (differing or missing or extra)[0]
    yield finding(
        "LG102",
        odd or other,
        _difference(facts, first, other, differs)
        + (f": {odd} is the odd one out" if odd else "")
        + f" (loaders read {first} first)",
        needed="the same token for every id in every file",
        fix=f"mv {facts.folder / (odd or other)} {facts.folder / (odd or other)}.stale",
        edit=Edit(odd) if odd else None,
        id=differs,
        first=first,
        text=repr(one.texts.get(differs)),
        other=other,
        named=repr(two.texts.get(differs)),
    )


def _model_ids(token_map: TokenMap) -> list[int]:
    """Ids of the vocabulary proper: added tokens need not be in every file."""
    return [i for i in sorted(token_map.texts) if i not in token_map.added]


def _same_words(one: TokenMap, two: TokenMap) -> bool:
    few, many = sorted((set(one.texts.values()), set(two.texts.values())), key=len)
    return len(few - many) <= 8  # control symbols are spelt differently


def _difference(facts: Facts, first: str, other: str, token_id: int) -> str:
    def says(name: str) -> str:
        token_map = facts.maps[name]
        text = token_map.texts.get(token_id)
        meaning = "nothing" if text is None else repr(text)
        return f"{name} ({token_map.tokens:,} tokens) has {meaning}"

    return f"for id {token_id} {says(first)}, {says(other)}"


def _odd_one(facts: Facts, first: str, other: str) -> str | None:
    """The file that is wrong, if the manifest, a third file or the length tells."""
    wanted = _manifest_hash(facts.manifest)
    if wanted:
        fits = [name for name in (first, other) if _alone(facts.maps, name).hash == wanted]
        if len(fits) == 1:
            return other if fits[0] == first else first
    for third in VOCABULARIES:
        if third in facts.maps and third not in (first, other):
            agrees = [n for n in (first, other) if _agree(facts.maps[n], facts.maps[third])]
            if len(agrees) == 1:
                return other if agrees[0] == first else first
    longer, shorter = sorted((first, other), key=lambda name: -facts.maps[name].tokens)
    if _agree(facts.maps[shorter], facts.maps[longer]):
        return shorter  # it was left behind when the other was extended
    return None


def _alone(maps: Mapping[str, TokenMap], name: str) -> TokenMap:
    """The tokenizer as it would be if `name` were its only vocabulary."""
    kept = {n: m for n, m in maps.items() if n == name or n not in VOCABULARIES}
    return joined(kept) or maps[name]


def _agree(one: TokenMap, two: TokenMap) -> bool:
    """Every id of the vocabulary of `one` means the same in `two`."""
    return all(two.texts.get(i) == one.texts[i] for i in _model_ids(one))


def _manifest_hash(manifest: Manifest | None) -> str | None:
    records = [r for r in manifest.records if hasattr(r, "token_map")] if manifest else []
    return records[-1].token_map if records else None


def _added_tokens(facts: Facts, names: list[str]) -> Iterator[Finding]:
    """added_tokens.json against the vocabulary that it adds to."""
    added = facts.maps.get(ADDED)
    if added is None:
        return
    whole = facts.maps[names[0]]
    model_file = next((name for name in names if name != "tokenizer.json"), names[0])
    model = facts.maps[model_file]
    wrong = [i for i, text in sorted(added.texts.items()) if whole.texts.get(i, text) != text]
    if wrong:
        yield finding(
            "LG102",
            ADDED,
            f"gives id {wrong[0]} the text {added.texts[wrong[0]]!r}, "
            f"{names[0]} gives it {whole.texts[wrong[0]]!r}",
            needed="one meaning for each id",
            fix=f"copy {ADDED} again from the model that {names[0]} belongs to",
            id=wrong[0],
            first=names[0],
            text=repr(whole.texts[wrong[0]]),
            other=ADDED,
            named=repr(added.texts[wrong[0]]),
        )
    yield from _hole(facts, model_file)
    repeated = [i for i in sorted(added.texts) if model.texts.get(i) == added.texts[i]]
    if repeated and model_file != "tokenizer.json" and not wrong:
        yield finding(
            "LG104",
            ADDED,
            f"repeats {len(repeated)} tokens of {model_file}, the first is id {repeated[0]}",
            count=len(repeated),
            file=model_file,
            id=repeated[0],
        )


def _hole(facts: Facts, model_file: str) -> Iterator[Finding]:
    """Ids between the end of the vocabulary and the added tokens that no file gives a meaning."""
    model, added = facts.maps[model_file], facts.maps[ADDED]
    known = facts.tokens.texts if facts.tokens else {}
    beyond = [i for i in sorted(added.texts) if i >= model.tokens]
    lost = next((i for i in range(model.tokens, max(beyond, default=0)) if i not in known), None)
    if lost is None:
        return
    first = next(i for i in beyond if i > lost)
    yield finding(
        "LG103",
        model_file,
        f"{ADDED} gives {added.texts[first]!r} the id {first}, but {model_file} has "
        f"{model.tokens:,} tokens and no file has id {lost}: {model_file} is older than {ADDED}",
        needed=f"a {model_file} with {first:,} tokens, or added tokens from id {lost} on",
        fix=f"copy {model_file} from the folder that {ADDED} came from",
        added=ADDED,
        text=repr(added.texts[first]),
        id=first,
        tokens=model.tokens,
        lost=lost,
    )


def _settings(facts: Facts, first: str) -> Iterator[Finding]:
    """The added tokens of tokenizer_config.json against the vocabulary."""
    settings = facts.maps.get(SETTINGS)
    if settings is None:
        return
    whole = facts.maps[first]
    for token_id, text in sorted(settings.texts.items()):
        other = whole.texts.get(token_id)
        if other is not None and other != text and token_id in whole.added | set(_model_ids(whole)):
            yield finding(
                "LG102",
                SETTINGS,
                f"gives id {token_id} the text {text!r}, {first} gives it {other!r}",
                needed="one meaning for each id",
                fix=f"copy {SETTINGS} again from the model that {first} belongs to",
                id=token_id,
                first=first,
                text=repr(other),
                other=SETTINGS,
                named=repr(text),
            )
            return
        if other is None and first == "tokenizer.json":
            yield finding(
                "LG105",
                SETTINGS,
                f"adds {text!r} as id {token_id}, which {first} does not have",
                needed="every added token in both files",
                fix=f"copy {first} and {SETTINGS} from one folder",
                text=repr(text),
                id=token_id,
                file=first,
            )
            return


def added_words(facts: Facts, first: str) -> frozenset[int]:
    """Ids of added tokens that are not special, in the vocabulary file `first` and beside it."""
    whole = facts.maps[first]
    beside = facts.maps.get(ADDED, TokenMap({}))
    return (whole.added | beside.added) - whole.special - beside.special


def _many_added(facts: Facts, first: str) -> Iterator[Finding]:
    """Words that someone entered as added tokens, by the thousand."""
    whole = facts.maps[first]
    beside = facts.maps.get(ADDED, TokenMap({}))
    words = added_words(facts, first)
    if len(words) > MANY_ADDED:
        yield finding(
            "LG106",
            first if len(whole.added) >= len(beside.added) else ADDED,
            f"{len(words):,} added tokens that are not special: they are matched before the "
            "tokenizer's model reads a text, also inside other words, and readers older than "
            "transformers 4.57 may take minutes to load them",
            needed="words in the model's own vocabulary",
            fix="lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
            count=len(words),
        )
