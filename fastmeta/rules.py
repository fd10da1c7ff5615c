"""Inner rules as data: how θ_k becomes θ_{k+1}. A rule names its hyper-parameters and state;
workers carry it out.

α is the inner rate, g_k = ∇L_k(θ_k); it broadcasts to [K,T,P], so each step, task and parameter may
have its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class SGD:
    """``θ_{k+1} = θ_k − α ⊙ g_k``."""

    name: ClassVar[str] = "sgd"
    state: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class MetaSGD(SGD):
    """SGD whose rates are learned, one per parameter [P] unless others are given (Li et al.
    2017)."""

    name: ClassVar[str] = "meta_sgd"


@dataclass(frozen=True)
class Momentum:
    """``b_{k+1} = μ b_k + g_k + ω θ_k``, ``θ_{k+1} = θ_k − α u_k``; u = b_{k+1}, or with nesterov
    g' + μ b_{k+1}.

    As ``torch.optim.SGD(momentum=mu, nesterov=nesterov, weight_decay=weight_decay)``; b_0 = 0.

    >>> from fastmeta import rules
    >>> rules.Momentum(0.95, nesterov=True)
    Momentum(mu=0.95, nesterov=True, weight_decay=0.0)
    """

    mu: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    name: ClassVar[str] = "momentum"
    state: ClassVar[tuple[str, ...]] = ("b",)

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1 or self.weight_decay < 0:
            raise ValueError(
                f"Momentum: mu is {self.mu}, weight_decay {self.weight_decay}; accepted are 0 "
                "<= mu < 1, weight_decay >= 0"
            )


@dataclass(frozen=True)
class Adam:
    """``m' = β1 m + (1−β1) g``, ``v' = β2 v + (1−β2) g²``, ``θ' = θ − α m'/(c1 (√(v'/c2) + ε))``,
    ``c_i = 1 − β_i^{k+1}``.

    As ``torch.optim.Adam``. In second order, the square root has derivative 0 at v = 0 (exact
    there).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    name: ClassVar[str] = "adam"
    state: ClassVar[tuple[str, ...]] = ("m", "v")

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise ValueError(
                f"Adam: beta1 is {self.beta1}, beta2 {self.beta2}, eps {self.eps}; accepted "
                "are 0 <= beta < 1, eps > 0"
            )


Rule = SGD | Momentum | Adam  # MetaSGD is an SGD
RULES: dict[str, type] = {r.name: r for r in (SGD, Momentum, Adam, MetaSGD)}


def resolve(rule: str | Rule) -> Rule:
    """A rule from its name (with default hyper-parameters), or the rule itself."""
    if isinstance(rule, (SGD, Momentum, Adam)):
        return rule
    if isinstance(rule, str) and rule in RULES:
        return RULES[rule]()
    raise ValueError(
        f"rule is {rule!r}; accepted are {', '.join(RULES)}, or one of the classes in "
        "fastmeta.rules"
    )
