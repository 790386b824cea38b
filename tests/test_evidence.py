"""What `train` tells of its new rows, against slow references, and the verdict's rules."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

import parts
from lexigraft import evaluate, families, graft, merge, train
from lexigraft.families.measure import new_ids
from lexigraft.files import read_json
from lexigraft.models.evidence import (
    RowEvidence,
    Watcher,
    new_tokens,
    shares,
    within_longer,
    written,
)
from lexigraft.models.load import load_model, start_and_end
from lexigraft.models.preparation import base_measure, measure, prepare, read_texts
from lexigraft.models.verdict import Thresholds, judge, verdict_lines
from test_train import settings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(extended, tmp_path_factory):
    """What `extended` holds, its grafted model, an adapter of some training, and the merge."""
    folder = tmp_path_factory.mktemp("evidence")
    shutil.copytree(extended, folder, dirs_exist_ok=True)
    with (folder / "general.txt").open("a", encoding="utf-8") as stream:  # with new tokens in it
        stream.write("\n\n" + parts.corpus_text(seed=5, documents=40))
    graft(folder / "base", folder / "vocab", output=folder / "model")
    train(
        folder / "model", corpus=[folder / "corpus.txt"], general=[folder / "general.txt"],
        output=folder / "adapter", block_size=64, max_bytes=24_000, measured_bytes=4000,
    )  # fmt: skip
    merge(folder / "model", [folder / "adapter"], output=folder / "merged")
    return folder


@pytest.fixture(scope="module")
def told(place):
    return read_json(place / "adapter" / "training.json")


@pytest.fixture(scope="module")
def job(place):
    texts = read_texts(
        [place / "corpus.txt"], [place / "general.txt"], (), seed=0, measured_bytes=4000
    )
    return prepare(place / "model", texts, settings(max_bytes=24_000))


@pytest.fixture(scope="module")
def trained(place):
    return load_model(place / "merged")


def slow_targets(job, model, texts=None):
    """(token, -ln p, rank, leak, the likeliest id, its context) of new tokens in domain text."""
    found = []
    for ids in job.family.encode_batch(texts or job.texts.held_domain):
        line = [*job.start, *ids]
        with torch.inference_mode():
            p = model(torch.tensor([line])).logits[0].double().softmax(-1)
        for i in range(1, len(line)):
            if line[i] in job.ids:
                row, t = p[i - 1], line[i]
                rank = int((row > row[t]).sum()) + 1
                leak = float(row[job.new.pieces[t][0]])
                found.append((t, -math.log(row[t]), rank, leak, int(row.argmax()), line[:i]))
    return found


def test_the_loss_is_split_by_old_and_new_targets(job, trained, told):
    slow = slow_targets(job, trained)
    found = measure(job, trained)
    size = sum(len(text.encode()) for text in job.texts.held_domain)
    new_size = sum(len(job.family.token_bytes(target[0])) for target in slow)
    assert len(slow) > 100 and 0 < new_size < size
    assert found["new_bpb"] == pytest.approx(
        sum(t[1] for t in slow) / math.log(2) / new_size, rel=1e-4
    )
    whole = found["new_bpb"] * new_size + found["old_bpb"] * (size - new_size)
    assert whole / size == pytest.approx(found["domain_bpb"], rel=1e-6)
    assert found["new_top1"] == pytest.approx(np.mean([t[2] == 1 for t in slow]))
    assert found["leak"] == pytest.approx(np.mean([t[3] for t in slow]), rel=1e-4)
    for key, value in found.items():  # the merged model is the one that was trained
        assert told["log"][-1][key] == pytest.approx(value, rel=1e-4), key


def test_every_row_has_its_evidence(place, job, trained, told):
    held = [*job.texts.held_domain, *job.texts.held_general]
    slow, before = (
        slow_targets(job, model, held) for model in (trained, load_model(place / "model"))
    )
    assert len(slow) > len(slow_targets(job, trained))  # some stand in general text
    rows = {row["id"]: row for row in told["rows"]}
    assert list(rows) == list(job.ids)
    targets, inputs = (
        np.bincount(found[found >= 0].ravel(), minlength=job.ids[-1] + 1)
        for found in (job.blocks.targets, job.blocks.inputs)
    )
    for token, row in rows.items():
        mine = [target for target in slow if target[0] == token]
        assert (row["targets"], row["inputs"]) == (targets[token], inputs[token])
        assert row["moved"] > 0
        assert row["held_out"] == bool(mine)
        if mine:
            assert row["looked_at"] == len(mine)
            assert row["top1"] == pytest.approx(np.mean([t[2] == 1 for t in mine]))
            assert row["rank"] == pytest.approx(np.mean([t[2] for t in mine]))
            assert row["leak"] == pytest.approx(np.mean([t[3] for t in mine]), rel=1e-3)
            for key, found in (
                ("bits", mine),
                ("bits_before", [t for t in before if t[0] == token]),
            ):
                wanted = np.mean([t[1] for t in found]) / math.log(2)
                assert row[key] == pytest.approx(wanted, rel=1e-3), key
        elif row["targets"]:
            assert row["looked_at"] == 1 and row["rank"] >= 1  # in training text
        assert row["adopted"] + row["spelled"] + row["missed"] == min(4, row["looked_at"])
    assert sum(row["adopted"] for row in told["rows"]) > 0


def slow_outcome(job, model, token, context):
    """Adopted, spelled or missed, by transformers' own greedy generation."""
    wanted = job.family.token_bytes(token)
    ids = model.generate(
        torch.tensor([context]), do_sample=False, max_new_tokens=len(wanted), eos_token_id=None,
        pad_token_id=0,
    )[0, len(context) :].tolist()  # fmt: skip
    if ids[0] == token:
        return "adopted"
    text = b""
    for i in ids:
        text += job.family.token_bytes(i) if i in job.family.map.texts else b"?no text?"
        if text == wanted:
            return "spelled"
        if not wanted.startswith(text):
            return "missed"
    raise AssertionError("as many tokens as bytes, and neither complete nor other text")


