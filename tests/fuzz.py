"""Mutants of real folders over the verbs: a pool of long-lived child processes, one seed a mutant.

`python tests/fuzz.py --mutants 10000 --first 0` (or `make fuzz`) prints every seed that failed, and
where to go on. `python tests/fuzz.py --seed 17` runs one of them here, with its traceback. A mutant
fails if a verb ends in anything but a result or a `LexigraftError`, takes more than 5 s of processor
time, a minute on the clock (which is what shows that it waits) or 1 GB, writes anything but its output, changes an input, loads a pickle, or imports or runs a
file of the folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_SECONDS = 5.0  # of processor time
MOST_WALL_SECONDS = 60.0  # of one mutant: what waits uses no processor
MOST_ANSWER_SECONDS = 300.0  # then a child is killed; its first answer waits for its imports
MOST_BYTES = 10**9
ODD = (
    None, True, -1, 0, 7, 2**31, 2**53 + 1, 2**70, 1.5, float("inf"), float("nan"), "", "x",
    "\x1b[31m\n", "../../x", "\ud800", "\u0000", [], [[]], {}, [{}], {"a": 1}, [0, 2**40], "9" * 400,
)  # fmt: skip
NAMES = ("", "\x1b]0;x\x07\n", "7", "vocab_size", "__metadata__", "model", "type", "id", "\ud800")
VERBS = {
    "check": 9, "graft": 4, "merge": 4, "learn": 2, "recipe": 1,
    "blend": 2, "split": 1, "extract": 1, "prune": 1, "align": 1, "run.json": 1,
}  # fmt: skip
BEGUN = "mutant: "
MUTABLE = (".json", ".jsonl", ".safetensors", ".model", ".gguf", ".txt", ".yaml", ".jinja")


# -- mutations


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to the parts of a JSON value; of long lists and maps the first few."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[: 12 if len(value) > 80 else 80]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for place in range(min(3, len(value))):
            yield from places(value[place], (*path, place))


def changed(data: Any, draw: random.Random) -> Any:
    """`data` with one part replaced, removed, doubled, nested, or under another key."""
    data = copy.deepcopy(data)
    path = draw.choice(list(places(data)))
    if not path:
        return draw.choice(ODD) if draw.random() < 0.2 else data
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    how, last = draw.random(), path[-1]
    if how < 0.12:
        del inside[last]
    elif how < 0.24 and isinstance(inside, dict):
        inside[draw.choice(NAMES)] = inside.pop(last)
    elif how < 0.32 and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[last]))
    elif how < 0.38:
        for _ in range(draw.choice((3, 90, 150))):
            inside[last] = [inside[last]]
    elif how < 0.6 and isinstance(inside[last], int | float):
        inside[last] = inside[last] + draw.choice((-1, 1, 2**20, 2**40))
    else:
        inside[last] = copy.deepcopy(draw.choice(ODD))
    return data


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bits, runs and lengths; most of it where a file says what it is."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        if not data:
            break
        place = draw.randrange(min(len(data), draw.choice((16, 200, 5000, len(data)))))
        how = draw.random()
        if how < 0.5:
            data[place] = draw.randrange(256)
        elif how < 0.7:
            number = draw.choice((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1))
            data[place : place + 8] = struct.pack("<Q", number)
        elif how < 0.85:
            del data[place : place + draw.choice((1, 8, 100))]
        else:
            data[place:place] = data[place : place + draw.choice((1, 8, 300))]
    return bytes(data[: draw.choice((len(data), len(data), len(data), len(data) // 2, 7))])


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw.randint(1, 3)):
        header = changed(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate_pieces(data: bytes, draw: random.Random) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    for _ in range(draw.randint(1, 3)):
        piece = draw.choice(proto.pieces)
        how = draw.randrange(7)
        if how == 0:
            piece.score = draw.choice((float("nan"), float("inf"), -1e38, 0.0))
        elif how == 1:
            piece.piece = draw.choice(("", "\n", "\x1b[2J", "▁" * 400, proto.pieces[-1].piece))
        elif how == 2:
            piece.type = draw.choice((1, 2, 3, 4, 5, 6))
        elif how == 3:
            proto.pieces.add(piece=draw.choice(("▁the", "x" * 9, "")), score=draw.random())
        elif how == 4:
            del proto.pieces[draw.randrange(len(proto.pieces)) :]
            if not proto.pieces:
                proto.pieces.add(piece="a")
        elif how == 5:
            proto.trainer_spec.model_type = draw.choice((1, 2, 3, 4))
            proto.trainer_spec.unk_id = draw.choice((-1, 0, 2**30))
        else:
            proto.normalizer_spec.precompiled_charsmap = bytes(
                draw.randrange(256) for _ in range(40)
            )
    return proto.SerializeToString()


def mutate(path: Path, draw: random.Random) -> None:
    """Change one file. The old one may be a link to the source: a new file takes its place."""
    data = path.read_bytes()
    try:
        if path.suffix == ".json" and draw.random() < 0.85:
            content = json.loads(data)
            for _ in range(draw.randint(1, 3)):
                content = changed(content, draw)
            data = json.dumps(content).encode()
        elif path.suffix == ".jsonl" and draw.random() < 0.8:
            lines = data.decode().splitlines()
            place = draw.randrange(len(lines))
            lines[place] = json.dumps(changed(json.loads(lines[place]), draw))
            data = "\n".join(lines).encode()
        elif path.suffix == ".yaml" and draw.random() < 0.8:
            import yaml

            data = yaml.safe_dump(changed(yaml.safe_load(data), draw)).encode("utf-8", "replace")
        elif path.suffix == ".safetensors" and draw.random() < 0.7:
            data = mutate_header(data, draw)
        elif path.suffix == ".model" and draw.random() < 0.7:
            data = mutate_pieces(data, draw)
        else:
            data = mutate_bytes(data, draw)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        data = mutate_bytes(data, draw)  # what an earlier change left is no longer of its kind
    path.unlink()
    path.write_bytes(data)


# -- the folders that are mutated


def write_sources(place: Path) -> Path:
    """Real folders of each kind: models, an adapter, a learned vocabulary, a GGUF file, a recipe."""
    import parts
    from lexigraft import graft, learn
    from lexigraft.recipe import Recipe
    from lexigraft.runfile import Running, RunState, StageState
    from test_check_gallery import Ground, write_gallery, written_gguf

    write_gallery(place)
    corpus = place / "corpus.txt"
    corpus.write_text(parts.corpus_text(documents=6))
    learned = place / "learned"
    found = learn(place / "sp", corpus=[corpus], tokens="8", min_count=2, output=learned)
    grafted = graft(place / "sp", learned, output=place / "grafted", pad_to=8)
    (place / "gguf").mkdir()
    made = written_gguf(Ground(place, place / "scratch"))
    made.rename(place / "gguf" / "tiny.gguf")
    shutil.rmtree(place / "scratch")
    (place / "recipe").mkdir()
    (place / "recipe" / "recipe.yaml").write_text(
        "base: ../base\ncorpus: ../corpus.txt\ngeneral: [../corpus.txt]\n"
        "learn: {tokens: 8, terms: []}\ngraft: {init: mean, pad_to: 8}\n"
        "train: {stages: [{mode: lora, max_steps: 2}]}\ncontrol: false\n"
    )
    (place / "blend").mkdir()
    (place / "blend" / "recipe.yaml").write_text(BLEND.format(place.resolve()))
    (place / "run").mkdir()
    recipe = Recipe.read(place / "recipe" / "recipe.yaml")
    stages = {
        "learn": StageState(key="0a", output="1b", seconds=2.5, result=found.to_json()),
        "graft": StageState(key="2c", output="3d", seconds=0.5, result=grafted.to_json()),
    }
    running = Running(stage="train", key="4e")
    RunState(recipe=recipe, stages=stages, running=running).save(place / "run")
    return place


BLEND = """
models:
  - model: {0}/base
    parameters: {{weight: 0.5, density: 0.6}}
  - model: {0}/model
    parameters: {{weight: [0.2, 0.7], density: [{{filter: mlp, value: 0.5}}, {{value: 0.4}}]}}
