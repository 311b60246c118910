"""Compact states and anchors: the bits of dense masked training from arrays of nnz elements, for every rule on every backend."""

import copy

import pytest
import torch

from fusedadapt import checkpoint, dispatch
from fusedadapt.optim import OPTIMIZERS, AdamW, from_torch, release_gradients, to_torch
from fusedadapt.optim.compact import flat, index_of, take, unsqueeze
from fusedadapt.optim.spec import is_compact

B, F = torch.bfloat16, torch.float32
CASES = [(name, k) for name, cls in OPTIMIZERS.items() for k in range(len(cls.examples))]
MIXES = {
    "fp32": (F, {}),
    "bf16": (B, {}),
    "bf16-fp32-states": (B, {"state_dtype": "fp32"}),
    "fp16": (torch.float16, {"state_dtype": "fp16"}),
    "fp32-bf16-states": (F, {"state_dtype": "bf16"}),
    "bf16-split": (B, {"state_dtype": "fp32", "master_weights": "split"}),
    "bf16-master": (B, {"master_weights": "fp32"}),
    "fp16-master": (torch.float16, {"state_dtype": "fp32", "master_weights": "fp32"}),
    "bf16-stochastic": (B, {"stochastic_rounding": True, "seed": 1234567890123}),
    "fp64": (torch.float64, {}),
}
DENSITIES = (0.0, 0.02, 0.5, 1.0)
SHAPES = ((7, 5), (33,), (2, 3, 4), (1700,))


@pytest.fixture(params=["reference", "cpp", "triton", "emulated"])
def backend(request: pytest.FixtureRequest, quick_calls: None) -> str:
    absent = dispatch.available_backends("cpu")[request.param]
    assert not absent, f"{request.param}: {absent}"
    return request.param


class Run:
    """Four parameters in different memory orders under masks of different densities, and one without a mask."""

    def __init__(self, name: str, options: dict, dtype: torch.dtype, mask_state: str, backend: str | None, shapes=SHAPES):
        gen = torch.Generator().manual_seed(5)
        self.name, self.dtype = name, dtype
        self.params = [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in (*shapes, (12,))]
        base = self.params[0].data
        self.params[0].data = base.t().contiguous().t()  # the memory order is not the order of the indices
        self.masks = {p: torch.rand(p.shape, generator=gen) < d for p, d in zip(self.params, DENSITIES)}
        groups = [{"params": self.params[:2], "lr": torch.tensor(0.02)}, {"params": self.params[2:]}]
        kwargs = {"lr": 0.01, "weight_decay": 0.1} | options
        self.opt = OPTIMIZERS[name](groups, masks=self.masks, mask_state=mask_state, backend=backend, **kwargs)
        if hasattr(self.opt, "train"):
            self.opt.train()

    def step(self, t: int, compact_grads: bool = False) -> None:
        gen = torch.Generator().manual_seed(100 + t)
        for k, p in enumerate(self.params):
            g = torch.randn(p.shape, generator=gen).to(self.dtype)
            p.grad = None if (t + k) % 5 == 4 else g
            if self.name == "AdaHessian":
                p.hessian_diag = g.float().abs()
            if compact_grads and p in self.masks and p.grad is not None:
                p.grad = torch.where(self.masks[p], g, 0)  # a compact gradient says nothing of the rest: for the norm it is zero
                if self.opt.mask_state == "compact":
                    index = flat(memory(self.masks[p], p)).nonzero()[:, 0]
                    p.compact_grad, p.grad = take(g, p, index), None
        if hasattr(self.opt, "update_hessian") and t % 2 == 0:
            self.opt.update_hessian()
        self.opt.step()
        self.opt.zero_grad()
        assert all(getattr(p, "compact_grad", None) is None for p in self.params)

    def dense(self, k: int) -> dict[str, torch.Tensor]:
        """What a step changes, at the trainable elements in memory order."""
        p, state = self.params[k], self.opt.state[self.params[k]]
        index = state.get("index")
        packed = is_compact(state)
        if index is None and "mask" in state:
            index = flat(memory(self.masks[p], p)).nonzero()[:, 0]
        out = {"p": p.detach()}
        for key, v in state.items():
            if key in ("mask", "index", "prefix"):
                continue
            out[key] = v if v.shape != p.shape or index is None or packed else take(v, p, index)
        return out


