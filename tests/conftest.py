"""Shared setup: the Triton kernels run under the interpreter (decided before triton is first imported), torch uses the machine's cores."""

import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, help="number of random optimizer configurations (default 2000)")


@pytest.fixture
def fuzz_count(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz"))


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For oracles that are many small operations."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of ones: what a kernel forgets to write is seen."""
    import torch

    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.numel():
            out.view(torch.uint8).fill_(1 if out.dtype == torch.bool else 0xFF)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton interpreter patches triton.language anew at every call of a device function, 1.5 ms each; the launch has done so already."""
    from triton.runtime import interpreter

    call = interpreter.InterpretedFunction.__call__

    def quick(self, *args, **kwargs):
        foreign = self.fn.__module__.startswith("triton.")  # tl.philox and its like see other modules, which the launch did not patch
        return call(self, *args, **kwargs) if foreign else self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", quick)


@pytest.fixture
def compiled_triton() -> None:
    """A GPU is tested with compiled kernels: interpreted ones would pass there too, on the host."""
    triton = pytest.importorskip("triton")
    import torch

    if torch.cuda.is_available():
        assert not triton.knobs.runtime.interpret, "run the GPU tests with TRITON_INTERPRET=0 (bench/gpu.sh does)"