def test_adoption_is_what_generation_writes(place, job, trained):
    """Against `generate`, with a model that adopts and with one that knows the old spelling."""
    base = load_model(place / "base")
    optimizer = torch.optim.AdamW(base.requires_grad_(True).parameters(), lr=3e-3)
    word = max(job.ids, key=lambda t: (len(job.new.pieces[t]), job.new.text(t).isascii()))
    document = [*job.start, *job.new.pieces[word] * 8]
    for _ in range(60):  # the old spelling, learned by heart
        optimizer.zero_grad()
        base(torch.tensor([document]), labels=torch.tensor([document])).loss.backward()
        optimizer.step()
    base.eval().save_pretrained(place / "speller")
    families.copy_tokenizer(place / "base", place / "speller")
    graft(place / "speller", place / "vocab", output=place / "grown", force=True)
    speller = load_model(place / "grown").eval()
    lines = [[*job.start, *ids] for ids in job.family.encode_batch(job.texts.held_domain)]
    lines.append([*document[: 1 + len(job.new.pieces[word])], word])
    seen = set()
    for model in (trained, speller):
        watcher = Watcher(job.new, lines, before=1)
        for number, line in enumerate(lines):
            with torch.inference_mode():
                watcher(number, model(torch.tensor([line])).logits[0, :-1])
        some = [*watcher.targets[:60], watcher.targets[-1]]
        counted = written(model, job.new, lines, some)
        slow = [
            (t.token, slow_outcome(job, model, t.token, lines[t.place][: t.position])) for t in some
        ]
        for token in job.ids:
            mine = [outcome for of, outcome in slow if of == token]
            assert counted[token] == {o: mine.count(o) for o in set(mine)}
        seen |= {outcome for _, outcome in slow}
    assert seen == {"adopted", "spelled", "missed"}
    assert slow[-1] == (word, "spelled")


def test_the_base_is_found_in_the_grafted_model(place, job):
    """Its old rows, read in old tokens, are the base: no second model is needed."""
    model = load_model(place / "model")
    own, named = base_measure(job, model, None), base_measure(job, model, place / "base")
    assert own == pytest.approx(named, rel=1e-5)
    start, _ = start_and_end(job.family)
    assert own["domain_bpb"] == pytest.approx(
        evaluate(
            [place / "base"], corpus=[place / "corpus.txt"], held_out_only=True, speed_characters=0
        ).models[0].domain.bpb,
        rel=0.05,  # other windows
    )  # fmt: skip


def test_a_model_that_was_trained_since_asks_for_its_base(place, job, told):
    texts = read_texts([place / "corpus.txt"], (), (), seed=0, measured_bytes=2000)
    later = prepare(place / "merged", texts, settings(max_bytes=2000))
    model = load_model(place / "merged")
    assert base_measure(later, model, None) == {"domain_bpb": None, "general_bpb": None}
    assert base_measure(later, model, place / "base")["domain_bpb"] > 0
    assert told["base"]["domain_bpb"] > 0
    control = prepare(place / "base", texts, settings(max_bytes=2000))
    own = load_model(place / "base")
    assert base_measure(control, own, None)["domain_bpb"] == measure(control, own)["domain_bpb"]


