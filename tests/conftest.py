"""Shared setup: the Triton kernels run under the interpreter (decided before triton is first imported), torch uses the machine's cores."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, help="number of random optimizer configurations (default 2000)")


@pytest.fixture
def fuzz_count(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz"))


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
