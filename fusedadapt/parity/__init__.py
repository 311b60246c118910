"""`python -m fusedadapt parity optim`: how far every optimizer is from the float64 truth, for ours or for another library."""

from .cli import main

__all__ = ["main"]
