"""One tensor name of an adapter file: which module it belongs to, and what it is there.

The layouts are PEFT's, old and new: with or without the adapter's name (`.default.`), with the
copies of `modules_to_save`, and plain weights as Chinese-LLaMA saved them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal[
    "lora_A",
    "lora_B",
    "embedding_A",
    "embedding_B",
    "lora_bias",
    "magnitude",
    "scale",
    "full",
    "saved",
    "original",
    "base",
    "rows",
    "refused",
]

PREFIX = "base_model.model."
# A name inside the adapter file -> the part it plays. `.default` is the adapter's own name, which
# older versions of PEFT left in the file.
_PARTS: tuple[tuple[str, Part], ...] = (
    (r"\.lora_A(\.default)?\.weight$", "lora_A"),
    (r"\.lora_B(\.default)?\.weight$", "lora_B"),
    (r"\.lora_B(\.default)?\.bias$", "lora_bias"),
    (r"\.lora_magnitude_vector(\.default)?(\.weight)?$", "magnitude"),
    (r"\.ia3_l(\.default)?$", "scale"),
    (r"\.base_layer\.(?P<leaf>bias)$", "full"),
    (r"\.lora_embedding_A(\.default)?$", "embedding_A"),
    (r"\.lora_embedding_B(\.default)?$", "embedding_B"),
    (r"\.(token_adapter\.)?trainable_tokens_delta(\.default)?$", "rows"),
    (r"(\.token_adapter)?\.base_layer\.(?P<leaf>weight)$", "base"),
    (r"\.modules_to_save(\.default)?\.(?P<leaf>.+)$", "saved"),
    (r"\.original_module\.(?P<leaf>.+)$", "original"),
)
# Parts of forms that are refused by name: (what is in the key, how it is called).
REFUSED_FORMS = (
    ("base_layer.lora_", "LoRA beneath another adapter"),
    ("lora_diag", "KaSA"),
    ("lora_E", "AdaLoRA"),
    ("lora_", "an unknown kind of LoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("boft_", "BOFT"),
    ("vera_", "VeRA"),
    ("prompt_", "prompt tuning"),
    ("absmax", "a quantised copy of a weight"),
    ("quant_", "a quantised copy of a weight"),
)


@dataclass(frozen=True)
class Key:
    """What a tensor of an adapter file is.

    Attributes:
        name: the key in the file.
        part: the role of the tensor.
        target: for `full`, `saved`, `original` and `base` the tensor of the model that it is a
            copy of (`model.embed_tokens.weight`); otherwise the module (`model.embed_tokens`).
        form: for `refused`, what the form is called.
    """

    name: str
    part: Part
    target: str
    form: str = ""


def parse(name: str) -> Key:
    """What the tensor `name` of an adapter file is.

    >>> parse("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    ... # doctest: +NORMALIZE_WHITESPACE
    Key(name='base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight', part='lora_A',
    target='model.layers.0.mlp.up_proj', form='')
    >>> parse("base_model.model.lm_head.modules_to_save.weight").target
    'lm_head.weight'
    >>> parse("base_model.model.lm_head.lokr_w1").form
    'LoKr'
    """
    inner = name.removeprefix(PREFIX)
    if "base_layer.lora_" not in inner or ".experts." in inner:  # whose wrappers lie in each other
        for pattern, part in _PARTS:
            match = re.search(pattern, inner)
            if match:
                leaf = match.groupdict().get("leaf")
                module = inner[: match.start()]
                return Key(name, part, f"{module}.{leaf}" if leaf else module)
    # Where a part of the name begins: `mm_soft_emb_norm` is no OFT.
    form = next((called for mark, called in REFUSED_FORMS if f".{mark}" in f".{inner}"), None)
    if form:
        return Key(name, "refused", inner, form)
    return Key(name, "full", inner)
