"""A plain Trainer finds of its new rows what `train` finds, for the same run."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import parts
from lexigraft import EvidenceCallback, LexigraftError, card, families, graft, train
from lexigraft.corpus import held_out
from lexigraft.errors import RefusalError
from lexigraft.files import read_json
from lexigraft.models.callback import _aligned
from lexigraft.models.packing import collate
from lexigraft.models.preparation import prepare, read_texts, with_blocks_of_text
from test_train import settings

torch.set_num_threads(1)
STEPS, RATE, BYTES = 12, 1e-3, 1500
# Everything trains at one rate, as in a plain Trainer without a schedule.
ALIKE = {
    "mode": "full", "old_rows": "slow", "old_row_scale": 1.0, "learning_rate": RATE,
    "new_row_learning_rate": RATE, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0,
    "max_steps": STEPS, "block_size": 64, "batch_size": 2, "replay": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(extended, tmp_path_factory):
    """What `extended` holds, two texts to measure on, and a grafted model without padding rows."""
    folder = tmp_path_factory.mktemp("callback")
    shutil.copytree(extended, folder, dirs_exist_ok=True)
    (folder / "held.txt").write_text(parts.corpus_text(seed=1, documents=4), "utf-8")
    everyday = (folder / "general.txt").read_text("utf-8").split("\n\n")
    apart = [line for line in dict.fromkeys(everyday) if held_out(line)]
    (folder / "apart.txt").write_text("\n\n".join(apart), "utf-8")
    graft(folder / "base", folder / "vocab", output=folder / "model", pad_to=1)
    return folder


def evidence(place):
    return EvidenceCallback(
        place / "model", corpus=[place / "held.txt"], general=[place / "apart.txt"],
        measured_bytes=BYTES,
    )  # fmt: skip


def trained(model, data, output, callback, *, collator=None, steps=STEPS):
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=2, optim="adamw_torch",
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        train_sampling_strategy="sequential", use_cpu=True, average_tokens_across_devices=True,
    )  # fmt: skip
    Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collator,
        callbacks=[callback],
    ).train()  # fmt: skip
    return callback.result


def test_the_same_run_has_the_same_evidence(place, tmp_path, monkeypatch):
    # The plain Trainer's optimizer: new rows share no second moment there.
    monkeypatch.setattr("lexigraft.models.training.RowAdamW", torch.optim.AdamW)
    corpus, held, general = ([place / f"{n}.txt"] for n in ("corpus", "held", "general"))
    train(
        place / "model", corpus=corpus, held_out=held, general=general, measured_bytes=BYTES,
        output=tmp_path / "trained", **ALIKE,
    )  # fmt: skip
    own = read_json(tmp_path / "trained" / "training.json")
    texts = read_texts(corpus, general, held, seed=0, measured_bytes=BYTES)
    family = families.load(place / "model")
    wanted = with_blocks_of_text(family, texts, settings(**ALIKE, max_bytes=None))
    blocks = prepare(place / "model", texts, wanted).blocks
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    found = trained(model, blocks, tmp_path / "plain", evidence(place), collator=collate)
    assert found == read_json(tmp_path / "plain" / "training.json")
    assert found["base"] == pytest.approx(own["base"], rel=1e-5)
    for mine, theirs in zip(own["log"], found["log"], strict=True):
        assert (mine["step"], mine["tokens"]) == (theirs["step"], theirs["tokens"])
        assert theirs["text_bytes"] == pytest.approx(mine["text_bytes"], abs=64)
        for key in ("domain_bpb", "general_bpb", "old_bpb", "new_bpb", "new_top1", "leak"):
            assert theirs[key] == pytest.approx(mine[key], rel=2e-3, abs=1e-4), key
    assert found["log"][-1]["domain_bpb"] < found["log"][0]["domain_bpb"]
    for mine, theirs in zip(own["rows"], found["rows"], strict=True):
        for key in ("id", "text", "targets", "inputs", "looked_at", "held_out"):
            assert theirs[key] == mine[key]
        assert theirs["moved"] == pytest.approx(mine["moved"], rel=1e-2, abs=1e-4)
        for key in ("bits", "bits_before"):
            assert theirs[key] == (mine[key] and pytest.approx(mine[key], rel=2e-3)), key
    rules = [[reason["rule"] for reason in told["verdict"]["reasons"]] for told in (own, found)]
    assert rules[0] == rules[1] and found["verdict"]["verdict"] == own["verdict"]["verdict"]
    assert own.keys() - found.keys() == {"mode", "settings"}


class Padded:
    """Documents as plain users batch them: padded, labels yet to be shifted."""

    def __init__(self, folder, texts):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.batch = tokenizer(texts, padding=True, truncation=True, max_length=48)

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, place):
        ids, mask = (np.array(self.batch[key][place]) for key in ("input_ids", "attention_mask"))
        return {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100)}


@pytest.mark.parametrize(
    "kind",
    ["tokens", *(pytest.param(kind, marks=pytest.mark.matrix) for kind in ("saved", "lora"))],
)
def test_adapters_of_peft_are_looked_at_too(place, tmp_path, kind):
    """Counts against a slow reading of the batches; distances against what PEFT computes with."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    before = model.get_input_embeddings().weight.detach().clone()
    new = range(382, 422)
    how = {
        "saved": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        "tokens": {"trainable_token_indices": list(new), "target_modules": ["q_proj"]},
        "lora": {"target_modules": ["embed_tokens", "q_proj"]},
    }[kind]
    model = get_peft_model(model, LoraConfig(r=4, **how))
    texts = [*parts.corpus_text(documents=4).split("\n\n"), "hepatitis", "no such word"]
    data = Padded(place / "model", texts)
    found = trained(model, data, tmp_path / "out", evidence(place), steps=3)
    with torch.no_grad():
        after = model.get_input_embeddings()(torch.tensor([list(new)]))[0]
    moved = (after - before[list(new)]).square().sum(1).sqrt()
    ids, mask = (np.array(data.batch[key]) for key in ("input_ids", "attention_mask"))
    for row, distance in zip(found["rows"], moved.tolist(), strict=True):
        assert row["moved"] == pytest.approx(distance, rel=1e-3, abs=1e-6)
        assert row["targets"] == ((ids[:, 1:] == row["id"]) & (mask[:, 1:] == 1)).sum()
        assert row["inputs"] == ((ids[:, :-1] == row["id"]) & (mask[:, :-1] == 1)).sum()
    assert found["rows_moved"] > 0 and sum(row["targets"] for row in found["rows"]) > 30
    assert found["tokens"] == mask[:, 1:].sum()
    assert "Was the training enough?" in card_of(place, tmp_path, found)


def card_of(place, tmp_path, found):
    """A card of the folder that such a training ends in."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("lexigraft.json", "new_tokens.jsonl", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((place / "model" / name).read_bytes())
    (folder / "training.json").write_text(json.dumps(found))
    return card(folder, dry_run=True).text


def test_what_cannot_be_counted_is_refused(place, tmp_path):
    with pytest.raises(LexigraftError, match="a batch without labels"):
        _aligned({"input_ids": torch.zeros((1, 4), dtype=torch.int64)})
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(RefusalError, match="2 processes or devices"):
        evidence(place).on_train_begin(arguments, None, None)
