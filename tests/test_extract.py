"""extract: rows exactly, the rest within the reported error; PEFT and merge read what it writes."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter_parts
import parts
from adapter_parts import TOKENS
from lexigraft import check, extract, merge, split
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import Manifest
from test_merge import folder_hash, gpt2_with_adapter, other_with_adapter

SEVEN = 7
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def tensors(folder):
    return adapter_parts.load(folder).state_dict()


def fine_tune(root, *, tied, rows=None, old=(3, 20), apart=False, low=None, seed=4):
    """A base, and the same with seven tokens more and every matrix and norm of the body changed.

    With `low`, changes of matrices have that rank.
    """
    base = adapter_parts.write_base(root / "base", tied=tied)
    model = adapter_parts.load(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows or TOKENS + SEVEN, mean_resizing=False)
    if apart:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    changed = list(old) + list(range(TOKENS, TOKENS + SEVEN))
    with torch.no_grad():
        tables = {id(m.weight): m.weight for m in (model.model.embed_tokens, model.lm_head)}
        for weight in tables.values():
            weight[changed] += torch.randn(len(changed), 32) * 0.2
        for name, parameter in model.model.layers.named_parameters():
            if parameter.dim() == 2 and not name.startswith("0.mlp.up"):
                a, b = (torch.randn(n, low or 32) * 0.1 for n in parameter.shape)
                parameter.add_(a @ b.T)
            elif parameter.dim() == 1 and name.startswith("1."):
                parameter.add_(torch.randn(len(parameter)) * 0.1)
    model.save_pretrained(root / "tuned")
    adapter_parts.extended_tokenizer(base, root / "tuned", SEVEN)
    return base, root / "tuned"


def served(base, adapter, rows):
    """PEFT's model: the base grown to `rows`, and the adapter beside it."""
    from peft import PeftModel

    model = adapter_parts.load(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits_of(model, rows):
    torch.manual_seed(3)
    ids = torch.randint(0, TOKENS + SEVEN, (2, 24))
    with torch.no_grad():
        return model(input_ids=ids).logits[..., :rows]


@pytest.mark.parametrize(
    ("tied", "apart"),
    [(True, False), (True, True), (False, False)],
    ids=["tied", "apart", "untied"],
)
def test_extract_and_merge_give_rows_exactly_and_the_rest_within_the_error(tmp_path, tied, apart):
    base, tuned = fine_tune(tmp_path, tied=tied, apart=apart)
    before = [folder_hash(folder) for folder in (base, tuned)]
    result = extract(tuned, base=base, rank=4, output=tmp_path / "adapter")
    assert before == [folder_hash(folder) for folder in (base, tuned)]
    merge(base, result.output, output=tmp_path / "merged")
    merged, wanted, start = (tensors(tmp_path / n) for n in ("merged", "tuned", "base"))
    errors = {one.name: one.error for one in result.of("lora")}
    assert len(errors) == 13
    assert 0.1 < max(errors.values()) < 1
    for name, tensor in wanted.items():
        if name in errors:
            change = tensor - start[name]
            left = float(torch.linalg.norm(tensor - merged[name]) / torch.linalg.norm(change))
            assert left == pytest.approx(errors[name], rel=1e-3), name
            # no rank-4 matrix is nearer, as far as the random columns tell
            values = torch.linalg.svdvals(change)
            best = float(values[4:].square().sum().sqrt() / torch.linalg.norm(change))
            assert best * 0.9999 <= left <= best * 1.02
        else:
            assert torch.equal(merged[name], tensor), name
    assert result.added == SEVEN
    assert result.equal == 4  # one matrix and three norms
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and not apart)
    assert TokenMap.read(tmp_path / "merged").hash == TokenMap.read(tuned).hash
    peft = served(base, result.output, TOKENS + SEVEN)
    expected = logits_of(adapter_parts.load(tmp_path / "merged"), TOKENS + SEVEN)
    assert (logits_of(peft, TOKENS + SEVEN) - expected).abs().max() < 1e-4
    assert check(base, adapter=result.output).findings
    assert check(tmp_path / "merged").ok


