"""LoRALinear as a module: sharing, copies, state dicts, run-time values, compilers, autocast, checkpointing, errors."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedadapt as fa
from fusedadapt.lowrank import METHODS, LoRALinear, Method
from fusedadapt.lowrank.methods import Arguments, Part

K, N = 10, 7


def make(method="lora", dtype=torch.float32, p=0.0, bias=True, **options):
    torch.manual_seed(1)
    layer = LoRALinear(K, N, bias, r=3, lora_alpha=6, lora_dropout=p, method=method, dtype=dtype, **options)
    with torch.no_grad():
        for part in METHODS[method].parts:
            p_ = getattr(layer, part.name)
            p_.add_(torch.randn(p_.shape).to(p_) * 0.2)
    return layer


every_method = pytest.mark.parametrize("method", list(METHODS))


def test_is_public_and_a_linear():
    assert fa.LoRALinear is LoRALinear and isinstance(make(), nn.Linear)
    assert "method=lora, r=3, scaling=2, dropout=0.1" in repr(make(p=0.1)) and "r=" not in repr(make("ia3"))


@every_method
def test_only_the_adapter_is_trained(method):
    layer = make(method)
    names = {part.name for part in METHODS[method].parts}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == names
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"weight", "bias"}


def test_from_linear_shares_the_weight():
    base = nn.Linear(K, N, dtype=torch.bfloat16).eval()
    layer = LoRALinear.from_linear(base, r=3, lora_alpha=6, lora_dropout=0.5)
    assert layer.weight is base.weight and layer.bias is base.bias and not base.weight.requires_grad and not layer.training
    assert layer.lora_A.dtype == torch.float32 and layer.lora_A.shape == (3, K) and layer.lora_B.shape == (N, 3) and layer.scaling == 2.0
    x = torch.randn(4, K, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), base(x))
    assert LoRALinear.from_linear(base, r=3, adapter_dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16
    assert LoRALinear.from_linear(nn.Linear(K, N, dtype=torch.float64), r=3).lora_A.dtype == torch.float64


@every_method
def test_copies_are_equal_and_independent(method):
    layer = make(method, p=0.25).eval()
    layer.scaling = 0.75
    layer.merge()
    layer.unmerge()
    x = torch.randn(4, K)
    want = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(x), want) and twin.scaling == layer.scaling and twin.lora_dropout == 0.25
        twin.scaling = 3.0
        assert layer.scaling == 0.75
        merged = copy.deepcopy(twin)
        merged.merge()
        assert copy.deepcopy(merged).unmerge().exact and not layer.merged


@every_method
def test_state_dict_round_trip(method):
    layer, twin = make(method), LoRALinear(K, N, r=3, lora_alpha=1, method=method)
    layer.scaling = 0.3
    state = layer.state_dict()
    assert state["_extra_state"].dtype == torch.float64  # a plain tensor: safetensors can hold it
    twin.load_state_dict(state)
    x = torch.randn(4, K)
    assert torch.equal(twin(x), layer(x)) and twin.scaling == layer.scaling == pytest.approx(0.3)
    own = twin.scaling
    twin.load_state_dict({k: v for k, v in state.items() if k != "_extra_state"})  # parameters alone are a whole checkpoint
    assert twin.scaling == own
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict({k: v for k, v in state.items() if k != "weight"})


def test_safetensors_holds_the_state():
    saved = pytest.importorskip("safetensors.torch")
    layer, twin = make("dora"), LoRALinear(K, N, r=3, lora_alpha=1, method="dora")
    twin.load_state_dict(saved.load(saved.save(layer.state_dict())))
    x = torch.randn(4, K)
    assert torch.equal(twin(x), layer(x))


def test_a_new_method_is_a_record_and_a_function(monkeypatch):
    """Low rank with a trained gate per rank and a trained output scale: nothing but the record knows of it."""

    def gated(layer, dtype):
        return Arguments(layer.lora_A, layer.lora_B, layer.bias, rank_gate=layer.gate, row_scale=layer.out)

    parts = (
        Part("lora_A", "rK", nn.init.ones_),
        Part("lora_B", "Nr", nn.init.ones_),
        Part("gate", "r", nn.init.ones_),
        Part("out", "N", nn.init.ones_),
    )
    monkeypatch.setitem(METHODS, "gated", Method("gated", "none", parts, gated, lambda alpha, r: alpha / r, inits=True))
    layer, x = make("gated", dtype=torch.float64), torch.randn(5, K, dtype=torch.float64)
    delta = layer.scaling * layer.lora_B @ torch.diag(layer.gate) @ layer.lora_A
    want = layer.out * (x @ (layer.weight + delta).T) + layer.bias
    torch.testing.assert_close(layer(x), want)
    trained = [layer.gate, layer.out, layer.lora_A, layer.lora_B]
    for got, expected in zip(torch.autograd.grad(layer(x).sum(), trained), torch.autograd.grad(want.sum(), trained)):
        torch.testing.assert_close(got, expected)
    layer.merge()
    torch.testing.assert_close(layer(x), want)
    assert layer.unmerge().exact


def test_loading_rounds_nothing():
    wide, narrow = make(dtype=torch.float32), make(dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in narrow.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0\.weight: expected a dtype that torch.bfloat16 holds exactly; got torch.float32"):
        nn.Sequential(narrow).load_state_dict(nn.Sequential(wide).state_dict())
    assert all(torch.equal(before[k], v) for k, v in narrow.state_dict().items())
    narrow.load_state_dict(wide.state_dict(), assign=True)
    assert narrow.weight.dtype == torch.float32
    wide.load_state_dict(make(dtype=torch.bfloat16).state_dict())
    assert wide.weight.dtype == torch.float32 and torch.equal(wide.weight, make(dtype=torch.bfloat16).weight.float())


@every_method
def test_merged_state_goes_with_the_weight(method):
    layer, twin = make(method).eval(), make(method).eval()
    x = torch.randn(4, K)
    want = layer(x)
    layer.merge()
    twin.load_state_dict(layer.state_dict())
    assert twin.merged  # else the adapter would count twice
    torch.testing.assert_close(twin(x), want)
    with pytest.raises(RuntimeError, match="a state dict holds the merged one only"):
        twin.unmerge()
    layer.unmerge()
    twin.load_state_dict(layer.state_dict())
    assert not twin.merged and torch.equal(twin(x), layer(x))
    layer.merge()
    layer.load_state_dict({k: v for k, v in twin.state_dict().items() if k not in ("weight", "bias")}, strict=False)
    assert layer.merged  # adapters alone change nothing about the weight


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "ssf"])
def test_made_on_the_meta_device_and_filled_later(method):
    """Shapes without memory, dropout included; the scalars stay numbers."""
    whole = make(method, p=0.25)
    with torch.device("meta"):
        layer = LoRALinear(K, N, r=3, lora_alpha=6, lora_dropout=0.25, method=method)
        x = torch.empty(3, K, requires_grad=True)
    assert layer(x).shape == (3, N) and layer.scaling == whole.scaling and layer.lora_dropout == 0.25
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    layer.to_empty(device="cpu").load_state_dict(whole.state_dict())
    given = torch.randn(3, K)
    assert torch.equal(layer.eval()(given), whole.eval()(given))


def test_to_moves_the_module_and_not_its_scalars():
    layer = make(p=0.5).to(torch.bfloat16)
    assert layer.lora_scaling.dtype == torch.float64 and layer.scaling == 2.0 and layer.lora_dropout == 0.5
    assert layer.weight.dtype == layer.lora_A.dtype == torch.bfloat16
    meta = make().to("meta")
    assert meta.lora_scaling.device.type == "cpu"
    with pytest.raises(ValueError, match="on meta; dequantize or load it first"):
        meta.merge()
    built = LoRALinear(K, N, r=3, device="meta", init=True).to_empty(device="cpu")
    built.reset_parameters()
    assert torch.isfinite(built(torch.randn(2, K))).all() and not built.lora_B.any()


def test_reset():
    layer = make()
    layer.reset_adapter()
    assert layer.lora_A.any() and not layer.lora_B.any()
    layer.reset_adapter("gaussian")
    with pytest.raises(ValueError, match="expected init=True"):
        make("ia3").reset_adapter("gaussian")


def test_dropout_only_in_training_and_from_torchs_generator():
    layer, x = make(p=0.5), torch.randn(20, K)
    torch.manual_seed(3)
    one, other = layer(x), layer(x)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.equal(layer(x), one)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train().lora_dropout = 0.0
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer.eval()(x)) and torch.equal(torch.get_rng_state(), state)  # p = 0 draws nothing


@pytest.mark.parametrize(("method", "options"), [(m, {}) for m in METHODS] + [("dora", {"dropout_form": "peft"})], ids=str)
def test_checkpointing_replays_the_mask(method, options):
    layer = make(method, p=0.4, **options)
    x = torch.randn(12, K, requires_grad=True)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(7)
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@every_method
def test_autocast(method):
    layer, x = make(method), torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=3e-2, atol=3e-2)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


traces = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated:DeprecationWarning")


@traces
@every_method
def test_torch_jit_traces_it(method):
    layer, x = make(method, p=0.5).eval(), torch.randn(5, K, requires_grad=True)
    traced = torch.jit.trace(layer, (torch.randn(3, K),))
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.25)  # the graph reads parameters, not what they were
    grads = [torch.autograd.grad(f(x).square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]) for f in (traced, layer)]
    assert torch.equal(traced(x), layer(x)) and all(torch.equal(a, b) for a, b in zip(*grads))
    traced = torch.jit.trace(layer.train(), (x,), check_trace=False)  # its check would compare two masks
    if method in ("lora", "dora"):
        assert not torch.equal(traced(x), traced(x))


@traces
def test_torch_jit_and_two_masked_products():
    layer = make("dora", p=0.5, dropout_form="peft")
    with pytest.raises(RuntimeError, match="fusedadapt.dora_linear_peft: expected a call without dropout inside torch.jit.trace"):
        torch.jit.trace(layer, (torch.randn(3, K),))


@pytest.mark.parametrize(("method", "options"), [(m, {}) for m in METHODS] + [("dora", {"dropout_form": "peft"})], ids=str)
def test_compiles_whole_and_once(method, options):
    torch._dynamo.reset()
    layer = make(method, p=0.5 if METHODS[method].ranked else 0.0, **options)
    twin = copy.deepcopy(layer)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for scaling, p, rows in ((2.0, 0.5, 6), (0.3, 0.5, 6), (0.3, 0.25, 6), (1.7, 0.25, 9)):
        if METHODS[method].ranked:
            for module in (layer, twin):
                module.scaling, module.lora_dropout = scaling, p
        x = torch.randn(rows, K)
        results = []
        for run, module in ((compiled, layer), (twin, twin)):
            torch.manual_seed(5)
            module.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y, *(q.grad for q in module.parameters() if q.requires_grad)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 1


def test_compiled_by_inductor():
    torch._dynamo.reset()
    layer = make(p=0.0)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, K)
    for scaling in (2.0, 0.5):
        layer.scaling = scaling
        with torch._dynamo.config.patch(error_on_recompile=scaling == 0.5):
            y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        layer.zero_grad()
        y.sum().backward()
        got = layer.lora_A.grad.clone()
        layer.zero_grad()
        layer(x).sum().backward()
        torch.testing.assert_close(got, layer.lora_A.grad)


def test_saves_next_to_nothing_for_backward():
    layer = LoRALinear(512, 512, r=4, lora_dropout=0.1)
    x = torch.randn(64, 512, requires_grad=True)
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    for own in (x, *layer.parameters()):
        sizes.pop(own.untyped_storage().data_ptr(), None)
    assert sum(sizes.values()) <= 64 * 4 * 4 + 64


@every_method
def test_explain(method, capsys):
    model = nn.Sequential(nn.ReLU(), make(method))
    ((what, backend, why),) = fa.explain(model)
    assert what.startswith(f"1.LoRALinear[{method}] float32 cpu") and backend in ("cpp", "reference") and "torch's GEMM" in why
    model[1].merge()
    assert fa.explain(model) == [(what, "torch", "merged: one dense product")]
    ((_, _, why),) = fa.explain(make("dora", dropout_form="peft"))
    assert "second dense product" in why
    assert "LoRALinear" in capsys.readouterr().out


def test_errors_name_what_was_wrong():
    base = nn.Linear(K, N)
    for arguments, error, text in (
        ({"method": "lorra"}, ValueError, "expected a method of lora, rslora"),
        ({"r": 0}, ValueError, "rank r >= 1; got 0"),
        ({"r": 2.5}, ValueError, "rank r >= 1; got 2.5"),
        ({"r": True}, ValueError, "rank r >= 1; got True"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout in \[0, 1\); got 1.0"),
        ({"lora_dropout": float("nan")}, ValueError, "lora_dropout"),
        ({"dropout_form": "peft"}, TypeError, "got \\['dropout_form'\\]"),
        ({"method": "dora", "dropout_form": "both"}, ValueError, "'paper' or 'peft'"),
        ({"method": "ia3", "init": "pissa"}, ValueError, "expected init=True"),
        ({"lora_alpha": float("nan")}, ValueError, "finite lora_alpha"),
        ({"lora_alpha": None}, ValueError, "finite lora_alpha; got None"),
        ({"lora_dropout": "0.1"}, ValueError, r"lora_dropout in \[0, 1\); got '0.1'"),
        ({"adapter_dtype": torch.int32}, ValueError, "floating-point adapter_dtype"),
        ({"adapter_dtype": torch.float8_e4m3fn}, ValueError, "floating-point adapter_dtype: .*; got torch.float8_e4m3fn"),
        ({"adapter_dtype": "bf16"}, ValueError, "floating-point adapter_dtype: .*; got 'bf16'"),
    ):
        with pytest.raises(error, match=text):
            LoRALinear.from_linear(base, **arguments)
        with pytest.raises(error, match=text):
            LoRALinear(K, N, **arguments)
    assert base.weight.requires_grad  # nothing changed
    for wrong in (nn.Conv1d(2, 2, 1), LoRALinear(K, N), fa.MaskedLinear(K, N, mask=torch.ones(N, K, dtype=torch.bool))):
        with pytest.raises(TypeError, match="expected a torch.nn.Linear"):
            LoRALinear.from_linear(wrong)
    layer = make()
    with pytest.raises(ValueError, match="lora_dropout"):
        layer.lora_dropout = -0.1
    with pytest.raises(ValueError, match="finite scaling; got nan"):
        layer.scaling = float("nan")
    assert layer.scaling == layer.lora_alpha / layer.r
    with pytest.raises(ValueError, match=f"weight of shape \\({N}, {K + 1}\\)"):
        layer(torch.randn(2, K + 1))
    with pytest.raises(ValueError, match="weight in x's dtype"):
        layer(torch.randn(2, K, dtype=torch.bfloat16))
