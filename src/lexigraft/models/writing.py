"""How a model goes on with a text."""

from __future__ import annotations

from typing import Any

from lexigraft.families import Family
from lexigraft.models.load import context_limit, quiet_transformers, start_and_end


def continuation(model: Any, family: Family, text: str, *, tokens: int) -> str:
    """What `model` writes behind `text`: its likeliest token each time, at most `tokens` of them.

    A text that leaves no room in the context is cut at its beginning; a character that is not
    finished at the end is left out.
    """
    import torch

    start, _ = start_and_end(family)
    read = family.encode(text)
    room = max(1, context_limit(model) - tokens - len(start))
    ids = [*start, *read[-room:]]
    place = model.get_output_embeddings().weight.device
    given = torch.tensor([ids], device=place)
    with quiet_transformers(), torch.inference_mode():
        found = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=ids[0],
        )
    whole = family.decode(found[0].tolist(), skip_special=True)
    return whole[len(family.decode(ids, skip_special=True)) :].rstrip("\N{REPLACEMENT CHARACTER}")
