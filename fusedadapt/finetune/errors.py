class FinetuneError(RuntimeError):
    """What was expected, what arrived, how to fix it. ``python -m fusedadapt finetune`` prints it without a traceback and exits with 2."""
