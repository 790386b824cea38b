"""Real PEFT adapters in every supported form, on tiny grafted models."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import parts

HAN = "患者冠状动脉潜伏性感染急慢性肺炎支气管糖尿病高血压心肌梗死"
TOKENS, ADDED = 372, 12
LINEAR = ["q_proj", "v_proj", "down_proj"]
TAKEN_APART = ("lora-embed", "lora-head", "lora-both", "lora-shared", "dora-embed", "dora-both")
NEW = tuple(range(TOKENS, TOKENS + ADDED))
# form -> the trainable part besides LoRA; None is an adapter without LoRA
FORMS = {
    "lora": {},
    "plain": {"save_embedding_layers": True},
    "saved-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-embed": {"modules_to_save": ["embed_tokens"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-shared": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora-embed": {"target_modules": [*LINEAR, "embed_tokens"]},
    "lora-head": {"target_modules": [*LINEAR, "lm_head"]},
    "lora-both": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "lora-shared": {
        "target_modules": [*LINEAR, "embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "dora": {"use_dora": True},
    "dora-embed": {"use_dora": True, "target_modules": [*LINEAR, "embed_tokens"]},
    "dora-both": {"use_dora": True, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": [3, *NEW]},
    "rows-both": {"trainable_token_indices": {"embed_tokens": [*NEW], "lm_head": [*NEW]}},
    "rows-only": None,
}


@dataclass(frozen=True)
class Scene:
    """A base, the same base grafted by other hands, and an adapter trained on the latter."""

    base: Path
    grafted: Path
    adapter: Path

    def start(self, *, ungrafted: bool) -> Path:
        return self.base if ungrafted else self.grafted


def extended_tokenizer(base: Path, folder: Path, added: int = ADDED) -> Path:
    """The base's tokenizer with `added` new tokens, ids after the highest."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    words = list(dict.fromkeys(f"{a}{b}" for a in HAN for b in HAN))[:added]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(base / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


def write_base(
    folder: Path,
    *,
    tied: bool,
    rows: int = TOKENS,
    dtype: str = "float32",
    shards: bool = False,
) -> Path:
    parts.write_model(
        folder,
        tokens=TOKENS,
        rows=rows,
        tied=tied,
        dtype=dtype,
        shard_size="60KB" if shards else None,
    )
    return parts.write_byte_level(folder, vocab_size=TOKENS)


