"""torch's process-wide defaults are the user's: neither another default dtype nor another default device changes a number or a dtype of ours.

Kernels get addresses: a scratch tensor in the default dtype instead of fp32 is a write past its end. Each case runs in a process of its own, since
tables are made once.
"""

import json
import subprocess
import sys

import pytest

WORK = """
import hashlib, json, sys, torch, fusedadapt as fa
from fusedadapt import sparse
from fusedadapt.optim import OPTIMIZERS
torch.set_num_threads(1)
exec(sys.argv[1])
gen, cpu = torch.Generator("cpu").manual_seed(3), {"device": "cpu", "dtype": torch.float32}
draw = lambda *shape: torch.randn(shape, generator=gen, **cpu)
param = lambda *shape: torch.nn.Parameter(draw(*shape))
out = {}

def note(name, *tensors):
    found = [(t, t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for t in tensors]
    out[name] = [(str(t.dtype), str(t.device), hashlib.sha256(data).hexdigest()) for t, data in found]

for name, cls in OPTIMIZERS.items():
    for options in ({}, {"state_dtype": "int8", "max_grad_norm": 1.0}, {"state_dtype": "fp8"}):
        p = param(70, 70)
        opt = cls([p], **options)
        if hasattr(opt, "train"):
            opt.train()
        for _ in range(2):
            p.grad = draw(70, 70)
            p.hessian_diag = p.grad.abs()
            opt.step()
            opt.load_state_dict(opt.state_dict())
        note(f"{name} {options}", p, *(v for v in opt.state[p].values() if torch.is_tensor(v) and v.numel()))
p, keep = param(40, 40), draw(40, 40) > 0
opt = OPTIMIZERS["AdamW"]([p], masks={p: sparse.Mask.from_bool(keep)}, mask_state="compact")
p.grad = draw(40, 40)
opt.step()
if "device" not in sys.argv[1]:  # topk_mask over a whole tensor still makes its threshold on the default device
    note("grow", sparse.grow_prune(opt, p, k=9, grow="random").words)
for name in fa.quant.FORMATS:
    w, x = draw(9, 130), draw(5, 130).requires_grad_()
    q = fa.quantize(w, name, **({"double_quant": True} if name in ("nf4", "fp4") else {}))
    y = fa.quantized_linear(x, q)
    y.sum().backward()
    note(name, q.qdata.view(torch.uint8), *(t for t in q.parts[1:] if t is not None), q.dequantize(), y, x.grad)
    with fa.backend("reference"):
        note(f"{name} reference", fa.quantize(w, name).qdata.view(torch.uint8), q.dequantize())
for name in ("int8", "fp8_e4m3"):
    note(f"W8A8 {name}", fa.quantized_linear(draw(5, 128), fa.quantize(draw(8, 128), name), activations=name))
x, s = draw(6, 40).requires_grad_(), draw(1).abs().requires_grad_()
fa.quant.fake_quantize(x, s, quant_min=-8, quant_max=7).sum().backward()
note("fake quantization", x.grad, s.grad)
for method in fa.lowrank.METHODS:
    linear = torch.nn.Linear(20, 10, **cpu)
    linear.weight.data, linear.bias.data = draw(10, 20), draw(10)
    layer = fa.LoRALinear.from_linear(linear, r=4, method=method, lora_dropout=0.25)
    for t in layer.parameters():
        t.data = draw(*t.shape)
    x = draw(7, 20).requires_grad_()
    y = layer.eval()(x)
    layer.merge()
    note(method, y, layer.scaling_argument() if torch.is_tensor(layer.scaling_argument()) else layer.lora_scaling, layer(x))
y = fa.lora_linear(x, draw(10, 20), draw(3, 20), draw(10, 3), dropout_p=0.5, seed=1, row_scale=draw(10))
y.sum().backward()
note("dropout", y, x.grad)
w, other = draw(16, 32), draw(16, 32)
note("masks", sparse.wanda_mask(w, draw(50, 32), 0.5).words, sparse.nm_mask(w, 2, 4).words, sparse.topk_mask(w, density=0.3, scope="row").words)
for method in ("ties", "dare_ties", "della"):
    note(method, sparse.merge({"w": w}, [{"w": other}, {"w": w + other}], method, density=0.5)["w"])
chosen = sparse.MaskedLinear.from_linear(linear, sparse.Mask.from_bool(draw(10, 20) > 0))
y = chosen(draw(7, 20))
y.sum().backward()
note("masked linear", y, chosen.values.grad)
print(json.dumps(out))
"""


def work(setting: str) -> dict:
    done = subprocess.run([sys.executable, "-c", WORK, setting], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain() -> dict:
    return work("pass")


SETTINGS = ["torch.set_default_dtype(torch.float64)", "torch.set_default_dtype(torch.bfloat16)", "torch.set_default_device('meta')"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_changes(setting: str, plain: dict) -> None:
    other = work(setting)
    assert [name for name in other if plain[name] != other[name]] == []
