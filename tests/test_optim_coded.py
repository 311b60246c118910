"""States of one byte an element: the format against fp64, the same bits on every backend, masks, checkpoints and what is refused."""

import copy

import pytest
import torch

from fusedadapt import _core, checkpoint
from fusedadapt.optim import OPTIMIZERS, AdaBelief, AdamW, Lion, RMSprop, from_torch, to_torch
from fusedadapt.optim import coded as states
from fusedadapt.optim.compact import index_of
from fusedadapt.optim.spec import CODED, RULES
from fusedadapt.optim.table import flat
from fusedadapt.reference import lowbit

F = torch.float32
KINDS = ("signed", "unsigned", "expanded")
ISAS = [isa for isa in ("base", "avx2", "avx512") if _core.use_isa(isa)]
CASES = [(name, k) for name, cls in OPTIMIZERS.items() for k, options in enumerate(cls.examples) if not options.get("centered")]
INEXACT = [("AdaHessian", 1)]  # pow: a value between two codes may take either


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    _core.use_isa(ISAS[-1])
    torch.set_num_threads(threads)


def values(kind: str, n: int, spread: float, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    v = torch.randn(n, generator=gen) * 10.0 ** (-spread * torch.rand(n, generator=gen))
    v[torch.rand(n, generator=gen) < 0.05] = 0.0
    return v.square() if kind == "unsigned" else v


# --- the format ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_published_one(signed):
    table = lowbit.dynamic_map(signed)
    assert table.numel() == 256 and bool((table[1:] > table[:-1]).all()) and table[255] == 1.0 and table[lowbit.zero_code(KINDS[1 - signed])] == 0.0
    decades = [torch.linspace(0.1, 1, (1 if signed else 2) * 2**e + 1, dtype=torch.float64) for e in range(7)]
    positive = torch.cat([10.0 ** (e - 6) * (d[1:] + d[:-1]) / 2 for e, d in enumerate(decades)])
    exact = torch.cat([-positive.flip(0) if signed else positive[:0], torch.zeros(1), positive, torch.ones(1)])
    assert ((table - exact).abs() <= 1e-7 * exact.abs()).all()
    assert torch.equal(lowbit.dynamic_code(table, signed), torch.arange(256, dtype=torch.uint8))
    assert pytest.approx(float(table[0]), rel=1e-6) == (-0.99296875 if signed else 0.0)


def test_the_map_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed=signed).cpu()
        assert torch.allclose(lowbit.dynamic_map(signed), theirs, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("spread", [0.0, 2.0, 9.0])
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_error_is_half_a_code_step(kind, spread):
    """Against the nearest value of the map, in fp64. A positive element may also get the smallest positive value where zero is nearer."""
    v = values(kind, 40_000, spread)
    codes, scale = lowbit.encode(v, kind, 256)
    table, per = lowbit.dynamic_map(kind == "signed").double(), scale.double().repeat_interleave(256)[: v.numel()]
    x = v.double() / per
    middle = (table[1:] + table[:-1]) / 2
    edges = torch.cat([torch.tensor([-torch.inf]), middle, torch.tensor([torch.inf])])
    low, high = edges[codes.long()], edges[codes.long() + 1]
    slack = 1e-4 * (high - low).nan_to_num(posinf=0.01, neginf=0.01).clamp(max=0.01)
    fits = (x >= low - slack) & (x <= high + slack)
    lifted = (codes == 1) & (v > 0) & (x < low) if kind == "unsigned" else torch.zeros_like(fits)
    assert bool((fits | lifted).all())
    decoded = lowbit.decode(codes, scale, kind, 256)
    assert torch.equal(decoded == 0, v == 0) if kind == "unsigned" else bool((decoded[v == 0] == 0).all())
    again = lowbit.encode(decoded, kind, 256)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)


