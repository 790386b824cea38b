"""The page of a run and its server: structure, hostile text, both languages, and a real browser."""

import http.client
import json
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
import typer

from browsing import DESK, PHONE_AT_NIGHT, Visit, open_browser, require_drawn  # noqa: F401
from lexigraft import LexigraftError, report, reporting, run, serve
from lexigraft.models.evidence import RowEvidence
from lexigraft.models.verdict import Thresholds, judge, row_verdict
from lexigraft.reporting.page import page
from lexigraft.reporting.words import WORDS, reasons, unknown
from test_pipeline import RECIPE, write_inputs

torch.set_num_threads(1)
LAST = {"text_bytes": 100, "domain_bpb": 9.1, "general_bpb": 9.2}
HOSTILE = "</script><img src=x onerror=alert(1)>"
ARABIC = "التهاب القلب"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run with Chinese and Arabic tokens, and hostile names and texts throughout."""
    root = tmp_path_factory.mktemp("report")
    write_inputs(root)
    arabic = "".join(f"{ARABIC} {number}.\n\n" for number in range(60))
    (root / "<b>c&.txt").write_text((root / "c.txt").read_text() + f"\n\n{arabic}")
    (root / "terms.txt").write_text("性\nالقلب\n")
    (root / "special.txt").write_text(f"{HOSTILE}\n<|\u202e|>\n")
    (root / "held.txt").write_text(
        f"急性冠状动脉炎 {HOSTILE}\n{ARABIC} 7.\n\nthe patient was treated.\n"
    )
    text = RECIPE.format(steps=2).replace("[c.txt]", '["<b>c&.txt"]')
    text = text.replace("max_bytes: 2000}", "max_bytes: 2000, corpus: held.txt, general: g.txt}")
    text = text.replace("[急性冠状动脉炎]", f"[急性冠状动脉炎, '{HOSTILE}']").replace(
        "tokens: 20", "tokens: 40"
    )
    (root / "recipe.yaml").write_text(
        text.replace("min_count: 5", "min_count: 5, allow_more: true") + "control: false\n"
    )
    run(root / "recipe.yaml", output=root / "run")
    return root / "run"


class Structure(HTMLParser):
    """Collects what a page is made of, and complains where its elements do not nest."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.attributes = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, self.getpos()

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_page_is_whole_and_refers_to_nothing_outside(run_folder, tmp_path, lang):
    result = report(run_folder, output=tmp_path / "p.html", lang=lang)
    assert [path.name for path in result.files] == ["p.html", "p.md", "p.json"]
    text = (tmp_path / "p.html").read_text()
    found = Structure(text)
    assert found.tags.count("h1") == 1 and found.values("lang")[0].startswith(lang)
    assert all(value.startswith("#") or value == "data:," for value in found.values("href"))
    assert found.values("src") == [] and found.values("style") == []
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    named = found.values("aria-labelledby") + [h[1:] for h in found.values("href") if h[0] == "#"]
    assert set(named) <= set(ids)
    assert all(name for _, key, name in found.attributes if key == "aria-label")
    assert 4 <= found.tags.count("svg") == found.values("role").count("img")
    shown = re.sub(r"<(style|script).*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\{\w+\}", shown)  # every place of the words is filled
    assert ARABIC.split(" ", maxsplit=1)[0] in text and "冠" in text and 'dir="rtl"' in text


def test_the_chinese_page_tells_nothing_in_english(run_folder, tmp_path):
    """Sizes, terms, limits and findings are sentences of `reporting.chinese`; old runs keep theirs."""
    facts = report(run_folder).facts
    assert facts["check"]["findings"] and facts["terms"] and facts["learn"]["size"]["because"]
    text = page(facts, "zh")
    assert 'lang="en"' not in text and "选取" in text.split('id="size"')[1]
    for finding in facts["check"]["findings"]:
        assert finding["found"] not in text and finding["code"] in text
    assert all(row["reason"] is None or row["reason"] not in text for row in facts["terms"])
    del facts["learn"]["size"]["because"]
    for finding in facts["check"]["findings"]:
        del finding["values"]
    assert page(facts, "zh").count('lang="en"') == 1 + len(facts["check"]["findings"])


