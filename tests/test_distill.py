"""`--objective distill`: what a teacher leaves behind is what the plain formulas say."""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import parts
from lexigraft import LexigraftError, check, families, graft, graft_distilled, learn, merge, train
from lexigraft.errors import RefusalError
from lexigraft.files import read_json
from lexigraft.manifest import NewIds
from lexigraft.models import distill
from lexigraft.models.adapter_files import WEIGHTS_FILE, lora_config, make_trainable
from lexigraft.models.distill import Distill, first_layers
from lexigraft.models.evidence import NewTokens
from lexigraft.models.load import load_model
from lexigraft.models.packing import collate, pack, repeated
from test_objectives import FIRST, SIZES, TOKENS

torch.set_num_threads(1)
LAYERS = 8  # so that two are compared
PIECES = {token: [token % 7 + 1, token % 5 + 20, token % 3 + 40][: 2 + token % 2] for token in
          range(FIRST, TOKENS)}  # fmt: skip
KINDS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_layer": LAYERS, "n_head": 4, "n_embd": 32, "n_positions": 64},
    "gpt_neox": {},
    "phi": {},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "qwen3": {},
    "mixtral": {"num_local_experts": 2},
}


LORA = ("llama", "gpt2", "mixtral")  # linear layers, GPT-2's, and experts that are none