def test_without_spellings_only_the_leak_is_unknown(place, tmp_path):
    """A tokenizer that someone else extended has no new_tokens.jsonl."""
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    (model / "new_tokens.jsonl").unlink()
    family = families.load(model)
    new = new_tokens(model, family, new_ids(model, family))
    assert new.pieces == {} and new.spelled([0, new.ids.first]) is None
    assert new.spelled([0, 1]) == [0, 1]
    line = family.encode("hepatitis hepatitis hepatitis neuralgia")
    watcher = Watcher(new, [line])
    watcher(0, torch.randn(len(line), new.ids[-1] + 1))
    assert watcher.targets and all(math.isnan(target.leak) for target in watcher.targets)
    whole = evaluate([model], corpus=[place / "corpus.txt"], max_bytes=500, speed_characters=0)
    found = shares(watcher.targets, new, whole.models[0].domain)
    assert found["leak"] is None and found["new_bpb"] > 0


def test_measurements_are_tensorboard_scalars(place, told):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "adapter" / "tensorboard"))
    events.Reload()
    for key in ("domain_bpb", "general_bpb", "old_bpb", "new_bpb", "new_top1", "leak"):
        points = [(point.step, point.value) for point in events.Scalars(key)]
        assert points == [
            (entry["step"], pytest.approx(entry[key], rel=1e-6)) for entry in told["log"]
        ]


# --- the verdict ---------------------------------------------------------------------------------

ROW = RowEvidence(
    id=400, text=" hepatitis", targets=150, inputs=150, moved=0.5, looked_at=9, held_out=True,
    top1=0.8, rank=1.5, leak=0.01, adopted=3, spelled=0, missed=1,
)  # fmt: skip
ROWS = [dataclasses.replace(ROW, id=400 + i, text=f" word{i}") for i in range(50)]
BASE = {"domain_bpb": 1.2, "general_bpb": 1.1}


def log(domain=(1.6, 1.105, 1.1), general=(1.12, 1.11, 1.105), sizes=(0, 5000, 10_000)):
    return [
        {"text_bytes": size, "domain_bpb": d, "general_bpb": g}
        for size, d, g in zip(sizes, domain, general, strict=True)
    ]


def changed(count, **changes):
    return [dataclasses.replace(row, **changes) for row in ROWS[:count]] + ROWS[count:]


def test_parts_of_longer_new_tokens_are_told_apart():
    """'其' of '其他', which BPE needs on its way, is left with no place of its own."""
    few = judge(log(), BASE, changed(7, targets=3, within=97))
    assert (few.verdict, few.reasons) == ("sufficient", ())
    assert [text for text in few.unknown if "parts of longer new tokens" in text]
    rows = [*changed(6, targets=3, within=97)[:49], changed(1, targets=3)[0]]
    (reason,) = judge(log(), BASE, rows).reasons
    assert "1 of 44 new tokens (parts of longer ones apart)" in reason.found
    assert judge(log(), BASE, changed(7, targets=20, within=97)).unknown == ()


def test_a_part_of_rare_words_is_rare():
    (reason,) = judge(log(), BASE, changed(1, targets=3, within=16)).reasons
    assert "1 of 50 new tokens were predicted fewer than 20" in reason.found
    (reason,) = judge(log(), BASE, changed(6, targets=30, within=69)).reasons
    assert "6 of 50 new tokens were predicted fewer than 100" in reason.found


def test_how_often_longer_words_hold_a_text():
    texts = [text.encode() for text in ["其", "其他", "他", "他的", " 其他", "炎", "他们他"]]
    texts += [b"\xe7\x82", b""]
    counts = [3, 5, 7, 11, 13, 17, 19, 23, 29]
    expected = [
        sum(n for other, n in zip(texts, counts, strict=True) if text and text in other != text)
        for text in texts
    ]
    assert within_longer(texts, counts) == expected
    assert expected == [18, 13, 48, 0, 0, 0, 0, 17, 0]
    assert within_longer([], []) == []


def test_less_text_is_advised_than_was_read():
    """`learn` with the same number would choose the same tokens again."""
    sizes = []
    for count in (99, 50, 5, 0):
        (reason,) = judge(log(), BASE, changed(6, targets=count)).reasons
        sizes.append(int(re.search(r"--train-bytes (\d+)", reason.next)[1]))
    assert sizes == [9900, 5000, 2500, 500]


