"""A gallery for `check`: each broken folder gives exactly its finding, no healthy one any above a note.

All are made of two tiny real models and one adapter, saved once; files are edited in copies.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import parts
import test_architectures
import test_check as small
from lexigraft import merge
from lexigraft.checks import probe
from lexigraft.checks.consumers import CONSUMERS
from lexigraft.checks.findings import Finding
from lexigraft.errors import LexigraftError
from lexigraft.families.llama_cpp import check_text
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import Manifest, Probe
from lexigraft.steps.check import CheckResult, check, mend
from parts import write_byte_level, write_model, write_sentencepiece
from test_check import ADDED, TOKENS, add_pieces, edit, extend, grow_rows, write_manifest
from test_commands import parse

ROWS = TOKENS + ADDED
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Broken = Callable[["Ground"], CheckResult]
BROKEN: dict[str, tuple[tuple[str, ...], Broken]] = {}
HEALTHY: dict[str, Broken] = {}


class Ground:
    """Fresh copies of healthy folders, made when they are asked for."""

    def __init__(self, source: Path, place: Path) -> None:
        self._source, self._place = source, place

    def copy(self, name: str) -> Path:
        target = self._place / name
        return target if target.exists() else Path(shutil.copytree(self._source / name, target))

    @property
    def base(self) -> Path:
        """A tied byte-level model of 360 tokens and rows."""
        return self.copy("base")

    @property
    def sp(self) -> Path:
        """An untied SentencePiece model of 360 tokens and rows, with both tokenizer files."""
        return self.copy("sp")

    @property
    def model(self) -> Path:
        """The byte-level base, extended and grafted, with its manifest."""
        return self.copy("model")

    @property
    def adapter(self) -> Path:
        """An adapter of `sp`, trained with six tokens more, embedding and head saved whole."""
        return self.copy("adapter")

    @property
    def shards(self) -> Path:
        """The byte-level base in two shards with an index."""
        return self.copy("shards")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_gallery(tmp_path_factory.mktemp("gallery"))


def write_gallery(place: Path) -> Path:
    """The healthy folders of which `Ground` makes copies."""
    torch.set_num_threads(1)
    base, sp = place / "base", place / "sp"
    write_byte_level(base, vocab_size=TOKENS)
    write_model(base, tokens=TOKENS, tied=True, eos=TOKENS - 2)
    write_sentencepiece(sp, vocab_size=TOKENS)
    write_model(sp, tokens=TOKENS, tied=False, eos=2)
    edit(base / "config.json", bos_token_id=None)
    for name in ("config.json", "generation_config.json"):
        edit(sp / name, bos_token_id=1)
    model = Path(shutil.copytree(base, place / "model"))
    extend(base, model)
    grow_rows(model, ROWS)
    write_manifest(base, model, rows=ROWS)
    write_adapter(place / "adapter", extend(sp, place / "vocab"), ROWS)
    write_shards(Path(shutil.copytree(base, place / "shards")))
    return place


@pytest.fixture
def ground(source, tmp_path) -> Ground:
    return Ground(source, tmp_path)


def lora(layer: str = "q_proj", inner: int = 32, outer: int = 32) -> dict[str, torch.Tensor]:
    name = f"base_model.model.model.layers.0.self_attn.{layer}"
    return {
        f"{name}.lora_A.weight": torch.ones(2, inner),
        f"{name}.lora_B.weight": torch.ones(outer, 2),
    }


def saved(rows: int) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{name}": torch.ones(rows, 32) for name in (EMBED, HEAD)}


def write_adapter(folder: Path, vocab: Path | None, rows: int | None, **config: object) -> Path:
    """An adapter as PEFT lays it out; `rows` of embedding and head, or none of them."""
    folder.mkdir()
    save_file(lora() | (saved(rows) if rows else {}), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    for name in ("tokenizer.json", "tokenizer_config.json") if vocab else ():
        shutil.copyfile(vocab / name, folder / name)
    return folder


def write_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"1": names[: len(names) // 2], "2": names[len(names) // 2 :]}
    weight_map, size = {}, 0
    for part, own in halves.items():
        shard = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(own, shard)
        size += sum(tensors[name].nbytes for name in own)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change(folder: Path, name: str = "model.safetensors", **made: object) -> None:
    """Replace tensors of a file; None removes one. `__` in a key stands for a dot."""
    tensors = load_file(folder / name)
    for key, value in made.items():
        full = key.replace("__", ".")
        full = next((n for n in tensors if n.endswith(full)), full)
        if value is None:
            del tensors[full]
        else:
            tensors[full] = value(tensors.get(full)) if callable(value) else value
    save_file(tensors, folder / name, {"format": "pt"})


def add_token(folder: Path, text: str, token_id: int, *, special: bool = True) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"].append({"id": token_id, "content": text, **flags, "special": special})
    (folder / "tokenizer.json").write_text(json.dumps(data))


def index_of(folder: Path, **values: object) -> None:
    edit(folder / "model.safetensors.index.json", **values)


def broken(code: str, *also: str) -> Callable[[Broken], Broken]:
    """A folder with the fault `code`; `also`: what else is true of such a folder."""

    def keep(make: Broken) -> Broken:
        BROKEN[make.__name__] = ((code, *also), make)
        return make

    return keep


def healthy(make: Broken) -> Broken:
    HEALTHY[make.__name__] = make
    return make


# -- tokenizer files


@broken("LG101")
def tokenizer_json_cut_off(ground):
    path = ground.base / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:500])
    return check(ground.base)


@broken("LG101")
def a_git_lfs_pointer_for_the_model_file(ground):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"
    (ground.sp / "tokenizer.model").write_text(pointer)
    return check(ground.sp)


@broken("LG101")
def a_token_whose_id_is_text(ground):
    data = json.loads((ground.base / "tokenizer.json").read_text())
    data["model"]["vocab"]["a"] = "7"
    (ground.base / "tokenizer.json").write_text(json.dumps(data))
    return check(ground.base)


@broken("LG102", "LG303")
def a_stale_tokenizer_json_beside_a_grown_model_file(ground):
    add_pieces(ground.sp / "tokenizer.model", ["▁hospital", "▁patient"])
    grow_rows(ground.sp, TOKENS + 2)
    return check(ground.sp)


@broken("LG102")
def a_stale_model_file_beside_a_grown_tokenizer_json(ground):
    extend(ground.sp, ground.sp)
    grow_rows(ground.sp, ROWS)
    return check(ground.sp)


@broken("LG102")
def added_tokens_that_contradict_the_vocabulary(ground):
    (ground.sp / "added_tokens.json").write_text(json.dumps({"<human>": 7}))
    return check(ground.sp)


@broken("LG102")
def settings_that_contradict_the_vocabulary(ground):
    listed = {"358": {"content": "<|other|>", "special": True}}
    edit(ground.base / "tokenizer_config.json", added_tokens_decoder=listed)
    return check(ground.base)


@broken("LG103")
def added_tokens_behind_a_shorter_model_file(ground):
    (ground.sp / "tokenizer.json").unlink()
    (ground.sp / "added_tokens.json").write_text(json.dumps({"<human>": TOKENS + 23}))
    grow_rows(ground.sp, TOKENS + 24)
    return check(ground.sp)


@broken("LG105")
def an_added_token_that_only_the_settings_know(ground):
    listed = {"360": {"content": "<new>", "special": True}}
    edit(ground.base / "tokenizer_config.json", added_tokens_decoder=listed)
    grow_rows(ground.base, 361)
    return check(ground.base)


@broken("LG106")
def words_by_the_hundred_as_added_tokens(ground):
    for place in range(501):
        add_token(ground.base, f"word{place}", TOKENS + place, special=False)
    grow_rows(ground.base, TOKENS + 501)
    return check(ground.base)


@broken("LG107")
def an_added_token_that_the_settings_of_qwen_lack(ground):
    old = {"358": {"content": "<|endoftext|>"}, "359": {"content": "<|im_end|>"}}
    edit(
        ground.base / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=old,
    )  # fmt: skip
    add_token(ground.base, "<|diagnosis|>", TOKENS)
    grow_rows(ground.base, TOKENS + 1)
    return check(ground.base)


@broken("LG108")
def a_word_flagged_special(ground):
    add_token(ground.base, "angina", TOKENS)
    grow_rows(ground.base, TOKENS + 1)
    return check(ground.base)


@broken("LG109")
def a_byte_level_tokenizer_declared_as_llama(ground):
    edit(ground.base / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    return check(ground.base)


@broken("LG110")
def an_added_token_beyond_a_hole(ground):
    add_token(ground.base, "<|call|>", TOKENS + 40)
    grow_rows(ground.base, TOKENS + 41)
    return check(ground.base)


@broken("LG111")
def a_template_with_a_marker_of_another_model(ground):
    template = "{{ '<|im_start|>' + message.content + '<|im_end|>' }}"
    (ground.base / "chat_template.jinja").write_text(template)
    return check(ground.base)


@broken("LG112")
def a_pad_token_that_no_file_has(ground):
    edit(ground.base / "tokenizer_config.json", pad_token="[PAD]")
    return check(ground.base)


@broken("LG113")
def a_template_whose_markers_are_all_unknown(ground):
    template = "{{ '<|user|>' + message.content }}"
    edit(ground.base / "tokenizer_config.json", chat_template=template)
    return check(ground.base)


@broken("LG114")
def a_model_file_that_is_converted_each_time(ground):
    (ground.sp / "tokenizer.json").unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(probe, "SLOW", 0.0)
        return check(ground.sp, deep=True)


@broken("LG115")
def a_word_that_no_merge_makes(ground):
    grown = extend(ground.base, ground.base.parent / "grown")
    data = json.loads((grown / "tokenizer.json").read_text())
    data["model"]["vocab"]["angiogram"] = ROWS
    (grown / "tokenizer.json").write_text(json.dumps(data))
    return check(grown, base=ground.base, deep=True)


@broken("LG116")
def scores_in_another_order_than_the_merges(ground):
    """The merges join the new pairs last, their scores of 0 join them first."""
    grown = extend(ground.sp, ground.sp.parent / "grown")
    shutil.copyfile(ground.sp / "tokenizer.model", grown / "tokenizer.model")
    texts = TokenMap.read(grown).texts
    add_pieces(grown / "tokenizer.model", [texts[i] for i in range(TOKENS, ROWS)], score=0)
    return check(grown, base=ground.sp, deep=True)


# -- configs


@broken("LG201")
def vocab_size_raised_by_hand(ground):
    edit(ground.base / "config.json", vocab_size=TOKENS + 64)
    return check(ground.base)


@broken("LG201")
def vocab_size_zero_of_an_ungathered_resize(ground):
    edit(ground.base / "config.json", vocab_size=0)
    return check(ground.base)


@broken("LG201")
def a_nested_vocab_size_left_behind(ground):
    edit(ground.base / "config.json", text_config={"vocab_size": 7})
    return check(ground.base)


@broken("LG202")
def eos_beyond_the_rows(ground):
    edit(ground.base / "config.json", eos_token_id=[TOKENS - 2, TOKENS])
    return check(ground.base)


@broken("LG202")
def a_suppressed_id_beyond_the_rows(ground):
    edit(ground.base / "generation_config.json", suppress_tokens=[3, 50257])
    return check(ground.base)


@broken("LG202")
def bad_words_of_another_tokenizer(ground):
    edit(ground.base / "generation_config.json", bad_words_ids=[[3], [4, 32000]])
    return check(ground.base)


@broken("LG203")
def eos_that_the_tokenizer_calls_otherwise(ground):
    for name in ("config.json", "generation_config.json"):
        edit(ground.base / name, eos_token_id=5)
    return check(ground.base)


@broken("LG204")
def a_config_that_is_a_list(ground):
    (ground.base / "generation_config.json").write_text("[]")
    return check(ground.base)


@broken("LG204")
def a_config_nested_beyond_reason(ground):
    (ground.base / "generation_config.json").write_text("[" * 100_000)
    return check(ground.base)


# -- weights


@broken("LG301")
def weights_cut_off(ground):
    path = ground.base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return check(ground.base)


@broken("LG301")
def weights_as_a_pickle(ground):
    (ground.base / "model.safetensors").rename(ground.base / "pytorch_model.bin")
    return check(ground.base)


@broken("LG301")
def a_header_of_exabytes(ground):
    path = ground.base / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    return check(ground.base)


@broken("LG301")
def a_shard_that_is_missing(ground):
    (ground.shards / "model-00002-of-00002.safetensors").unlink()
    return check(ground.shards)


@broken("LG301")
def an_index_that_leads_out_of_the_folder(ground):
    shutil.copyfile(ground.base / "model.safetensors", ground.base.parent / "out.safetensors")
    index_of(ground.shards, weight_map={EMBED: "../out.safetensors"})
    return check(ground.shards)


@broken("LG301")
def a_tensor_in_two_shards(ground):
    one, two = (ground.shards / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    name, tensor = next(iter(load_file(one).items()))
    save_file(load_file(two) | {name: tensor}, two, {"format": "pt"})
    return check(ground.shards)


@broken("LG301")
def an_index_beside_the_single_file(ground):
    shutil.copyfile(ground.base / "model.safetensors", ground.shards / "model.safetensors")
    return check(ground.shards)


@broken("LG301")
def an_index_that_names_a_tensor_nobody_has(ground):
    path = ground.shards / "model.safetensors.index.json"
    shards = json.loads(path.read_text())["weight_map"]
    index_of(ground.shards, weight_map=shards | {"lm_head.weight": next(iter(shards.values()))})
    return check(ground.shards)


@broken("LG302")
def a_grown_tokenizer_without_rows(ground):
    extend(ground.base, ground.base)
    return check(ground.base)


@broken("LG303")
def padding(ground):
    grow_rows(ground.base, 384)
    return check(ground.base)


@broken("LG304")
def embedding_and_head_of_different_length(ground):
    change(ground.sp, lm_head__weight=lambda head: head[:-3].clone())
    return check(ground.sp)


@broken("LG305")
def an_untied_model_without_its_head(ground):
    change(ground.sp, lm_head__weight=None)
    return check(ground.sp)


@broken("LG306")
def a_tied_model_with_a_head(ground):
    edit(ground.sp / "config.json", tie_word_embeddings=True)
    return check(ground.sp)


@broken("LG307")
def an_embedding_saved_by_one_rank(ground):
    change(ground.base, model__embed_tokens__weight=torch.zeros(0))
    return check(ground.base)


@broken("LG308")
def an_index_with_the_size_of_the_base(ground):
    index_of(ground.shards, metadata={"total_size": 1234})
    return check(ground.shards)


@broken("LG308")
def an_index_that_lacks_a_tensor(ground):
    path = ground.shards / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    index_of(ground.shards, weight_map=weight_map)
    return check(ground.shards)


@broken("LG309")
def a_shard_of_an_earlier_save(ground):
    save_file({"old": torch.ones(2)}, ground.shards / "model-00003-of-00003.safetensors")
    return check(ground.shards)


# -- further tables with a row per token


def of_kind(ground: Ground, kind: str) -> Path:
    """A tiny model of `test_architectures.KINDS` with the byte-level tokenizer of the base."""
    folder = ground.base.parent / kind
    test_architectures.build(kind, test_architectures.KINDS[kind].tied[0], folder, rows=TOKENS)
    return finished(ground, folder)


def finished(ground: Ground, folder: Path) -> Path:
    """A model with the tokenizer of the base and its special ids."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ground.base / name, folder / name)
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, bos_token_id=None, eos_token_id=TOKENS - 2)
    return folder


