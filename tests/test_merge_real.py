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


class Real:
    """What the cells of one tokenizer share: every folder and every unmerged model is made once."""

    def __init__(self, kind, root):
        self.root, self.source = root, real_base(kind, root / "source")
        self.vocab, self.more = root / "vocab", root / "more"
        self.first = TokenMap.read(self.source).tokens
        (root / "corpus.txt").write_text(parts.corpus_text(), "utf-8")
        (root / "more.txt").write_text(parts.corpus_text(1).replace("itis", "ysis"), "utf-8")
        options = {"corpus": [root / "corpus.txt"], "tokens": ADDED, "min_count": 4}
        learn(self.source, output=self.vocab, **options)
        options = {"corpus": [root / "more.txt"], "tokens": 8, "min_count": 2}
        learn(self.vocab, output=self.more, **options)
        self.tokens = TokenMap.read(self.vocab).tokens
        self._models, self._adapters = {}, {}

    def models(self, tied, padded):
        """The folder that holds one model as it was, grafted, and grafted once more."""
        if (tied, padded) not in self._models:
            folder = self.root / f"{tied}-{padded}"
            base = shutil.copytree(self.source, folder / "un-grafted")
            rows = self.first + 192 if padded else self.first
            parts.write_model(base, tokens=self.first, rows=rows, tied=tied)
            graft(base, self.vocab, output=folder / "grafted", pad_to=1)
            graft(folder / "grafted", self.more, output=folder / "larger", pad_to=1)
            self._models[tied, padded] = folder
        return self._models[tied, padded]

    def adapter(self, form, tied, padded):
        """An adapter of one form, and the logits of the model that it was trained on."""
        if (form, tied, padded) not in self._adapters:
            models = self.models(tied, padded)
            new = [5, *range(self.first, self.tokens)]
            options = {"trainable_token_indices": new} if form == "rows" else {}
            folder = adapter_parts.write_adapter(
                models / "un-grafted", models / "grafted", models / form, form, **options
            )
            unmerged = adapter_parts.unmerged(models / "grafted", folder)
            self._adapters[form, tied, padded] = folder, self.logits(unmerged)
        return self._adapters[form, tied, padded]

    def logits(self, model):
        """Logits of old and new tokens; the sequences hold both."""
        draw = torch.Generator().manual_seed(1)
        old = torch.randint(3, self.first, (2, 24), generator=draw)
        new = torch.randint(self.first, self.tokens, (2, 24), generator=draw)
        mixed = torch.where(torch.rand((2, 24), generator=draw) < 0.5, old, new)
        with torch.no_grad():
            return model(input_ids=torch.cat([old, mixed])).logits[..., : self.tokens].float()


@pytest.fixture(scope="module", params=KINDS)
def real(request, tmp_path_factory):
    return Real(request.param, tmp_path_factory.mktemp("real"))


@pytest.mark.matrix
@pytest.mark.parametrize("start", ["un-grafted", "grafted", "larger"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_real_tokenizers_merge_as_peft_computes_unmerged(real, tmp_path, form, tied, padded, start):
    if form == "saved-shared" and not tied:
        pytest.skip("a form of tied models")
    adapter, expected = real.adapter(form, tied, padded)
    onto = real.models(tied, padded) / start
    try:
        merge(onto, adapter, output=tmp_path / "merged")
    except LexigraftError as fault:
        # Padding rows took the new tokens, so PEFT saved no table; DoRA wants the rows it knew.
        lost = start == "un-grafted" and padded and form in ("lora", "rows")
        assert lost or (start == "larger" and form == "dora-both"), fault
        assert "no row of" in fault.found or "norms of" in fault.found
        return
    got = real.logits(adapter_parts.load(tmp_path / "merged"))
    assert float((got - expected).abs().max()) < 1e-4
    grown = TokenMap.read(tmp_path / "merged")
    assert grown.hash == TokenMap.read(onto if start == "larger" else adapter).hash
    assert check(tmp_path / "merged").ok
