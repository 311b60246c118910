"""Small parameters, gradients and snapshots that several test files share."""

import copy

import torch


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in ((7, 5), (33,), (2, 3, 4))]


def feed(params: list, seed: int, scale: float = 1.0) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=gen) * scale).to(p.dtype)


def snapshot(params: list, opt) -> tuple:
    return [p.detach().clone() for p in params], copy.deepcopy({i: dict(opt.state[p]) for i, p in enumerate(params)})


def unchanged(before: tuple, params: list, opt) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(before[0], params, strict=True))
    return same and all(torch.equal(v, opt.state[p][k]) for i, p in enumerate(params) for k, v in before[1][i].items())