def with_copies(folder: Path, prefix: str, rows: int = TOKENS) -> Path:
    """Copies of embedding and head, as layers for the prediction of more tokens have them."""
    tensors = load_file(folder / "model.safetensors")
    copies = {
        f"{prefix}.embed_tokens.weight": tensors[EMBED][:rows].clone(),
        f"{prefix}.shared_head.head.weight": tensors[HEAD][:rows].clone(),
    }
    save_file(tensors | copies, folder / "model.safetensors", {"format": "pt"})
    return folder


def gemma_3n(ground: Ground) -> Path:
    """Its image and audio tokens have no embedding per layer: fewer rows there, as is right."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=TOKENS, vocab_size_per_layer_input=TOKENS - 8, hidden_size=32,
        intermediate_size=[48, 48], num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0], max_position_embeddings=128,
    )  # fmt: skip
    folder = ground.base.parent / "gemma3n"
    Gemma3nForCausalLM(config).save_pretrained(folder)
    return finished(ground, folder)


@broken("LG201")
def a_stale_number_of_embeddings_per_layer(ground):
    folder = of_kind(ground, "gemma4_text")
    edit(folder / "config.json", vocab_size_per_layer_input=TOKENS - 24)
    return check(folder)


@broken("LG201", "LG310")
def a_stale_number_of_embeddings_per_layer_in_gemma_3n(ground):
    folder = gemma_3n(ground)
    edit(folder / "config.json", vocab_size_per_layer_input=TOKENS)
    return check(folder)


@broken("LG304")
def embeddings_per_layer_of_another_length(ground):
    folder = of_kind(ground, "gemma4_text")
    change(folder, embed_tokens_per_layer__weight=lambda table: table[:-8].clone())
    edit(folder / "config.json", vocab_size_per_layer_input=TOKENS - 8)
    return check(folder)


@broken("LG304")
def a_copy_in_a_prediction_layer_that_did_not_grow(ground):
    return check(with_copies(of_kind(ground, "deepseek_v3"), "model.layers.2", TOKENS - 8))


@broken("LG304")
def a_copy_beside_the_layers_that_did_not_grow(ground):
    return check(with_copies(of_kind(ground, "deepseek_v3"), "mtp", TOKENS - 8))


@broken("LG310")
def a_model_to_which_no_row_can_be_added(ground):
    return check(gemma_3n(ground))


# -- adapters


@broken("LG401")
def the_origin_case(ground):
    return check(ground.sp, adapter=ground.adapter)


@broken("LG402", "LG303")
def an_adapter_whose_trainer_cut_padding_off(ground):
    extend(ground.sp, ground.sp)
    (ground.sp / "tokenizer.model").unlink()
    grow_rows(ground.sp, ROWS)
    edit(ground.sp / "config.json", vocab_size=ROWS)
    grow_rows(ground.sp, 384)
    return check(ground.sp, adapter=ground.adapter)


@broken("LG403")
def an_adapter_saved_by_one_rank(ground):
    change(ground.adapter, "adapter_model.safetensors", q_proj__lora_A__weight=torch.zeros(0))
    return check(ground.adapter)


@broken("LG404")
def an_adapter_of_another_extension(ground):
    extend(ground.sp, ground.sp, skip=ADDED)
    (ground.sp / "tokenizer.model").unlink()
    grow_rows(ground.sp, ROWS)
    return check(ground.sp, adapter=ground.adapter)


@broken("LG405")
def an_adapter_without_its_tokenizer(ground):
    (ground.adapter / "tokenizer.json").unlink()
    (ground.adapter / "tokenizer_config.json").unlink()
    return check(ground.sp, adapter=ground.adapter)


@broken("LG406", "LG303")
def new_tokens_on_padding_rows(ground):
    grow_rows(ground.sp, ROWS)
    return check(ground.sp, adapter=ground.adapter)


@broken("LG407")
def new_rows_that_nobody_saved(ground):
    adapter = write_adapter(ground.base.parent / "a", ground.copy("vocab"), None)
    return check(ground.sp, adapter=adapter)


@broken("LG407")
def a_longer_tokenizer_copied_beside_an_adapter(ground):
    adapter = write_adapter(ground.base.parent / "a", ground.copy("vocab"), TOKENS)
    return check(adapter)


@broken("LG408")
def an_adapter_of_a_wider_model(ground):
    change(
        ground.adapter, "adapter_model.safetensors",
        q_proj__lora_A__weight=torch.ones(2, 48), embed_tokens__weight=None, lm_head__weight=None,
    )  # fmt: skip
    shutil.copyfile(ground.sp / "tokenizer.json", ground.adapter / "tokenizer.json")
    return check(ground.sp, adapter=ground.adapter)


@broken("LG408")
def an_adapter_whose_two_tables_differ(ground):
    change(ground.adapter, "adapter_model.safetensors", lm_head__weight=torch.ones(TOKENS, 32))
    return check(ground.adapter)


@broken("LG409")
def an_adapter_as_a_pickle(ground):
    (ground.adapter / "adapter_model.safetensors").rename(ground.adapter / "adapter_model.bin")
    return check(ground.adapter)


@broken("LG410")
def an_adapter_that_replicates_layers(ground):
    edit(ground.adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 2]])
    return check(ground.adapter)


@broken("LG411")
def rows_trained_for_ids_without_a_token(ground):
    rows = [TOKENS, ROWS]
    adapter = write_adapter(
        ground.base.parent / "a", ground.copy("vocab"), None, trainable_token_indices=rows
    )
    return check(adapter)


# -- manifests and bases


@broken("LG412", "LG406", "LG406", "LG303")
def adapters_of_two_extensions(ground):
    grow_rows(ground.sp, ROWS)
    other = write_adapter(ground.sp.parent / "o", extend(ground.sp, ground.sp.parent / "v", skip=ADDED), ROWS)  # fmt: skip
    return check(ground.sp, adapter=[ground.adapter, other])


@broken("LG501")
def a_manifest_of_another_format(ground):
    (ground.model / "lexigraft.json").write_text('{"format": 99}')
    return check(ground.model)


@broken("LG502")
def a_tokenizer_that_was_swapped(ground):
    extend(ground.base, ground.model, skip=ADDED)
    return check(ground.model)


@broken("LG503", "LG303")
def rows_that_the_manifest_does_not_know(ground):
    grow_rows(ground.model, ROWS + 2)
    return check(ground.model)


@broken("LG504")
def a_tokenizer_of_another_lineage(ground):
    edit(ground.model / "tokenizer_config.json", lexigraft={"manifest": "0" * 64})
    return check(ground.model)


@broken("LG601")
def a_tokenizer_trained_anew(ground):
    other = ground.base.parent / "other"
    write_byte_level(other, vocab_size=TOKENS - 40)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (ground.model / name).unlink()
    (ground.model / "lexigraft.json").unlink()
    return check(ground.model, base=other)


@broken("LG602")
def a_table_that_shrank(ground):
    grow_rows(ground.base, 384)
    return check(ground.model, base=ground.base)


@broken("LG603")
def a_tensor_that_was_lost(ground):
    change(ground.model, model__norm__weight=None)
    return check(ground.model, base=ground.base)


# -- GGUF files


def written_gguf(ground: Ground, **change: object) -> Path:
    """The SentencePiece tokenizer and a table as llama.cpp's converter writes them, and a change.

    `rows`: of the table; `scores`: how many; `twice`: the id that gets the text of id 5;
    `eos`: its id; `cut`: bytes to leave out at the end.
    """
    import gguf
    import numpy as np

    tokens = TokenMap.read(ground.sp)
    texts = [tokens.texts[i] for i in range(TOKENS)] + ["[PAD360]", "[PAD361]"]
    if "twice" in change:
        texts[change["twice"]] = texts[5]
    path = ground.sp.parent / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([-1.0] * change.get("scores", len(texts)))
    writer.add_token_types([1] * TOKENS + [5, 5])
    writer.add_eos_token_id(change.get("eos", 2))
    writer.add_tensor(
        "token_embd.weight", np.zeros((change.get("rows", len(texts)), 32), np.float32)
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if change.get("cut"):
        path.write_bytes(path.read_bytes()[: -change["cut"]])
    return path


@broken("LG801")
def a_gguf_file_cut_off(ground):
    return check(written_gguf(ground, cut=100))


@broken("LG801")
def a_gguf_header_of_exabytes(ground):
    path = written_gguf(ground)
    path.write_bytes(path.read_bytes()[:8] + struct.pack("<QQ", 2**62, 2**62))
    return check(path)


@broken("LG802")
def a_gguf_file_with_a_row_too_few(ground):
    return check(written_gguf(ground, rows=TOKENS))


@broken("LG803")
def a_gguf_file_with_a_score_too_few(ground):
    return check(written_gguf(ground, scores=TOKENS))


@broken("LG804")
def a_gguf_file_whose_eos_is_of_another_model(ground):
    return check(written_gguf(ground, eos=128009))


@broken("LG805")
def a_gguf_file_with_a_token_twice(ground):
    return check(written_gguf(ground, twice=7))


@broken("LG601")
def a_gguf_file_of_another_tokenizer(ground):
    return check(written_gguf(ground), base=ground.base)


def with_probe(ground: Ground, probe: list[Probe]) -> Path:
    """The grafted model with trained rows and texts in its manifest that `learn` read."""
    learned, grafted = Manifest.read(ground.model).records
    Manifest(records=[replace(learned, probe=probe), grafted]).write(ground.model)
    change(ground.model, model__embed_tokens__weight=some_rows(like_old_rows))
    return ground.model


@broken("LG505")
def a_class_that_the_installed_versions_build_otherwise(ground):
    """The manifest's probe, re-encoded: someone changed how the tokenizer cuts words."""
    return check(with_probe(ground, [Probe(text="the river", ids=[1, 2, 3])]), deep=True)