def test_a_recipe_names_the_language_of_its_page(run_folder, tmp_path):
    """Also one that is changed after the run: no stage is done again for it."""
    shutil.copytree(run_folder, tmp_path / "run")
    recipe = run_folder.parent / "recipe.yaml"
    changed = recipe.with_name("zh.yaml")
    changed.write_text(f"{recipe.read_text()}report: {{lang: zh}}\n")
    result = run(changed, output=tmp_path / "run")
    assert result.skipped == list(result.state.stages)
    assert 'lang="zh-Hans"' in (tmp_path / "run" / "report.html").read_text()
    assert 'lang="zh-Hans"' in report(tmp_path / "run").files[0].read_text()
    assert '<html lang="en"' in report(tmp_path / "run", lang="en").files[0].read_text()
    changed.write_text(f"{recipe.read_text()}report: {{lang: fr}}\n")
    with pytest.raises(LexigraftError, match=r"report\.lang"):
        run(changed, output=tmp_path / "run")


def test_hostile_text_is_shown_and_does_nothing(run_folder):
    text = report(run_folder).files[0].read_text()
    assert HOSTILE not in text and "<img" not in text and "<b>" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text
    assert "\u202e" not in text and "\\u202e" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert HOSTILE in [row[1] for row in data["tokens"]]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert (
        "default-src &#39;none&#39;" in policy
        and "unsafe" not in policy
        and "connect" not in policy
    )


def test_the_facts_are_those_of_the_run(run_folder):
    facts = report(run_folder).facts
    rows = [json.loads(line) for line in (run_folder / "vocab" / "new_tokens.jsonl").open()]
    trained = json.loads((run_folder / "adapter" / "training.json").read_text())["rows"]
    assert [token["id"] for token in facts["tokens"]] == [row["id"] for row in trained]
    for token, row, seen in zip(facts["tokens"], rows, trained, strict=False):
        assert token["count"] == row["count"] and token["pieces"] == row["pieces"]
        assert token["targets"] == seen["targets"] and token["moved"] == seen["moved"]
        assert token["verdict"] == row_verdict(seen) != "unmoved"
    assert facts["tokens"][-1]["origin"] == "special"
    shown = facts["sentences"]["shown"]
    assert shown and all(any(new for _, _, new in sentence["after"]) for sentence in shown)
    assert ARABIC in "".join(sentence["text"] for sentence in shown)
    assert [r["stage"] for r in facts["lineage"]["records"]] == ["learn", "graft", "train", "merge"]
    assert {len(facts["rows"]["map"]["new"]), len(facts["tokens"])} == {len(rows) + 2}
    for lengths in facts["rows"]["lengths"]:
        assert sum(lengths["old"]) == pytest.approx(1, abs=1e-3) == sum(lengths["new"])
    assert (
        facts["curves"][0]["points"][-1]["text_bytes"] == facts["training"]["log"][-1]["text_bytes"]
    )
    assert report(run_folder).facts == facts


def test_the_markdown_has_what_the_page_has(run_folder):
    """Held-out sentences, bits per byte through training, lengths of rows, the check's table."""
    found = report(run_folder)
    facts, lines = found.facts, found.text.splitlines()
    for sentence in facts["sentences"]["shown"]:
        told = sentence["text"].replace("<", "\\<")
        line = next(line for line in lines if line.startswith(f"| {told} |")).replace("\\<", "<")
        assert f"| {len(sentence['before'])}: " in line and f"| {len(sentence['after'])}: " in line
        assert all(f"[{text}]" in line for _, text, new in sentence["after"] if new)
    for curve in facts["curves"]:
        for point in curve["points"]:
            domain, general = (f"{point[key]:.3f}" for key in ("domain_bpb", "general_bpb"))
            assert f"| {curve['model']} | {point['text_bytes']:,} | {domain} | {general} |" in lines
    assert f"| base, untrained | 0 | {facts['training']['base']['domain_bpb']:.3f} |" in found.text
    for lengths in facts["rows"]["lengths"]:
        fullest = {
            kind: f"{lengths['edges'][lengths[kind].index(max(lengths[kind]))]:.3g}"
            for kind in ("new", "old")
        }
        assert (
            f"- `{lengths['name']}` in merged/: most new rows are about {fullest['new']} long, "
            f"most old ones about {fullest['old']}"
        ) in lines
    for row in facts["check"]["table"]:
        count = "-" if row["count"] is None else f"{row['count']:,}"
        assert f"| {row['part']} | {row['unit']} | {count} | " in found.text


