"""DynamicLoss: `l2t.dynamic_loss` as a module that holds its coefficients.

For coefficients that belong to the loss: trained by an optimizer, fixed, saved in a state_dict. Coefficients
that a teacher computes anew at every step go to `l2t.dynamic_loss` directly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2t import check
from l2t.functional import LINKS, REDUCTIONS, checked_tables, dynamic_loss
from l2t.weight import Diagonal, Full, LowRank, Weight

__all__ = ["DynamicLoss"]


class DynamicLoss(nn.Module):
    """The dynamic loss ``-κ_y φ(Σ_j W[y, j] log softmax(logits)_j + b_y)`` with coefficients of its own.

    See `dynamic_loss` for the formula, its source, shapes, dtypes and errors. ``weight`` is W, not the class
    weights w of `torch.nn.CrossEntropyLoss`, which go to the call as
    ``sample_weight=w[target.where(target != ignore_index, 0)]``.

    Args:
        weight: W: `Full`, `Diagonal` or `LowRank`, a tensor of shape (C, C) or (C,), or None for the
            identity.
        bias: b, shape (C,), or None.
        scale: κ, shape (C,), or None.
        link: ``"sigmoid"``, ``"identity"`` or ``"log-sigmoid"``.
        ignore_index: a target that takes no part.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        trainable: True makes the coefficients parameters, False buffers. Values are copied, except that a
            `torch.nn.Parameter` stays the parameter it is if it is to be trained, so that modules can share
            it.

    The coefficients are ``weight`` or ``diagonal``, ``left``, ``right``, and ``bias``, ``scale`` in
    ``state_dict()``.

    Example:
        >>> import torch, l2t
        >>> loss = l2t.DynamicLoss(l2t.Diagonal.identity(3), bias=torch.zeros(3))
        >>> loss
        DynamicLoss(Diagonal, num_classes=3, bias, link='sigmoid')
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 2])).backward()
        >>> loss.diagonal.grad
        tensor([0.1030, 0.0000, 0.1030])
    """

    bias: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        weight: Weight | Tensor | None = None,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        link: str = "sigmoid",
        ignore_index: int = -100,
        reduction: str = "mean",
        trainable: bool = True,
    ) -> None:
        super().__init__()
        check.loss_choice("link", link, LINKS)
        check.loss_choice("reduction", reduction, REDUCTIONS)
        if isinstance(weight, Tensor):
            weight = Full(weight) if weight.dim() == 2 else Diagonal(weight)
        if weight is not None and not isinstance(weight, Weight):
            raise check.loss_weight(weight)
        parts = {} if weight is None else dict(zip(weight._fields, weight, strict=True))
        tensors = {**parts, "bias": bias, "scale": scale}
        given = [*parts.values(), *(x for x in (bias, scale) if x is not None)]
        check.module_coefficients(given)
        if given:  # fits logits of the lowest dtype among them, or none
            dtype = min((x.dtype for x in given), key=lambda dtype: dtype.itemsize)
            checked_tables(given[0].new_empty(0, given[0].shape[0], dtype=dtype), weight, bias, scale)
        self.link = link
        self.ignore_index = check.loss_ignore_index(ignore_index)
        self.reduction = reduction
        self._structure = None if weight is None else type(weight)
        for name, tensor in tensors.items():
            if tensor is None:
                self.register_parameter(name, None)
            elif not trainable:
                self.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))
            elif isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_parameter(
                    name, nn.Parameter(tensor.clone(memory_format=torch.contiguous_format))
                )

    def coefficients(self) -> Weight | None:
        """W as the record that it was made from; None is the identity."""
        if self._structure is None:
            return None
        return self._structure(*(getattr(self, name) for name in self._structure._fields))

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of `logits` for `target`; see `dynamic_loss`."""
        return dynamic_loss(
            logits,
            target,
            self.coefficients(),
            self.bias,
            self.scale,
            link=self.link,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Structure, classes, and whatever is not the default."""
        weight = self.coefficients()
        said = (
            ["identity"] if weight is None else [type(weight).__name__, f"num_classes={weight.num_classes}"]
        )
        if isinstance(weight, LowRank):
            said.append(f"rank={weight.rank}")
        said += [name for name in ("bias", "scale") if getattr(self, name) is not None]
        said.append(f"link={self.link!r}")
        if self.ignore_index != -100:
            said.append(f"ignore_index={self.ignore_index}")
        if self.reduction != "mean":
            said.append(f"reduction={self.reduction!r}")
        if self._buffers:
            said.append("trainable=False")
        return ", ".join(said)
