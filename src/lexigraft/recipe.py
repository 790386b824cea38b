"""A recipe: the YAML file that `run` follows. Spec with examples: docs/recipe.md.

Unknown keys are errors that name the nearest known key. Paths in a recipe are relative to the
folder of the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lexigraft.errors import LexigraftError
from lexigraft.files import is_there

SMALLEST_BLOCK = 8  # tokens
# One name, or a list of names.
Names = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LearnPart(_Part):
    """Options of `learn`."""

    tokens: int | str = "auto"
    replace: int | None = Field(default=None, ge=1)
    min_count: int | None = Field(default=None, ge=1)
    allow_more: bool = False
    train_bytes: int | None = Field(default=None, ge=1)
    change_check_text: bool = False
    contrast: Names = []
    terms: Names = []
    pin: Names = []
    ban: Names = []
    special: Names = []
    engine: Literal["local", "ray"] = "local"
    workers: int | None = Field(default=None, ge=1)

    @property
    def word_lists(self) -> dict[str, list[str]]:
        """The lists of words, which are no texts to learn from."""
        return {"terms": self.terms, "pin": self.pin, "ban": self.ban, "special": self.special}

    @property
    def choices(self) -> dict[str, Any]:
        """The options that decide the result, files apart.

        `engine` and `workers` are none of them: they decide how fast it comes.
        """
        return self.model_dump(exclude={"engine", "workers", "contrast", *self.word_lists})

    def beside(self, at: Callable[[str], str]) -> LearnPart:
        """The same with each file where `at` says it is."""
        files = {**self.word_lists, "contrast": self.contrast}
        return self.model_copy(
            update={name: [at(spec) for spec in specs] for name, specs in files.items()}
        )


class GraftPart(_Part):
    """Options of `graft`."""

    init: str = "auto"
    init_from: str | None = None
    donor: str | None = None
    pad_to: int = Field(default=64, ge=1)

    @property
    def choices(self) -> dict[str, Any]:
        """The options that are neither file nor folder; `distill` is a stage of training."""
        init = "auto" if self.init == "distill" else self.init
        return {**self.model_dump(exclude={"init_from", "donor"}), "init": init}

    def beside(self, at: Callable[[str], str], model: Callable[[str], str]) -> GraftPart:
        """The same with its file where `at` says it is, and its donor where `model` does."""
        return self.model_copy(
            update={
                "init_from": self.init_from and at(self.init_from),
                "donor": self.donor and model(self.donor),
            }
        )


class TrainStage(_Part):
    """Options of one `train`; what is left out takes the default of the verb."""

    mode: Literal["rows", "lora", "full"] = "lora"
    objective: Literal["lm", "distill"] | None = None
    passes: int | None = Field(default=None, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0)
    block_size: int | None = Field(default=None, ge=SMALLEST_BLOCK)
    batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    new_row_learning_rate: float | None = Field(default=None, gt=0)
    lora_rank: int | None = Field(default=None, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    old_rows: Literal["frozen", "slow"] | None = None
    old_row_scale: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] | None = None
    warmup: float | None = Field(default=None, ge=0, le=0.9)
    gradient_accumulation: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"] | None = None
    replay: float | None = Field(default=None, ge=0, le=0.9)
    replay_schedule: Literal["even", "early"] | None = None
    patience: int | None = Field(default=None, ge=1)
    general_limit: float | None = Field(default=None, ge=0, lt=1)
    measurements: int | None = Field(default=None, ge=1)
    measured_bytes: int | None = Field(default=None, ge=1)
    save_steps: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> TrainStage:
        if self.share is not None and (self.max_bytes or self.max_steps or self.max_tokens):
            raise ValueError("either share or one of max_bytes, max_steps and max_tokens")
        return self

    def options(self) -> dict[str, Any]:
        """The options that the recipe sets, as keyword arguments of `train`; but for `share`."""
        return self.model_dump(exclude_none=True, exclude={"share"})


class TrainPart(_Part):
    """The stages of training, in order; each starts from what the one before left."""

    stages: list[TrainStage] = Field(default=[TrainStage()], min_length=1)


class EvalPart(_Part):
    """The texts that are measured; without them the held-out part of the corpus is."""

    corpus: Names = []
    general: Names = []
    max_bytes: int | None = Field(default=None, ge=1)
    speed_characters: int | None = Field(default=None, ge=0)


class ReportPart(_Part):
    """Options of the report that `run` writes at its end."""

    lang: Literal["en", "zh"] = "en"


class Recipe(_Part):
    """Everything that `run` needs to know."""

    base: str
    corpus: Names = Field(min_length=1)
    general: Names = []
    seed: int = 0
    learn: LearnPart = LearnPart()
    graft: GraftPart = GraftPart()
    train: TrainPart = TrainPart()
    eval: EvalPart = EvalPart()
    control: bool = True
    samples: list[str] = []
    report: ReportPart = ReportPart()

    @property
    def stages(self) -> list[TrainStage]:
        """The stages of training, with that of `graft: {init: distill}` before them."""
        first = [TrainStage(mode="rows", objective="distill")]
        return [*(first if self.graft.init == "distill" else []), *self.train.stages]

    def beside(self, folder: Path) -> Recipe:
        """The recipe with its relative paths taken from `folder`."""

        def at(spec: str) -> str:
            return spec if spec.startswith("hf:") else str(folder / spec)

        def model(name: str) -> str:
            # a hub id has the form of a relative path: it is one unless the folder is there
            return at(name) if is_there(folder / name) else name

        return self.placed(at, model)

    def placed(self, at: Callable[[str], str], model: Callable[[str], str]) -> Recipe:
        """The recipe with its files where `at` says they are, and its models where `model` does."""
        return self.model_copy(
            update={
                "base": model(self.base),
                "corpus": [at(spec) for spec in self.corpus],
                "general": [at(spec) for spec in self.general],
                "learn": self.learn.beside(at),
                "graft": self.graft.beside(at, model),
                "eval": self.eval.model_copy(
                    update={
                        "corpus": [at(spec) for spec in self.eval.corpus],
                        "general": [at(spec) for spec in self.eval.general],
                    }
                ),
            }
        )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a YAML file, its paths taken from the file's folder.

        Raises:
            LexigraftError: no such file, no YAML, an unknown key, or a value that does not fit.
        """
        return cls.parse(read_yaml(path, "a recipe"), where=str(path)).beside(path.parent)

    @classmethod
    def parse(cls, data: Any, *, where: str) -> Recipe:
        """The recipe in plain data; `where` names its place in messages."""
        if not isinstance(data, dict):
            raise LexigraftError(
                f"{where} holds no keys",
                needed="a recipe with at least `base` and `corpus`",
                fix="start from a file in examples/",
            )
        try:
            return cls.model_validate(data)
        except ValidationError as fault:
            raise _explained(fault, where) from None


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file; `what` says what was looked for.

    Raises:
        LexigraftError: no such file, or no YAML in UTF-8.
    """
    if not path.is_file():
        raise LexigraftError(f"no file {path}", needed=what, fix=f"ls {path.parent}")
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise LexigraftError(
            f"{path} is not valid YAML ({str(fault).splitlines()[0]})",
            needed=f"{what} in YAML, in UTF-8",
            fix="start from a file in examples/",
        ) from None


def _explained(fault: ValidationError, where: str) -> LexigraftError:
    """All faults of a recipe in one message, each unknown key with its nearest known one."""
    found, needed = [], []
    for error in fault.errors():
        place = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            known = _known_keys(error["loc"][:-1])
            near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
            found.append(f"unknown key {place}")
            needed.append(near[0] if near else f"one of {', '.join(known)}")
        elif error["type"] == "missing":
            found.append(f"no key {place}")
            needed.append(place)
        else:
            found.append(f"{place} = {error['input']!r}")
            needed.append(error["msg"].lower())
    return LexigraftError(
        f"{where}: {'; '.join(found)}",
        needed="; ".join(needed),
        fix=f"edit {where} (every key: docs/recipe.md)",
    )


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that a part of a recipe may have; list indexes in `location` are skipped."""
    model: type[BaseModel] = Recipe
    for name in location:
        if isinstance(name, str) and name in model.model_fields:
            annotation = model.model_fields[name].annotation
            inner = get_args(annotation)[0] if get_args(annotation) else annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(model.model_fields)
