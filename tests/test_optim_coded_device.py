"""Coded states on the CUDA kernels (run by the emulator) and the Triton ones (interpreted): codes, scales and parameters of the reference."""

import pytest
import torch
from test_optim_coded import CASES, INEXACT, Run, same

from fusedadapt import _core_emulated, dispatch
from fusedadapt.kernels import optim
from fusedadapt.optim import OPTIMIZERS, AdaBelief
from fusedadapt.optim.spec import CODED

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.usefixtures("quick_calls")]

B, F = torch.bfloat16, torch.float32
BACKENDS = ("emulated", "triton")
# The interpreter takes seconds a step: there, the rules whose states differ in number and sign.
TRITON = ("AdamW", "AdaBelief", "Lion", "AdEMAMix", "ScheduleFreeAdamW", "Adagrad")
HOSTILE = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3e38, 1e-30, -3e-20])


@pytest.fixture(autouse=True)
def there():
    for backend in BACKENDS:
        absent = dispatch.available_backends("cpu")[backend]
        assert not absent, f"{backend}: {absent}"


class Small:
    """A coded tensor with a short last block, one whose addresses are not aligned, and one too small to be coded."""

    def __init__(self, name: str, options: dict, backend: str, dtype: torch.dtype = F, shapes=((4200,), (4099,), (100,)), density=None, **extras):
        gen = torch.Generator().manual_seed(11)
        self.name, self.params = name, []
        for k, shape in enumerate(shapes):
            storage = torch.randn(torch.Size(shape).numel() + 1, generator=gen).to(dtype)
            self.params.append(torch.nn.Parameter(storage[k % 2 :][: torch.Size(shape).numel()].view(shape)))
        if density is not None:
            masks = {p: torch.rand(p.shape, generator=gen) < density for p in self.params}
            masks[self.params[0]][700:2800] = False  # whole blocks without a trainable element
            extras["masks"] = masks
        self.opt = OPTIMIZERS[name](self.params, backend=backend, **({"lr": 0.01, "weight_decay": 0.1} | options), **extras)
        if hasattr(self.opt, "train"):
            self.opt.train()

    def step(self, t: int, hostile: bool = False) -> None:
        gen = torch.Generator().manual_seed(100 + t)
        for k, p in enumerate(self.params):
            p.grad = (torch.randn(p.shape, generator=gen) * 10.0 ** torch.randint(-6, 1, p.shape, generator=gen)).to(p.dtype)
            if k == 0:
                p.grad.view(-1)[256:2048] = 0.0
            if hostile:
                p.grad.view(-1)[40:48] = HOSTILE.to(p.dtype)
        self.opt.step()

    bits = Run.bits


def compare(backend: str, name: str = "AdamW", options: dict | None = None, steps: int = 2, hostile: bool = False, **extras) -> Small:
    runs = [Small(name, options or {}, which, **extras) for which in ("reference", backend)]
    for t in range(steps):
        for run in runs:
            run.step(t, hostile)
    same(runs[0].bits(), runs[1].bits())
    assert any(v.dtype == torch.uint8 for v in runs[1].bits().values())
    return runs[1]


@pytest.mark.parametrize("state_dtype", CODED)
@pytest.mark.parametrize(("name", "k"), CASES)
def test_cuda_has_the_bits_of_the_reference(name, k, state_dtype):
    runs = [Run(name, OPTIMIZERS[name].examples[k], backend, state_dtype=state_dtype) for backend in ("reference", "emulated")]
    for t in range(2):
        for run in runs:
            run.step(t)
    if (name, k) in INEXACT:
        assert all((p.detach() - q.detach()).abs().max() < 1e-3 for p, q in zip(*(run.params for run in runs)))
    else:
        same(*(run.bits() for run in runs))


@pytest.mark.parametrize(("name", "state_dtype"), [(name, "int8") for name in TRITON] + [("AdamW", "fp8")])
def test_triton_has_the_bits_of_the_reference(name, state_dtype):
    compare("triton", name, shapes=((4101,), (100,)), state_dtype=state_dtype)


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("state_dtype", CODED)
@pytest.mark.parametrize("mask_state", ["dense", "compact"])
def test_blocks_and_masks_on_cuda(mask_state, state_dtype, block):
    sizes = ((19, 1024), (4099,), (100,), (64, 129))
    compare("emulated", dtype=B, shapes=sizes, density=0.5, mask_state=mask_state, state_dtype=state_dtype, state_block=block)


