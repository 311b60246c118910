"""What holds of every merge, and what merging refuses."""

import merge_cases as cases
import numpy as np
import pytest
import torch
from merge_cases import EVERY, SEED, SHAPES, WEIGHTS, assert_same, call, hashes, model, options_of
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedadapt as fa
from fusedadapt.ops import sparse as ops
from fusedadapt.sparse import merge
from fusedadapt.sparse import merge_methods as methods

# fixtures
base, tuned, one_torch_thread = cases.base, cases.tuned, cases.one_torch_thread


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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("method, compat", [pair for pair in EVERY if pair[0] in methods.METHODS and methods.METHODS[pair[0]].elect])
def test_no_election_hides_a_nan(method, compat, backend):
    """Not under another model's change, of either sign; what stands beside it is elected as ever."""
    base = {"a": torch.zeros(6)}
    first, second = {"a": torch.tensor([float("nan"), float("nan"), float("inf"), 1, 2, -3])}, {"a": torch.tensor([1.0, -1, 2, -3, 2, -3])}
    with fa.backend(backend):
        for weights in (None, [-1.0, 1.0]):
            options = {"method": method, "density": 1.0, "compat": compat, "weights": weights}
            merged = merge(base, [first, second], **options)["a"]
            clean = merge({"a": torch.zeros(3)}, [{"a": m["a"][3:]} for m in (first, second)], **options)["a"]
            assert merged[:3].isnan().tolist() == [True, True, False] and torch.equal(merged[3:], clean)


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
        ({"method": "della", "density": 0.5, "epsilon": -0.1}, "epsilon >= 0"),
        ({"method": "della", "density": 0.0}, "epsilon"),
        ({"method": "dare_linear", "density": 0.0, "compat": "peft"}, "above 0"),
        ({"method": "darex", "density": 0.5, "q": float("nan")}, "finite q"),
        ({"method": "darex", "density": 0.5, "q": float("inf")}, "finite q"),
        ({"density": 0.5, "device": "nowhere"}, "a device that torch can use; got 'nowhere'"),
        ({"method": "darex", "density": 0.0}, "above 0"),
        ({"method": "linear", "lambda_": 0.5}, "lambda_"),
        ({"method": "linear", "weights": [1.0, 1.0, -2.0]}, "do not add up to 0"),
        ({"method": "linear", "weights": [0.0, 0.0, 0.0], "compat": "mergekit"}, "do not add up to 0"),
        ({"method": "pcb", "compat": "peft"}, "pcb"),
        ({"density": 0.5, "majority_sign_method": "most"}, "got 'most' with"),
        ({"method": "dare_linear", "density": 0.5, "majority_sign_method": "frequency"}, "where signs are elected"),
        ({"density": 0.5, "rescale": True}, 'compat="mergekit"'),
        ({"density": 0.5, "normalize": True}, "got normalize="),  # elections divide by those that agree
        ({"density": 0.5, "gamma": 0.2}, "got gamma="),
        ({"method": "darex", "density": 0.5, "rescale": False}, "rescale="),
        ({"method": "task_arithmetic", "rescale": True, "compat": "mergekit"}, "rescale="),
        ({"density": 0.5, "seed": float("inf")}, "an integer as seed; got inf"),
        ({"density": 0.5, "seed": float("nan")}, "an integer as seed; got nan"),
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


def test_all_that_cannot_be_opened_is_listed_at_once(base, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError) as error:
        merge(tmp_path / "no-base", [base, tmp_path / "torn.safetensors", tmp_path / "gone"], density=0.5)
    assert all(name in str(error.value) for name in ("no-base", "torn.safetensors", "gone")) and str(error.value).count("merge:") == 1
    with pytest.raises(FileNotFoundError, match=r"one; .*two;"):
        merge(base, [tmp_path / "one", tmp_path / "two"], density=0.5)
    for n in (1, 2):
        save_file({"x": torch.ones(3).to(torch.float8_e5m2)}, tmp_path / f"eight-{n}.safetensors")
    with pytest.raises(ValueError, match=r"float8_e5m2 in .*eight-1.*float8_e5m2 in .*eight-2"):
        merge(tmp_path / "eight-1.safetensors", [tmp_path / "eight-2.safetensors"], "task_arithmetic")
    with pytest.raises(FileNotFoundError, match=r"one; .*two;"):
        merge(None, [base, base], "fisher", fishers=[tmp_path / "one", tmp_path / "two"])


