"""Whole models blended: the laws, plain references, and vocabularies aligned by token text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import adapter_parts
import parts
from adapter_parts import TOKENS
from lexigraft import blend, check, graft, learn
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import load as load_tokenizer
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import Manifest

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights(folder):
    return adapter_parts.load(folder).state_dict()


def moved(base, folder, seed, by=0.05):
    """A fine-tune, as far as a blend sees it: every weight of the base is another."""
    model = adapter_parts.load(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn_like(parameter, dtype=torch.float32) * by).to(parameter))
    shutil.copytree(base, folder)
    model.save_pretrained(folder)
    return folder


def family(root, *, tied=False, dtype="float32", count=3):
    base = adapter_parts.write_base(root / "base", tied=tied, dtype=dtype, rows=448)
    return base, [moved(base, root / f"m{i}", seed=i) for i in range(count)]


@pytest.fixture(
    scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.matrix)]
)
def models(request, tmp_path_factory):
    return family(tmp_path_factory.mktemp("models"), dtype=request.param)


@pytest.mark.parametrize("method", ["linear", "slerp", "task", "ties", "dare", "della"])
def test_a_model_blended_with_itself_is_itself(models, tmp_path, method):
    base, _ = models
    options = {"t": 0.3} if method == "slerp" else {}
    if method in ("ties", "dare", "della"):
        options["density"] = [0.5]
    blend(
        [base, base], base=base, method=method, weights=[0.3, 0.4], output=tmp_path / "b", **options
    )
    ours, theirs = weights(tmp_path / "b"), weights(base)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert ours.keys() == theirs.keys()
    assert check(tmp_path / "b").ok


def test_room_for_what_lies_beside_the_weights_is_foreseen(models, tmp_path):
    base = Path(shutil.copytree(models[0], tmp_path / "base"))
    parts.fill_beside(base)
    with pytest.raises(LexigraftError, match="GB free"):
        blend([base, models[1][0]], base=base, method="linear", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_fine_tune_blended_with_itself_is_itself(models, tmp_path):
    base, (one, *_) = models
    blend([one, one], base=base, method="linear", weights=[0.3, 0.4], output=tmp_path / "b")
    ours = weights(tmp_path / "b")
    assert all(torch.equal(ours[name], t) for name, t in weights(one).items())


@pytest.mark.parametrize("method", ["linear", "task", "ties", "dare", "della", "slerp"])
@pytest.mark.parametrize("kept", [0, 1])
def test_weight_1_and_0_give_each_parent(models, tmp_path, method, kept):
    base, (one, two, _) = models
    pair = [base, two] if method == "slerp" else [one, two]
    numbers = [1.0 - kept, float(kept)]
    options = {"t": numbers[1]} if method == "slerp" else {"weights": numbers}
    if method in ("ties", "dare", "della"):
        options["density"] = [1.0]
    blend(pair, base=base, method=method, output=tmp_path / "b", **options)
    ours, parent = weights(tmp_path / "b"), weights(pair[kept])
    for name, tensor in parent.items():
        assert torch.equal(ours[name], tensor), name


def plain_ties(base, tensors, numbers, density):
    """TIES as the paper has it: trim, elect, average what agrees."""
    deltas = []
    for tensor in tensors:
        delta = (tensor - base).flatten()
        keep = delta.abs().argsort(descending=True)[: max(1, int(density * len(delta)))]
        mask = torch.zeros_like(delta)
        mask[keep] = 1
        deltas.append(delta * mask)
    scaled = torch.stack([w * d for w, d in zip(numbers, deltas, strict=True)])
    sign = torch.where(scaled.sum(0) >= 0, 1.0, -1.0)
    agrees = scaled.sign() == sign
    total = (scaled * agrees).sum(0)
    divisor = (torch.tensor(numbers)[:, None] * agrees).sum(0)
    divisor[divisor == 0] = 1
    return base + (total / divisor).reshape(base.shape)


def test_ties_of_three_models_is_a_plain_reference(tmp_path):
    base, three = family(tmp_path)
    numbers, density = [0.5, 0.3, 0.8], 0.2
    blend(
        three, base=base, method="ties", weights=numbers, density=[density], output=tmp_path / "b"
    )
    ours, start = weights(tmp_path / "b"), weights(base)
    for name, tensor in start.items():
        parents = [weights(model)[name] for model in three]
        expected = plain_ties(tensor, parents, numbers, density)
        assert torch.allclose(ours[name], expected, atol=1e-6), name
        assert torch.equal(ours[name] == tensor, expected == tensor)


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della", "della_linear"])
def test_what_is_dropped_by_chance_hangs_on_the_seed_alone(tmp_path, method):
    base, (one, two, _) = family(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        blend(
            [one, two], base=base, method=method, density=[0.5], seed=seed, output=tmp_path / name
        )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    start, ours, tuned = weights(base), weights(tmp_path / "a"), weights(one)
    name = "model.layers.0.mlp.down_proj.weight"
    if method == "dare":  # of two models half of the changes each: a quarter has none
        assert 0.2 < (ours[name] == start[name]).float().mean() < 0.3
    delta, change = tuned[name] - start[name], ours[name] - start[name]
    assert float((delta * change).sum()) > 0


def test_slerp_is_on_the_great_circle_and_follows_mergekit_s_gradient(tmp_path):
    base, (one, *_) = family(tmp_path, count=1)
    recipe = {
        "slices": [
            {
                "sources": [
                    {"model": str(base), "layer_range": [0, 2]},
                    {"model": str(one), "layer_range": [0, 2]},
                ]
            }
        ],
        "merge_method": "slerp",
        "base_model": str(base),
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.25]},
                {"filter": "mlp", "value": [1, 0.5]},
                {"value": 0.4},
            ]
        },
        "dtype": "float32",
    }
    (tmp_path / "slerp.yml").write_text(yaml.safe_dump(recipe))
    blend([tmp_path / "slerp.yml"], output=tmp_path / "b")
    ours, start, end = (weights(tmp_path / n) for n in ("b", "base", "m0"))
    for name, tensor in start.items():
        place = 1.0 if ".layers.1." in name else 0.0
        t = 0.4
        if "self_attn" in name:
            t = 0.25 if place else 0.0
        elif "mlp" in name:
            t = 0.5 if place else 1.0
        a, b = tensor.double(), end[name].double()
        cosine = (a * b).sum() / a.norm() / b.norm()
        if cosine > 0.9995:
            expected = (1 - t) * a + t * b
        else:
            theta = torch.acos(cosine)
            expected = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / theta.sin()
        assert torch.allclose(ours[name].double(), expected, atol=1e-6), name


def test_ids_of_equal_number_that_mean_other_words_are_aligned_not_averaged(tmp_path):
    base, (one, *_) = family(tmp_path, count=1)
    other, _ = adapter_parts.permuted(one, tmp_path / "other")
    assert TokenMap.read(other).tokens == TokenMap.read(base).tokens
    blend([one, other], base=base, method="linear", output=tmp_path / "b")
    ours, theirs = weights(tmp_path / "b"), weights(one)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert TokenMap.read(tmp_path / "b").hash == TokenMap.read(base).hash


@pytest.fixture(scope="module", params=["byte", "sp"])
def grown(request, tmp_path_factory):
    """A base and two models of it, each with a vocabulary of its own."""
    root = tmp_path_factory.mktemp("grown")
    write = {"byte": parts.write_byte_level, "sp": parts.write_sentencepiece}[request.param]
    base = write(root / "base")
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens, tied=True)
    texts = parts.corpus_text(0), parts.corpus_text(1).replace("itis", "ysis").replace("炎", "癌")
    for place, text in enumerate(texts):
        (root / f"{place}.txt").write_text(text, "utf-8")
        learn(
            base, corpus=[root / f"{place}.txt"], tokens=30, min_count=5, output=root / f"v{place}"
        )
        graft(base, root / f"v{place}", output=root / f"g{place}")
        moved(root / f"g{place}", root / f"m{place}", seed=place)
    return root, tokens


@pytest.mark.parametrize("method", ["linear", "task"])
def test_the_union_keeps_the_base_s_ids_and_its_tokens_come_out(grown, tmp_path, method):
    root, first = grown
    pair = [root / "m0", root / "m1"]
    result = blend(
        pair, base=root / "base", method=method, weights=[0.6, 0.2], output=tmp_path / "b"
    )
    maps = [TokenMap.read(folder) for folder in (tmp_path / "b", root / "base", *pair)]
    union, base, *theirs = maps
    assert base.texts.items() <= union.texts.items()
    assert union.ids.keys() == theirs[0].ids.keys() | theirs[1].ids.keys()
    assert result.added == union.tokens - first > 30
    assert not {i for i in union.added if i >= first}
    tokenizer = load_tokenizer(tmp_path / "b")
    assert all(tokenizer.pieces(union.texts[i]) == [i] for i in range(first, union.tokens))
    words = [text for text in ("neurysis", "cardiitis", "患者肝癌") if text]
    for word in words:
        lengths = [len(load_tokenizer(folder).encode(f" {word}")) for folder in pair]
        assert len(tokenizer.encode(f" {word}")) <= max(lengths)
    ours, start, *parents = (
        weights(f)[EMBED].double() for f in (tmp_path / "b", root / "base", *pair)
    )
    for token_id, text in union.texts.items():
        rows = [
            (weight, table[tokens.ids[text]])
            for weight, table, tokens in zip((0.6, 0.2), parents, theirs, strict=True)
            if text in tokens.ids
        ]
        if method == "linear":
            expected = sum(w * row for w, row in rows) / sum(w for w, _ in rows)
        else:
            mean = sum(row for _, row in rows) / len(rows)
            at = start[token_id] if token_id < first else mean
            expected = at + sum(w * (row - at) for w, row in rows)
        assert torch.allclose(ours[token_id], expected, atol=1e-6), text
    assert check(tmp_path / "b").ok
    assert Manifest.read(tmp_path / "b").last("blend").method == method


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        ("linear", 0),
        ("linear", 1),
        ("della", 1),
        ("slerp", 0),
        pytest.param("della", 0, marks=pytest.mark.matrix),
        pytest.param("slerp", 1, marks=pytest.mark.matrix),
        *(
            pytest.param(method, kept, marks=pytest.mark.matrix)
            for method in ("task", "ties", "dare")
            for kept in (0, 1)
        ),
    ],
)
def test_weight_1_gives_the_parent_under_the_union_s_ids(grown, tmp_path, method, kept):
    """Of slerp, too, which goes from its base to the other: both have words of their own."""
    root, _ = grown
    pair = [root / "m0", root / "m1"]
    options = {"t": float(kept)} if method == "slerp" else {"weights": [1 - kept, kept]}
    if method in ("ties", "dare", "della"):
        options["density"] = [1.0]
    start = pair[0] if method == "slerp" else root / "base"
    blend(pair, base=start, method=method, output=tmp_path / "b", **options)
    union, own = TokenMap.read(tmp_path / "b"), TokenMap.read(root / f"m{kept}")
    ours, parent = weights(tmp_path / "b"), weights(root / f"m{kept}")
    for text, place in own.ids.items():
        assert torch.equal(ours[EMBED][union.ids[text]], parent[EMBED][place])
    for name, tensor in parent.items():
        assert name in (EMBED, HEAD) or torch.equal(ours[name], tensor), name


def test_slerp_takes_a_row_that_one_of_two_has_from_it(grown, tmp_path):
    root, first = grown
    pair = [root / "base", root / "m0"]
    blend(pair, base=pair[0], method="slerp", t=0.25, output=tmp_path / "b")
    ours, one = weights(tmp_path / "b")[EMBED], weights(root / "m0")[EMBED]
    tokens = TokenMap.read(tmp_path / "b")
    assert tokens.hash == TokenMap.read(root / "m0").hash
    assert torch.equal(ours[first : tokens.tokens], one[first : tokens.tokens])
    assert not torch.equal(ours[:first], one[:first])


def chat_model(base, folder):
    """An instruct model: moved weights, two new special tokens, a template, another end."""
    from transformers import AutoTokenizer

    moved(base, folder, seed=9)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    model = adapter_parts.load(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def test_a_chat_vector_is_added_to_a_model_with_more_words(grown, tmp_path):
    from transformers import AutoTokenizer

    root, first = grown
    chat = chat_model(root / "base", tmp_path / "chat")
    blend([root / "m0", chat], base=root / "base", method="chat-vector", output=tmp_path / "b")
    union, own, of_chat = (TokenMap.read(f) for f in (tmp_path / "b", root / "m0", chat))
    assert own.texts.items() <= union.texts.items()
    ours, start, trained, talks = (
        weights(f) for f in (tmp_path / "b", root / "base", root / "m0", chat)
    )
    for name, tensor in trained.items():
        if name not in (EMBED, HEAD):
            assert torch.allclose(ours[name], tensor + talks[name] - start[name], atol=1e-6)
    for token_id in range(first, own.tokens):
        assert torch.equal(ours[EMBED][token_id], trained[EMBED][token_id])
    for text in ("<|user|>", "<|end|>"):
        assert torch.equal(ours[EMBED][union.ids[text]], talks[EMBED][of_chat.ids[text]])
        assert union.ids[text] >= own.tokens
        assert union.ids[text] in union.special
    old = 300
    expected = trained[EMBED][old] + talks[EMBED][old] - start[EMBED][old]
    assert torch.allclose(ours[EMBED][old], expected, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    ids = tokenizer.apply_chat_template([{"content": "neuritis"}], return_dict=False)
    assert ids[0] == union.ids["<|user|>"]
    assert ids[-1] == union.ids["<|end|>"] == tokenizer.eos_token_id
    for name in ("config.json", "generation_config.json"):
        stated = json.loads((tmp_path / "b" / name).read_text())["eos_token_id"]
        assert stated == union.ids["<|end|>"]
    assert check(tmp_path / "b").ok


def test_models_of_which_one_is_untied_come_apart(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=True)
    one = moved(base, tmp_path / "one", seed=1)
    model = adapter_parts.load(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    shutil.copytree(base, tmp_path / "two")
    model.save_pretrained(tmp_path / "two")
    result = blend([one, tmp_path / "two"], base=base, method="linear", output=tmp_path / "b")
    assert not result.tied
    ours, theirs, tied = (weights(tmp_path / n) for n in ("b", "two", "one"))
    assert torch.allclose(ours[HEAD], (theirs[HEAD] + tied[EMBED]) / 2)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    assert check(tmp_path / "b").ok


RECIPES = {
    "linear": """
