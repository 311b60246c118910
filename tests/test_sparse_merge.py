"""fa.sparse.merge: every method against oracles of its own, properties, hostile input, memory and interruption."""

import merge_cases as cases
import merge_oracles as oracle
import numpy as np
import pytest
import torch
from merge_cases import SEED, SHAPES, WEIGHTS, by_row, check_each, deltas_of, flat, model, rows, whole
from torch import Tensor

from fusedadapt.reference.merge import stream_of
from fusedadapt.sparse import merge

# fixtures
base, tuned, one_torch_thread = cases.base, cases.tuned, cases.one_torch_thread


# ---- the papers


def test_task_arithmetic(base, tuned):
    merged = merge(base, tuned, "task_arithmetic", weights=WEIGHTS, lambda_=0.7)
    check_each(merged, base, lambda name: oracle.sum_of(deltas_of(base, tuned, name), WEIGHTS), 0.7)
    assert torch.equal(merged["ids"], tuned[0]["ids"]) and merged["ids"] is not tuned[0]["ids"]


@pytest.mark.parametrize("normalize", [None, False])
def test_linear(tuned, normalize):
    merged = merge(None, tuned, "linear", weights=WEIGHTS, normalize=normalize)
    divisor = 1.0 if normalize is False else sum(WEIGHTS)
    for name in SHAPES:
        np.testing.assert_allclose(flat(merged, name), sum(w * flat(m, name) for w, m in zip(WEIGHTS, tuned)) / divisor, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0, [0.1, 0.5, 0.9]])
def test_ties_paper(base, tuned, density):
    merged = merge(base, tuned, "ties", weights=WEIGHTS, density=density, lambda_=1.3)
    shares = density if isinstance(density, list) else [density] * 3
    expected = oracle.ties_paper([whole(m) - whole(base) for m in tuned], shares, WEIGHTS)
    np.testing.assert_allclose(whole(merged), whole(base) + 1.3 * expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float64, torch.float16)])
def test_ties_paper_cuts_tensors_of_several_dtypes_together(kinds):
    state = lambda seed: {str(i): torch.randn(50, generator=torch.Generator().manual_seed(seed + i)).to(kind) for i, kind in enumerate(kinds)}
    base, tuned = state(0), state(10)
    merged = merge(base, [tuned], "ties", density=0.3)
    sizes = torch.cat([(tuned[n].float() - base[n].float()).abs() for n in base])
    edge = sizes.sort(descending=True).values[int(0.3 * sizes.numel())]
    for n, was in base.items():
        change = tuned[n].to(torch.promote_types(was.dtype, torch.float32)) - was
        stays = (tuned[n].float() - was.float()).abs() >= edge
        assert torch.equal(merged[n], torch.where(stays, (was + change).to(was.dtype), was))


def test_ties_paper_takes_the_majority_where_changes_cancel():
    base = {"x": torch.zeros(4)}
    first, second = {"x": torch.tensor([1.0, -1, -3, -2])}, {"x": torch.tensor([-1.0, 1, -1, -2])}
    for sign in (1, -1):
        merged = merge(base, [{"x": sign * first["x"]}, {"x": sign * second["x"]}], "ties", density=1.0)
        assert torch.equal(merged["x"], sign * torch.tensor([-1.0, -1, -2, -2]))


def random_keep(name: str, n: int, i: int, density: float) -> np.ndarray:
    return oracle.bits(SEED, n, i, stream_of(name)) < round(65536 * density)


