"""`train`, from a real extended tokenizer and a grafted model to a PEFT adapter."""

import math
import shutil

import numpy as np
import pytest
import torch

import parts
from launching import killed_after_a_checkpoint
from lexigraft import LexigraftError, families, graft, learn, merge, train
from lexigraft.corpus import held_out, read_documents
from lexigraft.files import read_json
from lexigraft.manifest import Manifest
from lexigraft.models.adapter_files import lora_config, make_trainable
from lexigraft.models.bits import score, windows
from lexigraft.models.load import load_model, start_and_end
from lexigraft.models.preparation import measure, prepare, read_texts
from lexigraft.models.settings import Settings
from lexigraft.models.training import Schedule, fit, rate

torch.set_num_threads(1)
QUICK = {"block_size": 64, "max_bytes": 6000, "measurements": 2, "measured_bytes": 3000}
APART = {"seed": 0, "measured_bytes": 3000}


@pytest.fixture(scope="module", name="place")
def make_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "corpus.txt").write_text(parts.corpus_text(documents=40), "utf-8")
    english = parts.plain_english().splitlines()
    (folder / "general.txt").write_text("\n\n".join(english), "utf-8")
    vocab = None
    for name, tied in (("tied", True), ("untied", False)):
        base = parts.write_byte_level(folder / f"base_{name}")
        parts.write_model(base, tokens=400, rows=416, tied=tied, eos=380)
        if vocab is None:
            vocab = folder / "vocab"
            learn(
                base,
                corpus=[folder / "corpus.txt"],
                tokens=40,
                min_count=5,
                allow_more=True,
                output=vocab,
            )
        graft(base, vocab, output=folder / name)
    return folder


def settings(**changes):
    values = {
        "mode": "lora",
        "max_steps": None,
        "max_bytes": 6000,
        "max_tokens": None,
        "block_size": 64,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "new_row_learning_rate": 3e-3,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "replay": 0.1,
        "seed": 0,
    }
    return Settings(**{**values, **changes})


def job_of(place, model, **changes):
    texts = read_texts([place / "corpus.txt"], (), (), seed=0, measured_bytes=2000)
    return prepare(place / model, texts, settings(**changes))


def held_windows(place, model):
    """What a training of `QUICK` measures on."""
    texts = read_texts([place / "corpus.txt"], (), (), **APART)
    return prepare(place / model, texts, settings()).texts.held_domain


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_the_adapter_is_what_was_trained(place, tmp_path, tied, mode):
    """Plain PEFT gives the last measured bits per byte; every file that a merge needs is there."""
    from peft import PeftModel

    out = tmp_path / "adapter"
    result = train(place / tied, corpus=[place / "corpus.txt"], mode=mode, output=out, **QUICK)
    assert result.domain_bpb < result.log[0]["domain_bpb"] - 0.05
    assert result.rows_moved == result.new_rows == 40
    model = PeftModel.from_pretrained(load_model(place / tied), out).eval()
    apart = held_windows(place, tied)
    reader = families.load(out)
    again = score(model, apart, reader.encode_batch(apart), start=start_and_end(reader)[0])
    assert again.bpb == pytest.approx(result.domain_bpb, rel=1e-5)
    assert (out / "new_tokens.jsonl").read_bytes() == (
        place / tied / "new_tokens.jsonl"
    ).read_bytes()
    record = Manifest.read(out).last("train")
    assert (record.mode, record.steps) == (mode, result.steps)
    assert set(record.new_rows) == {"model.embed_tokens.weight"} | (
        set() if tied == "tied" else {"lm_head.weight"}
    )
    assert not (tmp_path / "adapter.partial").exists()
    assert any((out / "tensorboard").iterdir())


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_only_what_should_move_moves(place, tmp_path, tied, mode):
    """Law 12, on the model in memory: old rows and body bit for bit, and every row seen moved."""
    job = job_of(place, tied, mode=mode, block_size=32)
    model = load_model(job.folder)
    lora = lora_config(4, 8.0) if mode == "lora" else None
    trained, rows = make_trainable(model, job.ids, lora)
    frozen = {n: p.detach().clone() for n, p in trained.named_parameters() if not p.requires_grad}
    assert len(frozen) >= 20
    schedule = Schedule(5, 1, 1e-3, 3e-3, 5, frozenset({5}), 0)
    fit(
        trained,
        rows,
        job.blocks,
        schedule,
        folder=tmp_path,
        trained_on="model",
        measure=lambda: measure(job, trained),
        advance=lambda n: None,
        resume=False,
    )
    for name, parameter in trained.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    used = np.concatenate([job.blocks.inputs[:5].ravel(), job.blocks.targets[:5].ravel()])
    seen = sorted({int(i) for i in used if i in job.ids})
    assert len(seen) > 10
    moved = rows.moved()
    assert all(moved[token - job.ids.first] > 0 for token in seen)
    if mode == "lora":
        lora = [p for n, p in trained.named_parameters() if "lora_B" in n]
        assert lora and all(p.abs().max() > 0 for p in lora)
        assert not any(
            "head" in n or "embed" in n for n, _ in trained.named_parameters() if "lora" in n
        )