# -- what other programs refuse


def with_piece(ground: Ground, *pieces: str) -> Path:
    """The SentencePiece model with more pieces of score 0, as merge scripts add them."""
    folder = ground.sp.parent / "grown"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(ground.sp / name, folder / name)
    add_pieces(folder / "tokenizer.model", list(pieces))
    return folder


@broken("LG911")
def new_tokens_in_the_text_that_llama_cpp_knows_tokenizers_by(ground):
    grown = ground.base.parent / "grown"
    parts.lengthen(ground.base, grown, [check_text()] * 10, tokens=20)
    return check(grown, base=ground.base, consumer="gguf")


@broken("LG912")
def a_sentencepiece_tokenizer_without_its_model_file(ground):
    """The merges join `th` and then `e` first; with equal scores the leftmost pair comes first."""
    (ground.sp / "tokenizer.model").unlink()
    return check(ground.sp, consumer="gguf")


@broken("LG913", "LG301", "LG912")
def a_vocabulary_beside_the_config_of_its_base(ground):
    folder = ground.copy("vocab")
    shutil.copyfile(ground.base / "config.json", folder / "config.json")
    return check(folder, base=ground.sp, consumer="gguf")


@broken("LG913", "LG912", "LG303")
def padding_that_the_converter_will_not_name(ground):
    (ground.sp / "tokenizer.model").unlink()
    grow_rows(ground.sp, 384)
    return check(ground.sp, consumer="gguf")


