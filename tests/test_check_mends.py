"""What the findings of the gallery tell one to do is done, and the folder checked again.

A command is run as the finding gives it, with the words in capitals filled in; what a fix says in
words is done by a line of code. Then the finding is gone, and nothing above a note is left.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import test_check_gallery as gallery
from lexigraft.checks.findings import Finding
from lexigraft.cli import app
from lexigraft.steps.check import CheckResult, check
from test_check import TOKENS, add_pieces, edit, extend, grow_rows
from test_check_gallery import BROKEN, MENDED, ROWS, Ground, command_of, source  # noqa: F401

TEXT = "the river and the hospital heart. " * 50


@dataclass
class Case:
    """A broken folder of the gallery, its finding, and how it was checked."""

    ground: Ground
    source: Path
    found: Finding
    folder: Path
    options: dict[str, Any]

    def again(self, folder: Path | None = None, **changed: object) -> CheckResult:
        return check(folder or self.folder, **self.options | changed)


Mend = Callable[[Case], CheckResult]


def copied(*names: str) -> Mend:
    """Files again from where the folder came from; what was not there goes."""

    def mend(case: Case) -> CheckResult:
        for name in names:
            (case.folder / name).unlink(missing_ok=True)
            if (case.source / case.folder.name / name).is_file():
                shutil.copyfile(case.source / case.folder.name / name, case.folder / name)
        return case.again()

    return mend


def ids(file: str, **values: object) -> Mend:
    """Ids that the user knows, in a file of the folder."""

    def mend(case: Case) -> CheckResult:
        edit(case.folder / file, **values)
        return case.again()

    return mend


def in_words(case: Case) -> CheckResult:
    """What the fix says word for word: a key to set or to rename, a file to move or remove."""
    fix = case.found.fix
    if done := re.match(r"set (\S+) to (\S+) in ([^,]+\.json)", fix):
        key, value, path = done.groups()
        edit(Path(path), **{key: int(value) if value.isdigit() else value})
    elif done := re.match(r"rename the key (\S+) to (\S+) in (.+)", fix):
        old, new, path = done.groups()
        content = json.loads(Path(path).read_text())
        content[new] = content.pop(old)
        Path(path).write_text(json.dumps(content))
    else:
        subprocess.run(shlex.split(fix), check=True, capture_output=True)
    return case.again()


def command(out: str = "", **names: str) -> Mend:
    """The fix's command; `names`: what BASE or VOCAB are, a folder of the ground or of its source.

    `out`: what of the output is checked again, in place of the folder.
    """

    def mend(case: Case) -> CheckResult:
        output = run(case, **names) / out
        kept = {key: value for key, value in case.options.items() if key != "adapter"}
        return check(output, **kept)

    return mend


def run(case: Case, **names: str) -> Path:
    """Run the command of a fix; its output."""
    place = case.ground.sp.parent
    (place / "text.txt").write_text(TEXT)
    (place / "words.txt").write_text("hospital\nriver\n")
    known = {"TEXT": place / "text.txt", "WORDS": place / "words.txt"}
    known |= {name: case.source / folder for name, folder in names.items()}
    words = [str(known.get(word, word)) for word in command_of(case.found)[1:]]
    output = place / words[words.index("-o") + 1]
    words[words.index("-o") + 1] = str(output)
    left = [word for word in words if word.isupper() and len(word) > 2]
    assert not left, f"{left} of `{case.found.fix}` are not filled in"
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output, done.exception)
    return output


def a_grown_model_file(case: Case) -> CheckResult:
    pieces = [f"▁piece{place}" for place in range(23)]
    add_pieces(case.folder / "tokenizer.model", pieces)
    return case.again()


def the_model_that_it_was_trained_on(case: Case) -> CheckResult:
    extend(case.folder, case.folder)
    (case.folder / "tokenizer.model").unlink()
    grow_rows(case.folder, ROWS)
    return case.again()


def the_tokenizer_of_its_rows(case: Case) -> CheckResult:
    shutil.copyfile(case.source / "sp" / "tokenizer.json", case.folder / "tokenizer.json")
    return case.again()


def an_adapter_of_this_model(case: Case) -> CheckResult:
    gallery.change(case.options["adapter"], ADAPTER, q_proj__lora_A__weight=torch.ones(2, 32))
    return case.again()


def trained_with_ids_of_tokens(case: Case) -> CheckResult:
    edit(case.folder / "adapter_config.json", trainable_token_indices=[TOKENS, ROWS - 1])
    return case.again()


def first_on_its_own_model(case: Case) -> CheckResult:
    """The other model is a base that lacks the rows, as its check says; merged, all is well."""
    words = [
        str(case.source / "sp") if word == "OTHER" else word for word in command_of(case.found)
    ]
    told = json.loads(CliRunner().invoke(app, [*words[1:], "--json"]).output)
    [found] = [one for one in told["findings"] if one["severity"] != "note"]
    assert found["code"] == "LG401"
    case.found = Finding(**found)
    return check(run(case))


def converted(**change: object) -> Mend:
    return lambda case: case.again(gallery.written_gguf(case.ground, **change))


def metadata_of_a_gguf_file(case: Case) -> CheckResult:
    words = shlex.split(case.found.fix.replace(" ID", " 2"))
    subprocess.run([*words, "--force"], check=True, capture_output=True, cwd=case.folder.parent)
    return case.again()


def positions_for_both(case: Case) -> CheckResult:
    config = json.loads((case.folder / "config.json").read_text())
    edit(case.folder / "config.json", rope_theta=config["rope_parameters"]["rope_theta"])
    return case.again()


def saved_by_transformers(case: Case) -> CheckResult:
    subprocess.run(shlex.split(case.found.fix), check=True, cwd=case.folder.parent)
    return case.again(case.folder.parent / "NEW")


WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{place}-of-00002.safetensors" for place in (1, 2))
FILES = ("tokenizer.json", "tokenizer_config.json")
MENDS: dict[str, Mend] = {
    "tokenizer_json_cut_off": copied("tokenizer.json"),
    "a_git_lfs_pointer_for_the_model_file": copied("tokenizer.model"),
    "a_token_whose_id_is_text": copied("tokenizer.json"),
    "a_stale_tokenizer_json_beside_a_grown_model_file": in_words,
    "added_tokens_that_contradict_the_vocabulary": copied("added_tokens.json"),
    "settings_that_contradict_the_vocabulary": copied("tokenizer_config.json"),
    "added_tokens_behind_a_shorter_model_file": a_grown_model_file,
    "an_added_token_that_only_the_settings_know": copied(*FILES),
    "an_added_token_that_the_settings_of_qwen_lack": in_words,
    "a_byte_level_tokenizer_declared_as_llama": in_words,
    "an_added_token_beyond_a_hole": copied("tokenizer.json"),
    "a_template_with_a_marker_of_another_model": copied("chat_template.jinja"),
    "a_pad_token_that_no_file_has": ids("tokenizer_config.json", pad_token="<|im_end|>"),
    "eos_beyond_the_rows": ids("config.json", eos_token_id=TOKENS - 2),
    "a_suppressed_id_beyond_the_rows": ids("generation_config.json", suppress_tokens=[3]),
    "bad_words_of_another_tokenizer": ids("generation_config.json", bad_words_ids=[[3]]),
    "eos_that_the_tokenizer_calls_otherwise": in_words,
    "a_config_that_is_a_list": copied("generation_config.json"),
    "a_config_nested_beyond_reason": copied("generation_config.json"),
    "weights_cut_off": copied(WEIGHTS),
    "a_header_of_exabytes": copied(WEIGHTS),
    "a_shard_that_is_missing": copied(SHARDS[1]),
    "an_index_that_leads_out_of_the_folder": copied(INDEX),
    "a_tensor_in_two_shards": copied(*SHARDS),
    "an_index_beside_the_single_file": copied(WEIGHTS),
    "an_index_that_names_a_tensor_nobody_has": copied(INDEX, SHARDS[0]),
    "a_grown_tokenizer_without_rows": command(BASE="base"),
    "embedding_and_head_of_different_length": copied(WEIGHTS),
    "an_untied_model_without_its_head": copied(WEIGHTS),
    "an_embedding_saved_by_one_rank": copied(WEIGHTS),
    "the_origin_case": command(),
    "an_adapter_whose_trainer_cut_padding_off": command(),
    "an_adapter_saved_by_one_rank": copied(ADAPTER),
    "an_adapter_of_another_extension": first_on_its_own_model,
    "an_adapter_without_its_tokenizer": command(TOKENIZER="vocab"),
    "new_tokens_on_padding_rows": command(),
    "new_rows_that_nobody_saved": the_model_that_it_was_trained_on,
    "a_longer_tokenizer_copied_beside_an_adapter": the_tokenizer_of_its_rows,
    "an_adapter_of_a_wider_model": an_adapter_of_this_model,
    "an_adapter_whose_two_tables_differ": copied(ADAPTER),
    "an_adapter_as_a_pickle": copied(ADAPTER),
    "rows_trained_for_ids_without_a_token": trained_with_ids_of_tokens,
    "adapters_of_two_extensions": command(),
    "a_manifest_of_another_format": copied("lexigraft.json"),
    "a_tokenizer_that_was_swapped": copied(*FILES),
    "rows_that_the_manifest_does_not_know": copied(WEIGHTS, "config.json", "lexigraft.json"),
    "a_tokenizer_of_another_lineage": copied(*FILES, "lexigraft.json"),
    "a_tokenizer_trained_anew": command(),
    "a_table_that_shrank": command(),
    "a_tensor_that_was_lost": command(VOCAB="model"),
    "a_gguf_file_cut_off": converted(),
    "a_gguf_header_of_exabytes": converted(),
    "a_gguf_file_with_a_row_too_few": converted(),
    "a_gguf_file_with_a_score_too_few": converted(),
    "a_gguf_file_whose_eos_is_of_another_model": metadata_of_a_gguf_file,
    "a_gguf_file_with_a_token_twice": converted(),
    "words_by_the_hundred_as_added_tokens": command(BASE="base"),
    "a_word_flagged_special": command(BASE="base"),
    "a_model_file_that_is_converted_each_time": command(BASE="sp"),
    "a_word_that_no_merge_makes": command(BASE="base"),
    "scores_in_another_order_than_the_merges": command(BASE="sp"),
    "new_tokens_in_the_text_that_llama_cpp_knows_tokenizers_by": command(BASE="base"),
    "a_sentencepiece_tokenizer_without_its_model_file": copied("tokenizer.model"),
    "padding_that_the_converter_will_not_name": copied("tokenizer.model"),
    "an_adapter_with_tables_for_llama_cpp": command("adapter", BASE="sp"),
    "an_adapter_with_saved_modules_for_vllm": command("adapter", BASE="sp"),
    "an_adapter_with_tables_for_vllm": command("adapter", BASE="sp"),
    "a_class_of_transformers_5": in_words,
    "special_tokens_as_a_list": in_words,
    "positions_that_transformers_4_does_not_read": positions_for_both,
    "a_model_file_alone_for_tgi": saved_by_transformers,
    "an_adapter_with_tables_for_tgi": command("adapter", BASE="sp"),
    "a_head_with_nan": copied(WEIGHTS),
    "an_infinity_inside_a_layer": copied(WEIGHTS),
    "an_eos_that_was_never_trained": copied(WEIGHTS),
    "new_rows_that_are_all_one_mean": command(BASE="base", VOCAB="model"),
    "new_rows_of_noise_that_does_not_know_the_model": command(BASE="base", VOCAB="model"),
    "an_old_row_that_a_loop_overwrote": command(VOCAB="vocab"),
    "padding_rows_of_noise": command(BASE="sp", VOCAB="vocab"),
    "a_layer_that_a_copy_damaged": command(VOCAB="model"),
    "a_layer_in_another_type": command(VOCAB="model"),
    "a_layer_that_the_merged_adapter_does_not_change": command(),
}
DEAR = [  # they learn, convert or start a process
    "a_model_file_alone_for_tgi",
    "a_model_file_that_is_converted_each_time",
    "a_gguf_file_whose_eos_is_of_another_model",
    "a_layer_in_another_type",
    "a_sentencepiece_tokenizer_without_its_model_file",
    "a_tokenizer_trained_anew",
    "a_word_flagged_special",
    "a_word_that_no_merge_makes",
    "adapters_of_two_extensions",
    "an_old_row_that_a_loop_overwrote",
    "new_tokens_in_the_text_that_llama_cpp_knows_tokenizers_by",
    "padding_that_the_converter_will_not_name",
    "scores_in_another_order_than_the_merges",
    "words_by_the_hundred_as_added_tokens",
]


def mended(name: str, ground: Ground, source: Path) -> None:  # noqa: F811 - the fixture's value
    codes, make = BROKEN[name]
    calls: list[tuple[Path, dict[str, Any]]] = []

    def noted(folder: Path, **options: object) -> CheckResult:
        calls.append((folder, options))
        return check(folder, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gallery, "check", noted)
        result = make(ground)
    found = next(f for f in result.findings if f.code == codes[0])
    folder, options = calls[-1]
    after = MENDS[name](Case(ground, source, found, folder, options))
    left = [f.code for f in after.findings if f.severity != "note"]
    assert not left and codes[0] not in {f.code for f in after.findings}, after.lines()


@pytest.fixture
def ground(source, tmp_path) -> Ground:  # noqa: F811 - a fixture
    return Ground(source, tmp_path)


@pytest.mark.parametrize("name", [name for name in MENDS if name not in DEAR])
def test_what_a_finding_says_mends_it(ground, source, name):  # noqa: F811
    mended(name, ground, source)


@pytest.mark.matrix
@pytest.mark.parametrize("name", DEAR)
def test_what_takes_longer_mends_it(ground, source, name):  # noqa: F811
    mended(name, ground, source)


def test_most_broken_folders_are_mended():
    assert MENDS.keys() <= BROKEN.keys() and not MENDS.keys() & MENDED.keys()
    assert len(MENDS) + len(MENDED) >= 80
