"""Masks, exact selection, masked training, deltas and merging."""

from .delta import SparseDelta as SparseDelta
from .grow import grow_prune as grow_prune
from .layers import MaskedLinear as MaskedLinear
from .layers import SparseDeltaLinear as SparseDeltaLinear
from .layers import masked_wgrad as masked_wgrad
from .mask import Mask as Mask
from .mask import load_masks as load_masks
from .mask import save_masks as save_masks
from .merge import merge as merge
from .select import Threshold as Threshold
from .select import nm_mask as nm_mask
from .select import topk_mask as topk_mask
from .select import topk_threshold as topk_threshold