@pytest.mark.parametrize("spread", [0.0, 0.05, 2.0, 9.0])
def test_expanded_error_is_half_a_step(spread):
    v = values("expanded", 20_000, spread)
    codes, scale = lowbit.encode(v, "expanded", 128)
    absmax, k = (s.double().repeat_interleave(128)[: v.numel()] for s in scale.unbind(1))
    assert bool(((scale[:, 1] >= 1 / 16) & (scale[:, 1] <= 8) & (scale[:, 1] * 16 == (scale[:, 1] * 16).round())).all())
    q, got = 448.0 * (v.double().abs() / absmax) ** k, lowbit.e4m3_magnitude(codes).double()
    step = torch.where(got < 2.0**-6, 2.0**-9, 2.0 ** (torch.log2(got.clamp(min=2.0**-6)).floor() - 3))
    assert bool(((q - got).abs() <= step * 0.5001 + q * 2e-6).all())
    assert torch.equal((codes & 127) == 0, v == 0), "what is not zero stays that"
    assert torch.equal(codes >= 128, v < 0)
    decoded = lowbit.decode(codes, scale, "expanded", 128).double()
    exact = absmax * (got / 448.0) ** (1 / k) * v.sign()
    assert ((decoded - exact).abs() <= 3e-6 * exact.abs()).all()


def test_series_are_accurate():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).clamp(min=1e-6)
    assert (lowbit.log2_series(x).double() - x.double().log2()).abs().max() < 1e-6
    y = -118.0 * x
    assert (lowbit.exp2_series(y).double() / 2.0 ** y.double() - 1).abs().max() < 2e-7


def test_expansion_is_capped():
    for ratio, expected in ((1.0, 8.0), (0.9, 8.0), (0.5, 8.0), (2.0**-17, 0.9375), (2.0**-120, 0.125)):
        assert float(lowbit.expansion(torch.tensor([ratio]))) == expected


@pytest.mark.parametrize("backend", ["reference", *ISAS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, 1e-37])
def test_odd_blocks(kind, bad, backend):
    """A NaN or an infinity takes its block along, all of it; other blocks and blocks of zeros are none of its business."""
    opt_class, name = (Lion, "exp_avg") if kind != "unsigned" else (OPTIMIZERS["Adagrad"], "sum")
    if backend != "reference":
        _core.use_isa(backend)
    p = torch.nn.Parameter(torch.zeros(4096))
    opt = opt_class(
        [p], lr=1e-3, state_dtype="fp8" if kind == "expanded" else "int8", state_block=256, backend="reference" if backend == "reference" else "cpp"
    )
    p.grad = torch.ones(4096)
    p.grad[256:512] = bad if abs(bad) < 1 else 1.0
    p.grad[300] = bad
    opt.step()
    state = opt.state[p]
    full = states.decode(state, name)
    assert bool(full[:256].isfinite().all()) and bool(full[512:].isfinite().all()) and bool((full[512:] != 0).all())
    if abs(bad) < 1:
        assert not full[256:512].any() and float(state[f"{name}_scale"].view(16, -1)[1, 0]) == 0.0
    else:
        assert bool(full[256:512].isnan().all())
    assert bool((state[name][256:512] == lowbit.zero_code(kind)).all())


# --- every rule, every backend -----------------------------------------------------------------------------------------------------------