models:
  - model: {m0}
    parameters:
      weight: 0.6
  - model: {m1}
    parameters:
      weight: 0.4
merge_method: linear
dtype: float32
""",
    "ties": """
models:
  - model: {base}
    # no parameters necessary for base model
  - model: {m0}
    parameters:
      density: 0.5
      weight: 0.5
  - model: {m1}
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight:
        - filter: mlp
          value: 0.5
        - value: 0.3
merge_method: ties
base_model: {base}
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "dare_ties": """
models:
  - model: {base}
  - model: {m0}
    parameters: {{density: 1.0, weight: 0.5}}
  - model: {m1}
    parameters: {{density: 1.0, weight: [0, 0.3, 0.7, 1]}}
merge_method: dare_ties
base_model: {base}
parameters:
  int8_mask: true
dtype: float32
tokenizer_source: union
""",
    "task_arithmetic": """
base_model: {base}
models:
  - model: {m0}
    parameters: {{weight: 0.4}}
  - model: {m1}
    parameters: {{weight: 0.5}}
merge_method: task_arithmetic
parameters: {{lambda: 0.5}}
dtype: float32
""",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_real_users_mean_the_same(tmp_path, name):
    """The formulas of mergekit 0.1.5, written plainly over the tensors."""
    base, (one, two, _) = family(tmp_path)
    places = {"base": base, "m0": one, "m1": two}
    (tmp_path / "recipe.yml").write_text(RECIPES[name].format(**places))
    result = blend([tmp_path / "recipe.yml"], output=tmp_path / "b")
    assert result.method == {"task_arithmetic": "task"}.get(name, name)
    ours, start, first, second = (weights(f) for f in (tmp_path / "b", base, one, two))
    for key, tensor in start.items():
        a, b, c = tensor, first[key], second[key]
        last = ".layers.1." in key
        if name == "linear":
            expected = 0.6 * b + 0.4 * c
        elif name == "task_arithmetic":
            expected = a + 0.5 * (0.4 * (b - a) + 0.5 * (c - a))
        elif name == "ties":
            weight, density = 0.5 if "mlp" in key else 0.3, 0.1 if last else 1.0
            trimmed = plain_ties(a, [c], [1.0], density) if density < 1 else c
            kept = plain_ties(a, [b], [1.0], 0.5)
            expected = plain_ties(a, [kept, trimmed], [0.5, weight], 1.0)
        else:
            weight = 1.0 if last else 0.0
            scaled = torch.stack([0.5 * (b - a), weight * (c - a)])
            sign = torch.where(scaled.sum(0) >= 0, 1.0, -1.0)
            expected = a + (scaled * (scaled.sign() == sign)).sum(0)
        assert torch.allclose(ours[key], expected, atol=1e-6), key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"chat_template": "auto"}, "chat_template is not honoured"),
        ({"merge_method": "model_stock"}, "the method model_stock"),
        ({"parameters": {"gamma": 0.1}}, "parameters.gamma is not honoured"),
        ({"tokenizer": {"source": "union", "tokens": {}}}, "tokenizer.tokens is not honoured"),
        ({"tokenizer_source": "other/model"}, "tokenizer source other/model"),
        ({"dtype": "int8"}, "dtype: int8"),
        ({"models": [{"model": "a+b"}]}, r"model: a\+b"),
        ({"slices": [{}, {}]}, "2 slices"),
    ],
)
def test_what_a_recipe_says_and_is_not_honoured_is_refused_by_name(tmp_path, change, named):
    recipe = {"models": [{"model": "a"}], "merge_method": "linear", "base_model": "a", **change}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RefusalError, match=named):
        blend([tmp_path / "r.yml"], output=tmp_path / "b")


