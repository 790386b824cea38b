"""Adapters on disk: every form in which PEFT lets one touch a tensor, and the delta formulas.

`config` says what an adapter is and refuses what is not supported, `keys` reads one tensor name,
`folder` joins both into an `Adapter`, `vocabulary` says where each row of a vocabulary tensor
comes from, and `delta` computes. Only `delta` imports torch.
"""
