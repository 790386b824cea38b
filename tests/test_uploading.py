"""`upload` against a server of the hub's endpoints, and models named by hub ids in every verb."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import parts
from launching import Silent, serve_locally
from lexigraft import LexigraftError, card, upload
from lexigraft.manifest import Manifest
from test_check_hub import COMMIT, serving

CHILD = """
import json, sys
import lexigraft
for verb, arguments, options in json.loads(sys.argv[1]):
    try:
        told = getattr(lexigraft, verb)(*arguments, **options).to_json()
    except lexigraft.LexigraftError as fault:
        told = {"fault": str(fault)}
    print(json.dumps({**told, "torch": "torch" in sys.modules}))
"""


@dataclass
class Store:
    """What was committed, by repository and branch, and which repositories are private."""

    token: str = "hf_secret"
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def answer(self, ask: BaseHTTPRequestHandler, body: bytes) -> tuple[int, object]:
        path = unquote(urlsplit(ask.path).path).strip("/")
        if ask.command == "PUT" and path.startswith("objects/"):
            self.objects[path.removeprefix("objects/")] = body
            return 200, {}
        if ask.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.private
            hidden = asked.get("private") or asked.get("visibility") == "private"
            self.private.setdefault(name, bool(hidden))
            self.files.setdefault((name, "main"), {})
            return (409 if there else 200), {"url": f"{self.url}/{name}"}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        name, verb, revision = self._split(path)
        if verb == "branch":
            self.files[name, revision] = dict(self.files[name, "main"])
            return 200, {}
        if verb == "preupload":
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if verb == "commit":
            self._commit(self.files[name, revision], body)
            return 200, {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.url}/{name}/commit/{COMMIT}",
            }
        told = {"id": name, "sha": COMMIT, "private": self.private[name], "siblings": []}
        return 200, told

    @staticmethod
    def _split(path: str) -> tuple[str, str, str]:
        owner, name, verb, revision = [*path.removeprefix("api/models/").split("/"), "", ""][:4]
        return f"{owner}/{name}", verb, revision

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]


@contextmanager
def storing() -> Iterator[Store]:
    store = Store()

    class Answers(Silent, BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else self._chunks()
            status, told = store.answer(self, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunks(self) -> bytes:
            found = b""
            while "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                size = int(self.rfile.readline(), 16)
                found += self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
            return found

        do_GET = do_POST = do_PUT = _answer  # noqa: N815

    with serve_locally(Answers) as store.url:
        yield store


def told(place: Path, url: str, *jobs: object, **settings: str) -> list[dict]:
    """What verbs return in a process whose hub is at `url`."""
    hub = {"HF_ENDPOINT": url, "HF_HOME": str(place), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **hub, "HF_HUB_DISABLE_XET": "1", **settings}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(jobs)],
        capture_output=True, text=True, check=False, cwd=place.parent, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def model(grafted_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(grafted_models / "tied", folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hidden").write_text("stays here")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_folder_and_its_card_arrive_byte_for_byte(model, tmp_path):
    home = tmp_path / "home"
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 1}))
    sent = ["upload", [str(model), "owner/new"]]
    with storing() as store:
        dry, refused, first, again, branch, public = told(
            home, store.url,
            [*sent, {"dry_run": True}],
            ["upload", [str(broken), "owner/broken"], {}],
            [*sent, {"private": True, "base_model": "owner/tiny"}],
            [*sent, {}],
            [*sent, {"revision": "v2"}],
            ["upload", [str(model), "owner/public"], {}],
            HF_TOKEN=store.token,
        )  # fmt: skip
        assert dry["url"] is None and "README.md" in dry["files"] and dry["card"]
        assert "LG201" in refused["fault"] and "owner/broken" not in store.private
        assert first["url"] == f"{store.url}/owner/new" and first["commit"] == COMMIT
        assert store.files["owner/new", "v2"] == content(model)
        assert store.files["owner/public", "main"] == content(model)
        assert first["files"].keys() == content(model).keys()
        assert not first["torch"] and again["url"] and branch["revision"] == "v2"
        assert store.private == {"owner/new": True, "owner/public": False}
        (exposed,) = told(
            home, store.url, ["upload", [str(model), "owner/public"], {"private": True}],
            HF_TOKEN=store.token,
        )  # fmt: skip
        assert "owner/public is there, and public" in exposed["fault"]
        assert (model / "README.md").is_file()


def test_no_login_and_no_hub_are_one_message_each(model, tmp_path):
    home, job = tmp_path / "home", ["upload", [str(model), "owner/new"], {}]
    with storing() as store:
        (stranger,) = told(home, store.url, job, HF_TOKEN="")
        (refused,) = told(home, store.url, job, HF_TOKEN="hf_other")
    for found in (stranger, refused):
        assert "try:    hf auth login" in found["fault"]
    (offline,) = told(home, store.url, job, HF_TOKEN="hf_x", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in offline["fault"] and "could not be uploaded" in offline["fault"]


def test_a_card_of_yours_is_kept_and_a_wrong_name_is_said(model, tmp_path):
    (model / "README.md").write_text("mine")
    result = upload(model, "owner/new", dry_run=True)
    assert not result.card and result.files["README.md"] == 4
    assert (model / "README.md").read_text() == "mine"
    for name in ("README.md", "lexigraft.json"):
        (model / name).unlink()
    assert "README.md" not in upload(model, "owner/new", dry_run=True).files
    with pytest.raises(LexigraftError, match="no name of a model"):
        upload(model, "only-a-name", dry_run=True)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(LexigraftError, match="is a run"):
        upload(tmp_path, "owner/new", dry_run=True)


def test_hub_ids_are_taken_and_recorded_with_their_commit(grafted_models, tmp_path):
    """Terms, new tokens and the base's card come along; the manifest tells the card the base."""
    served = tmp_path / "base"
    shutil.copytree(grafted_models / "base_tied", served)
    (served / "README.md").write_text("---\nlicense: mit\n---\n")
    (served / "LICENSE").write_text("MIT")
    out = tmp_path / "graft"
    with serving(o__base=served, o__vocab=grafted_models / "vocab") as hub:
        (done,) = told(
            tmp_path / "home", hub.url,
            ["graft", [f"o/base@{COMMIT}", "hf:o/vocab"], {"output": str(out)}],
        )  # fmt: skip
    assert "fault" not in done
    assert (out / "LICENSE").read_text() == "MIT" and (out / "new_tokens.jsonl").is_file()
    assert Manifest.read(out).records[-1].base.name == f"o/base@{COMMIT}"
    found = card(out, dry_run=True).metadata
    assert (found["base_model"], found["license"]) == ("o/base", "mit")


