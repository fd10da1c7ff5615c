"""Networks in and out: the paper authors' JAX checkpoints, modules of torch's own parts, the
state_dicts of other packages, tiny-cuda-nn.

A converter never guesses: what it does not know it refuses, naming the part. Layers keep their
order, weights go to [out,in] as ``nn.Linear`` has them, and no value is changed.
"""

from .layouts import LAYOUTS, from_state_dict, peer_arguments, reorder, to_state_dict
from .learnit import load_learnit
from .modules import from_module, to_module
from .tcnn import TinyCudaNN, from_tcnn, load_tcnn, to_tcnn

__all__ = [
    "LAYOUTS",
    "TinyCudaNN",
    "from_module",
    "from_state_dict",
    "from_tcnn",
    "load_learnit",
    "load_tcnn",
    "peer_arguments",
    "reorder",
    "to_module",
    "to_state_dict",
    "to_tcnn",
]
