"""Low-rank adapters: one primitive, y = g * (x W^T + s mid(drop(x) A^T) B^T) + b, fused forward and backward."""

from .adalora import RankAllocator as RankAllocator
from .adalora import orthogonal_penalty as orthogonal_penalty
from .functional import Output as Output
from .functional import Segment as Segment
from .functional import lora_linear as lora_linear
from .functional import lora_linear_group as lora_linear_group
from .inits import Covariance as Covariance
from .inits import Factors as Factors
from .inits import corda as corda
from .inits import olora as olora
from .inits import pissa as pissa
from .inits import watch_inputs as watch_inputs
from .layer import LoRALinear as LoRALinear
from .loraplus import loraplus_groups as loraplus_groups
from .merge import MergeReport as MergeReport
from .merge import merge_adapters as merge_adapters
from .merge import unmerge_adapters as unmerge_adapters
from .methods import METHODS as METHODS
from .methods import Method as Method
from .methods import VeraProjection as VeraProjection
from .pca import EvaInit as EvaInit
from .pca import IncrementalPCA as IncrementalPCA
from .pca import eva as eva