@broken("LG914")
def an_adapter_with_tables_for_llama_cpp(ground):
    return check(ground.adapter, consumer="gguf")


@broken("LG915")
def a_unigram_model_for_llama_cpp(ground):
    folder = ground.base.parent / "unigram"
    parts.write_unigram(folder)
    return check(folder, consumer="gguf")


@broken("LG916")
def a_model_that_puts_spaces_in_its_own_way(ground):
    return check(ground.sp, consumer="gguf")


@broken("LG921")
def an_adapter_with_saved_modules_for_vllm(ground):
    edit(ground.adapter / "adapter_config.json", modules_to_save=["embed_tokens", "lm_head"])
    return check(ground.adapter, consumer="vllm")


@broken("LG921")
def an_adapter_with_tables_for_vllm(ground):
    return check(ground.adapter, consumer="vllm")


@broken("LG922")
def an_adapter_of_a_high_rank_for_vllm(ground):
    adapter = write_adapter(ground.base.parent / "a", None, None, r=64)
    return check(adapter, consumer="vllm")


@broken("LG923", "LG303")
def an_adapter_on_more_rows_than_vllm_serves(ground):
    """Of a table of 262,144 rows only the header says so: the file has a hole."""
    rows = 262_144
    adapter = write_adapter(ground.base.parent / "a", None, None)
    layer = "model.layers.0.self_attn.q_proj.weight"
    write_hollow(ground.base / "model.safetensors", {EMBED: rows, layer: 32})
    edit(ground.base / "config.json", vocab_size=rows)
    return check(ground.base, adapter=adapter, consumer="vllm")


