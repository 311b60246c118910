"""Linear layers of which only chosen elements are trained: a compact parameter, a dense weight that follows it, no dense gradient."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import autocasting
from ..derivatives import first_order, refuse_transforms
from ..ops import dense
from ..ops import sparse as ops
from ..ops import wgrad as _wgrad  # noqa: F401 - defines torch.ops.fusedadapt.masked_wgrad
from ..quant.layer import check_plain
from .mask import Mask

_FIRST = threading.Lock()  # of threads that share a layer, one tells autograd of a change


def masked_wgrad(dy: Tensor, x: Tensor, mask: Mask | Tensor) -> Tensor:
    """dW = dy^T x at the mask's elements: fp32 [nnz] (fp64 for fp64), in their flat order. dy: [..., N]; x: [..., K]; mask: a Mask or bool tensor of
    shape (N, K), or its sorted flat positions.

    Memory beyond the result: one tile of dW and its operands, at most 8 MB. A gradient, with none of its own: the result requires none.

    Raises:
        ValueError: shapes that do not fit. TypeError: a mask that is none.
    """
    if not dy.dim() or not x.dim() or not dy.is_floating_point():
        raise ValueError(f"masked_wgrad: expected floating-point dy [..., N] and x [..., K]; got {dy.dtype} {tuple(dy.shape)} and {tuple(x.shape)}")
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"masked_wgrad: expected dy and x of the same leading dimensions; got {tuple(dy.shape)} and {tuple(x.shape)}; reshape one")
    shape = (dy.shape[-1], x.shape[-1])
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = Mask.from_bool(mask)
    if isinstance(mask, Mask) and tuple(mask.shape) != shape:
        raise ValueError(f"masked_wgrad: expected a mask of shape {shape}; got {tuple(mask.shape)}; make it from the layer's weight")
    if not isinstance(mask, Mask | Tensor):
        raise TypeError(f"masked_wgrad: expected a sparse.Mask, a bool tensor or sorted positions; got {type(mask).__name__}; make it a tensor")
    index = mask.indices() if isinstance(mask, Mask) else mask
    if index is mask and index.dim() == 1 and index.numel() and not index.is_floating_point():
        n = shape[0] * shape[1]
        if int(index[0]) < 0 or int(index[-1]) >= n or not bool((index[1:] > index[:-1]).all()):
            raise ValueError(f"masked_wgrad: expected sorted positions in [0, {n}) without repeats; got others; sort them, drop repeats")
    out: Tensor = torch.ops.fusedadapt.masked_wgrad(_rows(dy.detach()), _rows(x.detach()), index)
    return out


def _rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix; unlike reshape(-1, K) also where K is 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


class _ChosenLinear(torch.autograd.Function):
    """y = x W^T + b where W[index] = values (+ base): the gradient of W exists at `index` only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, alpha: float, cast: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, index)
        ctx.alpha, ctx.cast, ctx.dtypes = alpha, cast, (values.dtype, None if bias is None else bias.dtype)
        return dense.linear(x, weight.to(x.dtype) if cast else weight, bias)

    @staticmethod
    @first_order("fusedadapt.MaskedLinear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index = ctx.saved_tensors
        dx = dense.linear_dx(dy, weight.to(dy.dtype) if ctx.cast else weight) if ctx.needs_input_grad[0] else None
        db = dy.sum(0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        dv = None
        if ctx.needs_input_grad[3]:
            dv = torch.ops.fusedadapt.masked_wgrad(dy, x, index)
            dv = (dv if ctx.alpha == 1.0 else dv * ctx.alpha).to(ctx.dtypes[0])
        return dx, None, db, dv, None, None, None


_apply: Any = _ChosenLinear.apply


class MaskedLinear(nn.Linear):
    """A linear layer that trains only the elements of ``mask`` (True = trained); the others keep their bits.

    ``values`` is the parameter: [nnz], the trained elements in flat order. ``weight`` [N, K] is frozen and follows it before each forward pass.
    Any optimizer steps on ``values`` alone: state, gradient and master weights have nnz elements.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`. mask: `Mask` or bool tensor of shape (N, K).
        prune: set the elements outside the mask to zero.
    """

    alpha = 1.0
    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: Mask | Tensor,
        prune: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._choose(mask, prune)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Mask | Tensor, *, prune: bool = False) -> MaskedLinear:
        """Takes over `linear`'s own weight and bias (shared, not copied). TypeError if it is not a plain nn.Linear."""
        check_plain(f"{cls.__name__}.from_linear", linear)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self._choose(mask, prune)
        return self

    @torch.no_grad()
    def _choose(self, mask: Mask | Tensor, prune: bool) -> None:
        if not isinstance(mask, Mask | Tensor):
            raise TypeError(
                f"{type(self).__name__}: expected a sparse.Mask or a bool tensor as mask; got {type(mask).__name__}; make one, e.g. w != 0"
            )
        mask = mask if isinstance(mask, Mask) else Mask.from_bool(mask)
        if tuple(mask.shape) != tuple(self.weight.shape):
            raise ValueError(f"{type(self).__name__}: expected a mask of shape {tuple(self.weight.shape)}; got {tuple(mask.shape)}")
        if not self.weight.is_contiguous():
            raise ValueError(f"{type(self).__name__}: expected a contiguous weight; got strides {self.weight.stride()}; call .contiguous() first")
        self.weight.requires_grad_(False)
        index = mask.flat().indices().to(self.weight.device)
        if prune:
            self.weight.masked_fill_(~mask.to_bool().to(self.weight.device), 0.0)  # a product would leave -0 and NaN
        self.register_buffer("index", index)
        self.values = nn.Parameter(self._start(ops.gather(self.weight.view(-1), self.index)))
        self._seen: tuple[int, int] | None = None

    def _start(self, chosen: Tensor) -> Tensor:
        return chosen

    def _wanted(self) -> Tensor:
        """What the chosen elements of the weight should be now."""
        return self.values.detach()

    @property
    def mask(self) -> Mask:
        """Which elements are trained."""
        return Mask.from_indices(self.index, self.weight.shape)

    @torch.no_grad()
    def sync_(self) -> None:
        """Writes the current values into ``weight``; forward and `state_dict` do so themselves."""
        self._write()
        torch.autograd.graph.increment_version(self.weight)
        self._seen = self._state()

    @torch.no_grad()
    def _write(self) -> None:
        silent = self.weight.data  # the same memory with a version of its own
        ops.move_all("scatter", [(silent.view(-1), self.index, self._wanted().to(silent.dtype))])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._seen is not None:  # None: nothing has been trained yet, or `disable` was called
            self.sync_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _state(self) -> tuple[int, int]:
        return -1 if self.values.is_inference() else self.values._version, self.values.data_ptr()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _follow(self) -> None:
        """Brings the weight up to date: the one break in a compiled graph.

        Always writes, since torch's fused optimizers change parameters without counting a version. Where nothing says that they changed, autograd is
        not told either, so that a layer may be used several times before one backward pass.
        """
        with _FIRST:
            if self._seen != self._state() or self.weight.is_inference():  # which has no version, and no autograd to tell
                self.sync_()
                return
        self._write()

    def forward(self, x: Tensor) -> Tensor:
        refuse_transforms(f"fusedadapt.{type(self).__name__}")
        self._follow()
        bias: Tensor | None = self.bias
        device = x.device.type
        cast = autocasting(device) and x.dtype != torch.float64
        if x.shape[-1:] != (self.in_features,) or (not cast and x.dtype != self.weight.dtype):
            expected, got = f"x of shape [..., {self.in_features}] in {self.weight.dtype}", f"{tuple(x.shape)} in {x.dtype}"
            raise ValueError(f"{type(self).__name__}: expected {expected}; got {got}; convert x or the layer, or use torch.autocast")
        if cast:  # as autocast does with F.linear, which it cannot see in backward; the weight is converted anew there instead of kept
            dtype = torch.get_autocast_dtype(device)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        y: Tensor = _apply(_rows(x), self.weight, bias, self.values, self.index, self.alpha, cast)
        return y.reshape(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the current weight (a copy)."""
        self.sync_()
        out = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        out.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            out.bias = nn.Parameter(self.bias.detach().clone())
        return out

    def extra_repr(self) -> str:
        n = math.prod(self.weight.shape)
        return f"{super().extra_repr()}, trained={self.index.numel()} of {n}"

    def __fusedadapt_explain__(self) -> list[tuple[str, str, str]]:
        what = f"{type(self).__name__} {self.index.numel()} of {self.weight.numel()} {self.weight.dtype} {self.weight.device}".replace("torch.", "")
        choice = ops.choose("move_all", self.weight.device.type, self.weight.dtype)
        return [(what, choice.backend, f"{choice.reason}; products: torch's GEMM, dW in tiles of it")]


def _finite(alpha: float) -> float:
    if not math.isfinite(alpha):
        raise ValueError(f"SparseDeltaLinear: expected a finite alpha; got {alpha!r}; pass the number the change is multiplied by")
    return alpha


class SparseDeltaLinear(MaskedLinear):
    """y = x (W + alpha S)^T + b with S sparse: ``values`` [nnz] starts at 0 and is the change (SHiRA, arXiv 2406.13175). W's own elements are kept
    beside it, so `disable` brings them back bit for bit."""

    _base: Tensor

    def __init__(self, *args: Any, alpha: float = 1.0, **kwargs: Any) -> None:
        self.alpha = _finite(alpha)
        super().__init__(*args, **kwargs)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Mask | Tensor, *, prune: bool = False, alpha: float = 1.0) -> SparseDeltaLinear:
        """Takes over `linear`'s own weight and bias (shared, not copied)."""
        alpha = _finite(alpha)
        self = super().from_linear(linear, mask, prune=prune)
        assert isinstance(self, SparseDeltaLinear)
        self.alpha = alpha
        return self

    def _start(self, chosen: Tensor) -> Tensor:
        self.register_buffer("_base", chosen)
        return torch.zeros_like(chosen, dtype=torch.float64 if chosen.dtype == torch.float64 else torch.float32)

    def _wanted(self) -> Tensor:
        return self._base.to(self.values.dtype) + self.alpha * self.values.detach()

    @torch.no_grad()
    def disable(self) -> None:
        """Puts W's own elements back until the next forward pass or `sync_`."""
        ops.move_all("scatter", [(self.weight.view(-1), self.index, self._base)])
        torch.autograd.graph.increment_version(self.weight)
        self._seen = None
