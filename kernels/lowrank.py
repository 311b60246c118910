"""The low-rank family's backend "triton": the functions of fusedadapt/reference/lowrank.py, same names, same arguments, same results.

    U = drop(x) A^T;  y += V B^T;  dV = (g dy) B,  M_B = (g dy)^T V;  M = dU^T drop(x);  dx += drop(dU A);  W <- g (W + V A)

lowrank_shrink.py reads x, lowrank_grads.py reads dy and x in the backward, lowrank_expand.py adds in place; lowrank_parts.py holds what they
share, lowrank_tiles.py the tile sizes. Large operands are fp32, bf16 or fp16 with unit stride inside a row; A and B any of these, with any
strides; U, V and gradients in rank space fp32. Nothing is compiled anew for another scale, p, seed, number of tokens or rank within the same
power of two.
"""

from .lowrank_expand import add_, dropout, merge_, scale_add_
from .lowrank_grads import bwd_dy, bwd_x
from .lowrank_shrink import shrink, skinny_w

__all__ = ["add_", "bwd_dy", "bwd_x", "dropout", "merge_", "scale_add_", "shrink", "skinny_w"]