class Run:
    """A large parameter in another memory order, one just large enough, one too small, and a bf16 one."""

    def __init__(self, name: str, options: dict, backend: str | None, **extras):
        gen = torch.Generator().manual_seed(3)
        shapes, dtypes = ((70, 131), (4096,), (4095,), (5000,)), (F, F, F, torch.bfloat16)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=gen).to(d)) for s, d in zip(shapes, dtypes)]
        base = self.params[0].data
        self.params[0].data = base.t().contiguous().t()
        if "density" in extras:
            density = extras.pop("density")
            masks = {p: torch.rand(p.shape, generator=gen) < density for p in self.params[:2]}
            masks[self.params[1]][512:1024] = False  # whole blocks without a trainable element
            extras["masks"] = masks
        self.name, self.opt = name, OPTIMIZERS[name](self.params, backend=backend, **({"lr": 0.01} | options), **extras)
        if hasattr(self.opt, "train"):
            self.opt.train()

    def step(self, t: int) -> None:
        gen = torch.Generator().manual_seed(100 + t)
        for p in self.params:
            g = torch.randn(p.shape, generator=gen) * 10.0 ** torch.randint(-3, 1, p.shape, generator=gen)
            p.grad = g.to(p.dtype)
            if self.name == "AdaHessian":
                p.hessian_diag = g.abs()
        self.opt.step()

    def bits(self) -> dict[str, torch.Tensor]:
        return {
            f"{i}.{k}": v
            for i, p in enumerate(self.params)
            for k, v in [("p", p.detach()), *self.opt.state[p].items()]
            if isinstance(v, torch.Tensor)
        }


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k].nan_to_num(nan=7e7), b[k].nan_to_num(nan=7e7)), k


@pytest.mark.parametrize("state_dtype", CODED)
@pytest.mark.parametrize(("name", "k"), CASES)
def test_same_bits_as_the_reference(name, k, state_dtype):
    options = OPTIMIZERS[name].examples[k]
    truth = Run(name, options, "reference", state_dtype=state_dtype)
    for t in range(2):
        truth.step(t)
    rule = RULES[truth.opt._rule(truth.opt.param_groups[0])]
    for isa in ISAS:
        _core.use_isa(isa)
        run = Run(name, options, "cpp", state_dtype=state_dtype)
        for t in range(2):
            run.step(t)
        if (name, k) in INEXACT:
            assert all((p.detach() - q.detach()).abs().max() < 1e-3 for p, q in zip(truth.params, run.params))
        else:
            same(truth.bits(), run.bits())
        kinds = {(p.numel() >= 4096, run.opt.state[p][s].dtype) for p in run.params for s in set(rule.states[: rule.stored]) - {"z"}}
        assert kinds <= {(True, torch.uint8), (False, F)}


@pytest.mark.parametrize("block", [32, 64, 512, 2048])
@pytest.mark.parametrize("state_dtype", CODED)
@pytest.mark.parametrize("mask_state", ["dense", "compact"])
def test_blocks_masks_and_threads(mask_state, state_dtype, block):
    extras = {"state_dtype": state_dtype, "state_block": block, "density": 0.9, "mask_state": mask_state, "weight_decay": 0.1}
    runs = [Run("AdamW", {}, backend, **extras) for backend in ("reference", "cpp", "cpp")]
    start = [p.detach().clone() for p in runs[0].params[:2]]
    frozen = [~runs[0].opt._unpack_mask(runs[0].opt._masks[p], p.detach()) for p in runs[0].params[:2]]
    for t in range(3):
        for run, n in zip(runs, (2, 1, 2)):
            torch.set_num_threads(n)
            run.step(t)
    same(runs[0].bits(), runs[1].bits())
    same(runs[1].bits(), runs[2].bits())
    for p, before, still in zip(runs[1].params, start, frozen):
        assert torch.equal(p.detach()[still], before[still])


