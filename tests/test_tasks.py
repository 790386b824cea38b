"""`eval --tasks`: lm-evaluation-harness on our models, where it is installed."""

import importlib.util
import json

import pytest
import torch
import yaml

import parts
from lexigraft import LexigraftError, evaluate, families
from lexigraft.models.load import load_model

torch.set_num_threads(1)
HARNESS = importlib.util.find_spec("lm_eval") is not None
QUESTIONS = [
    {"question": f"The {word} that she", "choices": choices, "answer": place % 2}
    for place, (word, choices) in enumerate(
        [
            ("house", [" saw", " painted"]),
            ("river", [" hepatitis", " found"]),
            ("friend", [" 急性心肌炎", " wrote"]),
            ("road", [" opened", " followed"]),
            ("book", [" neuralgia", " bought"]),
        ]
    )
]


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), "utf-8")
    config = {
        "task": "tiny_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path


def accuracy(folder):
    """The share of questions whose likelier choice is the answer, computed plainly."""
    model, family = load_model(folder), families.load(folder)
    right = 0
    for question in QUESTIONS:
        start = family.encode(question["question"])
        scores = []
        for choice in question["choices"]:
            whole = family.encode(question["question"] + choice)
            with torch.inference_mode():
                log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed (extra `tasks`)")
def test_a_task_s_figures_stand_beside_bits_per_byte(grafted_models, task, tmp_path, capsys):
    (tmp_path / "c.txt").write_text(parts.corpus_text(documents=2), "utf-8")
    models = [grafted_models / name for name in ("base_tied", "untied")]
    result = evaluate(
        models, corpus=[tmp_path / "c.txt"], max_bytes=500, speed_characters=0, tasks=[str(task)]
    )
    assert capsys.readouterr().out == ""
    for model, found in zip(models, result.to_json()["models"], strict=True):
        assert found["domain"]["bpb"] > 0
        assert found["tasks"]["tiny_questions"]["acc"] == pytest.approx(accuracy(model))
        assert found["tasks"]["tiny_questions"]["acc_stderr"] >= 0
    lines = result.lines()
    at = lines.index("tiny_questions: acc")
    assert [line.split()[0] for line in lines[at + 1 : at + 3]] == list(map(str, models))
    assert all("±" in line for line in lines[at + 1 : at + 3])
    with pytest.raises(LexigraftError, match="hellaswagg: no task") as fault:
        evaluate(models, corpus=[tmp_path / "c.txt"], tasks=["hellaswagg"])
    assert "hellaswag" in fault.value.needed
    task.write_text(task.read_text().replace("questions.jsonl", "gone.jsonl"))
    with pytest.raises(LexigraftError, match="could not run"):
        evaluate(
            models[:1], corpus=[tmp_path / "c.txt"], max_bytes=500, speed_characters=0,
            tasks=[str(task)],
        )  # fmt: skip


@pytest.mark.skipif(HARNESS, reason="lm-eval is installed")
def test_without_the_package_one_message_names_it(grafted_models, task, tmp_path):
    with pytest.raises(LexigraftError, match="without lm-eval") as fault:
        evaluate([grafted_models / "tied"], corpus=[tmp_path / "none.txt"], tasks=[str(task)])
    assert fault.value.fix == "pip install 'lexigraft[tasks]'"