def memory(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype).copy_(t)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_equal(a: Run, b: Run) -> None:
    for k in range(len(a.params)):
        x, y = a.dense(k), b.dense(k)
        assert x.keys() == y.keys()
        for key in x:
            assert same(x[key], y[key]), (a.name, k, key)


def compare(name: str, options: dict, dtype: torch.dtype, backend: str, steps: int = 3, **kwargs) -> None:
    dense, packed = (Run(name, options, dtype, kind, backend) for kind in ("dense", "compact"))
    start = [p.detach().clone() for p in packed.params]
    for t in range(steps):
        dense.step(t, **kwargs), packed.step(t, **kwargs)
    assert_equal(dense, packed)
    for p, old in zip(packed.params, start):
        if p in packed.masks:
            assert torch.equal(p[~packed.masks[p]], old[~packed.masks[p]]), "a frozen element changed"
            state = packed.opt.state[p]
            assert all(v.numel() in (1, int(packed.masks[p].sum())) for key, v in state.items() if key not in ("mask", "prefix"))


# --- equality ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "k"), CASES)
def test_every_rule_equals_dense_masked(name: str, k: int, backend: str) -> None:
    compare(name, OPTIMIZERS[name].examples[k] | {"max_grad_norm": 0.5}, F, backend, steps=2 if backend == "triton" else 3)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("decay_to", ["zero", "init"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_every_storage_equals_dense_masked(name: str, decay_to: str, mix: str, backend: str) -> None:
    dtype, options = MIXES[mix]
    options = options | {"maximize": name == "SGD", "decay_to": decay_to}
    compare(name, options, dtype, "reference" if dtype == torch.float64 else backend, compact_grads=mix in ("fp32", "bf16-split"))


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "ScheduleFreeAdamW"])
def test_decay_to_init_equals_reference(name: str, backend: str) -> None:
    for kind in ("dense", "compact"):
        a, b = (Run(name, {"decay_to": "init"}, F, kind, which) for which in (backend, "reference"))
        for t in range(2):
            a.step(t), b.step(t)
        assert_equal(a, b)


def test_decay_to_init_pulls_towards_the_start() -> None:
    """Without a gradient the distance to the anchor shrinks by the decay factor; from the anchor nothing moves."""
    p = torch.nn.Parameter(torch.tensor([1.0, -3.0, 0.5]))
    opt = AdamW([p], lr=0.1, weight_decay=0.5, decay_to="init")
    p.grad = torch.zeros(3)
    opt.step()
    assert torch.equal(p, torch.tensor([1.0, -3.0, 0.5]))
    with torch.no_grad():
        p.add_(torch.tensor([1.0, 2.0, 0.0]))
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.95, -1.1, 0.5]))
    coupled = OPTIMIZERS["SGD"]([p], lr=0.1, weight_decay=0.5, decay_to="init")
    coupled.step()
    with torch.no_grad():
        p.add_(1.0)
    before = p.detach().clone()
    coupled.step()
    torch.testing.assert_close(p.detach(), before - 0.05)