def test_a_change_of_low_rank_is_found_whole(tmp_path):
    base, tuned = fine_tune(tmp_path, tied=True, low=3)
    result = extract(tuned, base=base, rank="auto", max_error=1e-4, output=tmp_path / "adapter")
    assert {one.rank for one in result.of("lora")} == {3}
    assert max(one.error for one in result.of("lora")) < 1e-4
    merge(base, result.output, output=tmp_path / "merged")
    one, other = (adapter_parts.load(tmp_path / n) for n in ("merged", "tuned"))
    assert (logits_of(one, 379) - logits_of(other, 379)).abs().max() < 1e-3


def test_auto_takes_the_least_rank_of_each_layer(tmp_path):
    base, tuned = fine_tune(tmp_path, tied=False)
    result = extract(tuned, base=base, rank="auto", max_error=0.4, output=tmp_path / "adapter")
    lora, start, wanted = result.of("lora"), tensors(base), tensors(tuned)
    assert len({one.rank for one in lora}) > 1
    for one in lora:
        assert one.error <= 0.4
        values = torch.linalg.svdvals(wanted[one.name] - start[one.name]).double()
        shorter = values[one.rank - 1 :].square().sum() / values.square().sum()
        assert shorter.sqrt() > 0.4 * 0.98
    merge(base, result.output, output=tmp_path / "merged")
    expected = logits_of(adapter_parts.load(tmp_path / "merged"), TOKENS + SEVEN)
    peft = served(base, result.output, TOKENS + SEVEN)
    assert (logits_of(peft, TOKENS + SEVEN) - expected).abs().max() < 1e-4
    pair = split(base, result.output, output=tmp_path / "pair")
    merge(pair.base, pair.adapter, output=tmp_path / "again")
    assert (logits_of(adapter_parts.load(tmp_path / "again"), 379) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_rows_and_norms_alone_are_an_adapter_too(tmp_path, tied):
    base, tuned = fine_tune(tmp_path, tied=tied)
    model, start = adapter_parts.load(tuned), tensors(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.copy_(start[name])
    model.save_pretrained(tuned)
    result = extract(tuned, base=base, output=tmp_path / "adapter")
    assert not result.of("lora")
    merge(base, result.output, output=tmp_path / "merged")
    merged = tensors(tmp_path / "merged")
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors(tuned).items())
    peft = served(base, result.output, TOKENS + SEVEN)
    assert (logits_of(peft, 379) - logits_of(model.eval(), 379)).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.matrix), False])
def test_where_most_rows_changed_all_are_stored(tmp_path, tied):
    """Untied tables whole, with their padding; PEFT would store a tied one twice."""
    base, tuned = fine_tune(tmp_path, tied=tied, rows=448, old=range(TOKENS))
    result = extract(tuned, base=base, rank=2, output=tmp_path / "adapter")
    (embedding,) = (one for one in result.tensors if one.name == TABLES[0])
    assert (embedding.kind, len(embedding.ids)) == (("rows", 379) if tied else ("whole", 0))
    assert merge(base, result.output, output=tmp_path / "merged").rows == 448
    merged, wanted = tensors(tmp_path / "merged"), tensors(tuned)
    stored = 379 if tied else 448
    assert all(torch.equal(merged[n][:stored], wanted[n][:stored]) for n in TABLES)
    peft = served(base, result.output, 448)
    expected = logits_of(adapter_parts.load(tmp_path / "merged"), 379)
    assert (logits_of(peft, 379) - expected).abs().max() < 1e-4


def test_the_number_of_rows_is_kept_by_the_manifest(tmp_path):
    base, tuned = fine_tune(tmp_path, tied=False, rows=448)
    result = extract(tuned, base=base, rank=2, output=tmp_path / "adapter")
    merged = merge(base, result.output, output=tmp_path / "merged")
    assert merged.rows == result.rows == 448
    record = Manifest.read(result.output).last("extract")
    assert (record.rows, record.rank, record.tokens) == (448, 2, TOKENS + SEVEN)


