"""merge of adapters that classify: the head over labels, its proof, and several side by side."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import adapter_parts
import parts
from adapter_parts import LINEAR, TOKENS
from lexigraft import check, merge
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import TokenMap
from lexigraft.manifest import Manifest

torch.set_num_threads(1)


def write_classifier(base, folder, *, labels=3, seed=11, targets=LINEAR, bare=None, **lora):
    """A SEQ_CLS adapter; `bare` gets the model that it was trained on."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification as Classifier

    torch.manual_seed(seed)
    model = Classifier.from_pretrained(base, num_labels=labels)
    if bare is not None:
        model.save_pretrained(bare)
    config = LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", **lora)
    peft = get_peft_model(model, config)
    adapter_parts.move_what_trains(peft)
    peft.save_pretrained(folder)
    return folder


def classified(folder, adapter=None):
    """Logits of a classifier, one sequence at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Classifier

    model = Classifier.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, TOKENS - 1, (4, 16), generator=draw)
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=one[None]).logits for one in ids])


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_gets_its_head_over_labels_and_is_proved(tmp_path, tied, capsys):
    base = adapter_parts.write_base(tmp_path / "base", tied=tied)
    adapter = write_classifier(base, tmp_path / "adapter", bare=tmp_path / "bare")
    result = merge(base, adapter, output=tmp_path / "merged", prove=True)
    expected, got = classified(tmp_path / "bare", adapter), classified(tmp_path / "merged")
    assert float((got - expected).abs().max()) < 1e-4
    assert result.difference < 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 3
    assert config["tie_word_embeddings"] is tied
    assert "3 labels" in capsys.readouterr().err
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "merged").tensors
    assert result.tokens == TOKENS
    assert check(tmp_path / "merged").ok


def test_the_base_may_be_the_classifier_that_was_trained(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    adapter = write_classifier(base, tmp_path / "adapter", bare=tmp_path / "bare")
    parts.write_byte_level(tmp_path / "bare", vocab_size=TOKENS)
    result = merge(tmp_path / "bare", adapter, output=tmp_path / "merged", prove=True)
    assert result.difference < 1e-4
    merge(base, adapter, output=tmp_path / "other")
    assert torch.equal(classified(tmp_path / "merged"), classified(tmp_path / "other"))


def test_a_classifier_trained_on_the_grafted_model_grows_the_base(tmp_path):
    """New rows are the adapter's; the proof reads sequences of old and of new tokens."""
    scene = adapter_parts.scene(tmp_path, "rows-only", tied=False)
    adapter = write_classifier(
        scene.grafted, tmp_path / "cls", modules_to_save=["embed_tokens", "score"]
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(scene.grafted / name, adapter / name)
    result = merge(scene.base, adapter, output=tmp_path / "merged", prove=True)
    assert result.difference < 1e-4
    assert result.tokens == TokenMap.read(scene.grafted).tokens


def test_a_proof_of_a_classifier_tells_a_wrong_result(tmp_path):
    from lexigraft.models.proof import compare_merged

    base = adapter_parts.write_base(tmp_path / "base", tied=True)
    adapters = [write_classifier(base, tmp_path / f"a{n}", seed=n) for n in (1, 2)]
    merge(base, adapters[0], output=tmp_path / "merged")
    numbers = {"base_tokens": TOKENS, "tokens": TOKENS, "adapter_rows": TOKENS, "dtype": "F32"}
    right, wrong = (
        compare_merged(base, adapter, tmp_path / "merged", labels=3, **numbers)
        for adapter in adapters
    )
    assert right.difference < right.limit < wrong.difference


def test_a_pooler_that_nobody_holds_is_refused(tmp_path):
    """BERT's masked language model has none: PEFT trains on a random one and does not save it."""
    from transformers import BertConfig, BertForMaskedLM

    base = parts.write_wordpiece(tmp_path / "base")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=TokenMap.read(base).tokens, num_attention_heads=4, **sizes)
    BertForMaskedLM(config).save_pretrained(base)
    bare = tmp_path / "bare"
    adapter = write_classifier(base, tmp_path / "adapter", targets=["query", "value"], bare=bare)
    with pytest.raises(LexigraftError, match=r"bert\.pooler\.dense\.weight") as caught:
        merge(base, adapter, output=tmp_path / "merged")
    assert "unload().save_pretrained" in caught.value.fix
    assert not (tmp_path / "merged").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, bare / name)
    assert merge(bare, adapter, output=tmp_path / "merged", prove=True).difference < 1e-4


def test_classifiers_side_by_side_are_the_weighted_mean_of_their_heads(tmp_path, capsys):
    base = adapter_parts.write_base(tmp_path / "base", tied=True)
    adapters = [write_classifier(base, tmp_path / f"a{n}", seed=n) for n in (1, 2)]
    merge(base, adapters, weights=[3, 1], output=tmp_path / "both")
    assert "they have to mean the same" in capsys.readouterr().err
    alone = []
    for place, adapter in enumerate(adapters):
        merge(base, adapter, output=tmp_path / f"m{place}")
        alone.append(Checkpoint.open(tmp_path / f"m{place}"))
    assert set(Checkpoint.open(tmp_path / "both").tensors) == set(alone[0].tensors)
    tensors = [adapter_parts.tensors(tmp_path / name) for name in ("base", "m0", "m1", "both")]
    start, one, other, both = tensors
    assert torch.allclose(
        both["score.weight"], (3 * one["score.weight"] + other["score.weight"]) / 4
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    change = 3 * (one[name] - start[name]) + (other[name] - start[name])
    assert torch.allclose(both[name], start[name] + change, atol=1e-6)
    merge(base, adapters, weights=[1, 0], output=tmp_path / "first")
    assert torch.equal(classified(tmp_path / "first"), classified(tmp_path / "m0"))
    assert check(tmp_path / "both").ok


def test_classifiers_that_cannot_be_averaged_are_refused_by_name(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    three = write_classifier(base, tmp_path / "three")
    two = write_classifier(base, tmp_path / "two", labels=2)
    language = adapter_parts.write_adapter(base, base, tmp_path / "lm", "lora")
    for adapters, weights, named in (
        ([three, two], [1, 1], "different heads"),
        ([three, three], [1, -1], "weights of the classifiers sum to 0"),
        ([language, three], [1, 1], "is a classifier, .* is none"),
    ):
        with pytest.raises(RefusalError, match=named):
            merge(base, adapters, weights=weights, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_language_model_s_adapter_and_a_classifier_are_a_stack(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=True)
    first = adapter_parts.write_adapter(base, base, tmp_path / "lm", "lora")
    merge(base, first, output=tmp_path / "once")
    second = write_classifier(tmp_path / "once", tmp_path / "cls")
    result = merge(base, [first, second], output=tmp_path / "merged", prove=True)
    assert result.difference < 1e-4
    assert len(Manifest.read(tmp_path / "merged").records) == 2
