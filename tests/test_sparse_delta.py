"""SparseDelta: what it changes, bit-exact undo and exchange, composition, refusals that change nothing."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.ops import sparse as ops
from fusedadapt.sparse import Mask, SparseDelta
from fusedadapt.sparse.delta import Entry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fa.backend(request.param):
        yield
    torch.set_num_threads(threads)


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g).to(dtype) for n, s in (("a", (40, 33)), ("b.c", (1025,)), ("d", ()), ("e", (0, 3)))}


def tuned(base: dict[str, Tensor], density: float = 0.05, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.where(torch.rand(t.shape, generator=g) < density, torch.randn(t.shape, generator=g).to(t.dtype), t) for n, t in base.items()}


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in weights.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(bits(a[n]) == bits(b[n]) for n in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_and_revert_to_the_bit(dtype: torch.dtype) -> None:
    base = state(0, dtype)
    new = tuned(base)
    exact, added = SparseDelta.from_diff(base, new, kind="set"), SparseDelta.from_diff(base, new)
    assert exact.nnz == sum(int((base[n] != new[n]).sum()) for n in base) and set(exact.entries) <= {"a", "b.c", "d"}
    w = copied(base)
    assert exact.apply_(w) is exact and exact.applied and equal(w, new)
    exact.revert_()
    assert equal(w, base) and not exact.applied
    for alpha in (1.0, -0.3, 1e30):  # with infinities on the way in fp16
        added.apply_(w, alpha)
        for n, e in added.entries.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            wanted, at = base[n].clone().reshape(-1), e.indices.long()
            wanted[at] = (wanted[at].to(wide) + alpha * e.values.to(wide)).to(dtype)
            assert bits(w[n]) == bits(wanted)
        added.revert_()
        assert equal(w, base)


def test_the_changed_bits_arrive_signs_of_zero_and_nan_included() -> None:
    base = {"w": torch.tensor([0.0, -0.0, math.nan, 1.0, 2.0, math.inf])}
    new = {"w": torch.tensor([-0.0, 0.0, math.nan, math.nan, 2.0, -math.inf])}
    delta, w = SparseDelta.from_diff(base, new, kind="set"), copied(base)
    delta.apply_(w)
    assert equal(w, new) and delta.nnz == 4, "the unchanged NaN is no change"
    delta.revert_()
    assert equal(w, base)


def test_selection_of_the_largest_changes() -> None:
    base, new = state(0), tuned(state(0), 0.5)
    change = torch.cat([(new[n] - base[n]).abs().reshape(-1) for n in base])
    for delta in (SparseDelta.from_diff(base, new, k=30), SparseDelta.from_diff(base, new, density=30.5 / change.numel())):
        assert delta.nnz == 30
        kept = torch.cat([torch.cat([e.values.abs() for e in delta.entries.values()])])
        assert torch.equal(kept.sort().values, change.topk(30).values.sort().values)
    mask = {"a": Mask.from_bool(torch.eye(40, 33, dtype=torch.bool))}
    delta = SparseDelta.from_diff(base, new, masks=mask, kind="set", dtype=torch.float64)
    assert set(delta.entries) == {"a"} and delta.masks() == mask and torch.equal(delta.entries["a"].values.float(), new["a"].diagonal())


def test_stacked_deltas_come_off_in_the_opposite_order() -> None:
    base, module = state(0), nn.ModuleDict({"l": nn.Linear(30, 20)})
    w = copied(base)
    deltas = [SparseDelta.from_diff(base, tuned(base, 0.3, seed)) for seed in (1, 2, 3)]
    snapshots = []
    for delta in deltas:
        snapshots.append(copied(w))
        delta.apply_(w)
    for delta, before in zip(reversed(deltas), reversed(snapshots)):
        delta.revert_()
        assert equal(w, before)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    version = module["l"].weight._version
    delta = SparseDelta.from_diff(module, {n: t + 1 for n, t in before.items()}, density=0.25)
    delta.apply_(module)
    assert module["l"].weight._version > version, "autograd sees it"
    delta.revert_()
    assert equal({n: p.detach() for n, p in module.named_parameters()}, before)


def test_weights_that_overlap(backend: str) -> None:
    """Changes of tensors that share some of their memory are added one after the other, and come off again."""
    w = torch.randn(50, generator=torch.Generator().manual_seed(1))
    was, at = w.clone(), torch.arange(0, 40, 3, dtype=torch.int32)
    delta = SparseDelta({name: Entry(at, torch.full((14,), 0.3), torch.Size([40])) for name in ("a", "b", "c")})
    for views in ({"a": w[:40], "b": w[3:43], "c": torch.zeros(40)}, {"a": w[3:43], "b": torch.zeros(40), "c": w[:40]}):
        delta.apply_(views)
        wanted = was.clone()
        for first in (0, 3):
            wanted[at.long() + first] += 0.3
        assert torch.equal(w, wanted)
        delta.revert_()
        assert torch.equal(w, was)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))


@pytest.mark.parametrize("kind", ["add", "set"])
def test_tied_weights_change_once(kind: str) -> None:
    """A state dict has them under both names, so has a delta of two state dicts; it fits the module, its state dict and an untied copy."""
    old, new = Tied(), Tied()
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        new.embed.weight[2:4] += 0.3
        new.scale[1] = 2
    base, wanted = copied(old.state_dict()), copied(new.state_dict())
    delta = SparseDelta.from_diff(old.state_dict(), new.state_dict(), kind=kind)
    assert set(delta.entries) == {"embed.weight", "head.weight", "scale"}
    for weights in (old, old.state_dict(), copied(base)):
        found = weights.state_dict() if isinstance(weights, nn.Module) else weights
        delta.apply_(weights)
        assert equal(found, wanted)
        delta.revert_()
        assert equal(found, base)
    if kind == "set":
        delta.swap_(old)
        assert equal(old.state_dict(), wanted) and torch.equal(delta.entries["head.weight"].values, base["head.weight"][2:4].flatten())
        delta.swap_(old)
        assert equal(old.state_dict(), base)
    changes = dict(delta.entries)
    changes["head.weight"] = Entry(changes["head.weight"].indices, changes["head.weight"].values + 1, torch.Size([10, 4]))
    with pytest.raises(ValueError, match="'embed.weight' and 'head.weight' are one tensor, with two changes"):
        SparseDelta(changes, kind).apply_(old)
    assert equal(old.state_dict(), base)


def test_one_tensor_in_two_layouts() -> None:
    """A weight and its transpose: no change arrives twice, and an exchange is undone by the next."""
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    was, new, weights = w.clone(), w + torch.arange(24).view(6, 4) % 3, {"a": w, "b": w.t()}
    values = {"a": new, "b": new.t()}
    adding = SparseDelta.from_diff(copied(weights), values)
    with pytest.raises(ValueError, match="'a' and 'b' are one tensor, transposed; leave one name out"):
        adding.apply_(weights)
    assert torch.equal(w, was) and not adding.applied
    delta = SparseDelta.from_diff(copied(weights), values, kind="set")
    delta.apply_(weights)
    assert torch.equal(w, new)
    delta.revert_()
    for wanted in (new, was, new, was):
        delta.swap_(weights)
        assert torch.equal(w, wanted)
    delta.entries["b"].values.add_(1)
    held = [e.values.clone() for e in delta.entries.values()]
    with pytest.raises(ValueError, match="expected one value for each element"):
        delta.swap_(weights)
    assert torch.equal(w, was) and all(torch.equal(a, e.values) for a, e in zip(held, delta.entries.values(), strict=True))


def test_weights_that_are_not_there_yet_are_refused() -> None:
    """On the meta device a change would be lost without a word."""
    delta = SparseDelta.from_diff({"a": torch.zeros(3)}, {"a": torch.ones(3)}, kind="set")
    for call in (delta.apply_, delta.swap_):
        with pytest.raises(ValueError, match=r"on the meta device: \['a'\]; materialise"):
            call({"a": torch.zeros(3, device="meta")})
    assert not delta.applied


def test_the_model_moves_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    run = ops.run("move_all", torch.zeros(1))
    monkeypatch.setattr(ops, "run", lambda op, data: lambda what, jobs, alpha: (calls.append((what, len(jobs))), run(what, jobs, alpha)))
    base = {name: w for name, w in state(0).items() if w.numel()}
    delta = SparseDelta({name: Entry(torch.tensor([0], dtype=torch.int32), torch.ones(1), w.shape) for name, w in base.items()})
    delta.apply_(base)
    delta.revert_()
    assert calls == [("gather", len(base)), ("add", len(base)), ("scatter", len(base))]


def test_exchanging_twice_changes_nothing() -> None:
    base = state(0, torch.bfloat16)
    new, w = tuned(base), copied(base)
    delta = SparseDelta.from_diff(base, new, kind="set")
    values = {n: e.values.clone() for n, e in delta.entries.items()}
    delta.swap_(w)
    assert equal(w, new)
    delta.swap_(w)
    assert equal(w, base) and equal({n: e.values for n, e in delta.entries.items()}, values)
    with pytest.raises(ValueError, match="loses nothing.*torch.float32 for torch.bfloat16"):
        SparseDelta.from_diff(base, new, kind="set", dtype=torch.float32).swap_(w)
    with pytest.raises(ValueError, match='kind "set"'):
        SparseDelta.from_diff(base, new).swap_(w)
    assert equal(w, base)


def test_weights_of_any_strides() -> None:
    w = torch.randn(20, 30).t()
    before, index = w.clone(), torch.tensor([0, 7, 599], dtype=torch.int32)
    delta = SparseDelta({"w": Entry(index, torch.tensor([1.0, 2.0, 3.0]), w.shape)}, "set")
    delta.apply_({"w": w})
    assert w.reshape(-1)[index.long()].tolist() == [1.0, 2.0, 3.0] and int((w != before).sum()) == 3
    delta.revert_()
    assert torch.equal(w, before)


def test_a_delta_without_changes_goes_on_and_off() -> None:
    base = state(0)
    delta = SparseDelta.from_diff(base, base)
    assert delta.nnz == 0 and delta.apply_(base).applied
    with pytest.raises(RuntimeError, match="revert_"):
        delta.apply_(base)
    delta.revert_()
    assert not delta.applied


def test_copies_are_not_applied_and_hold_no_weights() -> None:
    base = state(0)
    delta = SparseDelta.from_diff(base, tuned(base))
    before = copied(base)
    delta.apply_(base)
    for twin in (copy.copy(delta), copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert not twin.applied and len(pickle.dumps(twin)) < 2 * len(pickle.dumps(SparseDelta(delta.entries)))
        fresh = copied(before)
        twin.apply_(fresh).revert_()
        assert equal(fresh, before) and delta.applied
    delta.revert_()
    assert equal(base, before)


def test_expanded_weights_are_refused_before_anything_moves() -> None:
    base = {"a": torch.zeros(3), "b": torch.zeros(3, 3)}
    delta = SparseDelta.from_diff(base, {n: t + 1 for n, t in base.items()})
    weights = {"a": torch.zeros(3), "b": torch.zeros(1).expand(3, 3)}
    with pytest.raises(ValueError, match=r"expanded: \['b'\]; clone"):
        delta.apply_(weights)
    assert not weights["a"].any() and not delta.applied


def entry(at: list[int], shape: tuple[int, ...] = (6,), values: int | None = None) -> Entry:
    return Entry(torch.tensor(at), torch.ones(len(at) if values is None else values), torch.Size(shape))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (entry([0, 6]), r"positions in \[0, 6\)"), (entry([-1, 2]), r"positions in \[0, 6\)"), (entry([1, 3, 2, 5]), "sorted"),
        (entry([1, 1]), "without repeats"),
        (Entry(torch.tensor([1]), torch.tensor([2]), torch.Size([6])), "floating-point values"),
        (entry([1, 2], values=3), "as many positions"), (Entry(torch.tensor([1.0]), torch.ones(1), torch.Size([6])), "int32 or int64"),
    ],
)  # fmt: skip
def test_positions_must_fit(made: Entry, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparseDelta({"w": made})


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    base = state(0)
    delta = SparseDelta.from_diff(base, tuned(base), kind="set")
    for wrong in ({"a": base["a"]}, base | {"b.c": torch.zeros(3)}, base | {"b.c": torch.zeros(1025, dtype=torch.int64)}):
        weights = copied(wrong)
        for call in (delta.apply_, delta.swap_):
            with pytest.raises(ValueError, match=r"missing, of another shape or not floating-point: \['b.c'"):
                call(weights)
        assert equal(weights, wrong) and not delta.applied
    weights = copied(base)
    with pytest.raises(ValueError, match="alpha 1"):
        delta.apply_(weights, 0.5)
    with pytest.raises(RuntimeError, match="not"):
        delta.revert_()
    delta.apply_(weights)
    with pytest.raises(RuntimeError, match="revert_"):
        delta.apply_(weights)
    with pytest.raises(ValueError, match='"add" or "set"'):
        SparseDelta({}, "multiply")
    with pytest.raises(ValueError, match=r"\['z', 'b.c: \(1025,\) and \(3,\)'\]"):
        SparseDelta.from_diff(base, base | {"z": torch.zeros(1), "b.c": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"density in \[0, 1\]"):
        SparseDelta.from_diff(base, base, density=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {"w": Mask.full((3, 3), True)}}, r"expected masks in the shapes.*w: \(3, 3\)"),
        ({"masks": {"v": Mask.full((4, 6), True)}}, "got others.*v:"),
        ({"masks": {"w": Mask.full((4, 6), True)}, "density": 0.5}, "expected one of density, k and masks"),
        ({"k": 3, "density": 0.5}, "expected one of density, k and masks"),
    ],
)
def test_masks_that_do_not_fit(options, message):
    base = {"w": torch.zeros(4, 6)}
    with pytest.raises(ValueError, match=message):
        SparseDelta.from_diff(base, {"w": torch.ones(4, 6)}, **options)


def test_bool_tensors_are_masks():
    chosen = torch.arange(24).view(4, 6) % 5 == 0
    delta = SparseDelta.from_diff({"w": torch.zeros(4, 6)}, {"w": torch.ones(4, 6)}, masks={"w": chosen})
    assert torch.equal(delta.masks()["w"].to_bool(), chosen)


def test_a_module_that_moves_meanwhile_is_reverted_all_the_same() -> None:
    module = nn.Linear(6, 4)
    base = copied(module.state_dict())
    delta = SparseDelta.from_diff(base, {n: t + 1 for n, t in base.items()}, k=9)
    delta.apply_(module)
    module.load_state_dict(copied(module.state_dict()), assign=True)  # other tensors; so do .to(device) and FSDP
    delta.revert_()
    assert equal(copied(module.state_dict()), base)
    delta.apply_(module)
    with pytest.raises(ValueError, match=r"converted or gone: \['weight'"):
        module.double()
        delta.revert_()
    assert delta.applied
    module.float()
    delta.revert_()
    assert equal(copied(module.state_dict()), base) and not delta.applied


def test_a_failed_call_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = state(0)
    before, delta = copied(base), SparseDelta.from_diff(state(0), tuned(state(0)))
    for alpha in (math.nan, math.inf, "1", None):
        with pytest.raises(ValueError, match="a finite alpha"):
            delta.apply_(base, alpha)
        assert not delta.applied
    run = ops.move_all

    def failing(op: str, jobs: Any, alpha: float = 1.0) -> None:
        run(op, jobs, alpha)
        if op == "add":
            raise KeyboardInterrupt

    monkeypatch.setattr(ops, "move_all", failing)
    with pytest.raises(KeyboardInterrupt):
        delta.apply_(base)
    assert equal(base, before) and not delta.applied
    monkeypatch.setattr(ops, "move_all", run)
    delta.apply_(base, torch.tensor(0.5)).revert_()
    assert equal(base, before)
    for wrong in ([base["a"]], base["a"], {"a": 1}):
        with pytest.raises(TypeError, match="a module or name -> tensor"):
            delta.apply_(wrong)
    with pytest.raises(ValueError, match="tensors of positions and values"):
        SparseDelta({"a": Entry([1, 2], torch.ones(2), torch.Size([6]))})
    with pytest.raises(ValueError, match="Masks or bool tensors"):
        SparseDelta.from_diff(base, base, masks={"a": [1]})


def test_strided_positions_and_values_are_taken() -> None:
    """They passed, and apply_ failed inside."""
    both = torch.tensor([[1, 5], [3, 6], [7, 8]])
    delta = SparseDelta({"w": Entry(both[:, 0], both[:, 1].float()[:, None].expand(3, 2)[:, 0], [10])})  # type: ignore[arg-type]
    weights = {"w": torch.zeros(10)}
    delta.apply_(weights)
    assert weights["w"].tolist() == [0, 5, 0, 6, 0, 0, 0, 8, 0, 0]
