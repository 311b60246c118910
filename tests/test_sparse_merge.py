"""fa.sparse.merge: every method against oracles of its own, properties, hostile input, memory and interruption."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import merge_oracles as oracle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fusedadapt as fa
from fusedadapt.ops import sparse as ops
from fusedadapt.reference.merge import stream_of
from fusedadapt.sparse import merge
from fusedadapt.sparse import merge_methods as methods
from fusedadapt.sparse import weights as files

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"a.weight": (7, 45), "b.bias": (45,), "c": (3, 4, 5), "scalar": (), "empty": (0, 4)}
WEIGHTS = [0.5, 1.0, 0.3]
SEED = 11


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Tiny tensors, and oracles of many small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return out | {"ids": torch.arange(5) + seed}


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return model(0)


@pytest.fixture(scope="module")
def tuned() -> list[dict[str, Tensor]]:
    return [model(i) for i in (1, 2, 3)]


def flat(state: dict[str, Tensor], name: str) -> np.ndarray:
    return state[name].double().reshape(-1).numpy()


def whole(state: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([flat(state, name) for name in SHAPES])


def deltas_of(base, tuned, name) -> list[np.ndarray]:
    return [flat(m, name) - flat(base, name) for m in tuned]


def check_each(merged, base, expected, lambda_=1.0):
    """expected(name) is the merged change of a tensor."""
    for name, shape in SHAPES.items():
        assert merged[name].shape == torch.Size(shape)
        np.testing.assert_allclose(flat(merged, name), flat(base, name) + lambda_ * expected(name), rtol=2e-5, atol=2e-6, err_msg=name)


def rows(name: str) -> int:
    shape = SHAPES[name]
    return shape[-1] if len(shape) > 1 else max(int(np.prod(shape)), 1)


def by_row(d: np.ndarray, row: int, change) -> np.ndarray:
    return np.concatenate([change(part) for part in d.reshape(-1, row)]) if d.size else d


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
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_peft(base, tuned, method, density, monkeypatch):
    peft = pytest.importorskip("peft.utils.merge_utils")
    options = {} if method == "task_arithmetic" else {"density": density}
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


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("method", MERGEKIT)
def test_mergekit(base, tuned, method, normalize, monkeypatch):
    arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    group = pytest.importorskip("mergekit.merge_methods.base").TensorGroup
    consensus, sparsification, default, rescale = MERGEKIT[method]
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
    each = {"weight": WEIGHTS, "density": [0.3, 0.5, 0.6]}
    options = {"density": each["density"]} if sparsification else {}
    extra = {"gamma": [0.1] * 3} if "breadcrumbs" in method else {"epsilon": [0.15] * 3} if "della" in method else {}
    gamma = {"gamma": 0.1} if "breadcrumbs" in method else {}
    merged = merge(base, tuned, method, weights=WEIGHTS, lambda_=0.8, compat="mergekit", normalize=normalize, seed=SEED, **options, **gamma)
    for name in ("a.weight", "b.bias"):
        monkeypatch.setattr(torch, "bernoulli", Lottery(name))
        tensors = group.from_tensors([base[name], *(m[name] for m in tuned)], base_index=0)
        by_id = {key: {i + 1: v for i, v in enumerate(values)} for key, values in (each | extra).items()}
        torch.testing.assert_close(merged[name], theirs.merge_group(tensors, **shared, **by_id), rtol=1e-5, atol=3e-6, msg=name)


def test_mergekit_slerp(base, tuned):
    theirs = pytest.importorskip("mergekit.merge_methods.slerp")
    merged = merge(base, [tuned[0]], "slerp", t=0.4, compat="mergekit")
    for name in ("a.weight", "b.bias", "c"):
        expected = theirs.slerp(torch.tensor([0.4]), base[name].reshape(1, -1), tuned[0][name].reshape(1, -1)).reshape(base[name].shape)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=2e-6)


def test_mergekit_density_extremes(base, tuned):
    nothing = merge(base, tuned, "ties", density=0.0, compat="mergekit")
    assert all(torch.equal(nothing[name], base[name]) for name in SHAPES)
    one = merge(base, tuned[:1], "ties", density=1e-9, compat="mergekit")  # at least one change of each tensor
    assert all(int((one[name] != base[name]).sum()) == min(1, base[name].numel()) for name in SHAPES)


# ---- properties

EVERY = [(m, c) for m in methods.METHODS for c in methods.COMPAT] + [("pcb", "paper")]


def options_of(method: str) -> dict:
    spec = methods.METHODS.get(method)
    sparse = method == "pcb" or spec.trim or spec.drop
    return {"density": 0.5} if sparse else {}


def call(method, compat, base, models, **more):
    return merge(None if method == "linear" else base, models, method, compat=compat, seed=SEED, **(options_of(method) | more))


@pytest.mark.parametrize("method, compat", EVERY)
def test_whole_change_of_one_model_is_that_model(base, tuned, method, compat):
    """Density 1 and weight 1 return it, to the rounding of theta_0 + (theta - theta_0); PCB scales changes whatever the density."""
    if method == "pcb":
        return
    full = {"density": 1.0} if options_of(method) else {}
    merged = call(method, compat, base, tuned[:1], **full)
    for name in SHAPES:
        torch.testing.assert_close(merged[name], tuned[0][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method, compat", [pair for pair in EVERY if pair[0] != "linear"])
def test_lambda_zero_is_the_base(base, tuned, method, compat):
    start = {n: v.clone() for n, v in base.items()}
    start["a.weight"][0, :3] = torch.tensor([-0.0, float("inf"), 1e-42])
    merged = call(method, compat, start, tuned, lambda_=0.0)
    for name in SHAPES:
        assert torch.equal(merged[name].view(torch.int32), start[name].view(torch.int32)), name


def test_order_of_models_changes_only_rounding(base, tuned):
    for compat in methods.COMPAT:
        one = merge(base, tuned, "ties", weights=WEIGHTS, density=0.4, compat=compat)
        two = merge(base, tuned[::-1], "ties", weights=WEIGHTS[::-1], density=0.4, compat=compat)
        for name in SHAPES:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_dare_keeps_the_change_on_average():
    base, tuned = {"w": torch.zeros(512, 400)}, {"w": torch.full((512, 400), 0.5)}
    merged = merge(base, [tuned], "dare_linear", density=0.1)["w"]
    assert abs(float(merged.double().mean()) - 0.5) < 5 * 0.5 * (9 / merged.numel()) ** 0.5
    assert abs(float((merged != 0).double().mean()) - 0.1) < 0.004


@pytest.mark.parametrize("method, compat", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_the_wide_result_rounded_once(method, compat, dtype):
    base, tuned = model(0, dtype), [model(i, dtype) for i in (1, 2)]
    wide = [{n: v.float() if n in SHAPES else v for n, v in m.items()} for m in (base, *tuned)]
    merged, expected = call(method, compat, base, tuned), call(method, compat, wide[0], wide[1:])
    for name in SHAPES:
        assert torch.equal(merged[name], expected[name].to(dtype)), name
        assert merged[name].dtype == dtype


@pytest.mark.parametrize("method, compat", EVERY)
def test_fp64_and_other_output_dtypes(base, tuned, method, compat):
    double = [{n: v.double() if n in SHAPES else v for n, v in m.items()} for m in (base, *tuned)]
    narrow = call(method, compat, base, tuned)
    for source, dtype in ((double, None), (double, torch.float32), ([base, *tuned], torch.float64)):
        merged = call(method, compat, source[0], source[1:], dtype=dtype)
        for name in SHAPES:
            assert merged[name].dtype == (torch.float64 if dtype is None else dtype)
            torch.testing.assert_close(merged[name].float(), narrow[name], rtol=1e-3 if method == "pcb" else 1e-4, atol=1e-5)


@pytest.mark.parametrize("method, compat", EVERY)
def test_backends_and_strides_do_not_matter(base, tuned, method, compat):
    expected = call(method, compat, base, tuned)
    with fa.backend("reference"):
        assert_same(call(method, compat, base, tuned), expected)
    strided = [{n: v.t().contiguous().t() if v.dim() == 2 else v for n, v in m.items()} for m in (base, *tuned)]
    before = [hashes(m) for m in strided]
    assert_same(call(method, compat, strided[0], strided[1:]), expected)
    assert [hashes(m) for m in strided] == before


def hashes(state: dict[str, Tensor]) -> list[str]:
    return [hashlib.sha256(v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for v in state.values()]


def assert_same(one, two):
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_random_drop_depends_on_name_model_and_element_alone(base, tuned):
    """Not on the other tensors, their order, or how the work is divided."""
    every = merge(base, tuned, "dare_linear", density=0.5, seed=SEED)
    names = ["c", "a.weight"]
    pick = lambda state: {name: state[name] for name in names}
    some = merge(pick(base), [pick(m) for m in tuned], "dare_linear", density=0.5, seed=SEED)
    assert all(torch.equal(some[name], every[name]) for name in names)
    other = merge(base, tuned, "dare_linear", density=0.5, seed=SEED + 1)
    assert not torch.equal(other["a.weight"], every["a.weight"])


@pytest.mark.parametrize("method, compat", [pair for pair in EVERY if pair[0] != "pcb"])
def test_nan_and_infinity_stay_where_they_are(base, tuned, method, compat):
    broken = {n: v.clone() for n, v in tuned[1].items()}
    broken["a.weight"][0, 0], broken["a.weight"][3, 7] = float("nan"), float("inf")
    merged = call(method, compat, base, [tuned[0], broken])
    assert all(merged[name].isfinite().all() for name in ("b.bias", "c"))
    if compat != "mergekit" or not methods.METHODS[method].drop:  # its rescaling takes the norm of the tensor, which is NaN then
        assert int((~merged["a.weight"].isfinite()).sum()) <= 2


# ---- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "tyes"}, "tyes"),
        ({"compat": "other"}, "other"),
        ({}, "density"),
        ({"density": 1.5}, "1.5"),
        ({"density": [0.1, 0.2]}, "3 of them"),
        ({"density": 0.5, "weights": [1.0]}, "3 finite weights"),
        ({"density": 0.5, "weights": 1.0}, "pass a list"),
        ({"density": 0.5, "weights": [1.0, float("nan"), 1.0]}, "finite"),
        ({"density": 0.5, "lambda_": float("inf")}, "lambda_"),
        ({"density": 0.5, "dtype": torch.int8}, "int8"),
        ({"density": 0.5, "t": 0.5}, "slerp"),
        ({"density": 0.5, "q": 0.5}, "darex"),
        ({"density": 0.5, "epsilon": 0.1}, "epsilon="),
        ({"density": 0.5, "fishers": []}, "fisher"),
        ({"method": "task_arithmetic", "density": 0.5}, "density="),
        ({"method": "slerp", "t": 0.5}, "one model"),
        ({"method": "fisher"}, "fishers="),
        ({"method": "breadcrumbs", "density": 0.5, "gamma": 2.0}, "gamma"),
        ({"method": "della", "density": 0.9, "epsilon": 0.2}, "epsilon"),
        ({"method": "dare_linear", "density": 0.0}, "above 0"),
        ({"method": "darex", "density": 0.0}, "above 0"),
        ({"method": "linear", "lambda_": 0.5}, "lambda_"),
        ({"method": "pcb", "compat": "peft"}, "pcb"),
    ],
)
def test_arguments_that_do_not_fit(base, tuned, options, words):
    before = [hashes(m) for m in (base, *tuned)]
    with pytest.raises(ValueError, match=words):
        merge(base, tuned, **options)
    assert [hashes(m) for m in (base, *tuned)] == before


def test_all_differences_are_listed_at_once(base, tuned, tmp_path):
    odd = dict(tuned[1])
    odd["a.weight"], odd["extra"] = odd["a.weight"].half(), torch.zeros(1)
    del odd["c"]
    longer = tuned[2] | {"b.bias": torch.zeros(46)}
    with pytest.raises(ValueError, match="4 differ") as error:
        merge(base, [tuned[0], odd, longer], density=0.5, out=tmp_path / "new" / "x.safetensors")
    for part in ("model 1: c is missing", "model 1: extra is not in base", "torch.float16", "model 2: b.bias", "(46,)"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_none(base, tuned):
    with pytest.raises(ValueError, match="at least one"):
        merge(base, [], density=0.5)
    with pytest.raises(ValueError, match="pass \\[model"):
        merge(base, tuned[0], density=0.5)
    with pytest.raises(ValueError, match="base"):
        merge(None, tuned, density=0.5)
    with pytest.raises(ValueError, match="ids"):
        merge(base | {"ids": 3}, tuned, density=0.5)
    eight = {n: v.to(torch.float8_e4m3fn) if n == "c" else v for n, v in base.items()}
    with pytest.raises(ValueError, match="float8"):
        merge(eight, [eight], "task_arithmetic")


def test_unreadable_files(base, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="safetensors"):
        merge(base, [path], density=0.5)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        merge(base, [tmp_path / "nowhere"], density=0.5)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        merge(base, [folder], density=0.5)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="gone"):
        merge(base, [folder], density=0.5)


# ---- files


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, inside in parts.items():
        save_file({n: state[n] for n in inside}, folder / file)
    mapping = ", ".join(f'"{n}": "{file}"' for file, inside in parts.items() for n in inside)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {' + mapping + "}}")
    return folder


@pytest.fixture
def on_disk(tmp_path, base, tuned) -> tuple[Path, list[Path]]:
    return sharded(tmp_path / "base", base), [sharded(tmp_path / f"m{i}", m) for i, m in enumerate(tuned)]


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method, compat", EVERY)
def test_out_of_core_equals_in_memory(on_disk, tmp_path, base, tuned, method, compat):
    start, models = on_disk
    expected = call(method, compat, base, tuned)
    out = call(method, compat, start, models, out=tmp_path / "out")
    assert out == tmp_path / "out"
    written = read(out)
    assert_same({n: written[n] for n in expected}, expected)
    if method != "linear":  # which is laid out as its first model, alike
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in start.iterdir())
    single = call(method, compat, start, models, out=tmp_path / "one.safetensors")
    assert_same({n: load_file(single)[n] for n in expected}, expected)


def test_out_must_be_elsewhere(on_disk, tmp_path):
    start, models = on_disk
    with pytest.raises(ValueError, match="none of the inputs"):
        merge(start, models, density=0.5, out=start)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="suffix"):
        merge(start, models, density=0.5, out=tmp_path / "file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "model-00001-of-00009.safetensors").write_text("")
    with pytest.raises(ValueError, match="other weights"):
        merge(start, models, density=0.5, out=tmp_path / "used")


def test_full_disk_leaves_nothing(on_disk, tmp_path, monkeypatch):
    start, models = on_disk
    calls = []

    def failing(tensor):
        calls.append(tensor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(tensor)

    original = files.tensor_bytes
    monkeypatch.setattr(files, "tensor_bytes", failing)
    with pytest.raises(OSError, match="No space"):
        merge(start, models, density=0.5, out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def in_subprocess(code: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_killed_while_writing(on_disk, tmp_path):
    start, models = on_disk
    before = {p: p.read_bytes() for folder in (start, *models) for p in folder.iterdir()}
    code = """
        import os, signal, sys
        from fusedadapt.sparse import merge, weights
        left = iter(range(4))
        original = weights.tensor_bytes
        def dying(tensor):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(tensor)
        weights.tensor_bytes = dying
        merge(sys.argv[1], sys.argv[3:], density=0.5, out=sys.argv[2])
    """
    out = tmp_path / "out"
    done = in_subprocess(code, start, out, *models)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {p.suffix for p in out.iterdir()} == {".tmp"}  # hidden, and swept up by the next run
    assert all(p.read_bytes() == content for p, content in before.items())
    merge(start, models, density=0.5, out=out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in start.iterdir())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
@pytest.mark.skipif(fa.dispatch.core() is None, reason="the reference needs several times a tensor's size")
def test_memory_is_that_of_one_tensor(tmp_path):
    """Models of 104 MiB each; at most the tensors of one name (4 x 8 MiB) and 64 MiB more are ever in memory."""
    elements, count = 4 << 20, 13
    noise = torch.randn(elements // 16).bfloat16().repeat(16)
    for i in range(3):
        save_file({f"t{j}": (noise.roll(j) * (1 + i / 8)).view(2048, -1) for j in range(count)}, tmp_path / f"{i}.safetensors")
    code = """
        import pathlib, sys
        import torch
        from fusedadapt.sparse import merge
        torch.set_num_threads(2)
        folder = sys.argv[1]
        kib = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
        small = {"x": torch.randn(70000)}
        for method, compat in (("ties", "paper"), ("ties", "peft"), ("dare_ties", "mergekit")):
            merge(small, [small, small], method, density=0.2, compat=compat)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = kib("VmRSS")
            models = [f"{folder}/{i}.safetensors" for i in range(3)]
            merge(models[0], models[1:], method, density=0.2, compat=compat, out=f"{folder}/out.safetensors")
            print((kib("VmHWM") - before) / 1024)
    """
    done = in_subprocess(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 4 * 8 + 64, done.stdout


def test_merging_runs_in_cpp(base):
    if fa.dispatch.core() is None:
        pytest.skip("no compiled core")
    for op in ("merge_", "votes", "norms", "cuts"):
        assert ops.choose(op, "cpu").backend == "cpp"