def test_int64_index_and_plain_python_table(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (Run("AdamW", {}, F, "compact", "cpp") for _ in range(2))
    for t in range(3):
        a.step(t), b.step(t)
        for p in b.masks:
            if is_compact(b.opt.state[p]):
                unsqueeze(b.opt.state[p], p)
                b.opt.state[p]["index"] = b.opt.state[p]["index"].long()
    for p, q in zip(a.params, b.params):
        assert torch.equal(p, q)


def test_norm_is_that_of_dense_masked_training(backend: str) -> None:
    dense, packed = (Run("AdamW", {"max_grad_norm": 1.0}, F, kind, backend) for kind in ("dense", "compact"))
    dense.step(0), packed.step(0)
    assert torch.equal(dense.opt.grad_norm, packed.opt.grad_norm)


def test_found_inf_and_gradient_release() -> None:
    run = Run("AdamW", {}, F, "compact", None)
    run.step(0)
    before = copy.deepcopy([p.detach() for p in run.params]), copy.deepcopy(run.opt.state_dict()["state"])
    run.opt.grad_scale, run.opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    run.step(1)
    assert all(torch.equal(p, q) for p, q in zip(run.params, before[0]))
    after = run.opt.state_dict()["state"]
    assert all(torch.equal(v, after[i][k]) for i, s in before[1].items() for k, v in s.items())
    released, stepped = Run("AdamW", {}, F, "compact", None), Run("AdamW", {}, F, "compact", None)
    release_gradients(released.opt)
    for r in (released, stepped):
        sum((p * p).sum() for p in r.params).backward()
    stepped.opt.step()
    assert_equal(released, stepped)


# --- the mask as the index ---------------------------------------------------------------------------------------------------------------


def patterned(n: int) -> torch.Tensor:
    """Full words, empty groups of 1,024, single bits, and a half at random."""
    mask = torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[100:300], mask[1024:4096], mask[5000:5100] = True, False, False
    mask[min(2000, n - 1)] = mask[-1] = True
    return mask


@pytest.mark.parametrize("options", [{}, {"compact_grad": True}, {"state_dtype": "int8", "state_block": 64}, {"stochastic_rounding": True}])
@pytest.mark.parametrize("n", [31, 1024, 9001])
def test_a_mask_as_the_index_is_a_list(n: int, options: dict, backend: str) -> None:
    given, dtype = options.get("compact_grad"), B if "stochastic_rounding" in options else F
    kept = {k: v for k, v in options.items() if k != "compact_grad"}
    runs = []
    for listed in (False, True):
        p = torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype))
        opt = AdamW([p], lr=0.01, masks={p: patterned(n)}, mask_state="compact", backend=backend, **kept)
        for t in range(3):
            p.grad = torch.randn(n, generator=torch.Generator().manual_seed(t)).to(dtype)
            if given:
                p.compact_grad = p.grad[patterned(n)]
            opt.step()
            p.compact_grad = None
            assert "prefix" in opt.state[p] or listed
            if listed and t == 0:
                unsqueeze(opt.state[p], p)
        runs.append((p, opt.state[p]))
    (p, mine), (q, theirs) = runs
    assert torch.equal(p, q) and torch.equal(index_of(mine, p), theirs["index"]) and "prefix" not in theirs
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items() if k != "prefix")


@pytest.mark.parametrize(("chosen", "key"), [(32, "index"), (33, "prefix")])
def test_which_form_takes_less_memory(chosen: int, key: str) -> None:
    p = torch.nn.Parameter(torch.zeros(1024))
    mask = torch.arange(1024) < chosen
    opt, plain = AdamW([p], masks={p: mask}, mask_state="compact"), OPTIMIZERS["SGD"]([p], lr=0.1, masks={p: mask}, mask_state="compact")
    p.grad = torch.ones(1024)
    opt.step(), plain.step()
    assert {"index", "prefix"} & set(opt.state[p]) == {key} and "index" in plain.state[p]


def test_lists_of_older_checkpoints_become_masks() -> None:
    run, twin = (Run("AdamW", {}, F, "compact", None) for _ in range(2))
    run.step(0), twin.step(0)
    saved = copy.deepcopy(run.opt.state_dict())
    for i, p in enumerate(run.params[:4]):
        unsqueeze(saved["state"][i], p)
    run.opt.load_state_dict(saved)
    run.step(1), twin.step(1)
    assert_equal(run, twin)
    assert all(run.opt.state[p].keys() == twin.opt.state[q].keys() for p, q in zip(run.params, twin.params))


def test_a_mask_emptied_in_place_is_noticed() -> None:
    p = torch.nn.Parameter(torch.zeros(3000))
    opt = AdamW([p], masks={p: patterned(3000)}, mask_state="compact", backend="cpp")
    for t in range(2):
        p.grad = torch.ones(3000)
        if t:
            opt.state[p]["mask"].zero_()
            with pytest.raises(RuntimeError, match="changed in place"):
                opt.step()
        else:
            opt.step()


# --- checkpoints -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "ScheduleFreeAdamW"])
def test_between_dense_and_compact(name: str, mix: str) -> None:
    """dense -> compact -> dense and the other way round, switching every two steps, is the same run."""
    dtype, options = MIXES[mix]
    if name == "AdamW":
        options = options | {"decay_to": "init"}
    backend = "reference" if dtype == torch.float64 else None
    alone = Run(name, options, dtype, "dense", backend)
    for t in range(6):
        alone.step(t)
    for order in (("dense", "compact", "dense"), ("compact", "dense", "compact")):
        last = None
        for part, kind in enumerate(order):
            run = Run(name, options, dtype, kind, backend)
            if last is not None:
                for p, q in zip(run.params, last.params):
                    p.data.copy_(q.data)
                run.opt.load_state_dict(copy.deepcopy(last.opt.state_dict()))
                held = run.opt.state_dict()["state"]
                assert all(is_compact(s) == (kind == "compact" and i < 4) for i, s in held.items())
            for t in range(2 * part, 2 * part + 2):
                run.step(t)
            last = run
        assert_equal(alone, last)


