"""The published methods on top of the primitives, under one roof."""

from .methods_dynamic import SET as SET
from .methods_dynamic import RigL as RigL
from .methods_dynamic import cosine_fraction as cosine_fraction
from .methods_finetune import LTSFT as LTSFT
from .methods_finetune import SaRA as SaRA
from .methods_finetune import compose as compose
from .methods_finetune import sara_lr as sara_lr
from .methods_prune import GradualMagnitudePruning as GradualMagnitudePruning
from .methods_prune import PruneReport as PruneReport
from .methods_prune import cubic_sparsity as cubic_sparsity
from .methods_prune import prune_model_ as prune_model_
from .methods_random import half_fine_tuning_ as half_fine_tuning_
from .methods_random import random_mask as random_mask
from .methods_random import shira_ as shira_
from .methods_random import shira_delta as shira_delta
from .methods_random import sparse_init_ as sparse_init_