def write_grafted(base: Path, folder: Path, *, rows: int | None = None) -> Path:
    """`base` grown by transformers to hold every new token, as other tools do it."""
    import torch

    model = load(base)
    torch.manual_seed(5)
    before = model.config.vocab_size
    after = rows or max(before, TOKENS + ADDED)
    model.resize_token_embeddings(after, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            new = module.weight[TOKENS : TOKENS + ADDED]
            new.copy_(torch.randn_like(new) * 0.3)
    model.save_pretrained(folder)
    return extended_tokenizer(base, folder)


def permuted(source: Path, folder: Path):
    """The same model under other ids, its learned tokens in reverse order; and its order of ids."""
    import torch

    shutil.copytree(source, folder)
    order = list(range(TOKENS))
    order[260:370] = order[260:370][::-1]
    data = json.loads((folder / "tokenizer.json").read_text())
    place = {old: new for new, old in enumerate(order)}
    data["model"]["vocab"] = {t: place[i] for t, i in data["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    model = load(source)
    with torch.no_grad():
        for weight in {
            id(m.weight): m.weight
            for m in (model.get_input_embeddings(), model.get_output_embeddings())
        }.values():
            weight[:TOKENS] = weight[torch.tensor(order)]
    model.save_pretrained(folder)
    return folder, torch.tensor(order)


def load(folder: Path, dtype: str = "auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def write_adapter(scene_base: Path, grafted: Path, folder: Path, form: str, **lora) -> Path:
    """An adapter of one form, its trainable values moved at random instead of trained.

    `scene_base` is what PEFT takes for the base: where its vocabulary is smaller, whole
    embeddings are saved.
    """
    import torch
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    options = FORMS[form]
    model = load(grafted)
    if options is None:
        targets = ["embed_tokens"]
        if not model.config.tie_word_embeddings:
            targets.append("lm_head")
        config = TrainableTokensConfig(
            token_indices=list(NEW), target_modules=targets, task_type="CAUSAL_LM"
        )
        saved = "auto"
    else:
        options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options, **lora}
        saved = options.pop("save_embedding_layers", "auto")
        config = LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    torch.manual_seed(11)
    move_what_trains(model)
    model.peft_config["default"].base_model_name_or_path = str(scene_base)
    model.save_pretrained(folder, save_embedding_layers=saved)
    shutil.copyfile(grafted / "tokenizer.json", folder / "tokenizer.json")
    shutil.copyfile(grafted / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


def move_what_trains(model) -> None:
    """Training, as far as a merge sees it: every trainable number becomes another."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def scene(
    root: Path,
    form: str,
    *,
    tied: bool,
    padded: bool = False,
    dtype: str = "float32",
    shards: bool = False,
    whole: bool = True,
    **lora,
) -> Scene:
    """Base, grafted model and adapter; `whole`: the adapter was saved with resized embeddings."""
    base = write_base(
        root / "base", tied=tied, rows=448 if padded else TOKENS, dtype=dtype, shards=shards
    )
    grafted = write_grafted(base, root / "grafted")
    adapter = write_adapter(base if whole else grafted, grafted, root / "adapter", form, **lora)
    return Scene(base, grafted, adapter)


def write_larger(scene: Scene, folder: Path, *, shards: bool = False) -> Path:
    """The grafted model, grown by five more tokens after the adapter was trained."""
    import torch

    model, tokens = load(scene.grafted), TOKENS + ADDED + 5
    model.resize_token_embeddings(max(tokens, model.config.vocab_size), mean_resizing=False)
    torch.manual_seed(7)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[TOKENS + ADDED : tokens].normal_(std=0.3)
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
    return extended_tokenizer(scene.base, folder, added=ADDED + 5)


def unmerged(grafted: Path, adapter: Path, dtype: str = "auto"):
    """The model of PEFT: base and adapter side by side."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(grafted, dtype), adapter).eval()


def merged_by_peft(grafted: Path, adapter: Path, form: str, *, tied: bool) -> dict:
    """The tensors of PEFT's own merge, made to be right where head and embedding are tied.

    There PEFT adds what was trained on either to the one matrix that both share: so the two are
    taken apart first, and a LoRA that both share is merged into one of them and copied.
    """
    import torch

    model, apart = load(grafted), tied and form in TAKEN_APART
    if apart:
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    if form == "lora-shared":
        adapter = shutil.copytree(adapter, adapter.parent / "both")
        targets = FORMS["lora-both"]["target_modules"]
        edit_adapter_config(adapter, ensure_weight_tying=False, target_modules=targets)
    from peft import PeftModel

    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    # On a 16-bit base PEFT casts the two apart and trains two.
    if form == "lora-shared" and model.dtype == torch.float32:
        merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    return merged


def logits(model, rows: int, *, old_only: bool = False):
    """Logits over ids of old and new tokens."""
    import torch

    torch.manual_seed(3)
    old = torch.randint(0, TOKENS, (2, 24))
    new = torch.randint(TOKENS, TOKENS + ADDED, (2, 24))
    ids = old if old_only else torch.cat([old, torch.where(torch.rand(2, 24) < 0.5, old, new)])
    with torch.no_grad():
        return model(input_ids=ids).logits[..., :rows].float()


def tensors(folder: Path) -> dict:
    """Everything that the weights of a folder hold."""
    from safetensors.torch import load_file

    return {
        n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()
    }


def edit_adapter_config(adapter: Path, **values) -> None:
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def edit_tensors(adapter: Path, change) -> None:
    """Rewrite the adapter's tensors through `change(dict) -> dict`."""
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def pairwise(axes: dict) -> list[dict]:
    """Few combinations in which every pair of values of two axes occurs (greedy, ordered)."""
    import itertools

    names = list(axes)
    rows = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]

    def pairs(row):
        return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)}

    left = set().union(*map(pairs, rows))
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(pairs(row) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def label(case: dict) -> str:
    return "-".join(
        str(value) if not isinstance(value, bool) else name if value else f"not_{name}"
        for name, value in case.items()
    )