@pytest.mark.parametrize(
    ("mask_state", "state_dtype", "block"), [("dense", "int8", 32), ("dense", "fp8", 2048), ("compact", "int8", 2048), ("compact", "fp8", 128)]
)
def test_blocks_and_masks_on_triton(mask_state, state_dtype, block):
    shapes = ((4101,), (100,)) if mask_state == "dense" else ((12001,),)
    extras = dict(mask_state=mask_state, state_dtype=state_dtype, state_block=block)
    compare("triton", shapes=shapes, dtype=B, density=0.5, steps=1 if mask_state == "compact" else 2, **extras)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "extras"),
    [
        (B, {"master_weights": "split", "stochastic_rounding": True}),
        (B, {"master_weights": "fp32", "decay_to": "init"}),
        (B, {"stochastic_rounding": True, "seed": 77, "decay_to": "init", "mask_state": "compact", "density": 0.7}),
        (F, {"max_grad_norm": 0.5, "maximize": True, "stochastic_rounding": True}),
    ],
)
def test_options(backend, dtype, extras):
    compare(backend, dtype=dtype, shapes=((4103,), (6200,), (100,)), state_dtype="int8", **extras)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", CODED)
def test_hostile_gradients(backend, state_dtype):
    """Infinities and NaN spoil their block and no other."""
    run = compare(backend, shapes=((4101,), (100,)), hostile=True, state_dtype=state_dtype)
    scale = run.opt.state[run.params[0]]["exp_avg_scale"].view(-1)
    assert scale[0].isnan() and scale[-1].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", CODED)
def test_a_skipped_step_changes_nothing(backend, state_dtype):
    run = Small("AdamW", {}, backend, shapes=((4101,), (100,)), state_dtype=state_dtype)
    run.step(0)
    before = {k: v.clone() for k, v in run.bits().items()}
    run.opt.grad_scale, run.opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    run.step(1)
    same(before, run.bits())
    del run.opt.grad_scale, run.opt.found_inf
    run.step(1)
    assert not torch.equal(before["0.exp_avg"], run.bits()["0.exp_avg"])


def test_results_do_not_depend_on_the_order_of_threads():
    """Blocks of 2048 meet in shared memory; a barrier too few shows as another result in some order."""
    found = []
    for seed in range(3):
        _core_emulated.emulator_seed(seed)
        run = Small("AdEMAMix", {}, "emulated", shapes=((9001,), (4099,)), density=0.5, state_dtype="fp8", state_block=2048)
        run.step(0), run.step(1)
        found.append(run.bits())
    same(found[0], found[1])
    same(found[0], found[2])


def test_full_and_coded_states_share_an_optimizer():
    """Every kind of entry in one plan: each goes to its own sweep."""
    runs = []
    for backend in ("reference", "emulated"):
        gen = torch.Generator().manual_seed(5)
        params = [torch.nn.Parameter(torch.randn(n, generator=gen)) for n in (9000, 5000, 100, 50, 4096)]
        masks = {p: torch.rand(p.shape, generator=gen) < 0.6 for p in params[:3]}
        opt = AdaBelief(params, weight_decay=0.1, masks=masks, mask_state="compact", state_dtype="int8", max_grad_norm=1.0, backend=backend)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen)
            opt.step()
        runs.append({f"{i}.{k}": v for i, p in enumerate(params) for k, v in [("p", p.detach()), *opt.state[p].items()]})
    same(*runs)
    assert runs[1]["0.exp_avg"].dtype == torch.uint8 and runs[1]["1.exp_avg"].dtype == F and runs[1]["4.exp_avg"].dtype == torch.uint8


def test_refused():
    table, rows = torch.zeros(1, 26, dtype=torch.int64), torch.zeros(1, 24)
    for block in (16, 48, 4096):
        with pytest.raises(ValueError, match="step_: expected blocks of a power of two"):
            optim.step_(table, torch.zeros(0, 2, dtype=torch.int64), rows, "adam", chunk=2048, block=block)
    numbers = {name: i for i, (name, _, _) in enumerate(_core_emulated.RULES)}
    for rule in ("sgd", "rmsprop_centered"):
        with pytest.raises(ValueError, match="cuda_sweep: expected a rule that can have coded states"):
            _core_emulated.cuda_sweep(numbers[rule], table.data_ptr(), 1, table.data_ptr(), 1, 2048, rows.data_ptr(), 0, 0, 0, 0, False, 0, 0, 2)
    with pytest.raises(ValueError, match="cuda_sweep: expected path 0, 1 or 2"):
        _core_emulated.cuda_sweep(0, 0, 0, 0, 0, 2048, 0, 0, 0, 0, 0, False, 0, 0, 3)