def test_conv1d_biases_and_positions(tmp_path):
    base, adapter = gpt2_with_adapter(tmp_path, bias="all", target_modules=["c_attn", "wpe"])
    merge(base, adapter, output=tmp_path / "tuned")
    result = extract(tmp_path / "tuned", base=base, rank=4, output=tmp_path / "found")
    assert max(one.error for one in result.of("lora")) < 1e-4
    assert {one.name for one in result.of("lora")} == {
        f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(2)
    }
    merge(base, result.output, output=tmp_path / "merged")
    merged, wanted = tensors(tmp_path / "merged"), tensors(tmp_path / "tuned")
    assert all(torch.allclose(merged[n], tensor, atol=1e-5) for n, tensor in wanted.items())
    peft = adapter_parts.unmerged(base, result.output)
    expected = adapter_parts.logits(adapter_parts.load(tmp_path / "tuned"), TOKENS, old_only=True)
    assert (adapter_parts.logits(peft, TOKENS, old_only=True) - expected).abs().max() < 1e-3


def test_names_without_the_body_s_are_told_to_peft_in_full(tmp_path):
    """GPT-2 on the hub has `h.0...`; in memory the same is `transformer.h.0...`."""
    base, adapter = gpt2_with_adapter(tmp_path, target_modules=["c_attn"])
    merge(base, adapter, output=tmp_path / "tuned")
    for folder in (base, tmp_path / "tuned"):
        path = folder / "model.safetensors"
        bare = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
        save_file(bare, path, metadata={"format": "pt"})
    result = extract(tmp_path / "tuned", base=base, rank=4, output=tmp_path / "found")
    merge(base, result.output, output=tmp_path / "merged")
    expected = adapter_parts.logits(adapter_parts.load(tmp_path / "tuned"), TOKENS, old_only=True)
    for model in (
        adapter_parts.load(tmp_path / "merged"),
        adapter_parts.unmerged(base, result.output),
    ):
        found = adapter_parts.logits(model, TOKENS, old_only=True)
        assert (found - expected).abs().max() < 1e-4


def test_an_image_text_model_with_one_changed_row(tmp_path):
    """Names on disk are older than those in memory; one of its norms is called `mm_soft_emb_norm`."""
    from peft import PeftModel
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    text = {"vocab_size": TOKENS, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    image = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 370, "boi_token_index": 368, "eoi_token_index": 369}
    config = Gemma3Config(
        text_config=sizes | text, vision_config=sizes | image, mm_tokens_per_image=4, **ids
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    base = parts.write_byte_level(tmp_path / "base", vocab_size=TOKENS)
    model.save_pretrained(base)
    tuned = shutil.copytree(base, tmp_path / "tuned")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.get_input_embeddings().weight[5].add_(0.3)
    model.save_pretrained(tuned)
    result = extract(tuned, base=base, rank=32, output=tmp_path / "adapter")
    assert [one.ids for one in result.of("rows")] == [(5,)]
    merge(base, result.output, output=tmp_path / "merged")
    load = Gemma3ForConditionalGeneration.from_pretrained
    drawn = torch.randint(0, 360, (2, 12))
    with torch.no_grad():
        expected = model(input_ids=drawn).logits
        for other in (
            load(tmp_path / "merged"),
            PeftModel.from_pretrained(load(base), result.output),
        ):
            assert (other.eval()(input_ids=drawn).logits - expected).abs().max() < 1e-4


def test_fused_experts_sinks_and_routers_are_stored_whole(tmp_path):
    from transformers import AutoModelForCausalLM, GptOssConfig

    sizes = {"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8}
    few = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **few, **heads)).eval()
    base = parts.write_byte_level(tmp_path / "base", vocab_size=TOKENS)
    model.save_pretrained(base)
    tuned = shutil.copytree(base, tmp_path / "tuned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tuned)
    result = extract(tuned, base=base, rank=32, output=tmp_path / "adapter")
    whole = {one.name for one in result.of("whole")}
    assert {f"model.layers.1.{n}" for n in ("mlp.experts.gate_up_proj", "self_attn.sinks")} < whole
    assert len(result.of("lora")) == 8
    merge(base, result.output, output=tmp_path / "merged")
    merged, wanted = tensors(tmp_path / "merged"), model.state_dict()
    assert all(torch.equal(merged[name], wanted[name]) for name in whole)
    expected = adapter_parts.logits(model, TOKENS, old_only=True)
    for other in (adapter_parts.load(tmp_path / "merged"), served(base, result.output, TOKENS)):
        found = adapter_parts.logits(other, TOKENS, old_only=True)
        assert (found - expected).abs().max() < 1e-4


def with_other_experts(base, folder, change):
    """A copy of a mixture whose stored tensors are `change(name, tensor)`."""
    shutil.copytree(base, folder)
    path = folder / "model.safetensors"
    torch.manual_seed(7)
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})
    return folder