@pytest.mark.parametrize("method, factor", [("dare_linear", 1 / 0.3), ("dare_ties", 1 / 0.3), ("darex", 1 / 0.45)])
def test_random_drop_as_published(base, tuned, method, factor):
    options = {"q": 0.45} if method == "darex" else {}
    merged = merge(base, tuned, method, weights=WEIGHTS, density=0.3, seed=SEED, **options)

    def dropped(name):
        return [d * factor * random_keep(name, d.size, i, 0.3) for i, d in enumerate(deltas_of(base, tuned, name))]

    if method == "dare_ties":
        expected = oracle.elect_paper([np.concatenate([dropped(n)[i] for n in SHAPES]) for i in range(3)], WEIGHTS)
        np.testing.assert_allclose(whole(merged), whole(base) + expected, rtol=2e-5, atol=2e-6)
    else:
        check_each(merged, base, lambda name: oracle.sum_of(dropped(name), WEIGHTS))


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_paper(base, tuned, method):
    merged = merge(base, tuned, method, weights=WEIGHTS, density=0.5, gamma=0.1)

    def kept(name):
        return [by_row(d, rows(name), lambda row: oracle.breadcrumbs(row, 0.5, 0.1)) for d in deltas_of(base, tuned, name)]

    if method == "breadcrumbs":
        check_each(merged, base, lambda name: oracle.sum_of(kept(name), WEIGHTS))
    else:
        expected = oracle.elect_paper([np.concatenate([kept(n)[i] for n in SHAPES]) for i in range(3)], WEIGHTS)
        np.testing.assert_allclose(whole(merged), whole(base) + expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_paper(base, tuned, method):
    merged = merge(base, tuned, method, weights=WEIGHTS, density=0.4, epsilon=0.1, seed=SEED)

    def kept(name):
        out = []
        for i, d in enumerate(deltas_of(base, tuned, name)):
            p = by_row(d, rows(name), lambda row: oracle.della_chances(row, 0.4, 0.1))
            keep = oracle.bits(SEED, d.size, i, stream_of(name)) < np.round(65536 * p)
            out.append(np.where(keep, d / p, 0) if d.size else d)
        return out

    if method == "della_linear":
        check_each(merged, base, lambda name: oracle.sum_of(kept(name), WEIGHTS))
    else:
        expected = oracle.elect_paper([np.concatenate([kept(n)[i] for n in SHAPES]) for i in range(3)], WEIGHTS)
        np.testing.assert_allclose(whole(merged), whole(base) + expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("near", [False, True])
def test_slerp(base, tuned, t, near):
    end = {n: v + 0.001 * tuned[0][n] if n in SHAPES else v for n, v in base.items()} if near else tuned[0]
    merged = merge(base, [end], "slerp", t=t)
    for name in ("a.weight", "b.bias", "c", "scalar"):
        np.testing.assert_allclose(flat(merged, name), oracle.slerp(flat(base, name), flat(end, name), t), rtol=2e-5, atol=2e-6)


def test_magnitude_prune(base, tuned):
    merged = merge(base, tuned, "magnitude_prune", weights=WEIGHTS, density=0.25)
    kept = lambda name: [d * oracle.largest(d, int(0.25 * d.size)) for d in deltas_of(base, tuned, name)]
    check_each(merged, base, lambda name: oracle.sum_of(kept(name), WEIGHTS))


@pytest.mark.parametrize("density", [None, 0.4])
def test_pcb(base, tuned, density):
    merged = merge(base, tuned, "pcb", weights=WEIGHTS, density=density, lambda_=1.2)
    expected = oracle.pcb([whole(m) - whole(base) for m in tuned], 0.1 if density is None else density, WEIGHTS)
    np.testing.assert_allclose(whole(merged), whole(base) + 1.2 * expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher(tuned, normalize):
    information = [{n: v.abs().double() for n, v in model(i).items() if n in SHAPES} for i in (7, 8, 9)]
    merged = merge(None, tuned, "fisher", weights=WEIGHTS, fishers=information, normalize=normalize)
    scale = [w / (np.linalg.norm(whole(f)) if normalize else 1) for w, f in zip(WEIGHTS, information)]
    for name in SHAPES:
        shares = [c * np.maximum(flat(f, name), 1e-6) for c, f in zip(scale, information)]
        expected = sum(s * flat(m, name) for s, m in zip(shares, tuned)) / sum(shares)
        np.testing.assert_allclose(flat(merged, name), expected, rtol=2e-5, atol=2e-6)


def test_fisher_computes_as_widely_as_the_models_or_the_result():
    """Of fp64 models with weights that nearly cancel fp32 holds a few digits only."""
    draw = lambda seed: torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    models, information, weights = [{"a": draw(1)}, {"a": draw(2)}], [{"a": 1 + 1e-6 * draw(3)}, {"a": 1 + 1e-6 * draw(4)}], [1.0, -0.999999]
    for dtype in (torch.float32, torch.float64):
        merged = merge(None, models, "fisher", weights=weights, fishers=information, normalize=False, dtype=dtype)["a"]
        shares = [w * f["a"] for w, f in zip(weights, information)]
        expected = sum(s * m["a"] for s, m in zip(shares, models)) / sum(shares)
        torch.testing.assert_close(merged.double(), expected, rtol=2e-7 if dtype == torch.float32 else 1e-9, atol=0)


# ---- PEFT and mergekit themselves


class Lottery:
    """Stands in for torch.bernoulli: the library's random bits, one model after the other."""

    def __init__(self, name: str) -> None:
        self.stream, self.model = stream_of(name), 0

    def __call__(self, chances: Tensor) -> Tensor:
        keep = oracle.bits(SEED, chances.numel(), self.model, self.stream) < np.round(65536 * chances.double().reshape(-1).numpy())
        self.model += 1
        return torch.from_numpy(keep).reshape(chances.shape).to(chances.dtype)


@pytest.mark.parametrize("density", [0.2, 0.73])
@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties frequency", "dare_ties frequency"]
)
def test_peft(base, tuned, method, density, monkeypatch):
    peft = pytest.importorskip("peft.utils.merge_utils")
    options = {} if method == "task_arithmetic" else {"density": density}
    if "frequency" in method:
        method, options["majority_sign_method"] = method.split()
    merged = merge(base, tuned, method, weights=WEIGHTS, compat="peft", seed=SEED, **options)
    for name in SHAPES:
        monkeypatch.setattr(torch, "bernoulli", Lottery(name))
        theirs = getattr(peft, method)([m[name] - base[name] for m in tuned], torch.tensor(WEIGHTS), **options)
        torch.testing.assert_close(merged[name], base[name] + theirs, rtol=1e-5, atol=2e-6, msg=name)


# name -> (election, sparsification, normalize, rescale) as mergekit registers them
MERGEKIT = {
    "task_arithmetic": (None, None, False, False),
    "ties": ("sum", "magnitude", True, False),
    "dare_ties": ("sum", "random", False, True),
    "dare_linear": (None, "random", False, True),
    "breadcrumbs": (None, "magnitude_outliers", False, False),
    "breadcrumbs_ties": ("sum", "magnitude_outliers", False, False),
    "della": ("sum", "della_magprune", True, True),
    "della_linear": (None, "della_magprune", False, True),
}


def by_mergekit(method: str, tensors: list[Tensor], normalize: bool | None, density: list[float], rescale: bool | None = None) -> Tensor:
    arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    group = pytest.importorskip("mergekit.merge_methods.base").TensorGroup
    consensus, sparsification, default, usual = MERGEKIT[method]
    rescale = usual if rescale is None else rescale
    theirs = arithmetic.GeneralizedTaskArithmeticMerge(
        consensus_method=consensus and arithmetic.ConsensusMethod(consensus),
        sparsification_method=sparsification and arithmetic.SparsificationMethod(sparsification),
        default_normalize=default,
        default_rescale=rescale,
        method_name=method,
        method_pretty_name=None,
        method_reference_url=None,
    )
    shared = {"normalize": default if normalize is None else normalize, "rescale": rescale, "int8_mask": False, "lambda": 0.8}
    each = {"weight": WEIGHTS, "density": density, "gamma": [0.1] * 3, "epsilon": [0.15] * 3}
    by_id = {key: {i + 1: v for i, v in enumerate(values)} for key, values in each.items()}
    merged: Tensor = theirs.merge_group(group.from_tensors(tensors, base_index=0), **shared, **by_id)
    return merged


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("method", MERGEKIT)
def test_mergekit(base, tuned, method, normalize, monkeypatch):
    density = [0.3, 0.5, 0.6]
    options = {"density": density} if MERGEKIT[method][1] else {}
    gamma = {"gamma": 0.1} if "breadcrumbs" in method else {}
    merged = merge(base, tuned, method, weights=WEIGHTS, lambda_=0.8, compat="mergekit", normalize=normalize, seed=SEED, **options, **gamma)
    for name in ("a.weight", "b.bias"):
        monkeypatch.setattr(torch, "bernoulli", Lottery(name))
        theirs = by_mergekit(method, [base[name], *(m[name] for m in tuned)], normalize, density)
        torch.testing.assert_close(merged[name], theirs, rtol=1e-5, atol=3e-6, msg=name)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", sorted(set(MERGEKIT) - {"task_arithmetic"}))
def test_mergekit_rescaling(base, tuned, method, rescale, monkeypatch):
    density = [0.3, 0.6, 1.0]
    gamma = {"gamma": 0.1} if "breadcrumbs" in method else {}
    merged = merge(base, tuned, method, weights=WEIGHTS, lambda_=0.8, compat="mergekit", rescale=rescale, density=density, seed=SEED, **gamma)
    for name in ("a.weight", "b.bias"):
        monkeypatch.setattr(torch, "bernoulli", Lottery(name))
        theirs = by_mergekit(method, [base[name], *(m[name] for m in tuned)], None, density, rescale)
        torch.testing.assert_close(merged[name], theirs, rtol=1e-5, atol=3e-6, msg=name)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_drops_leave_need_not_be_scaled(base, tuned, method):
    """One model, so that an election changes nothing: what stays is the change itself."""
    merged = merge(base, tuned[:1], method, density=0.5, rescale=False, seed=SEED)
    changed = False
    for name in SHAPES:
        stays = merged[name] != base[name]
        assert torch.equal(merged[name][stays], (base[name] + (tuned[0][name] - base[name]))[stays])
        changed |= bool(stays.any())
    assert changed


def test_the_sign_that_most_have():
    """One large change against two small ones."""
    base = {"w": torch.zeros(3)}
    models = [{"w": torch.tensor(x)} for x in ([9.0, 1.0, -2.0], [-1.0, 1.0, 2.0], [-3.0, -9.0, 0.0])]
    for compat in ("paper", "peft"):
        assert merge(base, models, "ties", density=1.0, compat=compat)["w"].tolist() == [9.0, -9.0, 2.0 if compat == "peft" else -2.0]
        by_count = merge(base, models, "ties", density=1.0, compat=compat, majority_sign_method="frequency")["w"].tolist()
        assert by_count == [-2.0, 1.0, 2.0 if compat == "peft" else -2.0], compat  # as published, a tie goes with the majority of the elements


@pytest.mark.parametrize("shape", [(3, 40, 5), (2, 30, 3, 3), (700, 30, 7), (4, 2, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("method", ["della", "della_linear", "breadcrumbs", "ties", "dare_ties"])
def test_mergekit_in_more_dimensions(method, shape, monkeypatch):
    """DELLA ranks along the second dimension there, the others look at the whole tensor."""
    g = torch.Generator().manual_seed(0)
    base, *tuned = ({"w": torch.randn(shape, generator=g)} for _ in range(4))
    extra = {"epsilon": 0.15} if "della" in method else {"gamma": 0.1} if method == "breadcrumbs" else {}
    if shape == (5, 1) and "della" in method:  # 0 / 0 in mergekit: the density
        keep = oracle.bits(SEED, 5, 0, stream_of("w")) < round(65536 * 0.4)
        merged = merge(base, tuned[:1], "della_linear", density=0.4, compat="mergekit", seed=SEED)
        assert torch.equal(torch.ne(merged["w"], base["w"]).flatten(), torch.from_numpy(keep))
        return
    monkeypatch.setattr(torch, "bernoulli", Lottery("w"))
    merged = merge(base, tuned, method, weights=WEIGHTS, density=0.4, lambda_=0.8, compat="mergekit", seed=SEED, **extra)
    torch.testing.assert_close(merged["w"], by_mergekit(method, [base["w"], *(m["w"] for m in tuned)], None, [0.4] * 3), rtol=1e-5, atol=3e-6)


def test_mergekit_slerp(base, tuned):
    theirs = pytest.importorskip("mergekit.merge_methods.slerp")
    merged = merge(base, [tuned[0]], "slerp", t=0.4, compat="mergekit")
    for name in ("a.weight", "b.bias", "c"):
        expected = theirs.slerp(torch.tensor([0.4]), base[name].reshape(1, -1), tuned[0][name].reshape(1, -1)).reshape(base[name].shape)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=2e-6)


def test_mergekit_density_extremes(base, tuned):
    for method in ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"):
        nothing = merge(base, tuned, method, density=0.0, compat="mergekit")
        assert all(torch.equal(nothing[name], base[name]) for name in SHAPES), method
    for method in ("dare_linear", "dare_ties"):  # the authors' code, too, leaves what a drop rate of 1 has emptied as it is
        nothing = merge(base, tuned, method, density=0.0)
        assert all(torch.equal(nothing[name], base[name]) for name in SHAPES), method
    one = merge(base, tuned[:1], "ties", density=1e-9, compat="mergekit")  # at least one change of each tensor
    assert all(int((one[name] != base[name]).sum()) == min(1, base[name].numel()) for name in SHAPES)
