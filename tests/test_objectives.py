"""The loss in chunks is the plain loss, with its gradients, and holds no logits of a block."""

import subprocess
import sys

import pytest
import torch
import transformers

from lexigraft.manifest import NewIds
from lexigraft.models import objectives
from lexigraft.models.adapter_files import lora_config, make_trainable
from lexigraft.models.bits import nats
from lexigraft.models.objectives import NextToken, can_chunk
from lexigraft.models.whole_model import make_all_trainable

torch.set_num_threads(1)
ROWS, FIRST, TOKENS = 120, 90, 110
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
KINDS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
}


def model_of(kind, tied, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{**SIZES, **KINDS.get(kind, {}), "tie_word_embeddings": tied, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # logits that caps and scales change
            parameter.mul_(8.0) if parameter.dim() == 2 else None
    return model.requires_grad_(False)


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TOKENS, (2, 16), generator=generator)
    labels = torch.randint(0, TOKENS, (2, 16), generator=generator)
    labels[0, 3] = labels[1, 9:] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(16).expand(2, 16)}


def prepared(model, what):
    ids = NewIds((), FIRST, TOKENS)
    if what in ("rows", "lora"):
        return make_trainable(model, ids, lora_config(4, 8.0) if what == "lora" else None)[0]
    ids = NewIds((), 0, 0) if what == "plain" else ids
    make_all_trainable(model, ids, old_rows=what != "frozen")
    return model


def plain(model, inputs):
    logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits
    return nats(logits.flatten(0, 1), inputs["labels"].flatten()).sum()


def gradients(model, loss):
    model.zero_grad()
    (loss / 7).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("what", ["rows", "lora", "frozen", "slow", "plain"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_plain_form(kind, tied, what, monkeypatch):
    monkeypatch.setattr(objectives, "LOGITS", 5 * ROWS)  # 5 positions at a time
    model, inputs, objective = prepared(model_of(kind, tied), what), batch(), NextToken()
    loss, count = objective.loss(model, inputs)
    assert objective._chunked and count == int((inputs["labels"] >= 0).sum())
    found, wanted = gradients(model, loss), gradients(model, expected := plain(model, inputs))
    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys() and len(found) >= 1
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    if what == "slow":  # padding and the stored copies of new rows have no gradient at all
        assert not found["model.embed_tokens.inner.weight"][FIRST:].any()


def test_under_autocast_too(monkeypatch):
    monkeypatch.setattr(objectives, "LOGITS", 5 * ROWS)
    model, inputs = prepared(model_of("llama", False), "slow"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = NextToken().loss(model, inputs)
        expected = plain(model, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    found, wanted = gradients(model, loss), gradients(model, expected)
    for name, gradient in wanted.items():
        assert torch.nn.functional.cosine_similarity(
            found[name].flatten(), gradient.flatten(), dim=0
        ) > 0.999, name  # fmt: skip


def test_a_batch_without_targets_has_a_loss_of_zero_and_zero_gradients():
    model, inputs = prepared(model_of("llama", False), "rows"), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, count = NextToken().loss(model, inputs)
    assert (loss.item(), count) == (0.0, 0)
    assert not any(g.any() for g in gradients(model, loss).values())


def test_what_is_not_known_behind_the_head_is_computed_in_the_plain_form():
    """Falcon-H1 multiplies its logits by a factor of its own name."""
    model = model_of("falcon_h1", False, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4)
    inputs, objective = batch(), NextToken()
    assert not can_chunk(model, inputs["input_ids"])
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_()
    loss, _ = objective.loss(model, inputs)
    torch.testing.assert_close(loss, plain(model, inputs))
    assert not objective._chunked
    assert "forward" not in vars(model.lm_head)


@pytest.mark.matrix
def test_the_logits_of_a_block_are_never_held_at_once():
    """150,000 rows, 1,024 positions: 586 MiB of logits, and as much again for their gradient."""
    script = """
import sys, torch, transformers
sys.path.insert(0, {tests!r})
import parts
from lexigraft.models import objectives
from lexigraft.models.adapter_files import make_trainable
from lexigraft.manifest import NewIds
config = transformers.LlamaConfig(vocab_size=150_000, hidden_size=16, intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2)
model = transformers.LlamaForCausalLM(config).requires_grad_(False)
make_trainable(model, NewIds((), 149_000, 150_000))
ids = torch.arange(1024)[None]
inputs = dict(input_ids=ids, labels=ids + 1, position_ids=ids)
objective = objectives.NextToken()
objective._chunked = {chunked}
before = parts.peak_megabytes()
objective.loss(model, inputs)[0].backward()
print(parts.peak_megabytes() - before)
"""
    from pathlib import Path

    tests = str(Path(__file__).parent)
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", script.format(tests=tests, chunked=chunked)],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for chunked in (True, False)
    ]  # fmt: skip
    assert peaks[0] < 500 and peaks[1] > 1000, peaks