@pytest.mark.matrix
def test_learn_downloads_no_weights(grafted_models, tmp_path):
    """Words of a 70B model are learned where there is no room for it."""
    (tmp_path / "c.txt").write_text(parts.corpus_text(documents=20), "utf-8")
    options = {"corpus": [str(tmp_path / "c.txt")], "tokens": 5, "output": str(tmp_path / "vocab")}
    with serving(o__base=grafted_models / "base_tied") as hub:
        (done,) = told(tmp_path / "home", hub.url, ["learn", ["o/base"], options])
    assert "fault" not in done
    assert list((tmp_path / "home").rglob("config.json"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.matrix
def test_every_verb_takes_hub_ids(grafted_models, tmp_path):
    """With and without a revision and `hf:`; the manifests tell the commit."""
    (tmp_path / "c.txt").write_text(parts.corpus_text(documents=20), "utf-8")
    corpus = {"corpus": [str(tmp_path / "c.txt")]}
    base, name, adapter = "o/base", f"o/base@{COMMIT}", str(tmp_path / "adapter")
    few = {"tokens": 10, "min_count": 3, "allow_more": True}
    brief = {"max_steps": 2, "block_size": 64, "measured_bytes": 500, **corpus}
    jobs = [
        ["learn", [f"hf:{base}"], {**corpus, **few}],
        ["learn", [base], {"from_vocab": "o/vocab", "tokens": 5}],
        ["graft", [base, "o/vocab"], {"donor": "o/tied"}],
        ["train", ["o/tied"], {"base": name, **brief}],
        ["merge", [base, [adapter]], {"tokenizer": "o/vocab"}],
        ["split", ["o/tied", adapter], {}],
        ["extract", ["o/tied"], {"base": base}],
        ["prune", [base], {"drop": "10", **corpus}],
        ["blend", [[base, name]], {"base": f"hf:{base}", "method": "linear"}],
        ["align", [["o/tied", base]], {}],
    ]
    read = [
        ["show", ["o/vocab"], {}],
        ["check", [f"hf:{base}"], {"adapter": [adapter]}],
        ["evaluate", [[base, name]], {"max_bytes": 200, "speed_characters": 0, **corpus}],
    ]
    outputs = [tmp_path / verb for verb, *_ in jobs]
    outputs[1], outputs[3] = tmp_path / "cut", tmp_path / "adapter"
    for job, output in zip(jobs, outputs, strict=True):
        job[2]["output"] = str(output)
    models = {f"o__{key}": grafted_models / key for key in ("tied", "vocab")}
    with serving(o__base=grafted_models / "base_tied", **models) as hub:
        results = told(tmp_path / "home", hub.url, *jobs, *read)
    assert [found.get("fault") for found in results] == [None] * len(results)
    for place in (0, 1, 2, 6, 7, 8):
        assert Manifest.read(outputs[place]).records[-1].base.name == name, outputs[place]
    aligned = Manifest.read(outputs[9] / "base").records[-1]
    assert [one.name for one in aligned.models] == [f"o/tied@{COMMIT}", name]
    donor = Manifest.read(outputs[2]).records[-1].start.donor
    assert donor is None or donor.name == f"o/tied@{COMMIT}"


READ = """
import json, sys
from lexigraft.corpus import read_documents, sources
spec = sys.argv[1]
print(json.dumps([list(read_documents([spec])), [source.to_json() for source in sources([spec])]]))
"""


@pytest.mark.matrix
def test_a_data_set_has_its_commit_in_the_manifest(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"document {place}"} for place in range(3)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(datasets__o__data=data) as hub:
        settings = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", READ, f"hf:o/data@{COMMIT}#weight=2"],
            capture_output=True, text=True, check=False, env={**os.environ, **settings},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    documents, (source,) = json.loads(done.stdout)
    assert documents == [row["text"] for row in rows]
    assert (source["name"], source["weight"]) == (f"hf:o/data@{COMMIT}", 2.0)
