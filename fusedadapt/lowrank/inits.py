"""Initialisations of lora_A and lora_B that look at nothing, at the weight (PiSSA, OLoRA) or at the layer's inputs (CorDA; EVA is in `eva`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import lowrank as _ops  # noqa: F401 - defines torch.ops.fusedadapt.lr_*
from ..quant.tensor import quantize
from ..reference.lowrank import wide

if TYPE_CHECKING:
    from .layer import Init, LoRALinear


class Factors(NamedTuple):
    """A [r, K], B [N, r], and the weight [N, K] that goes with them: residual + s B A is the weight they were made from, up to one rounding of the
    residual to its dtype. Adapters saved from such a start are only right with this very residual."""

    A: Tensor
    B: Tensor
    residual: Tensor


def kaiming(A: Tensor, B: Tensor) -> None:
    """A kaiming-uniform with a = sqrt(5), B zero: LoRA's and PEFT's default."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)


def gaussian(A: Tensor, B: Tensor) -> None:
    """A from N(0, 1/r^2), B zero: PEFT's "gaussian"."""
    nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)


def random(A: Tensor, B: Tensor) -> None:
    """Both kaiming-uniform: the layer does not start as what it wraps (PEFT's init_lora_weights=False)."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))


def orthogonal(A: Tensor, B: Tensor) -> None:
    """A and B random in complementary halves of an orthonormal basis of rank space: B A is zero, they are not (r = 1: B is). PEFT's "orthogonal"."""
    r, dtype = A.shape[0], wide(A.dtype)
    q = torch.linalg.qr(torch.randn(r, r, dtype=dtype, device="cpu"))[0]
    A.copy_((torch.randn(A.shape[1], (r + 1) // 2, dtype=dtype, device="cpu") @ q[0::2]).T / 10)
    B.copy_(torch.randn(r // 2, B.shape[0], dtype=dtype, device="cpu").T @ q[1::2] / 10)


PLAIN: dict[str, Callable[[Tensor, Tensor], None]] = {"kaiming": kaiming, "gaussian": gaussian, "random": random, "orthogonal": orthogonal}


def pissa(weight: Tensor, r: int, scaling: float, *, niter: int | None = None, dtype: torch.dtype | None = None) -> Factors:
    """The r largest singular directions become the adapter (arXiv 2404.02948): A = sqrt(S / s) V^T, B = U sqrt(S / s).

    Args:
        weight: [N, K], any floating dtype; the SVD is in fp32 (fp64 for fp64).
        niter: randomised SVD with so many power iterations, drawn from torch's generator; None: the full SVD.
        dtype: of A and B, default fp32 (fp64). The residual is taken from what the rounding to it left.
    """
    _check_rank("pissa", weight, r)
    _check_scaling("pissa", scaling)
    w = weight.detach().to(wide(weight.dtype))
    if niter is None:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(w, r, niter=niter)
        vh = v.T
    root = (s[:r] / scaling).sqrt()
    return _factors(weight, root[:, None] * vh[:r], u[:, :r] * root, scaling, dtype)


def olora(weight: Tensor, r: int, scaling: float, *, dtype: torch.dtype | None = None) -> Factors:
    """QR of the weight: B = Q[:, :r], A = R[:r] (arXiv 2406.01775). The adapter is not divided by s, so s Q R is what leaves the weight, as in PEFT.

    Arguments as `pissa`.
    """
    _check_rank("olora", weight, r)
    q, upper = torch.linalg.qr(weight.detach().to(wide(weight.dtype)))
    return _factors(weight, upper[:r], q[:, :r], scaling, dtype)


def corda(weight: Tensor, covariance: Tensor, r: int, scaling: float, *, mode: str = "ipm", dtype: torch.dtype | None = None) -> Factors:
    """Context-oriented decomposition (arXiv 2406.05223): SVD of W C, with C^-1 moved back into A; C is the damped second moment of the inputs.

    Args:
        covariance: [K, K], see `Covariance`.
        mode: "ipm" trains the r largest directions (the task of the inputs), "kpm" the r smallest (the inputs' knowledge stays frozen).
        others: as `pissa`. All in fp64.

    Raises:
        ValueError: shapes or mode, a covariance that is zero or not finite.
    """
    _check_rank("corda", weight, r)
    _check_scaling("corda", scaling)
    k = weight.shape[1]
    if mode not in ("ipm", "kpm"):
        raise ValueError(f"corda: expected mode 'ipm' or 'kpm'; got {mode!r}; choose one")
    c = covariance.detach().to(weight.device, torch.float64)
    if tuple(c.shape) != (k, k) or not torch.isfinite(c).all() or not c.diagonal().mean() > 0:
        raise ValueError(f"corda: expected a finite covariance of shape ({k}, {k}), not zero; got {tuple(covariance.shape)}; collect inputs first")
    eye, damp = torch.eye(k, dtype=c.dtype, device=c.device), 0.01
    while True:  # damping doubles until C C^-1 is I: at the latest when the diagonal outweighs C
        damped = c + eye * (c.diagonal().mean() * damp)
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed.item() and torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight.detach().double() @ damped, full_matrices=False)
    part = slice(0, r) if mode == "ipm" else slice(s.shape[0] - r, None)
    root = (s[part] / scaling).sqrt()
    return _factors(weight, root[:, None] * (vh[part] @ inverse), u[:, part] * root, scaling, dtype)


def _check_rank(name: str, weight: Tensor, r: int) -> None:
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point matrix; got {weight.dtype} {tuple(weight.shape)}; dequantize it first")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(f"{name}: expected a rank of 1 to {min(weight.shape)} for a weight of shape {tuple(weight.shape)}; got {r}; lower it")


def _check_scaling(name: str, scaling: float) -> None:
    if not scaling > 0:
        raise ValueError(f"{name}: expected a positive scaling, which its root is divided by; got {scaling}; choose a positive lora_alpha")


def _factors(weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype | None) -> Factors:
    own = wide(weight.dtype)
    a, b = (part.to(dtype or own).contiguous() for part in (a, b))
    residual = weight.detach().clone(memory_format=torch.contiguous_format)
    torch.ops.fusedadapt.lr_merge_(residual, b.to(own) * -scaling, a, None)
    return Factors(a, b, residual)


def initialise(layer: LoRALinear, init: Init) -> None:
    """Fills ``layer``'s lora_A and lora_B, and rewrites its weight where the initialisation says so. Called under no_grad."""
    A, B = layer.lora_A, layer.lora_B
    weight = layer.weight if layer.format is None else layer.dequantize(torch.float32)
    if isinstance(init, Tensor):
        _check_shape("init", init, A)
        A.copy_(init)
        nn.init.zeros_(B)
        return
    if isinstance(init, bool):
        init = "kaiming" if init else "random"
    if isinstance(init, str):
        name, _, niter = init.partition("_niter_")
        if init in PLAIN:
            return PLAIN[init](A, B)
        if name == "pissa" and (not niter or niter.isdigit()):
            init = pissa(weight, layer.r, layer.scaling, niter=int(niter) if niter else None, dtype=A.dtype)
        elif init == "olora":
            init = olora(weight, layer.r, layer.scaling, dtype=A.dtype)
    if not isinstance(init, Factors):
        known = ", ".join((*PLAIN, "pissa", "pissa_niter_<n>", "olora"))
        raise ValueError(f"LoRALinear: expected init True, False, a tensor, Factors, or one of {known}; got {init!r}; name one of them")
    for own, new, what in ((A, init.A, "init.A"), (B, init.B, "init.B"), (weight, init.residual, "init.residual")):
        _check_shape(what, new, own)
    A.copy_(init.A)
    B.copy_(init.B)
    if layer.format is None:
        weight.copy_(init.residual)
    else:
        layer.write(quantize(init.residual, layer.format))


def _check_shape(name: str, new: Tensor, own: Tensor) -> None:
    if new.shape != own.shape:
        raise ValueError(f"LoRALinear: expected {name} of shape {tuple(own.shape)}; got {tuple(new.shape)}; make it for this layer and rank")


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block, ``see(name, x)`` gets the input of each layer that runs: x detached, of shape [..., K]."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0].detach())

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Covariance:
    """Mean over samples of x^T x, each sample divided by its largest |element|: what `corda` wants. fp64 [K, K].

    Samples are the matrices of the last two dimensions. (The official code divides by |max(x)|, which lets a sample of mostly negative values
    outweigh all others, and takes a whole batch for one sample.)
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """x: [T, K] or [..., T, K]. Raises ValueError if not finite. A sample of zeros counts and adds nothing."""
        x3 = x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1]).double()
        if not torch.isfinite(x3).all():
            raise ValueError("Covariance: expected finite inputs; got inf or nan; look at the data or the model's dtype")
        x3 = x3 / x3.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        flat = x3.reshape(-1, x.shape[-1])
        product = flat.T @ flat
        self.total = product if self.total is None else self.total + product
        self.samples += x3.shape[0]

    @property
    def value(self) -> Tensor:
        """[K, K]. Raises ValueError before the first sample."""
        if self.total is None or not self.samples:
            raise ValueError("Covariance: expected at least one sample; got none; run the model on data first")
        return self.total / self.samples