def test_merging_the_adapter_gives_its_bits(place, tmp_path):
    """Train and merge agree on the layout, onto the grafted model and onto the base."""
    for tied, mode in (("tied", "rows"), ("tied", "lora"), ("untied", "rows"), ("untied", "lora")):
        out = tmp_path / f"{tied}_{mode}"
        result = train(place / tied, corpus=[place / "corpus.txt"], mode=mode, output=out, **QUICK)
        for base in (place / tied, place / f"base_{tied}"):
            merged = tmp_path / f"merged_{out.name}_{base.name}"
            merge(base, [out], output=merged)
            reader = families.load(merged)
            apart = held_windows(place, tied)
            start, _ = start_and_end(reader)
            found = score(load_model(merged), apart, reader.encode_batch(apart), start=start)
            assert found.bpb == pytest.approx(result.domain_bpb, rel=1e-5), merged.name


def test_the_same_inputs_give_the_same_bytes(place, tmp_path):
    for name in ("one", "two"):
        train(place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / name, **QUICK)
    for name in ("adapter_model.safetensors", "adapter_config.json", "lexigraft.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_two_tokenizers_read_the_same_text(place, tmp_path):
    """The control, the base without new rows, is compared at equal bytes."""
    grown, control = (
        train(
            place / model,
            corpus=[place / "corpus.txt"],
            general=[place / "general.txt"],
            output=tmp_path / model,
            eval_at_bytes=[2000],
            **QUICK,
        )
        for model in ("tied", "base_tied")
    )
    assert grown.text_bytes == control.text_bytes
    assert grown.tokens < control.tokens
    assert (control.new_rows, control.rows_moved) == (0, 0)
    assert grown.general_bpb and control.general_bpb
    for result in (grown, control):
        past = next(entry for entry in result.log if entry["text_bytes"] >= 2000)
        assert past["text_bytes"] < 2000 + 2 * 64 * 4
        assert result.log[-1]["step"] == result.steps
        assert result.to_json()["domain_bpb"] == result.domain_bpb
    shorter = train(
        place / "base_tied",
        corpus=[place / "corpus.txt"],
        general=[place / "general.txt"],
        output=tmp_path / "compute",
        max_tokens=grown.tokens,
        block_size=64,
    )
    assert shorter.tokens == pytest.approx(grown.tokens, abs=200)
    record = read_json(tmp_path / "tied" / "training.json")
    assert len(record["rows"]) == 40
    assert sum(row["targets"] for row in record["rows"]) == pytest.approx(
        record["new_target_share"] * grown.tokens, rel=0.05
    )


def test_held_out_documents_are_not_trained_on(place):
    texts = read_texts([place / "corpus.txt"], (), (), seed=0, measured_bytes=10**6)
    apart = [d for d in read_documents([place / "corpus.txt"]) if held_out(d)]
    assert apart and not set(apart) & set(texts.domain)
    assert sorted("".join(w for d in apart for w in windows(d, 1024))) == sorted(
        "".join(texts.held_domain)
    )
    own = read_texts(
        [place / "corpus.txt"], (), [place / "general.txt"], seed=0, measured_bytes=10**6
    )
    assert len(own.domain) == len(texts.domain) + len(apart)
    assert not set(own.held_domain) & set(own.domain)


def test_steps_limit_and_repeat_the_text(place, tmp_path):
    result = train(
        place / "base_tied",
        corpus=[place / "corpus.txt"],
        output=tmp_path / "out",
        max_steps=3,
        block_size=32,
        batch_size=2,
    )
    assert result.steps == 3 and result.tokens == 3 * 2 * 32
    one_pass = sum(len(d.encode()) for d in read_documents([place / "corpus.txt"]))
    job = job_of(place, "tied", max_bytes=2 * one_pass)
    assert job.blocks.text_bytes[-1] == pytest.approx(2 * one_pass, abs=100)


def test_blocks_hold_as_much_text_with_new_tokens_as_without(place, tmp_path, capsys):
    """So a step sees as much text, and the same text makes as many steps."""
    runs = {}
    for model in ("base_tied", "tied"):
        runs[model] = train(
            place / model, corpus=[place / "corpus.txt"], output=tmp_path / model, max_bytes=8000,
            block_size=64, measurements=1, measured_bytes=500,
        )  # fmt: skip
    base, grown = runs["base_tied"], runs["tied"]
    assert grown.tokens < 0.9 * base.tokens
    assert grown.steps == pytest.approx(base.steps, rel=0.1)
    used = read_json(tmp_path / "tied" / "training.json")["settings"]["block_size"]
    assert used == pytest.approx(64 * grown.tokens / base.tokens, rel=0.1)
    told = f"blocks of {used} tokens: as much text as 64 tokens of the base"
    assert capsys.readouterr().err.count(told) == 1
    assert read_json(tmp_path / "base_tied" / "training.json")["settings"]["block_size"] == 64


def test_a_last_block_with_a_single_target_is_a_step_like_any_other(place, tmp_path):
    """Trainer once counted zero targets there, and the loss was divided by zero."""
    targets = int(job_of(place, "base_tied", max_bytes=300).blocks.tokens[-1])
    result = train(
        place / "base_tied", corpus=[place / "corpus.txt"], output=tmp_path / "out", max_bytes=300,
        block_size=targets - 1,
    )  # fmt: skip
    assert (result.steps, result.tokens) == (2, targets)
    assert math.isfinite(result.domain_bpb)
    assert result.domain_bpb < result.log[0]["domain_bpb"]


def test_an_output_that_would_replace_an_input_is_refused(place):
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    for output in (place, place / "tied"):
        with pytest.raises(LexigraftError, match="never modified"):
            train(place / "tied", corpus=[place / "corpus.txt"], output=output, force=True, **QUICK)
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before


def test_a_run_that_diverges_stops_and_says_so(place, tmp_path):
    with pytest.raises(LexigraftError, match=r"not.* finite") as caught:
        train(
            place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "out", max_steps=4,
            block_size=32, learning_rate=1e30, new_row_learning_rate=1e30,
        )  # fmt: skip
    assert "--learning-rate" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_warms_up_from_the_first_step():
    rates = [rate(step, 200) for step in range(200)]
    assert rates[0] > 0 and max(rates) == rates[9] == 1
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"mode": "head"}, LexigraftError, "lora"),
        ({"mode": "rows", "model": "base_tied"}, LexigraftError, "no new rows"),
        ({"corpus": "general.txt"}, LexigraftError, "none of the 40 new tokens"),
        ({"corpus": "absent.txt"}, LexigraftError, "absent.txt"),
        ({"block_size": 10_000}, LexigraftError, "--block-size 10000 (as much text as "),
        ({"block_size": 600, "model": "base_tied"}, LexigraftError, "use --block-size 512"),
        ({"model": "vocab"}, LexigraftError, "graft BASE"),
        ({"max_steps": 0}, LexigraftError, "--max-steps 0"),
        ({"max_bytes": 0}, LexigraftError, "--max-bytes 0"),
        ({"learning_rate": -1.0}, LexigraftError, "--learning-rate -1.0"),
        ({"new_row_learning_rate": math.nan}, LexigraftError, "greater than 0"),
        ({"replay": 1.0}, LexigraftError, "less than or equal to 0.9"),
        ({"share": (0.2, 1)}, LexigraftError, "beside max_steps"),
        ({"measurements": 0}, LexigraftError, "--measurements 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(place, tmp_path, changes, error, told):
    model = changes.pop("model", "tied")
    corpus = changes.pop("corpus", "corpus.txt")
    with pytest.raises(error) as fault:
        train(
            place / model, corpus=[place / corpus], output=tmp_path / "o",
            **{"max_steps": 2, **changes},
        )  # fmt: skip
    assert told in str(fault.value)
    assert list(tmp_path.iterdir()) == []


def test_ids_without_a_row_are_found_before_training(place, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(place / "base_tied", broken)
    families.copy_tokenizer(place / "tied", broken)
    model = load_model(place / "base_tied")
    model.resize_token_embeddings(401)
    model.save_pretrained(broken)
    with pytest.raises(LexigraftError, match="has 401 rows"):
        train(broken, corpus=[place / "corpus.txt"], output=tmp_path / "o", max_steps=2)


def test_a_killed_run_resumes_to_the_same_bytes(place, tmp_path):
    """SIGKILL after a checkpoint: no output; --resume ends where the whole run ends."""
    options = {**QUICK, "share": (0.1, 0.22), "save_steps": 4}
    del options["max_bytes"]
    whole = train(
        place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "whole", **options
    )
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed_after_a_checkpoint(place / "tied", place / "corpus.txt", out, options)
    corpus = [place / "corpus.txt"]
    with pytest.raises(LexigraftError, match="unfinished run"):
        train(place / "tied", corpus=corpus, output=out, **options)
    with pytest.raises(LexigraftError, match="had seed 0, this one has 1"):
        train(place / "tied", corpus=corpus, output=out, resume=True, seed=1, **options)
    copied, changed = (shutil.copytree(place / "tied", tmp_path / name) for name in ("c", "d"))
    parts.overwrite_row(changed, "model.layers.1.mlp.up_proj.weight", 3, b"\x01")
    with pytest.raises(LexigraftError, match=r"had weights [0-9a-f]+, this one has") as caught:
        train(changed, corpus=corpus, output=out, resume=True, **options)
    assert "the same model" in caught.value.needed
    again = train(copied, corpus=corpus, output=out, resume=True, **options)
    for name in ("adapter_model.safetensors", "lexigraft.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for one, other in zip(again.log, whole.log, strict=True):
        for key in set(one) - {"seconds"}:
            assert one[key] == (other[key] and pytest.approx(other[key], rel=1e-6)), key
    assert not partial.exists()


def test_a_folder_in_which_a_run_is_alive_is_left_alone(place, tmp_path):
    from filelock import FileLock

    from lexigraft.files import LOCK_NAME

    partial = tmp_path / "out.partial"
    (partial / "checkpoints").mkdir(parents=True)
    with FileLock(partial / LOCK_NAME), pytest.raises(LexigraftError, match="another run"):
        train(
            place / "tied",
            corpus=[place / "corpus.txt"],
            output=tmp_path / "out",
            max_steps=1,
            force=True,
        )
    assert (partial / "checkpoints").is_dir()
    train(place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "out", max_steps=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # a dead one is cleared away
