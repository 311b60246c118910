"""`python -m fusedadapt bench optim`: the optimizers against torch and others, side by side in one process."""

from .cli import main

__all__ = ["main"]
