"""fusedadapt: fused optimizer steps written by hand in Triton, CUDA C++ and C++, defined once in pure PyTorch and proved equal.

`import fusedadapt` loads neither torch nor Triton nor the compiled core, reads no environment variable and asks no GPU: every public name
below arrives on first use.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    import fusedadapt.testing as testing

    from . import lowrank as lowrank
    from . import optim as optim
    from . import quant as quant
    from . import sparse as sparse
    from .config import backend as backend
    from .config import strict as strict
    from .dispatch import explain as explain
    from .integrations.peft import patch as patch
    from .integrations.peft import unpatch as unpatch
    from .lowrank.functional import lora_linear as lora_linear
    from .lowrank.layer import LoRALinear as LoRALinear
    from .quant.layer import QuantizedLinear as QuantizedLinear
    from .quant.linear import quantized_linear as quantized_linear
    from .quant.model import quantize_model_ as quantize_model_
    from .quant.tensor import QuantizedTensor as QuantizedTensor
    from .quant.tensor import quantize as quantize
    from .sparse.layers import MaskedLinear as MaskedLinear

__version__ = "0.1.0"
__all__ = [
    "LoRALinear",
    "MaskedLinear",
    "QuantizedLinear",
    "QuantizedTensor",
    "__version__",
    "backend",
    "explain",
    "lora_linear",
    "lowrank",
    "optim",
    "patch",
    "quant",
    "quantize",
    "quantize_model_",
    "quantized_linear",
    "sparse",
    "strict",
    "testing",
    "unpatch",
]

# public name -> (submodule, attribute); no attribute means the submodule itself
_LAZY: dict[str, tuple[str, str]] = {
    "LoRALinear": ("lowrank.layer", "LoRALinear"),
    "QuantizedLinear": ("quant.layer", "QuantizedLinear"),
    "QuantizedTensor": ("quant.tensor", "QuantizedTensor"),
    "MaskedLinear": ("sparse.layers", "MaskedLinear"),
    "backend": ("config", "backend"),
    "explain": ("dispatch", "explain"),
    "lora_linear": ("lowrank.functional", "lora_linear"),
    "lowrank": ("lowrank", ""),
    "optim": ("optim", ""),
    "patch": ("integrations.peft", "patch"),
    "quant": ("quant", ""),
    "quantized_linear": ("quant.linear", "quantized_linear"),
    "quantize_model_": ("quant.model", "quantize_model_"),
    "quantize": ("quant.tensor", "quantize"),
    "sparse": ("sparse", ""),
    "strict": ("config", "strict"),
    "testing": ("testing", ""),
    "unpatch": ("integrations.peft", "unpatch"),
}

# In a wheel kernels/ and bench/ lie inside this package. In a checkout and in an editable install they lie beside it: an install-time
# mapping does not reach those two, so the search path is extended instead. Only a real checkout qualifies: in site-packages the folder
# beside us belongs to everyone, and a `kernels` there is another project's.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "CMakeLists.txt").is_file() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fusedadapt' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = _import_module(f"{__name__}.{module}")
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
