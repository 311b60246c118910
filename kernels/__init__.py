"""Triton kernels, imported as `fusedadapt.kernels`. One file per family; `common` holds what they share."""