merge_method: ties
base_model: {0}/base
parameters: {{normalize: true, lambda: 1.0}}
dtype: float32
tokenizer: {{source: union, pad_to_multiple_of: 8}}
"""


def linked(source: Path, target: Path) -> Path:
    """`source` again, its files hard links: an input that is written through is seen."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target


# -- one mutant


@dataclass
class Watch:
    """What the interpreter says of files and code while a verb runs (PEP 578)."""

    allowed: tuple[str, ...] = ()
    forbidden: str = ""
    found: list[str] = field(default_factory=list)
    on: bool = False

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if name == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | bytes):
                self._writes(name, path)
        elif name in ("os.rename", "os.link", "os.symlink"):
            self._writes(name, arguments[1])
        elif name in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            inside = name != "os.truncate" and isinstance(arguments[-1], int) and arguments[-1] >= 0
            if not inside:  # a name below an open folder, whose own removal was told before
                self._writes(name, arguments[0])
        elif name == "pickle.find_class" and not arguments[0].startswith(KEPT_AS_PICKLES):
            self.found.append(f"{name} {arguments}")
        elif name == "exec":
            file = getattr(arguments[0], "co_filename", "")
            if self.forbidden and file.startswith(self.forbidden):
                self.found.append(f"ran {file}")

    def _writes(self, name: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = Path(os.path.normpath(Path.cwd() / os.fsdecode(path)))
        if str(place) != os.devnull and not any(place.is_relative_to(a) for a in self.allowed):
            self.found.append(f"{name} {place}")


def impatient_loader() -> None:
    """transformers has 20 seconds to answer."""
    from lexigraft.checks import conversion, probe
    from lexigraft.families.loader import TransformersLoader

    step = sys.modules["lexigraft.steps.learn"]
    for module in (conversion, probe, step):
        module.TransformersLoader = lambda: TransformersLoader(seconds=20)  # type: ignore[attr-defined]


def actions(
    source: Path, place: Path, draw: random.Random
) -> tuple[str, Callable[[], Any], list[Path]]:
    """A verb, what calls it, and the input folders that may be mutated."""
    verb = draw.choices(list(VERBS), list(VERBS.values()))[0]

    def take(*names: str) -> Path:
        name = draw.choice(names)
        target = place / "in" / name
        return target if target.exists() else linked(source / name, target)

    out = place / "out" / "result"
    if verb == "check":
        from lexigraft.checks.consumers import CONSUMERS
        from lexigraft.steps.check import check, mend

        folder = take("base", "sp", "model", "shards", "adapter", "grafted", "learned", "gguf")
        base = draw.choice((None, None, take("sp", "base")))
        adapter = draw.choice((None, None, take("adapter")))
        consumer = draw.choice((None, *CONSUMERS))
        if draw.random() < 0.15:
            return "check --fix", lambda: mend(folder, out, deep=True), [folder]

        def call() -> Any:
            result = check(folder, base=base, adapter=adapter, deep=True, consumer=consumer)
            json.dumps(result.to_sarif())
            return result

        return f"check {folder.name}", call, [p for p in (folder, base, adapter) if p]
    if verb == "graft":
        from lexigraft.steps.graft import graft

        base, vocab = draw.choice(
            (
                (take("sp"), take("learned")),
                (take("base"), take("model")),
                (take("shards"), take("model")),
            )
        )
        init = draw.choice(("auto", "mean", "random"))
        return "graft", lambda: graft(base, vocab, output=out, init=init, pad_to=8), [base, vocab]
    if verb == "merge":
        from lexigraft.steps.merge import merge

        base, adapter = take("sp"), take("adapter")
        return "merge", lambda: merge(base, [adapter], output=out), [base, adapter]
    if verb == "learn":
        from lexigraft.steps.learn import learn

        base = take("sp", "base", "learned")
        corpus = place / "in" / "corpus.txt"
        shutil.copyfile(source / "corpus.txt", corpus)
        if draw.random() < 0.3:
            corpus.write_bytes(mutate_bytes(corpus.read_bytes(), draw))
        again = take("learned") if draw.random() < 0.3 else None
        if again is not None:
            return (
                "learn --from",
                lambda: learn(base, from_vocab=again, tokens="4", output=out),
                [base, again],
            )
        return (
            "learn",
            lambda: learn(base, corpus=[corpus], tokens="6", min_count=2, output=out),
            [base],
        )
    if verb == "blend":
        from lexigraft.steps.blend import blend

        if draw.random() < 0.5:
            recipe = take("blend")
            call = lambda: blend([recipe / "recipe.yaml"], output=out)  # noqa: E731
            return "blend with a recipe", call, [recipe]
        base, model = take("base"), take("model")
        method = draw.choice(("linear", "slerp", "ties", "della"))
        numbers = {"t": 0.4} if method == "slerp" else {}
        numbers |= {"density": [0.5]} if method in ("ties", "della") else {}
        return (
            f"blend --method {method}",
            lambda: blend([base, model], base=base, method=method, output=out, **numbers),
            [base, model],
        )
    if verb == "split":
        from lexigraft.steps.split import split

        base, adapter = take("sp"), take("adapter")
        return "split", lambda: split(base, adapter, output=out), [base, adapter]
    if verb == "extract":
        from lexigraft.steps.extract import extract

        base, model = take("base"), take("model")
        return "extract", lambda: extract(model, base=base, rank=2, output=out), [base, model]
    if verb == "prune":
        from lexigraft.steps.prune import prune

        base, corpus = take("base", "sp"), source / "corpus.txt"
        call = lambda: prune(base, corpus=[corpus], drop="2%", min_count=1000, output=out)  # noqa: E731
        return "prune", call, [base]
    if verb == "align":
        from lexigraft.steps.align import align

        base, model = take("base"), take("model")
        return "align", lambda: align([base, model], output=out), [base, model]
    if verb == "run.json":
        from lexigraft.runfile import RunState

        folder = take("run")
        return "run.json", lambda: RunState.read(folder), [folder]
    from lexigraft.recipe import Recipe

    folder = take("recipe")
    return "recipe", lambda: Recipe.read(folder / "recipe.yaml"), [folder]


def one_mutant(seed: int, source: Path, place: Path, watch: Watch) -> dict[str, Any]:
    """Build the mutant of a seed below `place`, run it, and say what was wrong with it."""
    from lexigraft.console import plain
    from lexigraft.errors import LexigraftError

    draw = random.Random(seed)
    (place / "out").mkdir(parents=True)
    (place / "in").mkdir()
    verb, call, folders = actions(source, place, draw)
    files = sorted(
        {path for folder in folders for path in folder.iterdir() if path.suffix in MUTABLE}
    )
    some = draw.sample(files, min(len(files), draw.choice((1, 1, 1, 2, 3))))
    for path in some:
        mutate(path, draw)
    what = f"{verb} with {', '.join(str(path.relative_to(place / 'in')) for path in some)}"
    print(f"{BEGUN}{what}", file=sys.stderr, flush=True)  # for whoever has to end this process
    before = state(place / "in")
    watch.allowed = (str(place / "out"), tempfile.gettempdir(), *ALLOWED)
    watch.forbidden, watch.found, watch.on = str(place), [], True
    began, wall = time.process_time(), time.monotonic()
    fault, trace, outcome = "", "", "result"
    try:
        result = call()
        lines = result.lines() if hasattr(result, "lines") else []
        if hasattr(result, "to_json"):
            json.dumps(result.to_json())
        if verb.startswith("check") and any(plain(line) != line or "\n" in line for line in lines):
            fault = "control characters in a line"
    except LexigraftError as error:
        outcome = type(error).__name__
        if not (error.found and error.needed and error.fix):
            fault = "a message that stops at the complaint"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        fault, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    watch.on = False
    seconds, wall = time.process_time() - began, time.monotonic() - wall
    left = sorted(path.name for path in (place / "out").iterdir())
    if watch.found:
        fault = fault or f"reached out: {watch.found[:3]}"
    if state(place / "in") != before:
        fault = fault or "changed an input"
    if outcome != "result" and left:
        fault = fault or f"left {left}"
    if seconds > MOST_SECONDS:
        fault = fault or f"took {seconds:.1f} s"
    if wall > MOST_WALL_SECONDS:
        fault = fault or f"took {wall:.0f} s on the clock"
    return {
        "seed": seed,
        "what": what,
        "outcome": outcome,
        "fault": fault[:500],
        "trace": trace,
        "seconds": seconds,
    }


# numba keeps compiled code as pickles, in its own folder.
KEPT_AS_PICKLES = ("numba.", "copyreg", "numpy", "builtins", "collections", "lexigraft.families")
# What compiled code and libraries keep for themselves.
ALLOWED = (str(Path(__file__).parents[1] / "src"),)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def peak_bytes() -> int:
    """The most memory this process has had since the last time it was asked."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return int(lines["VmHWM"].split()[0]) * 1024


def serve(source: Path) -> None:
    """The main program of a child: seeds come in, outcomes go out, one a line."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    prepare()
    watch = Watch()
    sys.addaudithook(watch.event)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=source.parent) as work:
        tempfile.tempdir = str(Path(work) / "tmp")
        Path(tempfile.tempdir).mkdir()
        os.chdir(tempfile.tempdir)
        for line in sys.stdin:
            seed = int(line)
            place = Path(work) / str(seed)
            peak_bytes()
            before = peak_bytes()  # what it has now: the peak since the last time
            answer = one_mutant(seed, source, place, watch)
            more = peak_bytes() - before
            if more > MOST_BYTES:
                answer["fault"] = answer["fault"] or f"took {more / 1e9:.2f} GB"
            rest = list(Path(tempfile.tempdir).iterdir())
            if rest:
                answer["fault"] = answer["fault"] or f"left {rest[0].name} in the temporary folder"
                for path in rest:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(place, ignore_errors=True)
            print(json.dumps(answer), file=answers, flush=True)


