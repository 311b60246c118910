"""`python -m fusedadapt bench optim|lowrank`: optimizers and adapters against torch and others, side by side in one process."""

from .cli import main

__all__ = ["main"]