def test_checkpoint_file_is_exact(tmp_path) -> None:
    run, twin = (Run("AdamW", {"decay_to": "init", "state_dtype": "fp32"}, B, "compact", None) for _ in range(2))
    for t in range(2):
        run.step(t)
    checkpoint.save(tmp_path / "c.safetensors", optimizer=run.opt)
    for p, q in zip(twin.params, run.params):
        p.data.copy_(q.data)
    checkpoint.load(tmp_path / "c.safetensors", optimizer=twin.opt)
    for p, q in zip(run.params, twin.params):
        for key, v in run.opt.state[p].items():
            assert v.dtype == twin.opt.state[q][key].dtype and torch.equal(v, twin.opt.state[q][key]), key
    run.step(2), twin.step(2)
    assert_equal(run, twin)


def test_from_and_to_torch() -> None:
    p = torch.nn.Parameter(torch.randn(40))
    theirs = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.randn(40)
    theirs.step()
    mask = torch.arange(40) % 3 == 0
    ours = from_torch(theirs, masks={p: mask}, mask_state="compact")
    assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"][mask])
    with pytest.raises(ValueError, match="to_torch: expected a AdamW without masks"):
        to_torch(ours)
    with pytest.raises(ValueError, match="anchors"):
        to_torch(AdamW([p], decay_to="init"))


# --- bad input ---------------------------------------------------------------------------------------------------------------------------


def test_bad_options() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="expected masks with mask_state"):
        AdamW([p], mask_state="compact")
    with pytest.raises(ValueError, match="mask_state to be one of"):
        AdamW([p], mask_state="sparse")
    with pytest.raises(ValueError, match="decay_to to be one of"):
        AdamW([p], decay_to="start")
    with pytest.raises(ValueError, match='expected decay_to="zero"'):
        OPTIMIZERS["ScheduleFreeAdamW"]([p], decay_to="init")


@pytest.mark.parametrize("which", ["cpp", "reference"])
@pytest.mark.parametrize("what", ["length", "shape", "state"])
def test_what_does_not_fit_is_refused(what: str, which: str) -> None:
    run = Run("AdamW", {}, F, "compact", which)
    run.step(0)
    p = run.params[2]
    before = p.detach().clone()
    p.grad = torch.ones(p.shape)
    if what == "length":
        p.compact_grad = torch.ones(3)
    elif what == "shape":
        p.compact_grad = torch.ones(p.shape)
    else:
        run.opt.state[p]["exp_avg"] = torch.zeros(p.shape)
    with pytest.raises(ValueError, match="vectors as long as the index"):
        run.opt.step()
    assert torch.equal(p, before)


def test_positions_outside_the_parameter_are_refused() -> None:
    run = Run("AdamW", {}, F, "compact", "cpp")
    run.step(0)
    p = run.params[2]
    unsqueeze(run.opt.state[p], p)
    for bad in (-1, p.numel()):
        index = run.opt.state[p]["index"].clone()
        index[1] = bad
        run.opt.state[p]["index"] = index
        p.grad = torch.ones(p.shape)
        with pytest.raises(ValueError, match="positions inside the parameter"):
            run.opt.step()


def test_damaged_compact_state_is_refused() -> None:
    run = Run("AdamW", {}, F, "compact", None)
    run.step(0)
    saved = run.opt.state_dict()
    wrong = {"index": torch.arange(5, dtype=torch.int32), "prefix": torch.tensor([0, 11]), "exp_avg": torch.zeros(2), "cohorts": torch.tensor([3, 1])}
    for key, value in wrong.items():
        broken = copy.deepcopy(saved)
        broken["state"][2][key] = value
        with pytest.raises(ValueError, match="in the compact state of parameter 0 of group 1"):
            run.opt.load_state_dict(broken)


def test_the_sign_of_nan_is_zero(backend: str) -> None:
    """A stale build once gave NaN: Lion of a NaN gradient must not move the parameter, dense or compact."""
    for kind in ("dense", "compact"):
        p = torch.nn.Parameter(torch.ones(9))
        opt = OPTIMIZERS["Lion"]([p], lr=0.1, masks={p: torch.ones(9, dtype=torch.bool)}, mask_state=kind, weight_decay=0.0, backend=backend)
        p.grad = torch.full((9,), float("nan"))
        opt.step()
        assert torch.equal(p, torch.ones(9))