def prepare() -> None:
    """Import everything that a verb imports, so that no mutant pays for it."""
    import gguf  # noqa: F401
    import torch

    import lexigraft.steps.align
    import lexigraft.steps.blend
    import lexigraft.steps.check
    import lexigraft.steps.extract
    import lexigraft.steps.graft
    import lexigraft.steps.learn
    import lexigraft.steps.merge
    import lexigraft.steps.prune
    import lexigraft.steps.split  # noqa: F401
    from lexigraft.console import set_quiet

    torch.set_num_threads(1)
    set_quiet(True)
    impatient_loader()


# -- the pool


class Child:
    """A process that runs mutants, and is replaced when it hangs or dies."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)

    def ask(self, seed: int) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(self._source)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            )  # fmt: skip
        child = self._process
        assert child.stdin is not None and child.stdout is not None
        watch = threading.Timer(MOST_ANSWER_SECONDS, child.kill)
        watch.start()
        began = time.monotonic()
        try:
            child.stdin.write(f"{seed}\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            line = ""
        finally:
            watch.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        late = time.monotonic() > began + MOST_ANSWER_SECONDS
        self.close()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        begun = [line.removeprefix(BEGUN) for line in lines if line.startswith(BEGUN)]
        self._errors.truncate(0)
        fault = (
            f"hung for {MOST_ANSWER_SECONDS:.0f} s"
            if late
            else f"died ({child.returncode}) {lines[-1:]}"
        )
        return {
            "seed": seed,
            "what": begun[-1] if begun else "?",
            "outcome": "died",
            "fault": fault,
            "trace": "",
            "seconds": 0.0,
        }

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@dataclass
class Tally:
    """What became of the mutants."""

    mutants: int = 0
    next_seed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)


def fuzz(
    source: Path,
    *,
    first: int,
    mutants: int,
    jobs: int,
    seconds: float = float("inf"),
    least: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Run the mutants `first`, `first + 1`, ... in `jobs` children.

    At least `least`, then as long as `seconds` are not over since the first answer.
    """
    tally, lock = Tally(next_seed=first), threading.Lock()
    seeds = iter(range(first, first + mutants))
    began: list[float] = []

    def go_on() -> bool:
        late = began and time.monotonic() > began[0] + seconds
        return not late or tally.mutants < least

    def work() -> None:
        child = Child(source)
        try:
            while go_on():
                with lock:
                    seed = next(seeds, None)
                if seed is None:
                    return
                answer = child.ask(seed)
                with lock:
                    began.append(time.monotonic())
                    tally.mutants += 1
                    tally.next_seed = max(tally.next_seed, seed + 1)
                    tally.outcomes[f"{answer['what'].split(' ')[0]}: {answer['outcome']}"] += 1
                    if answer["fault"]:
                        tally.faults.append(answer)
                        tell(f"seed {seed}: {answer['what']}: {answer['fault']}")
                    if tally.mutants % 500 == 0:
                        tell(
                            f"{tally.mutants} mutants, {len(tally.faults)} faults, next seed {tally.next_seed}"
                        )
        finally:
            child.close()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mutants", type=int, default=10_000)
    options.add_argument(
        "--first", type=int, default=0, help="the first seed: go on where a run stopped"
    )
    options.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    options.add_argument("--seconds", type=float, default=float("inf"))
    options.add_argument("--seed", type=int, help="one mutant, here, with its traceback")
    options.add_argument("--keep", type=Path, help="with --seed: leave the mutant in this folder")
    options.add_argument("--sources", type=Path, help="folders made by an earlier run, or to make")
    options.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        serve(given.serve)
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        source = given.sources or Path(scratch) / "sources"
        if not source.exists():
            write_sources(source)
        if given.seed is not None:
            prepare()
            watch = Watch()
            sys.addaudithook(watch.event)
            place = given.keep or Path(scratch) / "mutant"
            answer = one_mutant(given.seed, source.resolve(), place.resolve(), watch)
            print(answer["trace"] or "", json.dumps(answer | {"trace": ""}, indent=1))
            return 1 if answer["fault"] else 0
        tally = fuzz(
            source.resolve(), first=given.first, mutants=given.mutants, jobs=given.jobs,
            seconds=given.seconds, tell=lambda text: print(text, flush=True),
        )  # fmt: skip
    print(
        f"{tally.mutants} mutants, {len(tally.faults)} faults; go on with --first {tally.next_seed}"
    )
    for outcome, count in sorted(tally.outcomes.items()):
        print(f"  {outcome}: {count}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