def says_the_same(base, tuned, found, root, most):
    """Merged, and beside the base in PEFT, it is TUNED."""
    merge(base, found.output, output=root / "merged")
    expected = adapter_parts.logits(adapter_parts.load(tuned), TOKENS, old_only=True)
    for model in (
        adapter_parts.load(root / "merged"),
        adapter_parts.unmerged(base, found.output),
    ):
        got = adapter_parts.logits(model, TOKENS, old_only=True)
        assert (got - expected).abs().max() < most
    return got


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.matrix)])
def test_experts_that_are_stored_one_by_one_are_lora_of_their_parameters(tmp_path, kind):
    names = {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}
    base, adapter = other_with_adapter(tmp_path, kind, **names)
    merge(base, adapter, output=tmp_path / "tuned")
    found = extract(tmp_path / "tuned", base=base, rank=4, output=tmp_path / "found")
    experts = [one for one in found.of("lora") if len(one.shape) == 3]
    assert [one.rank for one in experts] == [4] * 4
    assert {one.shape for one in experts} == (
        {(3, 80, 32), (3, 32, 40)} if kind == "mixtral" else {(3, 48, 32), (3, 32, 24)}
    )
    assert max(one.error for one in found.of("lora")) < 1e-4
    total = len(load_file(base / "model.safetensors"))
    assert found.equal == total - 2 * (1 + 3 * 3)  # a projection of attention, three experts
    says_the_same(base, tmp_path / "tuned", found, tmp_path, 1e-4)


@pytest.mark.parametrize("width", [24, 16], ids=["", "square"])
def test_one_expert_and_the_router_changed(tmp_path, width):
    """`auto`: ranks of each parameter, the other experts are zero. Of square ones too."""
    base, _ = other_with_adapter(tmp_path, "qwen3_moe", width=width)

    def change(name, tensor):
        of_one = "layers.1.mlp.experts.2.gate_proj" in name
        noise = torch.randn_like(tensor) if of_one or name.endswith("1.mlp.gate.weight") else 0
        return tensor + 0.1 * noise

    tuned = with_other_experts(base, tmp_path / "tuned", change)
    found = extract(tuned, base=base, rank="auto", max_error=1e-5, output=tmp_path / "found")
    assert [one.name for one in found.of("whole")] == ["model.layers.1.mlp.gate.weight"]
    assert [(one.name, one.rank, one.error < 1e-5) for one in found.of("lora")] == [
        ("model.layers.1.mlp.experts.gate_up_proj", width, True),
        ("model.layers.1.mlp.experts.down_proj", 1, True),
    ]
    says_the_same(base, tuned, found, tmp_path, 1e-4)
    with pytest.raises(RefusalError, match="bare parameters"):
        split(base, found.output, output=tmp_path / "pair")


