"""Op schemas of torch.ops.fusedadapt: argument checks, fake kernels, FLOP formulas, and which backend runs."""
