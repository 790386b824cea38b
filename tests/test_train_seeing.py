"""`train` on models that see images beside their text: the part that reads text is what trains."""

import pytest
import torch
import transformers
from safetensors.numpy import load_file

import parts
import test_architectures
from extend import extend
from lexigraft import (
    LexigraftError,
    check,
    evaluate,
    families,
    find_learning_rate,
    graft,
    merge,
    train,
)
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.errors import RefusalError
from lexigraft.files import read_json
from lexigraft.models.distill import stack_of_layers
from lexigraft.models.load import text_part

torch.set_num_threads(1)
QUICK = {"block_size": 64, "max_bytes": 2500, "measurements": 1, "measured_bytes": 1500}
FAST = {"learning_rate": 1e-3, "new_row_learning_rate": 1e-2}


def grafted(kind, folder):
    """A tiny model that sees, with two new tokens, and text that holds them."""
    base = test_architectures.write_tokenizer(folder / "base")
    test_architectures.build(kind, test_architectures.KINDS[kind].tied[0], base)
    graft(base, extend(base, folder / "vocab", 2), output=folder / "model", pad_to=1)
    family = families.load(folder / "model")
    first, second = (family.decode([i]) for i in sorted(family.map.texts)[-2:])
    lines = parts.plain_english().splitlines()[:200]
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{line} {first} {second}" for line in lines))
    return folder / "model", text


def moved(before, after):
    """The tensors that differ in two folders."""
    one, other = Checkpoint.open(before), Checkpoint.open(after)
    assert one.tensors.keys() == other.tensors.keys()
    return {name for name in one.tensors if one.read(name).tobytes() != other.read(name).tobytes()}


def sees(name):
    return "vision" in name or "visual" in name or "projector" in name


def check_what_trains(kind, mode, folder):
    model, text = grafted(kind, folder)
    names = Checkpoint.open(model).tensors
    assert any(map(sees, names))
    body = {n for n in names if "layers" in n and not sees(n)}
    out = folder / "out"
    found = train(model, corpus=[text], mode=mode, output=out, **FAST, **QUICK)
    assert found.domain_bpb < found.log[0]["domain_bpb"]
    assert found.rows_moved == found.new_rows == 2
    assert check(out).ok
    if mode != "full":
        assert not any(map(sees, load_file(out / "adapter_model.safetensors")))
        merge(model, out, output=folder / "merged", prove=True)
        out = folder / "merged"
    changed = moved(model, out)
    tables = {n for n in changed if "embed" in n or "lm_head" in n}
    assert tables and not any(map(sees, changed))
    others = changed - tables
    if mode == "rows":
        assert not others
    elif mode == "lora":
        assert others == {n for n in body if n.endswith("proj.weight")}
    else:
        assert others >= body
    assert scored(out, text) < scored(model, text)
    # Positions part the documents of a block in the one kind, and not in Qwen's.
    settings = read_json(folder / "out" / "training.json")["settings"]
    assert settings["apart"] == (kind == "qwen2_vl")


def scored(folder, text):
    found = evaluate([folder], corpus=[text], max_bytes=1500, speed_characters=0)
    return found.models[0].domain.bpb


def test_what_reads_text_is_trained(tmp_path):
    check_what_trains("gemma3", "lora", tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["rows", "lora", "full"])
@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
def test_every_mode_trains_what_reads_text(kind, mode, tmp_path):
    check_what_trains(kind, mode, tmp_path)


@pytest.mark.matrix
def test_a_rate_is_found_for_a_model_that_sees(tmp_path):
    model, text = grafted("llava", tmp_path)
    found = find_learning_rate(model, corpus=[text], max_steps=2, measured_bytes=500, block_size=64)
    assert len(found.trials) == 5


def test_distillation_runs_the_layers_that_read_text(tmp_path):
    """Even where more layers see."""
    kind = test_architectures.KINDS["llava"]
    vision = {**kind.settings["vision_config"], "num_hidden_layers": 5}
    config = transformers.LlavaConfig(
        **{**kind.settings, "vision_config": vision}, text_config=kind.text | {"vocab_size": 96}
    )
    model = transformers.LlavaForConditionalGeneration(config)
    parent, name = stack_of_layers(text_part(model))
    assert getattr(parent, name) is model.model.language_model.layers


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    model, text = grafted("paligemma", tmp_path)
    with pytest.raises(RefusalError, match=r"PaliGemma.* looks at a token"):
        train(model, corpus=[text], output=tmp_path / "out", **QUICK)
    with pytest.raises(LexigraftError, match=r"PaliGemma.* looks at a token"):
        evaluate([model], corpus=[text])
    assert not (tmp_path / "out").exists()