@pytest.mark.parametrize("state_dtype", CODED)
def test_a_block_without_trainable_elements_is_left_alone(state_dtype):
    for backend in ("reference", "cpp"):
        p = torch.nn.Parameter(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
        mask = torch.ones(4096, dtype=torch.bool)
        mask[256:512] = False
        kwargs = {"lr": 1e-3, "state_dtype": state_dtype, "state_block": 256, "backend": backend}
        free, opt = AdamW([p], **kwargs), AdamW([p], masks={p: mask}, **kwargs)
        p.grad = torch.randn(4096, generator=torch.Generator().manual_seed(1))
        free.step()
        opt.load_state_dict(free.state_dict())
        for k in ("exp_avg", "exp_avg_sq"):  # no element at the block's extreme: encoding what this decodes to would choose other bytes
            opt.state[p][k].view(torch.uint8)[256:512] = 0x30
        before = copy.deepcopy(opt.state[p])
        p.grad = torch.randn(4096, generator=torch.Generator().manual_seed(2))
        opt.step()
        for k in ("exp_avg", "exp_avg_sq"):
            now, scale, old = opt.state[p][k], opt.state[p][f"{k}_scale"], before[f"{k}_scale"]
            assert torch.equal(now[256:512], before[k][256:512]) and not torch.equal(now[:256], before[k][:256])
            assert torch.equal(scale[1], old[1]) and not torch.equal(scale[0], old[0])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_skipped_step_changes_nothing(backend):
    run = Run("AdamW", {}, backend, state_dtype="int8")
    run.step(0)
    before = {k: v.clone() for k, v in run.bits().items()}
    run.opt.found_inf = torch.ones(())
    run.opt.grad_scale = torch.ones(())
    run.step(1)
    same(before, run.bits())


def test_repeats_bit_for_bit():
    runs = [Run("AdEMAMix", {}, "cpp", state_dtype="fp8") for _ in range(4)]
    for n, run in zip((1, 2, 3, 1), runs):
        torch.set_num_threads(n)
        for t in range(2):
            run.step(t)
        same(runs[0].bits(), run.bits())


def test_adabelief_never_divides_by_zero():
    """An element whose variance is 1e-12 of its block's largest: stored as zero it would step by m / sqrt(eps), about 1e8 lr."""
    for options in ({"rectify": False}, {}):
        for state_dtype in CODED:
            p, q = (torch.nn.Parameter(torch.zeros(4096)) for _ in range(2))
            opts = [AdaBelief([p], lr=1e-3, state_dtype=state_dtype, **options), AdaBelief([q], lr=1e-3, **options)]
            for t in range(12):
                g = torch.full((4096,), 1e-6) * (1 + 0.5 * (-1) ** t)
                g[::256] = 10.0 * (-1) ** t
                for x, opt in zip((p, q), opts):
                    x.grad = g.clone()
                    opt.step()
                assert bool((states.decode(opts[0].state[p], "exp_avg_var") > 0).all())
            assert p.detach().abs().max() < 0.2, (options, state_dtype, float(p.detach().abs().max()))


@pytest.mark.parametrize("state_dtype", CODED)
@pytest.mark.parametrize("name", ["AdamW", "Lion", "AdaBelief", "SGD", "Adagrad", "RMSprop", "AdEMAMix"])
def test_learns_as_with_full_states(name, state_dtype):
    """Least squares: the loss after 60 steps is within 10 % (of the start) of the fp32 states'."""
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(96, 64, generator=gen), torch.randn(64, 64, generator=gen)
    y, losses = x @ w, []
    for kind in (None, state_dtype):
        p = torch.nn.Parameter(torch.zeros(64, 64))
        options = {"momentum": 0.9} if name == "SGD" else {}
        opt = OPTIMIZERS[name]([p], lr={"SGD": 0.02, "Lion": 0.02, "Adagrad": 0.3, "AdaBelief": 0.05}.get(name, 0.03), state_dtype=kind, **options)
        for _ in range(60):
            loss = (x @ p - y).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        losses.append(loss.item())
    start = float(y.square().mean())
    assert losses[0] < 0.7 * start and abs(losses[1] - losses[0]) < 0.1 * start, (start, losses)


# --- checkpoints and other optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_state", ["dense", "compact"])
@pytest.mark.parametrize("state_dtype", CODED)
def test_checkpoint_is_exact(state_dtype, mask_state, tmp_path):
    extras = {"state_dtype": state_dtype, "density": 0.9, "mask_state": mask_state}
    one, two = Run("AdamW", {}, None, **extras), Run("AdamW", {}, None, **(extras | {"state_dtype": None}))
    for t in range(2):
        one.step(t)
    checkpoint.save(tmp_path / "c.safetensors", None, one.opt)
    checkpoint.load(tmp_path / "c.safetensors", None, two.opt)
    for p, q in zip(one.params, two.params):
        q.data.copy_(p.data)
    same(one.bits(), two.bits())
    for run in (one, two):
        run.step(2)
    same(one.bits(), two.bits())


def test_another_memory_order_after_loading():
    gen = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(100, 80, generator=gen).t())
    opt = AdamW([p], state_dtype="int8")
    p.grad = torch.randn(80, 100, generator=gen) * torch.arange(1, 81)[:, None]
    opt.step()
    q = torch.nn.Parameter(p.detach().contiguous())
    other = AdamW([q], state_dtype="int8")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    a, b = states.decode(opt.state[p], "exp_avg"), states.decode(other.state[q], "exp_avg")
    assert "strides" in opt.state[p] and "strides" not in other.state[q] and b.is_contiguous()
    assert (a - b).abs().max() <= 0.0075 * a.abs().max()


