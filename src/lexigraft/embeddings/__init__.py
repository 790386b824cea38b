"""How new tokens' rows start: the methods, the choice between them, and what they need.

`methods` holds pure functions, one per method; `choice` says which is used for which tensor;
`starting` feeds them from tensors on disk, block by block.
"""

from lexigraft.embeddings.choice import AUTO, Choice, choose
from lexigraft.embeddings.methods import METHODS, Spelled
from lexigraft.embeddings.spelling import spell
from lexigraft.embeddings.starting import Start

__all__ = ["AUTO", "METHODS", "Choice", "Spelled", "Start", "choose", "spell"]
