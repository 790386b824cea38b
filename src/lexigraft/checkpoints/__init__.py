"""Safetensors checkpoints on disk: headers, vocabulary tensors, plans and the streaming rewrite.

Nothing here loads a model or imports torch; tensors are byte ranges of files.
"""