def test_dense_and_compact_load_each_other():
    dense, compact = (Run("AdamW", {}, None, state_dtype="int8", density=0.9, mask_state=m) for m in ("dense", "compact"))
    dense.step(0)
    compact.opt.load_state_dict(dense.opt.state_dict())
    p, q = dense.params[0], compact.params[0]
    assert compact.opt.state[q]["exp_avg"].dtype == torch.uint8
    full = flat(states.decode(dense.opt.state[p], "exp_avg"))[index_of(compact.opt.state[q], q)]
    assert (states.decode(compact.opt.state[q], "exp_avg") - full).abs().max() <= 0.0075 * full.abs().max()


@pytest.mark.parametrize("state_dtype", CODED)
def test_from_and_to_torch(state_dtype):
    p = torch.nn.Parameter(torch.randn(90, 60, generator=torch.Generator().manual_seed(0)))
    theirs = torch.optim.AdamW([p], lr=1e-3)
    p.grad = torch.randn(90, 60, generator=torch.Generator().manual_seed(1))
    theirs.step()
    ours = from_torch(theirs, state_dtype=state_dtype)
    assert ours.state[p]["exp_avg"].dtype == torch.uint8
    full = states.decode(ours.state[p], "exp_avg_sq")
    assert (full - theirs.state[p]["exp_avg_sq"]).abs().max() <= 0.05 * full.max()
    ours.step()
    back = to_torch(ours)
    assert torch.equal(back.state[p]["exp_avg_sq"], states.decode(ours.state[p], "exp_avg_sq")) and back.state[p].keys() == theirs.state[p].keys()
    back.step()
    plain = AdamW([p], state_dtype=state_dtype)
    plain.load_state_dict(theirs.state_dict())
    assert plain.state[p]["exp_avg"].dtype == F, "a loaded dtype wins"
    plain.step()


def test_damaged_scales_are_refused():
    run = Run("AdamW", {}, None, state_dtype="int8")
    run.step(0)
    for change in (lambda s: s.__setitem__("exp_avg_scale", s["exp_avg_scale"][:-1]), lambda s: s.__setitem__("exp_avg", s["exp_avg"].float())):
        saved = copy.deepcopy(run.opt.state_dict())
        change(saved["state"][0])
        with pytest.raises(ValueError, match="one scale per block for exp_avg of parameter 0"):
            Run("AdamW", {}, None).opt.load_state_dict(saved)
        held = run.opt.state[run.params[0]]
        kept = dict(held)
        change(held)
        with pytest.raises(ValueError, match="scale|exp_avg"):
            run.step(1)
        held.update(kept)
    run.step(1)


# --- what is refused ---------------------------------------------------------------------------------------------------------------------


def test_refusals():
    p = torch.nn.Parameter(torch.zeros(5000))
    for make, text in (
        (lambda: AdamW([p], state_dtype="int4"), "state_dtype"),
        (lambda: AdamW([p], state_block=256), "state_block"),
        (lambda: AdamW([p], state_dtype="int8", state_block=100), "state_block to be one of"),
        (lambda: RMSprop([p], centered=True, state_dtype="int8"), "difference of two states"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