def test_what_training_brought_is_told_beside_the_base_and_the_control(run_folder):
    """Of held-out text, and of each new token that it holds."""
    found = report(run_folder)
    facts, lines = found.facts, found.text.splitlines()
    trained = json.loads((run_folder / "adapter" / "training.json").read_text())
    control = {"model": "control, equal text", "points": [LAST]}
    with_control = page({**facts, "curves": [*facts["curves"], control]})
    for name, other in (("domain", 9.1), ("general", 9.2)):
        key = f"{name}_bpb"
        figures = [trained["base"][key], trained["log"][0][key], trained[key]]
        told = [f"{value:.3f}" for value in figures]
        assert f"| {name} | {' | '.join(told)} | - |" in lines
        cells = "".join(f'<td class="number"><bdi>{x}</bdi></td>' for x in [*told, f"{other:.3f}"])
        assert cells in with_control
    seen = next(row for row in trained["rows"] if row["bits_before"] is not None)
    token = next(token for token in facts["tokens"] if token["id"] == seen["id"])
    assert (token["bits_before"], token["bits"]) == (seen["bits_before"], seen["bits"])
    assert f'<td class="number">{seen["bits_before"]:.1f}</td>' in page(facts)
    first = facts["tokens"][0]["shown"].replace("<", "\\<")
    assert next(line for line in lines if line.startswith(f"| {first} | ")).count(" | ") == 6


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """The folder of a run whose new tokens all have ids of old ones."""
    root = tmp_path_factory.mktemp("replaced")
    write_inputs(root)
    text = RECIPE.format(steps=1).replace("tokens: 20", "replace: 20")
    (root / "recipe.yaml").write_text(
        text.replace(", special: special.txt", "") + "control: false\n"
    )
    run(root / "recipe.yaml", output=root / "run")
    return root / "run"


def test_every_form_tells_of_ids_that_were_given_away(replaced, tmp_path):
    found = report(replaced, output=tmp_path / "p.html")
    general = found.facts["learn"]["replaced"]["general"]
    assert 0 < general["changed"] <= general["texts"]
    counts = f"{general['changed']} of {general['texts']}"
    assert "382 → 382 in all, 20 under old ids" in found.files[0].read_text()
    assert f"splits {counts} general texts otherwise" in found.files[0].read_text()
    assert "general text reads as before" not in found.files[0].read_text()
    assert f"without the replaced tokens: {counts}" in found.text
    assert ": other old ids kept" in found.text
    chinese = page(found.facts, "zh")
    assert "词表 382 → 382，20 个沿用旧编号" in chinese and "20 个旧 token 让出了编号" in chinese
    assert f"{general['texts']} 段通用文本中有 {general['changed']} 段的切分改变" in chinese
    found.facts["learn"]["replaced"].update(general=None, domain=None)
    told = page(found.facts, "en")
    assert "20 old tokens gave their ids" in told and "splits" not in told


def test_the_map_is_that_of_a_singular_value_decomposition(run_folder):
    import numpy as np

    from lexigraft.checkpoints.checkpoint import Checkpoint

    found = report(run_folder).facts["rows"]["map"]
    points = [*found["old"], *found["new"]]
    rows = Checkpoint.open(run_folder / "merged").read("model.embed_tokens.weight")
    rows = rows[[i for _, _, i, _ in points]].astype(np.float64)
    left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    places = np.array([[x, y] for x, y, _, _ in points])
    wanted = left[:, :2] * values[:2]
    assert np.allclose(np.abs(places), np.abs(wanted), atol=1e-3)
    assert np.allclose(found["explained"], values[:2] ** 2 / (values**2).sum(), atol=1e-3)