def test_fisher_weights_that_leave_nothing(base, tuned):
    """0 / 0 made a model of NaN."""
    for weights in ([0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="a sum other than 0"):
            merge(None, tuned[:2], "fisher", fishers=[base, base], weights=weights)
    merged = merge(None, tuned[:2], "fisher", fishers=[base, base], weights=[0.0, 2.0])
    assert all(torch.allclose(merged[name], tuned[1][name]) for name in merged if merged[name].dtype == torch.float32)


def test_models_that_are_none(base, tuned):
    with pytest.raises(TypeError, match=r"state dict or a path; got Linear; pass model.state_dict\(\)"):
        merge(torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)], "ties", density=0.5)
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
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(ValueError, match="weight_map"):
        merge(base, [folder], "task_arithmetic")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="gone"):
        merge(base, [folder], density=0.5)
    save_file(base, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"c": "model.safetensors", "lost": "model.safetensors"}}')
    with pytest.raises(ValueError, match="no file has lost; copy"):
        merge(base, [folder], density=0.5)


def test_merging_runs_in_cpp(base):
    if fa.dispatch.core() is None:
        pytest.skip("no compiled core")
    for op in ("merge_", "votes", "norms", "cuts"):
        assert ops.choose(op, "cpu").backend == "cpp"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": "0.5"}, "a number as density; got '0.5'"), ({"density": [0.5, None]}, "a number as density; got None"),
        ({"seed": "a"}, "an integer as seed; got 'a'"), ({"seed": 1.7}, "an integer as seed; got 1.7"), ({"seed": None}, "an integer as seed"),
        ({"lambda_": None}, "a number as lambda_"), ({"lambda_": "x"}, "a number as lambda_"), ({"weights": ["1"]}, "a number as weights"),
        ({"gamma": "x"}, "a number as gamma"), ({"epsilon": "x"}, "a number as epsilon"),
    ],
)  # fmt: skip
def test_what_is_no_number(options, said):
    base = {"a": torch.randn(4, 6)}
    with pytest.raises(ValueError, match=f"merge: expected {said}"):
        merge(base, [{"a": base["a"] + 1}], "dare_linear", **({"density": 0.5} | options))


def test_models_of_every_kind_of_sequence_and_what_is_no_model():
    base, tuned = {"a": torch.randn(4, 6)}, [{"a": torch.randn(4, 6)} for _ in range(2)]
    wanted = merge(base, tuned, "ties", density=0.5, weights=[0.5, 0.25])["a"]
    for models in (tuple(tuned), iter(tuned), (m for m in tuned)):
        assert torch.equal(merge(base, models, "ties", density=torch.tensor(0.5), weights=np.array([0.5, 0.25]))["a"], wanted)
    for name, t in ((1, base["a"]), ("a", base["a"].to_sparse()), ("a", [1.0])):
        with pytest.raises(ValueError, match="merge: expected name -> dense tensor"):
            merge({name: t}, [{name: t}], "ties", density=0.5)


class _LikeAGpu(TorchDispatchMode):
    """torch's arithmetic where a GPU's differs from a CPU's: numbers divide by their reciprocal, functions are an ulp off now and then."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], Tensor):
            return args[0] * (torch.ones((), dtype=args[0].dtype) / args[1])
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.exp.default, torch.ops.aten.tanh.default):
            near = torch.nextafter(out, torch.full_like(out, float("inf")))
            return torch.where(torch.arange(out.numel()).view(out.shape) % 3 == 0, near, out)
        return out


@pytest.mark.parametrize("method, compat", [("linear", "paper"), ("della", "paper"), ("della_linear", "peft"), ("pcb", "paper")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_bits(method, compat, dtype):
    """Of what plain torch computes: its CPU arithmetic, bent to a GPU's, changes nothing."""
    start, models = model(0, dtype), [model(i, dtype) for i in (1, 2, 3)]
    more = {"density": 0.4} if options_of(method) else {}
    with fa.backend("reference"):
        expected = call(method, compat, start, models, weights=WEIGHTS, **more)
        with _LikeAGpu():
            merged = call(method, compat, start, models, weights=WEIGHTS, **more)
    assert_same(merged, expected)
