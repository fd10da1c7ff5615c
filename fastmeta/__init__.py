"""fastmeta: meta-learned initial weights for coordinate networks, at kernel speed."""

from . import compat, nn, rules
from .batch import Batch, March, Project, Rays
from .checkpoint import load_init, save_init
from .convert import from_module, load_learnit, to_module
from .meta.maml import MAML
from .meta.reptile import Reptile
from .ops.adapt import Adapted, adapt, loss_grad, loss_hvp
from .ops.dispatch import available
from .ops.mlp import mlp
from .ops.project import project
from .ops.render import composite, render
from .spec import MLP, Encoding, fourier_mlp, nerf_mlp, siren

__version__ = "0.1.0"

__all__ = [
    "MAML",
    "MLP",
    "Adapted",
    "Batch",
    "Encoding",
    "March",
    "Project",
    "Rays",
    "Reptile",
    "adapt",
    "available",
    "compat",
    "composite",
    "fourier_mlp",
    "from_module",
    "load_init",
    "load_learnit",
    "loss_grad",
    "loss_hvp",
    "mlp",
    "nerf_mlp",
    "nn",
    "project",
    "render",
    "rules",
    "save_init",
    "siren",
    "to_module",
]