def test_of_experts_the_error_is_that_of_all(tmp_path):
    """Old names of a router and of experts (Mixtral's), ranks that differ, an error that is told."""
    base, _ = other_with_adapter(tmp_path, "mixtral")

    def change(name, tensor):
        moves = "block_sparse_moe" in name or "o_proj" in name
        return tensor + 0.1 * torch.randn_like(tensor) if moves else tensor

    tuned = with_other_experts(base, tmp_path / "tuned", change)
    found = extract(tuned, base=base, rank="auto", max_error=0.4, output=tmp_path / "found")
    assert len(found.of("whole")) == 2 and len({one.rank for one in found.of("lora")}) > 1
    merge(base, found.output, output=tmp_path / "merged")
    start, wanted, got = (
        load_file(folder / "model.safetensors") for folder in (base, tuned, tmp_path / "merged")
    )
    for layer, projections in (("0", ("w1", "w3")), ("1", ("w2",))):
        parameter = "gate_up_proj" if projections[1:] else "down_proj"
        name = f"model.layers.{layer}.block_sparse_moe.experts.{parameter}"
        (told,) = (one.error for one in found.of("lora") if one.name == name)
        names = [
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"
            for expert in range(3)
            for projection in projections
        ]
        left, whole = (
            torch.cat([(wanted[n] - other[n]).flatten() for n in names]).norm()
            for other in (got, start)
        )
        assert 0.2 < told <= 0.4 and float(left / whole) == pytest.approx(told, rel=1e-3)
    peft = adapter_parts.logits(adapter_parts.unmerged(base, found.output), TOKENS, old_only=True)
    ours = adapter_parts.logits(adapter_parts.load(tmp_path / "merged"), TOKENS, old_only=True)
    assert (peft - ours).abs().max() < 1e-4


def test_experts_of_unknown_names_are_refused_by_name(tmp_path):
    base, _ = other_with_adapter(tmp_path, "mixtral")

    def rename(folder, step):
        path = folder / "model.safetensors"
        tensors = {n.replace(".w2.", ".fc2."): t + step for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})

    tuned = shutil.copytree(base, tmp_path / "tuned")
    rename(base, 0)
    rename(tuned, 0.5)
    with pytest.raises(RefusalError, match=r"experts\.0\.fc2\.weight differs"):
        extract(tuned, base=base, output=tmp_path / "found")


def test_what_cannot_be_extracted_is_said(tmp_path):
    base, tuned = fine_tune(tmp_path, tied=True)
    with pytest.raises(LexigraftError, match="no number of"):
        extract(base, base=base, output=tmp_path / "adapter")
    for rank, most in ((0, None), ("some", None), (4, 0.1), ("auto", 2.0)):
        with pytest.raises(LexigraftError, match="--rank"):
            extract(tuned, base=base, rank=rank, max_error=most, output=tmp_path / "adapter")
    other, _ = adapter_parts.permuted(base, tmp_path / "other")
    with pytest.raises(LexigraftError, match="id 260 is"):
        extract(tuned, base=other, output=tmp_path / "adapter")
    parts.overwrite_row(
        tuned, "model.layers.0.mlp.down_proj.weight", 3, np.float32("nan").tobytes()
    )
    with pytest.raises(LexigraftError, match="holds NaN"):
        extract(tuned, base=base, output=tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "other"}


def test_an_extraction_keeps_the_rules_of_outputs(tmp_path):
    base, tuned = fine_tune(tmp_path, tied=True)
    shown = extract(tuned, base=base, rank=4, output=tmp_path / "one", dry_run=True)
    assert not (tmp_path / "one").exists()
    first = extract(tuned, base=base, rank=4, output=tmp_path / "one")
    assert {(t.name, t.kind, t.rank) for t in shown.tensors} == {
        (t.name, t.kind, t.rank) for t in first.tensors
    }
    with pytest.raises(LexigraftError, match="exists"):
        extract(tuned, base=base, output=tmp_path / "one")
    kept, threads = folder_hash(tmp_path / "one"), torch.get_num_threads()
    torch.set_num_threads(2)
    extract(tuned, base=base, rank=4, output=tmp_path / "one", force=True)
    torch.set_num_threads(threads)
    assert folder_hash(tmp_path / "one") == kept
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    extract(tuned, base=base, rank=4, seed=1, output=tmp_path / "two")
    other = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert stored.keys() == other.keys()
    shutil.rmtree(tmp_path / "two")
