"""The truth: every operation in pure PyTorch, dtype-generic, meant to be read beside the paper and to run in fp64."""
