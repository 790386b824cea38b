"""Early stop: the rule on made logs, and real runs that stop, go back and are resumed."""

import pytest
import torch

from launching import killed_after_a_checkpoint
from lexigraft import LexigraftError, families, train
from lexigraft.files import read_json
from lexigraft.models.bits import score
from lexigraft.models.load import load_model, start_and_end
from lexigraft.models.preparation import prepare, read_texts
from lexigraft.models.stopping import StopRule
from lexigraft.models.trackers import trackers
from test_train import make_place, settings  # noqa: F401 - the fixture `place`

torch.set_num_threads(1)


def log(domain, general=None):
    general = general or [1.0] * len(domain)
    return [
        {"step": i, "domain_bpb": d, "general_bpb": g}
        for i, (d, g) in enumerate(zip(domain, general, strict=True))
    ]


def test_patience_counts_measurements_without_a_better_one():
    rule = StopRule(patience=2)
    figures = [3.0, 2.0, 1.5, 1.6, 1.5, 1.4]
    assert [rule.reason(log(figures[:n])) is not None for n in range(1, 6)] == [
        False, False, False, False, True,
    ]  # fmt: skip
    assert rule.best(log(figures[:5])) == 2 and rule.best(log(figures)) == 5
    assert rule.best(log([1.0, 2.0, 3.0])) == 1  # the untrained model is none to go back to


def test_the_general_limit_is_against_the_base_and_before_training_without_one():
    found = log([3.0, 2.0, 1.5, 1.0], [1.05, 1.0, 1.005, 1.02])
    assert "1.0%" in StopRule(general_limit=0.01, general=1.0).reason(found)
    assert StopRule(general_limit=0.01, general=1.0).best(found) == 2
    assert StopRule(general_limit=0.01).reason(found) is None
    assert StopRule(general_limit=0.01, general=0.9).best(found) == 1  # all beyond: the least
    assert StopRule(general_limit=0.01, general=1.0).reason(found[:3]) is None


def test_a_graft_that_begins_beyond_the_general_limit_may_come_back():
    rule = StopRule(general_limit=0.01, general=1.0)
    figures = [1.05, 1.04, 1.02, 1.005, 1.02]
    told = [rule.reason(log([3.0] * n, figures[:n])) for n in range(2, 6)]
    assert told[:3] == [None] * 3 and "1.0%" in told[3]  # it was within the limit, and is no more
    assert "1.0%" in rule.reason(log([3.0] * 2, [1.05, 1.06]))
    assert rule.best(log([3.0] * 4, figures[:4])) == 3


def test_without_a_rule_the_end_is_what_is_kept():
    rule = StopRule()
    assert not rule.is_set and rule.reason(log([1.0, 2.0, 3.0])) is None
    assert rule.best(log([1.0, 2.0, 3.0])) == 2


# High rates, so that the measurements soon get worse again.
STOPS = {
    "block_size": 64, "max_steps": 80, "measurements": 20, "measured_bytes": 2000, "patience": 2,
    "learning_rate": 0.1, "new_row_learning_rate": 0.1, "save_steps": 6, "lora_rank": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped") / "adapter"
    return train(place / "tied", corpus=[place / "corpus.txt"], output=output, **STOPS)


def test_a_run_stops_and_the_best_measurement_is_what_is_written(place, stopped):
    from peft import PeftModel

    bpb = [entry["domain_bpb"] for entry in stopped.log]
    best = min(range(1, len(bpb)), key=bpb.__getitem__)
    assert stopped.steps < 80 and best == len(bpb) - 3
    assert stopped.kept_step == stopped.log[best]["step"] < stopped.steps
    assert stopped.domain_bpb == bpb[best]
    assert "2 measurements without a better one" in "\n".join(stopped.lines())
    texts = read_texts([place / "corpus.txt"], (), (), seed=0, measured_bytes=2000)
    apart = prepare(place / "tied", texts, settings()).texts.held_domain
    model = PeftModel.from_pretrained(load_model(place / "tied"), stopped.output).eval()
    reader = families.load(stopped.output)
    again = score(model, apart, reader.encode_batch(apart), start=start_and_end(reader)[0])
    assert again.bpb == pytest.approx(bpb[best], rel=1e-5)
    record = read_json(stopped.output / "training.json")
    used = stopped.kept_step * 64
    assert sum(row["targets"] for row in record["rows"]) <= used
    assert record["kept_step"] == stopped.kept_step and record["stopped"] == stopped.stopped
    assert not stopped.output.with_name("adapter.partial").exists()


@pytest.mark.matrix
def test_a_run_that_is_killed_stops_where_the_whole_one_did(place, stopped, tmp_path):
    out = tmp_path / "out"
    killed_after_a_checkpoint(place / "tied", place / "corpus.txt", out, STOPS)
    again = train(place / "tied", corpus=[place / "corpus.txt"], output=out, resume=True, **STOPS)
    assert (again.steps, again.kept_step) == (stopped.steps, stopped.kept_step)
    for name in ("adapter_model.safetensors", "lexigraft.json"):
        assert (out / name).read_bytes() == (stopped.output / name).read_bytes()


def test_a_run_stops_where_general_text_gets_worse(place, tmp_path):
    result = train(
        place / "untied", corpus=[place / "corpus.txt"], general=[place / "general.txt"],
        output=tmp_path / "out", replay=0.0, general_limit=0.01,
        **{**STOPS, "patience": None, "max_steps": 40},
    )  # fmt: skip
    limit = 1.01 * result.base["general_bpb"]
    assert result.steps < 40 and result.log[-1]["general_bpb"] > limit
    assert "general text got worse by more than 1.0%" in result.stopped
    assert result.general_bpb == min(
        entry["general_bpb"] for entry in result.log[1:]
    ) or result.general_bpb <= limit  # fmt: skip


def test_a_distillation_stops_by_itself(place, tmp_path):
    result = train(
        place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "out", mode="rows",
        objective="distill", block_size=64, max_bytes=6000, measurements=12, measured_bytes=1000,
        new_row_learning_rate=0.3,
    )  # fmt: skip
    assert "2 measurements without a better one" in result.stopped
    assert result.kept_step < result.steps


@pytest.mark.parametrize(
    ("option", "text"), [({"patience": 1}, "--held-out"), ({"general_limit": 0.1}, "--general")]
)
def test_what_cannot_be_measured_cannot_stop(place, tmp_path, option, text):
    few = tmp_path / "few.txt"
    few.write_text("患者冠状动脉炎 hepatitis hepatitis", "utf-8")
    with pytest.raises(LexigraftError) as fault:
        train(
            place / "base_tied", corpus=[few], output=tmp_path / "out", max_steps=2,
            block_size=16, **option,
        )  # fmt: skip
    assert text in fault.value.needed
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]


def test_trackers_are_those_of_trainer(place, tmp_path):
    assert trackers(["none", "tensorboard"]) == trackers([]) == []
    with pytest.raises(LexigraftError, match="wandb"):
        trackers(["weights and biases"])
    from transformers.integrations import get_available_reporting_integrations

    for name in {"wandb", "trackio"} - set(get_available_reporting_integrations()):
        with pytest.raises(LexigraftError, match=f"pip install {name}"):
            train(
                place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "out",
                report_to=[name],
            )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
