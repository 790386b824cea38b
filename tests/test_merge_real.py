"""merge with real tokenizers of both BPE families: learned, grafted, trained by PEFT, merged."""

from __future__ import annotations

import shutil

import pytest
import torch

import adapter_parts
import parts
from lexigraft import check, graft, learn, merge
from lexigraft.errors import LexigraftError
from lexigraft.families import TokenMap

ADDED = 96
FORMS = ["lora", "plain", "saved-both", "saved-shared", "lora-both", "dora-both", "rows"]
KINDS = [
    pytest.param("mistral", id="mistral"),
    pytest.param("smollm2_hf", marks=pytest.mark.real, id="smollm2"),
]


def real_base(kind, folder):
    if kind == "mistral":
        return parts.mistral_folder(folder)
    source = parts.SHARED / "tokenizers" / kind
    if not source.is_dir():
        pytest.skip("the shared tokenizers are not here")
    return shutil.copytree(source, folder)


@pytest.fixture(scope="module", params=KINDS)
def learned(request, tmp_path_factory):
    """A base's tokenizer, its extension by medical text, and how many tokens it had."""
    root = tmp_path_factory.mktemp("real")
    base = real_base(request.param, root / "base")
    (root / "corpus.txt").write_text(parts.corpus_text(), "utf-8")
    learn(base, corpus=[root / "corpus.txt"], tokens=ADDED, min_count=4, output=root / "vocab")
    return root, TokenMap.read(base).tokens


def logits(model, first, tokens):
    """Logits of old and new tokens; the sequences hold both."""
    draw = torch.Generator().manual_seed(1)
    old = torch.randint(3, first, (2, 24), generator=draw)
    new = torch.randint(first, tokens, (2, 24), generator=draw)
    mixed = torch.where(torch.rand((2, 24), generator=draw) < 0.5, old, new)
    with torch.no_grad():
        return model(input_ids=torch.cat([old, mixed])).logits[..., :tokens].float()


@pytest.mark.matrix
@pytest.mark.parametrize("start", ["un-grafted", "grafted", "larger"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_real_tokenizers_merge_as_peft_computes_unmerged(
    learned, tmp_path, form, tied, padded, start
):
    root, first = learned
    if form == "saved-shared" and not tied:
        pytest.skip("a form of tied models")
    base = shutil.copytree(root / "base", tmp_path / "base")
    parts.write_model(base, tokens=first, rows=first + 192 if padded else first, tied=tied)
    graft(base, root / "vocab", output=tmp_path / "grafted", pad_to=1)
    tokens = TokenMap.read(tmp_path / "grafted").tokens
    new = {"trainable_token_indices": [5, *range(first, tokens)]} if form == "rows" else {}
    adapter = adapter_parts.write_adapter(
        base, tmp_path / "grafted", tmp_path / "adapter", form, **new
    )
    onto = {"un-grafted": base, "grafted": tmp_path / "grafted", "larger": tmp_path / "larger"}
    if start == "larger":
        (tmp_path / "more.txt").write_text(parts.corpus_text(1).replace("itis", "ysis"), "utf-8")
        vocab = tmp_path / "more"
        learn(
            tmp_path / "grafted",
            corpus=[tmp_path / "more.txt"],
            tokens=8,
            output=vocab,
            min_count=2,
        )
        graft(tmp_path / "grafted", vocab, output=tmp_path / "larger", pad_to=1)
    try:
        merge(onto[start], adapter, output=tmp_path / "merged")
    except LexigraftError as fault:
        # Padding rows took the new tokens, so PEFT saved no table; DoRA wants the rows it knew.
        lost = start == "un-grafted" and padded and form in ("lora", "rows")
        assert lost or (start == "larger" and form == "dora-both"), fault
        assert "no row of" in fault.found or "norms of" in fault.found
        return
    unmerged = adapter_parts.unmerged(tmp_path / "grafted", adapter)
    merged = adapter_parts.load(tmp_path / "merged")
    expected, got = (logits(model, first, tokens) for model in (unmerged, merged))
    assert float((got - expected).abs().max()) < 1e-4
    grown = TokenMap.read(tmp_path / "merged")
    assert grown.tokens == TokenMap.read(onto[start]).tokens if start == "larger" else tokens
    assert check(tmp_path / "merged").ok