def test_the_commands_are_the_recipe(run_folder):
    from lexigraft.cli import app
    from lexigraft.recipe import Recipe
    from lexigraft.runfile import RunState

    repeat = report(run_folder).facts["repeat"]
    import yaml

    recipe = Recipe.parse(yaml.safe_load(repeat["recipe"]), where="report")
    assert recipe == RunState.read(run_folder).recipe
    group = typer.main.get_command(app)
    verbs = []
    for line in [repeat["run"], *repeat["commands"]]:
        _, verb, *words = shlex.split(line)
        group.get_command(None, verb).make_context(verb, words, resilient_parsing=False)
        verbs.append(verb)
    assert verbs == ["run", "learn", "graft", "train", "merge", "check", "eval"]


@pytest.mark.parametrize("done", [(), ("learn",), ("learn", "graft")])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_an_unfinished_run_says_what_is_missing(run_folder, tmp_path, done, lang):
    state = json.loads((run_folder / "run.json").read_text())
    state["stages"] = {name: state["stages"][name] for name in done}
    (tmp_path / "run.json").write_text(json.dumps(state))
    for stage, folder in (("learn", "vocab"), ("graft", "model")):
        if stage in done:
            shutil.copytree(run_folder / folder, tmp_path / folder)
    text = report(tmp_path, lang=lang).files[0].read_text()
    Structure(text)
    assert ("not finished" if lang == "en" else "尚未完成") in text
    for stage in {"learn", "graft", "train", "check", "evaluate"} - set(done):
        assert f"has not done {stage}" in text or f"尚未完成 {stage}" in text
    assert ('id="tokens"' in text) == ("learn" in done)


def test_a_run_whose_texts_and_base_are_gone_is_reported(run_folder, tmp_path):
    state = json.loads((run_folder / "run.json").read_text())
    state["recipe"]["base"] = str(tmp_path / "gone")
    state["recipe"]["eval"]["corpus"] = [str(tmp_path / "gone.txt")]
    shutil.copytree(run_folder / "vocab", tmp_path / "vocab")
    (tmp_path / "run.json").write_text(json.dumps(state))
    facts = report(tmp_path).facts
    assert facts["sentences"]["shown"] == [] and "gone.txt" in facts["sentences"]["why"]
    assert facts["sentences"]["samples"] == report(run_folder).facts["sentences"]["samples"]


def test_a_report_has_one_name(run_folder, tmp_path):
    with pytest.raises(LexigraftError, match=r"report.md"):
        report(run_folder, output=tmp_path / "report.md")