def test_what_breaks_no_rule_is_sufficient():
    found = judge(log(), BASE, ROWS)
    assert (found.verdict, found.reasons, found.unknown) == ("sufficient", (), ())
    assert verdict_lines(found.to_json()) == ["verdict  sufficient: no rule is broken"]


@pytest.mark.parametrize(
    ("rule", "verdict", "found", "advice", "facts"),
    [
        ("general", "harmful", "2.0% more than the base", "--replay",
         (log(general=(1.12, 1.12, 1.122)), BASE, ROWS)),
        ("general", "harmful", "more than before training", "--replay",
         (log(general=(1.12, 1.14, 1.14)), {"domain_bpb": 1.2, "general_bpb": None}, ROWS)),
        ("domain", "harmful", "before training", "--learning-rate",
         (log(domain=(1.0, 1.105, 1.1)), BASE, ROWS)),
        ("domain", "not yet", "the base 1.050", "more text",
         (log(), {"domain_bpb": 1.05, "general_bpb": 1.1}, ROWS)),
        ("falling", "not yet", "by 8.3% per doubling", "more text",
         (log(domain=(1.6, 1.2, 1.1)), BASE, ROWS)),
        ("occurrences", "not yet", "1 of 50 new tokens", "' word0'",
         (log(), BASE, changed(1, targets=19))),
        ("occurrences", "not yet", "6 of 50 new tokens were predicted fewer than 100", "' word5'",
         (log(), BASE, changed(6, targets=99))),
        ("moved", "not yet", "2 new rows have not moved", "prune",
         (log(), BASE, changed(2, moved=0.0))),
        ("adoption", "not yet", "in 80% of 150 places", "' word0', ' word1'",
         (log(), BASE, changed(10, adopted=0, spelled=3))),
    ],
)  # fmt: skip
def test_each_rule_says_what_to_do(rule, verdict, found, advice, facts):
    judged = judge(*facts)
    (reason,) = judged.reasons
    assert (judged.verdict, reason.rule, reason.verdict) == (verdict, rule, verdict)
    assert found in reason.found and advice in reason.next
    text = "\n".join(verdict_lines(json.loads(json.dumps(judged.to_json()))))
    assert f"verdict  {verdict}" in text and reason.found in text and reason.next in text


@pytest.mark.parametrize(
    "facts",
    [
        (log(general=(1.12, 1.11, 1.11)), BASE, ROWS),
        (log(domain=(1.6, 1.11, 1.1)), BASE, ROWS),
        (log(), BASE, changed(50, targets=100)),
        (log(), BASE, changed(5, targets=20)),
        (log(), BASE, changed(5, adopted=0, spelled=3)),
        (log(), BASE, changed(50, adopted=0, spelled=0, missed=4)),
    ],
)
def test_at_its_threshold_no_rule_is_broken(facts):
    assert judge(*facts).reasons == ()


def test_the_worst_reason_decides_and_ten_tokens_are_named():
    rows = [dataclasses.replace(row, targets=i) for i, row in enumerate(ROWS)]
    judged = judge(log(domain=(1.0, 1.2, 1.1)), BASE, list(reversed(rows)))
    assert judged.verdict == "harmful"
    few = next(reason for reason in judged.reasons if reason.rule == "occurrences")
    assert "20 of 50" in few.found and "' word9' and 10 more" in few.next
    assert few.next.index("' word0'") < few.next.index("' word9'")


def test_what_was_not_measured_breaks_no_rule_and_is_named():
    nothing = {"domain_bpb": None, "general_bpb": None}
    judged = judge(log((None,) * 3, (None,) * 3), nothing, changed(50, adopted=0, spelled=0))
    assert judged.reasons == ()
    assert [text.split("(")[-1].split(" ")[1] for text in judged.unknown[:2]] == [
        "--held-out", "--general",
    ]  # fmt: skip
    assert "adopted" in judged.unknown[-1]
    alone = judge(log()[::2], nothing, ROWS)
    assert any("--base" in text for text in alone.unknown)
    assert any("--measurements" in text for text in alone.unknown)


def test_the_thresholds_are_in_the_record(told):
    assert told["verdict"]["thresholds"] == dataclasses.asdict(Thresholds())
    assert told["verdict"]["verdict"] in ("sufficient", "not yet", "harmful")
    assert [reason["rule"] for reason in told["verdict"]["reasons"]]
