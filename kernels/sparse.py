"""The sparse family's backend "triton": the functions of `reference.sparse_parts`, bit for bit, same names and arguments.

sparse_select.py selects over lists of tensors, sparse_rows.py within rows, sparse_stats.py measures, sparse_mask.py has bitmasks and moves between
dense tensors and their chosen elements, sparse_merge.py merges models; sparse_parts.py holds what the first three share.
"""

from .sparse_mask import from_indices, indices, move_all, pack, prefix, unpack
from .sparse_merge import merge_, norms, votes
from .sparse_rows import nm, rows
from .sparse_select import LEVELS, LEVELS16, cuts, histogram, mark, select
from .sparse_stats import colstat, energy

__all__ = ["LEVELS", "LEVELS16", "colstat", "cuts", "energy", "from_indices", "histogram", "indices", "mark", "merge_", "move_all", "nm", "norms",
           "pack", "prefix", "rows", "select", "unpack", "votes"]  # fmt: skip