def test_both_languages_say_all_and_fill_the_same_places():
    def fields(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    for key, (english, chinese) in WORDS.items():
        assert english and chinese and fields(english) == fields(chinese), key


def test_every_rule_of_the_verdict_has_chinese_words():
    measures = {"text_bytes": 0, "domain_bpb": 2.0, "general_bpb": 1.0}
    rows = [RowEvidence(1, "心", 3, 3, 0.0, 9, True, 0.1, 3.0, 0.2, 1, 20, 0),
            RowEvidence(2, "炎", 3, 3, 0.5, 9, True, 0.1, 3.0, 0.2, 1, 20, 0),
            RowEvidence(3, "其", 0, 0, 0.5, 9, True, 0.1, 3.0, 0.2, 1, 20, 0, within=30)]  # fmt: skip
    logs = [
        [measures, {**measures, "text_bytes": 50, "domain_bpb": 1.9},
         {"text_bytes": 100, "domain_bpb": 1.5, "general_bpb": 1.5}],
        [measures, {"text_bytes": 100, "domain_bpb": 2.5, "general_bpb": 1.0}],
        [measures, {"text_bytes": 100, "domain_bpb": None, "general_bpb": None}],
    ]  # fmt: skip
    rules, unjudged = set(), 0
    for log in logs:
        for base in (
            {"domain_bpb": 1.2, "general_bpb": 1.0},
            {"domain_bpb": None, "general_bpb": None},
        ):
            verdict = judge(log, base, rows, Thresholds(weakest=1)).to_json()
            tokens = [
                {"shown": row.text, "targets": row.targets, "moved": row.moved,
                 "within": row.within} for row in rows
            ]  # fmt: skip
            training = {"verdict": verdict, "log": log, "base": base, "adoption": 2 / 42}
            facts = {"training": training, "tokens": tokens}
            told = reasons(facts, "zh")
            assert len(told) == len(reasons(facts, "en")) == len(verdict["reasons"])
            for reason, chinese in zip(verdict["reasons"], told, strict=True):
                rules.add((reason["rule"], reason["verdict"]))
                numbers = re.findall(r"\d+\.\d+", reason["found"])
                assert [n for n in numbers if n not in chinese["found"]] == []
                if reason["rule"] == "occurrences":
                    assert re.findall(r"\d+", chinese["found"]) == ["2", "2", "20"]
                    assert re.findall(r"\d+", reason["found"]) == ["2", "2", "20"]
                    for text in (reason["next"], chinese["next"]):
                        assert "lexigraft learn --train-bytes 15" in text
                assert all(re.search(r"[\u4e00-\u9fff]|%", text) for text in chinese.values())
            unjudged += len(verdict["unknown"])
            assert all(re.search(r"[\u4e00-\u9fff]", text) for text in unknown(facts, "zh"))
    assert len(rules) == 7 and unjudged


def luminance(colour):
    parts_ = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts_]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_light_and_in_dark():
    """Contrast of 4.5 at least: WCAG 2.1, success criterion 1.4.3."""
    css = Path(reporting.__file__).with_name("page.css").read_text()
    themes = [
        dict(re.findall(r"(--[\w-]+): (#\w+)", block))
        for block in re.findall(r":root[^{]*\{(.*?)\}", css, re.DOTALL)
    ]
    assert len(themes) == 3 and themes[1] == themes[2]
    for theme in themes:
        colours = {
            k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in theme.items()
        }
        for text, ground in [
            ("--ink", "--paper"), ("--ink", "--card"), ("--soft", "--paper"), ("--soft", "--card"),
            ("--soft", "--old-bg2"), ("--ink", "--old-bg2"), ("--ink", "--new-bg"), ("--new", "--card"),
            ("--good", "--card"), ("--warn", "--card"), ("--bad", "--card"), ("--new", "--paper"),
        ]:  # fmt: skip
            one, other = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (text, ground)


@pytest.fixture(scope="module")
def served(run_folder):
    serving = serve(run_folder, port=0)
    threading.Thread(target=serving.server.serve_forever, daemon=True).start()
    yield serving
    serving.server.shutdown()
    serving.server.server_close()


def ask(served, method, path, body=None, **headers):
    port = served.server.server_port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"Host": f"127.0.0.1:{port}", **headers})
    answer = connection.getresponse()
    return answer, answer.read().decode()


JSON = {"Content-Type": "application/json"}


def test_the_server_gives_its_page_and_both_readings(served, run_folder):
    from lexigraft import families

    answer, text = ask(served, "GET", "/")
    assert answer.status == 200 and 'id="try"' in text and "&lt;img" in text and "<img" not in text
    assert "connect-src 'self'" in answer.getheader("Content-Security-Policy")
    assert answer.getheader("Access-Control-Allow-Origin") is None
    text = f"急性 {ARABIC}"
    _, found = ask(served, "POST", "/segments", json.dumps({"text": text}), **JSON)
    found = json.loads(found)
    assert [i for i, *_ in found["after"]] == families.load(run_folder / "vocab").encode(text)
    assert len(found["before"]) > len(found["after"]) and any(row[2] for row in found["after"])
    _, found = ask(served, "POST", "/continuations", json.dumps({"text": "the patient"}), **JSON)
    assert [model["name"] for model in json.loads(found)["models"]] == ["base", "merged"]