def write_hollow(path: Path, rows: dict[str, int]) -> None:
    """A safetensors file of tables 32 wide, whose data takes no room on the disk."""
    entries, end = {}, 0
    for name, count in rows.items():
        begin, end = end, end + count * 32 * 4
        entries[name] = {"dtype": "F32", "shape": [count, 32], "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with path.open("r+b") as stream:
        stream.truncate(8 + len(header) + end)


@broken("LG924")
def rows_that_are_no_multiple_for_vllm(ground):
    return check(ground.base, consumer="vllm")


@broken("LG931", "LG934")
def a_class_of_transformers_5(ground):
    edit(ground.base / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    return check(ground.base, consumer="transformers-4")


@broken("LG932", "LG934")
def special_tokens_as_a_list(ground):
    edit(ground.base / "tokenizer_config.json", extra_special_tokens=["<|im_end|>"])
    return check(ground.base, consumer="transformers-4")


@broken("LG933", "LG934")
def positions_that_transformers_4_does_not_read(ground):
    rotary = {"rope_type": "default", "rope_theta": 500000.0}
    edit(ground.base / "config.json", rope_parameters=rotary)
    return check(ground.base, consumer="transformers-4")


@broken("LG934")
def a_type_that_old_versions_do_not_read(ground):
    return check(ground.base, consumer="transformers-4")


@broken("LG941")
def a_model_file_alone_for_tgi(ground):
    (ground.sp / "tokenizer.json").unlink()
    return check(ground.sp, consumer="tgi")


@broken("LG942")
def an_adapter_with_tables_for_tgi(ground):
    return check(ground.adapter, consumer="tgi")


# -- weights themselves


def some_rows(change_rows: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], object]:
    def changed(old: torch.Tensor) -> torch.Tensor:
        new = old.clone()
        change_rows(new)
        return new

    return changed


def like_old_rows(rows: torch.Tensor) -> None:
    """New rows that differ and are about as long as the old ones."""
    rows[TOKENS:].normal_(std=float(rows[:TOKENS].std()))


@broken("LG701")
def a_head_with_nan(ground):
    change(ground.sp, lm_head__weight=some_rows(lambda rows: rows[7].fill_(float("nan"))))
    return check(ground.sp, deep=True)


@broken("LG701")
def an_infinity_inside_a_layer(ground):
    change(ground.sp, layers__1__mlp__up_proj__weight=some_rows(lambda w: w[3, 3].fill_(torch.inf)))
    return check(ground.sp, deep=True)


@broken("LG702")
def rows_that_weight_decay_has_eaten(ground):
    change(ground.sp, model__embed_tokens__weight=some_rows(lambda rows: rows[300:303].zero_()))
    return check(ground.sp, deep=True)


@broken("LG703")
def an_eos_that_was_never_trained(ground):
    change(ground.sp, lm_head__weight=some_rows(lambda rows: rows[2].zero_()))
    return check(ground.sp, deep=True)


@broken("LG704")
def new_rows_that_are_all_one_mean(ground):
    return check(ground.model, base=ground.base, deep=True)


@broken("LG705")
def a_tied_model_whose_head_was_trained_apart(ground):
    edit(ground.sp / "config.json", tie_word_embeddings=True)
    return check(ground.sp, deep=True)


@broken("LG706")
def an_old_row_that_a_loop_overwrote(ground):
    base = Path(shutil.copytree(ground.sp, ground.sp.parent / "before"))
    change(ground.sp, model__embed_tokens__weight=some_rows(lambda rows: rows[0].add_(1)))
    result = check(ground.sp, base=base, deep=True)
    assert "1 of 360 old rows" in result.findings[0].found
    return result


@broken("LG707", "LG303")
def padding_rows_of_noise(ground):
    grow_rows(ground.sp, 384)
    change(ground.sp, lm_head__weight=some_rows(lambda rows: rows[360:].mul_(1e3)))
    return check(ground.sp, deep=True)


@broken("LG710")
def new_rows_of_noise_that_does_not_know_the_model(ground):
    noise = some_rows(lambda rows: rows[TOKENS:].normal_(std=0.5))
    change(ground.model, model__embed_tokens__weight=noise)
    return check(ground.model, base=ground.base, deep=True)


@broken("LG710", "LG702")
def new_rows_of_next_to_nothing(ground):
    change(
        ground.model,
        model__embed_tokens__weight=some_rows(lambda rows: rows[TOKENS:].normal_(std=1e-6)),
    )
    return check(ground.model, deep=True)


def grafted(ground: Ground) -> Path:
    """The grown model with new rows that differ; its manifest says that nothing else changed."""
    change(ground.model, model__embed_tokens__weight=some_rows(like_old_rows))
    return ground.model


def merged_by_others(ground: Ground, *also: str) -> CheckResult:
    """A copy of `sp` with another q_proj, as its adapter says, and other changes."""
    adapter = write_adapter(ground.sp.parent / "a", ground.sp, None)
    merged = Path(shutil.copytree(ground.sp, ground.sp.parent / "merged"))
    added = some_rows(lambda weight: weight.add_(0.1))
    changed = dict.fromkeys(("layers__0__self_attn__q_proj__weight", *also), added)
    change(merged, **changed)
    return check(merged, base=ground.sp, adapter=adapter, deep=True)


@broken("LG708")
def a_layer_that_a_copy_damaged(ground):
    change(grafted(ground), layers__1__mlp__up_proj__weight=some_rows(lambda w: w[3, 3].add_(1)))
    return check(ground.model, base=ground.base, deep=True)


@broken("LG708")
def a_layer_in_another_type(ground):
    change(grafted(ground), model__norm__weight=lambda w: w.double())
    return check(ground.model, base=ground.base, deep=True)


@broken("LG709")
def a_layer_that_the_merged_adapter_does_not_change(ground):
    return merged_by_others(ground, "layers__0__self_attn__k_proj__weight")


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_folder_gives_exactly_its_finding(ground, name):
    codes, make = BROKEN[name]
    result = make(ground)
    assert Counter(f.code for f in result.findings) == Counter(codes), result.lines()
    assert result.ok == all(f.severity != "error" for f in result.findings)
    for found in result.findings:
        assert found.severity == "note" or (found.needed and found.fix)
        if command := command_of(found):
            parse(command[1:])


def command_of(found: Finding) -> list[str]:
    """The words of the `lexigraft` command that a fix ends with; none where it has no command."""
    command = re.search(r"(?<!of )\blexigraft [a-z].*?(?=,? \(|, |$)", found.fix)
    return shlex.split(command[0]) if command else []


def test_adapters_of_a_stack_are_each_held_against_those_before_it(ground, tmp_path):
    """The second was trained on the result of the first: in that order neither is a stranger."""
    untied = ground.sp
    one = extend(untied, tmp_path / "one")
    two = extend(one, tmp_path / "two", skip=ADDED)
    first = write_adapter(tmp_path / "first", one, TOKENS + ADDED)
    second = write_adapter(tmp_path / "second", two, TOKENS + 2 * ADDED)
    found = check(untied, adapter=[first, second]).findings
    assert [f.code for f in found] == ["LG401", "LG401"]
    assert f"{untied} with {first} has 366: 6 tokens were added" in found[1].found
    assert found[1].fix == f"lexigraft merge {untied} {first} {second} -o MERGED"
    turned = {f.code: f for f in check(untied, adapter=[second, first]).findings}
    assert turned.keys() == {"LG401", "LG412"}
    assert turned["LG412"].where == str(first)
    assert turned["LG412"].fix == f"lexigraft merge {untied} {first} {second} -o MERGED"
    plain = write_adapter(tmp_path / "plain", untied, None)
    assert [f.code for f in check(untied, adapter=[first, plain]).findings] == ["LG401"]
    with pytest.raises(LexigraftError, match="is an adapter, and --adapter names"):
        check(first, adapter=second)


MENDED = {
    "vocab_size_raised_by_hand": "base",
    "vocab_size_zero_of_an_ungathered_resize": "base",
    "a_nested_vocab_size_left_behind": "base",
    "a_stale_number_of_embeddings_per_layer": "gemma4_text",
    "an_index_with_the_size_of_the_base": "shards",
    "an_index_that_lacks_a_tensor": "shards",
    "a_shard_of_an_earlier_save": "shards",
    "a_stale_model_file_beside_a_grown_tokenizer_json": "sp",
    "a_tied_model_whose_head_was_trained_apart": "sp",
}


@pytest.mark.parametrize("name", MENDED)
def test_fix_mends_a_copy_and_leaves_the_folder_alone(ground, tmp_path, name):
    codes, make = BROKEN[name]
    make(ground)
    folder = ground.copy(MENDED[name])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = mend(folder, tmp_path / "mended", deep=True)
    assert [one.code for one in result.mended] == list(codes)
    assert result.ok and all(f.severity == "note" for f in result.after.findings), result.lines()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in (tmp_path / "mended").glob("*.safetensors"):
        assert path.read_bytes() == before[path.name]


def test_fix_and_deep_on_the_command_line(ground, tmp_path):
    from typer.testing import CliRunner

    from lexigraft.cli import app

    vocab_size_raised_by_hand(ground)
    words = ["check", str(ground.base), "--deep", "--fix", str(tmp_path / "mended")]
    done = CliRunner().invoke(app, [*words, "--json"])
    told = json.loads(done.output)
    assert done.exit_code == 0 and told["ok"]
    assert [one["code"] for one in told["mended"]] == ["LG201"]
    assert "edit" not in told["mended"][0]
    refused = CliRunner().invoke(app, [*words, "--base", str(ground.sp), "--force"])
    assert isinstance(refused.exception, LexigraftError)


def test_fix_says_when_nothing_can_be_mended(ground, tmp_path):
    with pytest.raises(LexigraftError, match="edit alone"):
        mend(ground.base, tmp_path / "mended")
    grown = extend(ground.base, ground.base)
    with pytest.raises(LexigraftError, match="LG302"):
        mend(grown, tmp_path / "mended")
    with pytest.raises(LexigraftError, match="exists"):
        mend(ground.base, ground.base)
    assert not (tmp_path / "mended").exists()


def test_the_gallery_has_every_code():
    raised = {codes[0] for codes, _ in BROKEN.values()}
    assert small.CODES.keys() - raised <= {"LG104"}  # in the healthy ones
    assert len(BROKEN) >= 40 and len(HEALTHY) >= 15


# -- healthy ones


@healthy
def a_tied_base(ground):
    return check(ground.base)


@healthy
def an_untied_base(ground):
    return check(ground.sp)


@healthy
def a_sharded_base(ground):
    return check(ground.shards)


@healthy
def a_base_whose_weights_are_read(ground):
    return check(ground.base, deep=True)


@healthy
def an_untied_base_against_itself(ground):
    grow_rows(ground.sp, 448)
    return check(ground.sp, base=ground.sp, deep=True)


@healthy
def a_tied_base_with_a_copy_as_its_head(ground):
    tensors = load_file(ground.base / "model.safetensors")
    change(ground.base, lm_head__weight=tensors[EMBED].clone())
    return check(ground.base, deep=True)


@healthy
def embeddings_per_layer(ground):
    return check(of_kind(ground, "gemma4_text"), deep=True)


@healthy
def copies_in_a_prediction_layer(ground):
    return check(with_copies(of_kind(ground, "deepseek_v3"), "model.layers.2"), deep=True)


@healthy
def copies_beside_the_layers(ground):
    return check(with_copies(of_kind(ground, "deepseek_v3"), "mtp"))


@healthy
def an_adapter_whose_weights_are_read(ground):
    return check(ground.adapter, deep=True)


@healthy
def a_padded_base(ground):
    grow_rows(ground.sp, 448)
    return check(ground.sp)


@healthy
def a_grafted_model_and_its_base(ground):
    return check(ground.model, base=ground.base)


@healthy
def a_grafted_model_tensor_by_tensor(ground):
    return check(grafted(ground), base=ground.base, deep=True)


@healthy
def a_model_that_another_program_merged(ground):
    return merged_by_others(ground)


@healthy
def a_model_that_lexigraft_merged(ground):
    adapter = write_adapter(ground.sp.parent / "a", ground.sp, None)
    merge(ground.sp, adapter, output=ground.sp.parent / "merged")
    return check(ground.sp.parent / "merged", base=ground.sp, deep=True)


@healthy
def a_vocabulary_and_its_base(ground):
    return check(ground.copy("vocab"), base=ground.sp)


@healthy
def a_gguf_file(ground):
    return check(written_gguf(ground))


@healthy
def a_gguf_file_and_the_model_it_was_made_from(ground):
    return check(written_gguf(ground), base=ground.sp)


@healthy
def a_folder_with_a_gguf_file_alone(ground):
    folder = ground.sp.parent / "folder"
    folder.mkdir()
    return check(written_gguf(ground).rename(folder / "tiny.gguf").parent)


@healthy
def an_adapter_on_a_gguf_file(ground):
    adapter = write_adapter(ground.sp.parent / "a", ground.sp, None)
    return check(written_gguf(ground), adapter=adapter)


@healthy
def a_probe_that_is_read_as_before(ground):
    tokenizer = Tokenizer.from_file(str(ground.model / "tokenizer.json"))
    probe = [Probe(text=t, ids=tokenizer.encode(t).ids) for t in ("the river", "  冠状 12.5\n")]
    return check(with_probe(ground, probe), deep=True)


@healthy
def an_extension_for_llama_cpp(ground):
    return check(ground.model, base=ground.base, consumer="gguf")


@healthy
def an_adapter_of_linear_layers_for_all(ground):
    adapter = write_adapter(ground.sp.parent / "a", ground.sp, None)
    results = [check(ground.sp, adapter=adapter, consumer=name) for name in CONSUMERS]
    return CheckResult(ground.sp, [f for r in results for f in r.findings], [])


@healthy
def an_adapter_alone(ground):
    return check(ground.adapter)


@healthy
def an_adapter_on_the_grown_model(ground):
    extend(ground.sp, ground.sp)
    (ground.sp / "tokenizer.model").unlink()
    grow_rows(ground.sp, ROWS)
    return check(ground.sp, adapter=ground.adapter)


@healthy
def an_adapter_of_linear_layers(ground):
    return check(ground.sp, adapter=write_adapter(ground.sp.parent / "a", ground.sp, None))


@healthy
def an_adapter_without_a_tokenizer_of_the_same_rows(ground):
    return check(ground.sp, adapter=write_adapter(ground.sp.parent / "a", None, TOKENS))


@healthy
def a_model_file_alone(ground):
    (ground.sp / "tokenizer.json").unlink()
    return check(ground.sp)


@healthy
def old_added_tokens(ground):
    (ground.sp / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "<s>": 1}))
    return check(ground.sp)


