"""`check` of a hub id fetches headers, not weights; seen with a server of the hub's endpoints."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from safetensors.torch import load_file, save_file

from launching import Silent, serve_locally
from test_check import TOKENS
from test_check_gallery import Ground, grow_rows, source, written_gguf  # noqa: F401

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What huggingface_hub asks for one request of a file: weights are larger, headers are not.
BLOCK_BYTES = 2**17
# Jobs as JSON on the command line; a result or a fault for each comes back.
CHILD = """
import json, sys
from lexigraft import LexigraftError
from lexigraft.steps.check import check
for job in json.loads(sys.argv[1]):
    try:
        told = check(**job).to_json()
    except LexigraftError as fault:
        told = {"fault": str(fault)}
    print(json.dumps({**told, "torch": "torch" in sys.modules}))
"""


@pytest.fixture
def ground(source, tmp_path):  # noqa: F811
    return Ground(source, tmp_path)


@dataclass
class Hub:
    """Folders served as models (`datasets/...`: as data sets) of one commit each.

    It counts how many bytes of each file were sent.
    """

    models: dict[str, Path]
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""
    broken: str = ""

    def answer(self, ask: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(ask.path).path).strip("/")
        for name, folder in self.models.items():
            api = f"api/{name}" if name.startswith("datasets/") else f"api/models/{name}"
            files = sorted(p for p in folder.iterdir() if p.is_file())
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                listed = [{"rfilename": p.name} for p in files]
                return self._json(ask, {"id": name, "sha": COMMIT, "siblings": listed}, body)
            if path == f"{api}/tree/{COMMIT}":
                kind = {"type": "file", "oid": "0" * 40}
                tree = [{**kind, "path": p.name, "size": p.stat().st_size} for p in files]
                return self._json(ask, tree, body)
            for file in files:
                if path == f"{name}/resolve/{COMMIT}/{file.name}":
                    if file.name == self.broken:
                        return ask.send_error(500)
                    return self._file(ask, name, file, body)
            if path.startswith((f"{name}/resolve/", f"{api}/tree/")):
                return self._send(ask, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        return ask.send_error(404)

    def _json(self, ask: BaseHTTPRequestHandler, value: object, body: bool) -> None:
        self._send(ask, 200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _file(self, ask: BaseHTTPRequestHandler, name: str, file: Path, body: bool) -> None:
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT}
        asked = ask.headers.get("Range") if body else None
        if asked:
            begin, end = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(data) - 1)}/{len(data)}"
            data, status = data[begin : end + 1], 206
        if body:
            key = f"{name}/{file.name}"
            self.sent[key] = self.sent.get(key, 0) + len(data)
        self._send(ask, status, data, headers, body)

    def _send(
        self,
        ask: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str],
        body: bool,
    ) -> None:
        ask.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            ask.send_header(key, value)
        ask.end_headers()
        if body:
            ask.wfile.write(data)


@contextmanager
def serving(**models: Path) -> Iterator[Hub]:
    hub = Hub({name.replace("__", "/"): folder for name, folder in models.items()})

    class Answers(Silent, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self, body=True)

        def do_HEAD(self) -> None:
            hub.answer(self, body=False)

    with serve_locally(Answers) as hub.url:
        yield hub


def checked(hub: Hub, cache: Path, *jobs: dict[str, object]) -> list[dict]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(jobs)],
        capture_output=True, text=True, check=True, cwd=cache.parent,
        env={**os.environ, **settings},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def codes(told: dict) -> list[str]:
    return [finding["code"] for finding in told["findings"]]


def test_of_a_hub_id_headers_are_fetched_and_called_by_its_name(source, ground, tmp_path):  # noqa: F811
    """A model with a fault, an adapter, a GGUF file, a pickle and a header that lies, in one go."""
    model, pickled, hostile = ground.base, ground.copy("shards"), ground.copy("vocab")
    grow_rows(model, 20_000, config=False)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", {"format": "pt", "long": "x" * BLOCK_BYTES})
    for path in pickled.glob("model*"):
        path.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"never opened")
    shutil.copyfile(model / "config.json", hostile / "config.json")
    lie = struct.pack("<Q", 99_000_000) + b"{" * 10_000_000
    (hostile / "model.safetensors").write_bytes(lie)
    (tmp_path / "gguf").mkdir()
    gguf = written_gguf(Ground(source, tmp_path / "work"))
    gguf.rename(tmp_path / "gguf" / "tiny.gguf")
    with serving(
        o__model=model, o__adapter=ground.adapter, o__sp=ground.sp,
        o__pickle=pickled, o__lie=hostile, o__gguf=tmp_path / "gguf",
    ) as hub:  # fmt: skip
        grown, origin, pickle, lied, file = checked(
            hub,
            tmp_path / "cache",
            {"path": "o/model"},
            {"path": f"o/sp@{COMMIT}", "adapter": ["o/adapter"]},
            {"path": "o/pickle"},
            {"path": "o/lie"},
            {"path": "o/gguf"},
        )
    assert codes(grown) == ["LG201"]
    assert grown["findings"][0]["fix"] == "set vocab_size to 20000 in o/model/config.json"
    assert {row["folder"] for row in grown["table"]} == {"o/model"}
    assert codes(origin) == ["LG401"]
    assert origin["findings"][0]["fix"] == f"lexigraft merge o/sp@{COMMIT} o/adapter -o MERGED"
    assert codes(pickle) == ["LG301"] and "a pickle" in pickle["findings"][0]["found"]
    assert codes(lied) == ["LG301"]
    assert "announces a header of 99,000,000 bytes" in lied["findings"][0]["found"]
    assert file["ok"] and file["table"][0]["count"] == TOKENS + 2
    assert not any(one["torch"] for one in (grown, origin, pickle, lied, file))
    # What is asked for at once may pass the end of the header, and a long header takes another.
    assert hub.sent["o/lie/model.safetensors"] <= BLOCK_BYTES + 8
    assert hub.sent["o/model/model.safetensors"] <= 4 * BLOCK_BYTES
    assert "pytorch_model.bin" not in " ".join(hub.sent)
    kept = {path.suffix for path in (tmp_path / "cache").rglob("*.*") if path.is_symlink()}
    assert ".json" in kept and not kept & {".safetensors", ".gguf", ".bin"}


@pytest.mark.matrix
def test_weights_are_downloaded_where_they_are_asked_for_and_used_once_there(ground, tmp_path):
    """--deep reads weights; afterwards the cache has them, and no stand-in is needed."""
    whole = (ground.sp / "model.safetensors").stat().st_size
    with serving(o__sp=ground.sp) as hub:
        [deep] = checked(hub, tmp_path / "cache", {"path": "o/sp", "deep": True})
        assert deep["ok"] and hub.sent["o/sp/model.safetensors"] >= whole
        hub.sent.clear()
        [again] = checked(hub, tmp_path / "cache", {"path": "o/sp"})
        assert again["ok"] and "o/sp/model.safetensors" not in hub.sent
    gone = Hub({}, url=hub.url)
    [offline] = checked(gone, tmp_path / "cache", {"path": "o/sp"})
    assert offline == again


@pytest.mark.matrix
def test_a_hub_that_fails_on_the_way_is_one_message(ground, tmp_path):
    with serving(o__sp=ground.sp) as hub:
        hub.broken = "model.safetensors"
        [told] = checked(hub, tmp_path / "cache", {"path": "o/sp"})
    assert "the hub gave no model" in told["fault"] and "try:" in told["fault"]
    with serving() as hub:
        [told] = checked(hub, tmp_path / "cache", {"path": "o/unknown"})
    assert "the hub gave no model" in told["fault"]
