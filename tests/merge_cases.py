"""Small models and helpers of the merge tests."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedadapt.sparse import merge
from fusedadapt.sparse import merge_methods as methods

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"a.weight": (7, 45), "b.bias": (45,), "c": (3, 4, 5), "scalar": (), "empty": (0, 4)}
WEIGHTS = [0.5, 1.0, 0.3]
SEED = 11


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Tiny tensors, and oracles of many small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return out | {"ids": torch.arange(5) + seed}


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return model(0)


@pytest.fixture(scope="module")
def tuned() -> list[dict[str, Tensor]]:
    return [model(i) for i in (1, 2, 3)]


def flat(state: dict[str, Tensor], name: str) -> np.ndarray:
    return state[name].double().reshape(-1).numpy()


def whole(state: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([flat(state, name) for name in SHAPES])


def deltas_of(base, tuned, name) -> list[np.ndarray]:
    return [flat(m, name) - flat(base, name) for m in tuned]


def check_each(merged, base, expected, lambda_=1.0):
    """expected(name) is the merged change of a tensor."""
    for name, shape in SHAPES.items():
        assert merged[name].shape == torch.Size(shape)
        np.testing.assert_allclose(flat(merged, name), flat(base, name) + lambda_ * expected(name), rtol=2e-5, atol=2e-6, err_msg=name)


def rows(name: str) -> int:
    shape = SHAPES[name]
    return shape[-1] if len(shape) > 1 else max(int(np.prod(shape)), 1)


def by_row(d: np.ndarray, row: int, change) -> np.ndarray:
    return np.concatenate([change(part) for part in d.reshape(-1, row)]) if d.size else d


EVERY = [(m, c) for m in methods.METHODS for c in methods.COMPAT] + [("pcb", "paper")]


def options_of(method: str) -> dict:
    spec = methods.METHODS.get(method)
    sparse = method == "pcb" or spec.trim or spec.drop
    return {"density": 0.5} if sparse else {}


def call(method, compat, base, models, **more):
    return merge(None if method == "linear" else base, models, method, compat=compat, seed=SEED, **(options_of(method) | more))


def hashes(state: dict[str, Tensor]) -> list[str]:
    return [hashlib.sha256(v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for v in state.values()]


def assert_same(one, two):
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name