@healthy
def an_added_token_at_the_end(ground):
    (ground.sp / "tokenizer.model").unlink()
    add_token(ground.sp, "<pad>", TOKENS)
    edit(ground.sp / "tokenizer_config.json", pad_token="<pad>")
    edit(ground.sp / "config.json", pad_token_id=TOKENS)
    grow_rows(ground.sp, 384)
    return check(ground.sp)


@healthy
def a_template_of_its_own_markers(ground):
    template = "{{ message.content + '<|im_end|>' + '<|' ~ role ~ '|>' }}"
    (ground.base / "chat_template.jinja").write_text(template)
    return check(ground.base)


@healthy
def a_qwen_whose_settings_list_nothing(ground):
    edit(ground.base / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    return check(ground.base)


@healthy
def lists_of_ids_that_have_rows(ground):
    edit(
        ground.base / "generation_config.json",
        suppress_tokens=[1, -1], bad_words_ids=[[3], [4, 5]], eos_token_id=[TOKENS - 2, 3],
    )  # fmt: skip
    return check(ground.base)


@healthy
def vision_and_audio_with_tables_of_their_own(ground):
    edit(ground.base / "config.json", vision_config={"vocab_size": 3, "image_size": 8})
    return check(ground.base)


@healthy
def an_older_number_in_a_manifest_of_one_step(ground):
    manifest = Manifest.read(ground.model)
    Manifest(records=manifest.records[:1]).write(ground.model)
    return check(ground.model)


def of_a_kind(
    kind: str, *, rows: int = 0, lora: tuple[str, ...] = (), grown: bool = False
) -> Broken:
    """A tiny real model of another architecture, as transformers saves it.

    `rows`: with padding; `lora`: and with an adapter on these layers, as PEFT saves it; `grown`:
    with tokens that were added to it, and its rows resized, without lexigraft.
    """

    def make(ground: Ground) -> CheckResult:
        import test_architectures as architectures

        folder = architectures.write_tokenizer(ground.base.parent / kind)
        tied = architectures.KINDS[kind].tied[0]
        model = architectures.build(kind, tied, folder, rows=rows or architectures.TOKENS)
        if grown:
            add_token(folder, "<|user|>", architectures.TOKENS)
            model.resize_token_embeddings(architectures.TOKENS + 1, mean_resizing=False)
            model.save_pretrained(folder)
        adapter = None
        if lora:
            from peft import LoraConfig, get_peft_model

            adapter = folder.parent / "adapter"
            config = LoraConfig(r=2, target_modules=list(lora), base_model_name_or_path=kind)
            get_peft_model(model, config).save_pretrained(adapter)
        return check(folder, adapter=adapter, deep=True)

    return make


HEALTHY |= {
    "a_mixture_of_experts": of_a_kind("mixtral"),
    "a_padded_qwen_and_an_adapter": of_a_kind("qwen3", rows=384, lora=("q_proj", "v_proj")),
    "a_gemma_that_sees": of_a_kind("gemma3", rows=384),
}
OTHER_KINDS: dict[str, Broken] = {
    "a padded Qwen of experts and an adapter": of_a_kind("qwen2_moe", rows=384, lora=("q_proj",)),
    "a Gemma that others extended": of_a_kind("gemma3_text", grown=True),
    "an older Gemma": of_a_kind("gemma2", lora=("q_proj", "o_proj")),
    "a Llava with an adapter": of_a_kind("llava", lora=("q_proj",)),
    "a Qwen that sees": of_a_kind("qwen2_vl", rows=384),
    "a Qwen that others extended": of_a_kind("qwen2", grown=True),
    "DeepSeek's experts": of_a_kind("deepseek_v3", rows=384),
    "GPT-2 with Conv1D and an adapter": of_a_kind("gpt2", lora=("c_attn",)),
    "GPT-NeoX": of_a_kind("gpt_neox", rows=384, lora=("query_key_value",)),
    "Falcon": of_a_kind("falcon"),
    "T5": of_a_kind("t5", rows=384),
    "BERT": of_a_kind("bert"),
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_no_other_kind_of_model_has_a_finding_above_a_note(ground, name):
    result = OTHER_KINDS[name](ground)
    assert [f for f in result.findings if f.severity != "note"] == [], result.lines()


@pytest.mark.parametrize("name", HEALTHY)
def test_no_healthy_folder_has_a_finding_above_a_note(ground, name):
    result = HEALTHY[name](ground)
    assert [f for f in result.findings if f.severity != "note"] == [], result.lines()
    assert result.ok


KINDS: dict[str, Callable[[Path], object]] = {
    "GPT-2's two files": parts.write_byte_level_files,
    "Qwen2's two files": lambda folder: parts.write_byte_level_files(folder, kind="Qwen2Tokenizer"),
    "ranks": parts.write_ranks,
    "ranks and tokenizer.json": lambda folder: parts.write_ranks(folder, files=True),
    "WordPiece": parts.write_wordpiece,
    "Unigram": parts.write_unigram,
    "SentencePiece alone": lambda folder: write_sentencepiece(folder, fast=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_tokenizer_has_a_finding_above_a_note(tmp_path, kind):
    KINDS[kind](tmp_path / "vocab")
    result = check(tmp_path / "vocab")
    assert [f for f in result.findings if f.severity != "note"] == [], result.lines()
