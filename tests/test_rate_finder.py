"""`train --find-lr`: five short runs from one start, a table, and a recommendation."""

import json

import pytest
import torch

from lexigraft import LexigraftError, find_learning_rate, train
from lexigraft.cli import app
from lexigraft.models import rate_finder
from lexigraft.models.rate_finder import RateTable, Trial

torch.set_num_threads(1)
SMALL = {"block_size": 32, "max_steps": 8, "measured_bytes": 1500}


@pytest.fixture
def place(grafted_models):
    return grafted_models


@pytest.mark.parametrize("mode", ["rows", pytest.param("full", marks=pytest.mark.matrix)])
def test_each_run_starts_anew_and_ends_as_training_does(place, tmp_path, mode):
    """A trial is what `train` gives at its rates, though others ran before it in one model."""
    corpus = [place / "corpus.txt"]
    table = find_learning_rate(place / "untied", corpus=corpus, mode=mode, **SMALL)
    assert [trial.factor for trial in table.trials] == list(rate_finder.FACTORS)
    assert table.recommended in table.trials and table.steps == 8
    last = table.trials[-2]
    result = train(
        place / "untied", corpus=corpus, mode=mode, output=tmp_path / "out",
        learning_rate=last.learning_rate, new_row_learning_rate=last.new_row_learning_rate, **SMALL,
    )  # fmt: skip
    assert result.domain_bpb == last.domain_bpb
    assert result.log[0]["domain_bpb"] == table.domain_bpb
    told = "\n".join(table.lines())
    assert "recommended" in told and "--new-row-learning-rate" in told
    assert (" body " in told) == ("try: --learning-rate" in told) == (mode == "full")


def test_the_lowest_rate_that_does_nearly_as_well_is_recommended():
    def trials(*values):
        return [Trial(f, f, f, v, None) for f, v in zip(rate_finder.FACTORS, values, strict=True)]

    found = rate_finder._recommended(trials(1.9, 1.4, 1.05, 1.0, None), 2.0)
    assert found.factor == 1.0
    assert rate_finder._recommended(trials(2.0, 2.1, 2.2, None, None), 2.0) is None
    table = RateTable(5, 2.0, None, tuple(trials(2.0, 2.1, 2.2, None, None)), None)
    assert "lower" in table.lines()[-1]


def test_a_rate_at_which_training_fails_is_a_row_without_a_number(place):
    table = find_learning_rate(
        place / "tied", corpus=[place / "corpus.txt"], mode="full", learning_rate=1e30, **SMALL
    )
    assert table.trials[-1].domain_bpb is None
    assert "-" in table.lines()[-1] or table.recommended is None


def test_on_the_command_line(place, tmp_path):
    from typer.testing import CliRunner

    arguments = ["train", str(place / "tied"), "--corpus", str(place / "corpus.txt")]
    quick = ["--max-steps", "2", "--block-size", "32", "-q"]
    done = CliRunner().invoke(app, [*arguments, *quick, "--find-lr", "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["trials"]) == 5
    without = CliRunner().invoke(app, [*arguments, *quick])
    assert isinstance(without.exception, LexigraftError) and "-o" in str(without.exception)
