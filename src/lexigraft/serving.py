"""`serve`: the report of a run with a box to type in, for the browser of this machine alone.

The server listens on the loopback address. It answers only requests whose Host is its own, so that
no page of another site can reach it under a name of its own (DNS rebinding); it takes JSON alone,
which other sites' pages may not send, and gives no leave to any (no CORS).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.families.segments import Extension, Piece
from lexigraft.files import require_folder
from lexigraft.reporting import state_of
from lexigraft.reporting.facts import opened, run_facts
from lexigraft.reporting.page import Live, direction, page, policy, tip
from lexigraft.reporting.words import Language, speaker

ADDRESS = "127.0.0.1"
CHARACTERS = 4000  # of a text; the page's box takes no more
WRITTEN = 40  # tokens that a model writes
_BODY = 2**16
_SECONDS = 20  # for a client to send what it has announced


class _RefusedError(Exception):
    """A request that gets no answer but this."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Playground:
    """Answers what the page asks; models are loaded when they are first asked, one at a time."""

    def __init__(
        self, extension: Extension, models: Mapping[str, Path], tell: Callable[[int], str]
    ) -> None:
        """`models`: name -> folder; `tell`: what is said of a new token."""
        self._extension = extension
        self._folders = models
        self._tell = tell
        self._loaded: dict[str, Any] = {}
        self._lock = Lock()

    def segments(self, text: str) -> dict[str, Any]:
        """Both readings of a text: lists of [id, text, is new, what is told of it]."""

        def plain(piece: Piece) -> list[Any]:
            return [*piece, self._tell(piece.id) if piece.new else None]

        return {
            "before": list(map(plain, self._extension.before(text))),
            "after": list(map(plain, self._extension.after(text))),
            "direction": direction(text),
        }

    def continuations(self, text: str) -> dict[str, Any]:
        """What each model writes behind a text."""
        from lexigraft import families
        from lexigraft.models.load import load_model
        from lexigraft.models.writing import continuation

        found = []
        with self._lock:
            for name, folder in self._folders.items():
                if name not in self._loaded:
                    self._loaded[name] = (load_model(folder), families.load(folder))
                model, family = self._loaded[name]
                written = continuation(model, family, text, tokens=WRITTEN)
                found.append({"name": name, "text": written})
        return {"models": found}


@dataclass(frozen=True)
class Serving:
    """A server that listens; `forever` lets it answer."""

    server: ThreadingHTTPServer

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server.server_port}/"

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {"url": self.url}

    def lines(self) -> list[str]:
        """What a person reads."""
        return [f"serving {self.url}", "Ctrl-C ends it"]

    def forever(self) -> None:
        """Answer until Ctrl-C."""
        try:
            self.server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.server.server_close()


def serve(run: str | Path, *, port: int = 8000, lang: Language | None = None) -> Serving:
    """Listen on the loopback address with the report of a run, and both tokenizers to try.

    Where torch is installed and models are there, the page lets them write on too.

    Args:
        run: a run folder, finished or not.
        port: where to listen; 0 for one that is free.
        lang: of the page; default: as the recipe of the run says.

    Raises:
        LexigraftError: no run folder, or the port is taken.
    """
    folder = require_folder(Path(run), "a run")
    state = state_of(folder)
    lang = lang or state.recipe.report.lang
    facts = run_facts(state, folder)
    extension, _ = opened(state, folder)
    models = _models(Path(state.recipe.base), folder)
    live = Live(_first_text(facts), bool(models)) if extension else None
    t = speaker(lang)
    tokens = {token["id"]: token for token in facts["tokens"]}
    playground = None
    if extension is not None:
        playground = Playground(extension, models, lambda token: tip(tokens.get(token), token, t))
    handler = _handler(page(facts, lang, live).encode(), playground)
    try:
        return Serving(ThreadingHTTPServer((ADDRESS, port), handler))
    except OSError as fault:
        raise LexigraftError(
            f"port {port}: {fault.strerror or fault}",
            needed="a port that is free",
            fix="--port 0, which takes any",
        ) from None


def _models(base: Path, folder: Path) -> dict[str, Path]:
    """The models that can write on: the base, and the last one of the run."""
    if importlib.util.find_spec("torch") is None:
        return {}
    last = next((folder / name for name in ("merged", "model") if (folder / name).is_dir()), None)
    found = {"base": base, "merged": last}
    return {name: path for name, path in found.items() if path is not None and path.is_dir()}


def _first_text(facts: Mapping[str, Any]) -> str:
    known = [*facts["sentences"]["samples"], *facts["sentences"]["shown"]]
    return str(known[0]["text"])[:CHARACTERS] if known else ""


def _handler(content: bytes, playground: Playground | None) -> type[BaseHTTPRequestHandler]:
    """A handler for one page, and for what it asks."""
    asked: dict[str, Callable[[str], dict[str, Any]]] = {}
    if playground is not None:
        asked = {"/segments": playground.segments, "/continuations": playground.continuations}

    class Handler(BaseHTTPRequestHandler):
        server: ThreadingHTTPServer
        timeout = _SECONDS
        server_version = "lexigraft"
        sys_version = ""

        def do_GET(self) -> None:
            """The page."""
            try:
                self._require_own_host()
                if self.path != "/":
                    raise _RefusedError(HTTPStatus.NOT_FOUND, "there is one page here, /")
                self._send(HTTPStatus.OK, "text/html", content)
            except _RefusedError as fault:
                self._refuse(fault)

        def do_POST(self) -> None:
            """What the page asks: a text, and both readings of it or how models go on."""
            try:
                self._require_own_host()
                answer = asked.get(self.path)
                if answer is None:
                    raise _RefusedError(HTTPStatus.NOT_FOUND, "nothing to ask here")
                found = answer(self._text())
                self._send(HTTPStatus.OK, "application/json", json.dumps(found).encode())
            except _RefusedError as fault:
                self._refuse(fault)
            except LexigraftError as fault:
                self._refuse(_RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, fault.found))

        def _require_own_host(self) -> None:
            port = self.server.server_port
            own = {f"{ADDRESS}:{port}", f"localhost:{port}"}
            host = self.headers.get("Host", "")
            if host not in own:
                raise _RefusedError(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
            if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
                raise _RefusedError(HTTPStatus.FORBIDDEN, "asked by the page of another site")

        def _text(self) -> str:
            """The text that was sent, as {"text": ...}."""
            if self.headers.get_content_type() != "application/json":
                raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is needed")
            size = self.headers.get("Content-Length", "")
            if not size.isdecimal():
                raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "a length is needed")
            if int(size) > _BODY:
                raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_BODY:,} bytes")
            try:
                text = json.loads(self.rfile.read(int(size)))["text"]
                text.encode()  # half of a surrogate pair is no text
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise _RefusedError(HTTPStatus.BAD_REQUEST, 'needed: {"text": "..."}') from None
            if len(text) > CHARACTERS:
                message = f"at most {CHARACTERS:,} characters"
                raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
            return str(text)

        def _refuse(self, fault: _RefusedError) -> None:
            self._send(fault.status, "application/json", json.dumps({"error": str(fault)}).encode())

        def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Content-Security-Policy": f"{policy(live=True)}; frame-ancestors 'none'",
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: Any) -> None:
            """Nothing: what is typed is no one's business."""

    return Handler
