"""Who merges an adapter rightly: 12 cases on tiny models, for `bench/merge.py`.

    python bench/merge_cases.py          # prints the verdicts as JSON, one object per case

A result is right if its logits are those of base and adapter, unmerged, on the model that was
trained, over the ids that the adapter's tokenizer gives a text with new words; and if its folder
would give the text these ids. Adapters are made by PEFT (tests/adapter_parts.py).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

import adapter_parts
from adapter_parts import ADDED, NEW, TOKENS
from lexigraft import LexigraftError, merge
from lexigraft.families import TokenMap

ROWS = TOKENS + ADDED
LIMIT = 1e-4
RIGHT, STALE, WRONG = "right", "right under a stale tokenizer", "wrong"
REFUSED, STOPS, ABSENT = "refused", "stops", "not installed"


@dataclass(frozen=True)
class Case:
    """What is merged.

    Attributes:
        title: in words.
        form: of the adapter, as `adapter_parts.FORMS` names it.
        tied: embedding and head of the base are one.
        grafted: the base already has the new rows.
        lora: further options of the adapter.
        kind: `padded`: a base of 448 rows, whose trainer shrank them to 384; `sibling`: the
            adapter was trained on a model that gives other ids to the same tokens.
    """

    title: str
    form: str
    tied: bool
    grafted: bool
    lora: tuple[tuple[str, Any], ...] = ()
    kind: str = ""

    def write(self, root: Path) -> tuple[Path, Path, Path]:
        """The folder given to each tool, the adapter, and the model that it was trained on."""
        lora = dict(self.lora)
        if self.kind == "padded":
            base = adapter_parts.write_base(root / "base", tied=self.tied, rows=448)
            trained = adapter_parts.write_grafted(base, root / "grafted", rows=ROWS)
            adapter = adapter_parts.write_adapter(base, trained, root / "adapter", self.form)
            return base, adapter, trained
        if self.kind == "sibling":
            base = adapter_parts.write_base(root / "base", tied=self.tied)
            trained, _ = adapter_parts.permuted(base, root / "sibling")
            adapter = adapter_parts.write_adapter(trained, trained, root / "adapter", self.form)
            return base, adapter, trained
        scene = adapter_parts.scene(root, self.form, tied=self.tied, **lora)
        return scene.start(ungrafted=not self.grafted), scene.adapter, scene.grafted


CASES = (
    Case("LoRA on linear layers", "lora", tied=False, grafted=True),
    Case(
        "rsLoRA, another alpha for some layers",
        "lora",
        tied=True,
        grafted=True,
        lora=(("use_rslora", True), ("alpha_pattern", {"v_proj": 32})),
    ),
    Case("origin: embedding and head saved, base of fewer rows", "saved-both", False, False),
    Case("the same, tied", "saved-both", tied=True, grafted=False),
    Case("LoRA on embedding and head, base of fewer rows", "lora-both", tied=False, grafted=False),
    Case("the same, tied, base grafted", "lora-both", tied=True, grafted=True),
    Case("one LoRA for both (ensure_weight_tying)", "lora-shared", tied=True, grafted=True),
    Case("head of a tied model saved alone", "saved-head", tied=True, grafted=True),
    Case("single token rows, base of fewer rows", "rows-both", tied=False, grafted=False),
    Case("DoRA on linear layers, embedding and head", "dora-both", tied=False, grafted=True),
    Case("padded base, rows shrunk in training", "saved-both", False, False, kind="padded"),
    Case("sibling tokenizer: equal size, other ids", "lora", False, True, kind="sibling"),
)


def text_ids(tokenizer: Path) -> list[int]:
    """A text of old and new words in a folder's ids."""
    from tokenizers import Tokenizer

    words = [f"{a}{b}" for a in adapter_parts.HAN for b in adapter_parts.HAN][: 2 * len(NEW)]
    text = " the coronary artery ".join(words)
    return list(Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text).ids)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Of each position, over the rows that the tokenizer knows."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found.float()


def peft(base: Path, adapter: Path, out: Path) -> None:
    """As users do it who know the sizes and where the tokenizer is; new rows are the resize's."""
    model = adapter_parts.load(base)
    rows = TokenMap.read(adapter).tokens
    if model.get_input_embeddings().weight.shape[0] < rows:
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
    _peft_merge(model, adapter, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(adapter / name, out / name)


def _peft_merge(model: Any, adapter: Path, out: Path) -> None:
    from peft import PeftModel

    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def mergekit(base: Path, adapter: Path, out: Path) -> None:
    """A recipe that names BASE+ADAPTER."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    cache = out.with_name("lora-cache")
    shutil.rmtree(cache, ignore_errors=True)
    options = MergeOptions(lora_merge_cache=str(cache), quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)


def axolotl(base: Path, adapter: Path, out: Path) -> None:
    """What `axolotl merge-lora` calls by default."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    merge_lora_sharded_efficient(base, adapter, out)


def lexigraft(base: Path, adapter: Path, out: Path) -> None:
    """Without a flag."""
    merge(base, adapter, output=out)


Merge = Callable[[Path, Path, Path], None]
TOOLS: dict[str, Merge] = {
    "PEFT, given the resize": peft,
    "mergekit": mergekit,
    "Axolotl, per shard": axolotl,
    "lexigraft": lexigraft,
}


def verdict(merge_by: Merge, case: Case, root: Path) -> tuple[str, str]:
    """What became of a case, and what the tool said where it wrote nothing."""
    base, adapter, trained = case.write(root)
    ids, out = text_ids(adapter), root / "result"
    expected = logits(adapter_parts.unmerged(trained, adapter), ids)
    try:
        merge_by(base, adapter, out)
        model = adapter_parts.load(out)
    except ModuleNotFoundError as fault:
        return ABSENT, str(fault)
    except LexigraftError as fault:
        return REFUSED, fault.found
    except Exception as fault:  # whatever a tool says instead of a result
        return STOPS, f"{type(fault).__name__}: {fault}"
    rows = min(expected.shape[-1], ROWS)
    if model.get_input_embeddings().weight.shape[0] <= max(ids):
        return WRONG, ""
    if not float((logits(model, ids)[:, :rows] - expected[:, :rows]).abs().max()) < LIMIT:
        return WRONG, ""
    return (RIGHT if text_ids(out) == ids else STALE), ""


def verdicts(tools: Mapping[str, Merge] = TOOLS) -> list[dict[str, Any]]:
    """Every case with what each tool made of it."""
    found = []
    for case in CASES:
        row: dict[str, Any] = {"case": case.title, "said": {}}
        for tool, merge_by in tools.items():
            with tempfile.TemporaryDirectory() as place:
                row[tool], said = verdict(merge_by, case, Path(place))
            if said:
                row["said"][tool] = " ".join(said.split())[:160].replace(place, "")
        found.append(row)
    return found


if __name__ == "__main__":
    import contextlib

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # the tools print
        made = verdicts()
    print(json.dumps(made))