def test_numbers_and_models_that_cannot_be_blended_are_named(tmp_path):
    base, (one, two) = family(tmp_path, count=2)
    wide = tmp_path / "wide"
    parts.write_model(wide, tokens=TOKENS, hidden=64)
    parts.write_byte_level(wide, vocab_size=TOKENS)
    for options, error, named in (
        ({"method": "linear", "weights": [1]}, LexigraftError, "--weights with 1 numbers"),
        ({"method": "linear", "weights": [1, -1]}, LexigraftError, "sum to 0"),
        ({"method": "ties"}, LexigraftError, "without --density"),
        ({"method": "ties", "density": [1.5]}, LexigraftError, r"density 1\.5"),
        ({"method": "della", "density": [0.05]}, LexigraftError, "epsilon"),
        ({"method": "slerp", "t": 0.5}, LexigraftError, "one of which is the base"),
        ({"method": "tise"}, RefusalError, "the method tise"),
    ):
        with pytest.raises(error, match=named):
            blend([one, two], base=base, output=tmp_path / "b", **options)
    with pytest.raises(RefusalError, match="is"):
        blend([one, wide], base=base, method="linear", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_dry_run_writes_nothing_and_needs_no_torch(tmp_path):
    import subprocess
    import sys

    base, (one, two) = family(tmp_path, count=2)
    code = (
        "import sys; from lexigraft import blend; "
        f"r = blend(['{one}', '{two}'], base='{base}', method='task', output='{tmp_path / 'b'}', "
        "dry_run=True); print(len(r.plan), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(weights(base))), "False"]
    assert not (tmp_path / "b").exists()


def test_the_largest_are_found_in_blocks():
    from lexigraft.blending.methods import Largest

    draw = np.random.default_rng(0)
    for values in (draw.normal(size=5000), np.repeat([1.0, -1.0, 0.5], 700), np.zeros(100)):
        for count in (1, 7, len(values) // 3):
            largest, blocks = Largest(count), np.array_split(values, 7)
            for block in blocks:
                largest.see(block)
            largest.turn()
            for block in blocks:
                largest.see_again(block)
            largest.settle()
            kept = np.concatenate([largest.keep(block) for block in blocks])
            limit = np.sort(np.abs(values))[-count]
            assert np.all(np.abs(values[kept != 0]) >= limit)
            assert np.count_nonzero(kept) == (count if limit else 0)


SLERP = """
slices:
  - sources:
      - model: {base}
        layer_range: [0, 2]
      - model: {m0}
        layer_range: [0, 2]
merge_method: slerp
base_model: {base}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float32
"""


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*RECIPES, "slerp"])
def test_mergekit_makes_the_same_of_its_recipes(tmp_path, name):
    """The oracle itself, where it is installed: one vocabulary, nothing drawn by chance."""
    import subprocess
    import sys

    pytest.importorskip("mergekit", reason="mergekit is not installed")
    base, (one, two, _) = family(tmp_path)
    text = {**RECIPES, "slerp": SLERP}[name].format(base=base, m0=one, m1=two)
    path = tmp_path / "recipe.yml"
    path.write_text(text.replace("tokenizer_source: union\n", ""))  # mergekit drops padding
    run = [sys.executable, "-m", "mergekit.scripts.run_yaml", path, tmp_path / "theirs"]
    done = subprocess.run(
        [*run, "--no-copy-tokenizer"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    blend([path], output=tmp_path / "ours")
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    for key, tensor in theirs.items():
        assert torch.allclose(ours[key], tensor, atol=2e-6), key
