"""What is added to a weight: a whole matrix or its factors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The delta `left @ right` of a weight stored [rows, columns]."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"factors {tuple(self.left.shape)} and {tuple(self.right.shape)} make no matrix")

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The product, computed in float64 and given back in float32."""
        return (self.left.double() @ self.right.double()).float()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.left.shape[0], self.right.shape[1]))


Delta = Tensor | LowRank


def dense(delta: Delta) -> Tensor:
    """What is added to the weight."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def parts(delta: Delta) -> tuple[Tensor, ...]:
    """The tensors that a delta is stored as."""
    return (delta.left, delta.right) if isinstance(delta, LowRank) else (delta,)


def require_finite(tensor: Tensor, where: str) -> None:
    """Raises ValueError for a tensor with NaN or infinite values."""
    if not tensor.isfinite().all():
        raise ValueError(f"{where} holds NaN or infinite values; fit it with smaller steps or more damping")