def model_of(kind, *, tied, lora=False):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": LAYERS, **KINDS[kind], "tie_word_embeddings": tied}
    if kind == "falcon":  # its config computes it
        del sizes["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # logits that caps and scales change
            parameter.mul_(5.0) if parameter.dim() == 2 else None
    model.requires_grad_(False)
    ids = NewIds((), FIRST, TOKENS)
    if not lora:
        return make_trainable(model, ids)
    model, rows = make_trainable(model, ids, lora_config(4, 8.0), part=first_layers(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which starts as zero: LoRA that does something
                parameter.normal_(std=0.3)
    return model, rows


def documents():
    random = np.random.default_rng(1)
    return [(random.integers(1, TOKENS, size=n).tolist(), 3 * n) for n in (9, 14, 30, 5)]


def blocks_of(size=16):
    return pack(documents(), size, start=[1], end=2)


def objective_of(model, blocks):
    return Distill(model, NewTokens(None, range(FIRST, TOKENS), PIECES), blocks)


def spelled(line):
    return [piece for token in line for piece in PIECES.get(token, [token])]


@torch.no_grad()
def expected(model, objective, blocks, place):
    """The loss of one block by the definition: whole documents, whole logits, nothing kept."""
    total, count = 0.0, 0
    line, targets, positions = (
        getattr(blocks, name)[place].tolist() for name in ("inputs", "targets", "positions")
    )
    begins = [i for i, position in enumerate(positions) if position == 0] + [len(line)]
    states = []

    def keep(_, __, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    for begin, end in itertools.pairwise(begins):
        part = line[begin:end]
        ends = np.cumsum([len(spelled([token])) for token in part]) - 1
        handle = objective._first[-1].register_forward_hook(keep)
        short, long = (torch.tensor([ids]) for ids in (part, spelled(part)))
        model(input_ids=short, use_cache=False)
        with model.disable_adapter() if hasattr(model, "peft_config") else nullcontext():
            out = model(input_ids=long, use_cache=False, output_hidden_states=True)
        handle.remove()
        mine, teacher = states[-2][0], states[-1][0, ends]
        for i, target in enumerate(targets[begin:end]):
            if target == -100:
                continue
            distance = ((mine[i] - teacher[i]) / objective._spread).square().mean()
            total += float(distance - out.logits[0, ends[i]].log_softmax(-1)[target])
            count += 1
    return total, count


CASES = [
    *itertools.product(KINDS, (True, False), (False,)),
    *itertools.product(LORA, (True,), (True,)),
]


@pytest.mark.parametrize(("kind", "tied", "lora"), CASES)
def test_loss_is_what_the_definition_says(kind, tied, lora):
    model, _ = model_of(kind, tied=tied, lora=lora)
    blocks = blocks_of()
    objective = objective_of(model, blocks)
    model.eval()
    for place in range(len(blocks)):
        loss, count = objective.loss(model, collate([blocks[place]]))
        wanted, targets = expected(model, objective, blocks, place)
        assert count == targets
        assert float(loss.detach()) == pytest.approx(wanted, rel=2e-4)
    assert len(getattr(*objective._stack)) == LAYERS  # all layers are back


def test_a_batch_is_the_sum_of_its_blocks_and_reaches_every_row_in_it():
    model, rows = model_of("llama", tied=False)
    blocks = blocks_of()
    objective = objective_of(model, blocks)
    items = [blocks[place] for place in range(len(blocks))]
    loss, count = objective.loss(model, collate(items))
    assert count == int((blocks.targets >= 0).sum())
    alone = sum(float(objective.loss(model, collate([item]))[0].detach()) for item in items)
    assert float(loss.detach()) == pytest.approx(alone, rel=1e-5)
    loss.backward()
    embedding, head = rows.parameters.values()
    counted = blocks.inputs[blocks.targets >= 0]
    seen = {int(token) - FIRST for token in counted if token >= FIRST}
    moved = {int(row) for row in embedding.grad.abs().sum(1).nonzero()}
    assert moved == seen and len(seen) > 5
    assert bool((head.grad.abs().sum(1) > 0).all())  # the softmax reaches every row of the head
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("rows"))


def test_lora_learns_to_read_in_the_first_layers_alone():
    model, _ = model_of("llama", tied=True, lora=True)
    blocks = blocks_of()
    loss, _ = objective_of(model, blocks).loss(model, collate([blocks[1]]))
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    layers = {name.split("layers.")[1].split(".")[0] for name in reached if "lora_" in name}
    assert layers == {"0", "1"}
    assert all("lora_" in name or name.endswith("rows") for name in reached)


def test_a_teachers_reading_is_kept_up_to_a_limit_and_changes_nothing(monkeypatch):
    blocks = blocks_of()
    batch = collate([blocks[1], blocks[2]])

    def loss_twice(objective, model):
        return [float(objective.loss(model, batch)[0].detach()) for _ in range(2)]

    model, _ = model_of("llama", tied=True)
    kept = objective_of(model, blocks)
    found = loss_twice(kept, model)
    assert found[0] == found[1] and kept._kept
    monkeypatch.setattr(distill, "KEPT", 0)
    none = objective_of(model, blocks)
    assert loss_twice(none, model) == found and not none._kept


def test_what_cannot_be_distilled_is_refused(grafted_models, tmp_path):
    model, _ = model_of("llama", tied=True)
    few = NewTokens(None, range(FIRST, TOKENS), {FIRST: [1, 2]})
    with pytest.raises(RefusalError, match="19 new tokens whose spelling"):
        Distill(model, few, blocks_of())
    with pytest.raises(LexigraftError, match="--mode rows or lora"):
        train(
            grafted_models / "tied",
            corpus=[grafted_models / "corpus.txt"],
            output=tmp_path / "adapter",
            mode="full",
            objective="distill",
        )
    with pytest.raises(LexigraftError, match="spelled in base ids"):
        objective_of(model, pack([([FIRST] * 60, 60)], 60, start=[1], end=2))


def test_repeated_blocks_are_each_read_as_often():
    blocks = blocks_of()
    thrice = repeated(blocks, 3, seed=5)
    assert len(thrice) == 3 * len(blocks)
    assert thrice.inputs[: len(blocks)].tolist() == blocks.inputs.tolist()
    assert thrice.text_bytes[-1] == 3 * blocks.text_bytes[-1]
    assert thrice.tokens[-1] == 3 * blocks.tokens[-1]
    lines = [tuple(line) for line in blocks.inputs.tolist()]
    assert sorted(map(tuple, thrice.inputs.tolist())) == sorted(lines * 3)


@pytest.mark.parametrize(
    "tied", [True, pytest.param(False, marks=pytest.mark.matrix)], ids=["tied", "untied"]
)
def test_distilled_rows_beat_their_start_and_leave_the_body_alone(tmp_path, tied):
    """On a model that has learned its text: else there is nothing that a teacher could tell."""
    text = parts.corpus_text(documents=40)
    (tmp_path / "corpus.txt").write_text(text, "utf-8")
    base = parts.write_byte_level(tmp_path / "base")
    parts.write_model(base, tokens=400, rows=416, tied=tied, eos=380)
    corpus = [tmp_path / "corpus.txt"]
    train(
        base, corpus=corpus, output=tmp_path / "learned", mode="full", block_size=64,
        learning_rate=3e-3, batch_size=4, passes=3, measurements=1,
    )  # fmt: skip
    learn(
        tmp_path / "learned", corpus=corpus, tokens=40, min_count=5, allow_more=True,
        output=tmp_path / "vocab",
    )  # fmt: skip
    graft(tmp_path / "learned", tmp_path / "vocab", output=tmp_path / "model")
    options = {"corpus": corpus, "block_size": 64, "max_bytes": 12_000, "mode": "rows"}
    result = train(
        tmp_path / "model", **options, output=tmp_path / "adapter", objective="distill",
        measurements=2,
    )  # fmt: skip
    first, last = result.log[0], result.log[-1]
    assert last["domain_bpb"] < first["domain_bpb"]
    assert first["train_bpb"] is None and last["train_bpb"] is None  # it is no likelihood
    record = read_json(tmp_path / "adapter" / "training.json")["settings"]
    assert record["objective"] == "distill" and record["passes"] == 4
    assert result.text_bytes == pytest.approx(4 * 12_000, rel=0.02)
    merge(tmp_path / "model", [tmp_path / "adapter"], output=tmp_path / "merged")
    at_once = graft_distilled(
        tmp_path / "learned", tmp_path / "vocab", corpus=corpus, output=tmp_path / "at_once"
    )
    assert at_once.train.domain_bpb < at_once.train.log[0]["domain_bpb"]
    assert at_once.to_json()["init"].endswith("distilled")
    shown = at_once.lines()
    assert "rows for" in shown[0] and shown[-1] == f"model: {tmp_path / 'at_once'}"
    assert not any("partial" in line for line in shown)
    assert check(tmp_path / "at_once").ok
    assert not list(tmp_path.glob("at_once.*"))
    old, new = (load_model(tmp_path / name) for name in ("model", "merged"))
    ids = families.load(tmp_path / "model").map.tokens
    first_new = ids - len(read_json(tmp_path / "adapter" / "training.json")["rows"])
    for name, values in old.state_dict().items():
        after = new.state_dict()[name]
        if values.shape[0] == len(old.get_input_embeddings().weight):
            assert torch.equal(values[:first_new], after[:first_new])
            assert not torch.equal(values[first_new:ids], after[first_new:ids])
        else:
            assert torch.equal(values, after)
    assert not math.isnan(float(new.get_input_embeddings().weight.sum()))


def test_first_layers_that_learned_to_read_are_resumed_saved_and_merged(
    grafted_models, tmp_path, monkeypatch
):
    """The teacher of a resumed run reads without what was trained so far; PEFT reads the adapter."""
    from peft import PeftModel

    options = {
        "corpus": [grafted_models / "corpus.txt"], "mode": "lora", "objective": "distill",
        "passes": 2, "block_size": 32, "max_bytes": 2000, "save_steps": 3, "measured_bytes": 500,
        "learning_rate": 1e-2, "measurements": 1,
    }  # fmt: skip
    source = grafted_models / "tied"
    train(source, **options, output=tmp_path / "whole")
    calls, loss = itertools.count(), Distill.loss

    def stops(self, model, inputs):
        if next(calls) == 8:
            raise InterruptedError
        return loss(self, model, inputs)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(Distill, "loss", stops)
        train(source, **options, output=tmp_path / "resumed")
    train(source, **options, output=tmp_path / "resumed", resume=True)
    whole, resumed = (load_file(tmp_path / n / WEIGHTS_FILE) for n in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    layers = load_model(source).model.layers
    first = {f"layers.{place}." for place in range(len(first_layers(load_model(source))))}
    adapted = {key.split("model.")[-1][: len("layers.0.")] for key in whole if "lora_" in key}
    assert adapted == first and len(first) < len(layers)
    merge(source, [tmp_path / "whole"], output=tmp_path / "merged")
    ids = torch.arange(370, 422)[None]
    peft = PeftModel.from_pretrained(load_model(source), tmp_path / "whole").eval()
    merged = load_model(tmp_path / "merged")
    assert torch.allclose(peft(ids).logits, merged(ids).logits, atol=1e-4)
    assert not torch.allclose(load_model(source)(ids).logits, merged(ids).logits, atol=1e-2)
