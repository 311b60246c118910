"""The quant family's backend "triton": the functions of fusedadapt/reference/quant.py, same names, same arguments, same bytes.

    w[n, k] = (value[code[n, k]] - zero[g]) * S[g];   y = x W^T + bias;   dx = dy W

quant_codec.py quantizes and dequantizes, quant_linear.py multiplies; quant_parts.py holds what they share: how a format looks to a kernel, what a
code and a stored scale are worth. Bytes moved are named there. Operands are fp32, bf16 or fp16 with unit stride inside a row. Nothing is compiled
anew for another N, K, T of the same parity or another number of groups.
"""

from .quant_codec import dequantize, encode, stats
from .quant_linear import linear, linear_dx, small
from .quant_parts import prepare

__all__ = ["dequantize", "encode", "linear", "linear_dx", "prepare", "small", "stats"]