GOOD = json.dumps({"text": "x"})
REFUSED = [
    ("another host", "POST", "/segments", GOOD, {**JSON, "Host": "evil.example"}, 403),
    ("another host's page", "GET", "/", None, {"Host": "evil.example"}, 403),
    ("another site", "POST", "/segments", GOOD, {**JSON, "Origin": "http://evil.example"}, 403),
    ("a form", "POST", "/segments", GOOD, {"Content-Type": "text/plain"}, 415),
    ("too much", "POST", "/segments", json.dumps({"text": "x" * 2**16}), JSON, 413),
    ("too long", "POST", "/segments", json.dumps({"text": "x" * 5000}), JSON, 413),
    ("no JSON", "POST", "/segments", "{", JSON, 400),
    ("no text", "POST", "/segments", "[]", JSON, 400),
    ("half a character", "POST", "/segments", '{"text": "\\ud800"}', JSON, 400),
    ("a file", "GET", "/run.json", None, {}, 404),
    ("a way out", "GET", "/../run.json", None, {}, 404),
    ("nothing", "POST", "/", GOOD, JSON, 404),
    ("another verb", "DELETE", "/", None, {}, 501),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_the_server_refuses_whatever_it_need_not_do(served, case):
    _, method, path, body, headers, status = case
    answer, _ = ask(served, method, path, body, **headers)
    assert answer.status == status


def test_the_command_serves_until_it_is_interrupted(run_folder):
    """Page and readings as from the API; Ctrl-C ends it without a fault."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # `&` ignores it
        "from lexigraft.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", str(run_folder), "--port", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = child.stdout.readline().split()[1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        with urlopen(url, timeout=60) as answer:
            assert 'id="try"' in answer.read().decode()
        text = json.dumps({"text": f"急性 {ARABIC}"}).encode()
        with urlopen(Request(f"{url}segments", text, JSON), timeout=60) as answer:
            found = json.load(answer)
        assert len(found["before"]) > len(found["after"]) > 0
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0 and "Traceback" not in said
    finally:
        child.kill()


def test_a_taken_port_is_said(served, run_folder):
    with pytest.raises(LexigraftError, match="port"):
        serve(run_folder, port=served.server.server_port)


@pytest.mark.browser
def test_search_and_sort_in_a_browser(browser, run_folder, tmp_path):
    path = report(run_folder, output=tmp_path / "page.html").files[0]
    visit = Visit(browser, path.as_uri(), **DESK)
    visit.search_and_sort("القلب")
    visit.page.locator("#sentences .chip.new").first.focus()
    assert "base:" in visit.page.locator("#tip").inner_text()
    light = visit.ground()
    visit.page.click("#theme")
    assert visit.ground() != light
    assert visit.page.evaluate("document.querySelectorAll('img').length") == 0
    visit.keep("report-en", tmp_path)
    assert visit.said == [] and visit.asked == [path.as_uri()]


@pytest.mark.browser
def test_a_phone_at_night_shows_every_script_without_scrolling_sideways(
    browser, run_folder, tmp_path
):
    path = report(run_folder, output=tmp_path / "page.html", lang="zh").files[0]
    visit = Visit(browser, path.as_uri(), **PHONE_AT_NIGHT)
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert max(visit.ground()) < 60
    line = page.locator("#sentences .chips[dir=rtl]").last.locator(".chip")
    assert line.first.bounding_box()["x"] > line.nth(1).bounding_box()["x"]
    visit.keep("report-zh-phone", tmp_path)
    assert visit.said == [] and visit.asked == [path.as_uri()]
    for text in ("性", "القلب"):
        chip = page.locator("#sentences .chip", has_text=text).first
        assert chip.is_visible() and chip.bounding_box()["width"] > 8
        require_drawn(chip, text)


@pytest.mark.browser
def test_typing_shows_both_readings_and_hostile_text_is_inert(browser, served, tmp_path):
    visit = Visit(browser, served.url)
    page = visit.page
    page.fill("#text", f"急性冠状动脉炎 {HOSTILE}")
    page.locator("#after", has_text="onerror").wait_for()
    before, after = (int(page.inner_text(f"#{side}-count")) for side in ("before", "after"))
    assert 0 < after < before and page.locator("#after .chip.new").count() > 0
    page.click("#try [type=submit]")
    page.wait_for_selector("#continuations dd:nth-of-type(2)")
    assert page.evaluate("document.querySelectorAll('img, #try script').length") == 0
    visit.keep("serve", tmp_path)
    assert visit.said == []
    assert {url.removeprefix(served.url) for url in visit.asked} == {
        "",
        "segments",
        "continuations",
    }
