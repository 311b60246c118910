"""Checkpoints: exact round trips, every damage found and named before anything changes, and never an unreadable file after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fusedadapt.checkpoint import CheckpointError, load, load_tree, save, save_tree

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal types and values, tensors by dtype, shape and bits."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert bits(a) == bits(b), where
        return
    assert type(a) is type(b), f"{where}: {type(a)} is not {type(b)}"
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} is not {b}"


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits, NaN payloads and denormals included (0 and 1 for bool, whose other bytes are no values)."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def trained(cls: type[torch.optim.Optimizer], model: nn.Module, **kwargs: object) -> torch.optim.Optimizer:
    make: object = cls
    optimizer = make(model.parameters(), **kwargs)  # type: ignore[operator]
    step(model, optimizer)
    step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    dtype = next(model.parameters()).dtype
    model(torch.linspace(-1, 1, 24, dtype=dtype).reshape(4, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5)], ids=str)
def test_tensor_round_trip(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    tree = {"x": random_tensor(dtype, shape)}
    save_tree(tmp_path / "c", tree)
    assert_same(load_tree(tmp_path / "c"), tree)


def test_tree_round_trip(tmp_path: Path) -> None:
    tree = {
        "scalars": [None, True, False, 0, -(2**70), 0.1, 5e-324, -0.0, float("inf"), float("-inf"), float("nan"), "ü\n\0", ""],
        "tuples": ((0.9, 0.999), (), [(1,), []], {}),
        0: {1: "int keys", -3: {"": "empty key"}},
        "dtype": torch.bfloat16,
        "a/b": torch.ones(2),
        "a": {"b": torch.zeros(3)},
        "tagged": {"tensor": "a/b", "dict": [1], "tuple": {"float": "nan"}},
    }
    save_tree(tmp_path / "c", tree)
    assert_same(load_tree(tmp_path / "c"), tree)
    for bare in (None, 3, torch.arange(4), (torch.ones(1),)):
        save_tree(tmp_path / "c", bare)
        assert_same(load_tree(tmp_path / "c"), bare)


def test_negative_zero_keeps_its_sign(tmp_path: Path) -> None:
    save_tree(tmp_path / "c", -0.0)
    assert str(load_tree(tmp_path / "c")) == "-0.0"


def test_views_sharing_storage(tmp_path: Path) -> None:
    """Step counters are views of one buffer; safetensors refuses those, and storing the buffer would lose which is which."""
    buffer = torch.arange(6, dtype=torch.float32)
    base = torch.arange(12.0).reshape(3, 4)
    tree = {
        "steps": [buffer[i] for i in range(6)],
        "t": base.T,
        "strided": base[:, ::2],
        "tied": [base, base],
        "expanded": torch.ones(1).expand(4),
    }
    save_tree(tmp_path / "c", tree)
    back = load_tree(tmp_path / "c")
    assert_same(back, tree)
    back["steps"][0].add_(1)
    assert back["steps"][1] == 1, "loaded views must not share storage"


def test_equal_trees_give_equal_files_and_any_reader_opens_them(tmp_path: Path) -> None:
    model = net()
    optimizer = trained(torch.optim.AdamW, model)
    for name in ("a", "b"):
        save(tmp_path / name, model, optimizer, {"step": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert torch.equal(file.get_tensor("model//0.weight"), model[0].weight)
    assert os.listdir(tmp_path) in (["a", "b"], ["b", "a"]), "no temporary file may remain"


UNSTORABLE = [object(), {1.5: 0}, {"x": {1, 2}}, torch.eye(2).to_sparse(), torch.ones(1, dtype=torch.complex64), 1j]


@pytest.mark.parametrize("bad", UNSTORABLE, ids=lambda bad: type(bad).__name__)
def test_refuses_what_it_cannot_store(tmp_path: Path, bad: object) -> None:
    save_tree(tmp_path / "c", 1)
    with pytest.raises(CheckpointError, match=r"checkpoint\.save: expected .*where/0.*; "):
        save_tree(tmp_path / "c", {"where": [bad]})
    assert load_tree(tmp_path / "c") == 1
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.99), "amsgrad": True}),
        (torch.optim.AdamW, {"lr": torch.tensor(1e-3)}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.NAdam, {}),
        (torch.optim.Rprop, {}),
    ],
)
def test_optimizer_round_trip_and_same_continuation(tmp_path: Path, cls: type, kwargs: dict[str, object], dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = trained(cls, model, **kwargs)
    save(tmp_path / "c", model, optimizer, extra=("tuple", 1))
    other = net().to(dtype)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    fresh = cls(other.parameters(), **kwargs)
    assert load(tmp_path / "c", other, fresh) == ("tuple", 1)
    assert_same(fresh.state_dict(), optimizer.state_dict())
    for _ in range(3):
        step(model, optimizer)
        step(other, fresh)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(fresh.state_dict(), optimizer.state_dict())


def test_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    save(tmp_path / "c")
    expected = torch.rand(4)
    torch.manual_seed(6)
    load(tmp_path / "c", rng=False)
    assert not torch.equal(torch.rand(4), expected)
    load(tmp_path / "c")
    assert torch.equal(torch.rand(4), expected)


# --- what does not fit -----------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
    tree = {"m": model.state_dict(), "o": optimizer.state_dict(), "rng": torch.get_rng_state()}
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def narrow_model(m: nn.Module) -> tuple[nn.Module, str]:
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)), r"2\.bias.*\[4\].*\[3\]"


def bf16_model(m: nn.Module) -> tuple[nn.Module, str]:
    return m.bfloat16(), r"0\.bias .*bfloat16.*float32"


def short_model(m: nn.Module) -> tuple[nn.Module, str]:
    return nn.Sequential(*list(m)[:2]), r"2\.bias: the model lacks it"


def long_model(m: nn.Module) -> tuple[nn.Module, str]:
    return nn.Sequential(*m, nn.Linear(3, 3)), r"3\.bias: the file lacks it"


@pytest.mark.parametrize("change", [narrow_model, bf16_model, short_model, long_model], ids=lambda f: f.__name__)
def test_wrong_model_is_named_and_nothing_changes(tmp_path: Path, change: object) -> None:
    model = net()
    save(tmp_path / "c", model, trained(torch.optim.AdamW, model))
    other, message = change(net())  # type: ignore[operator]
    optimizer = torch.optim.AdamW(other.parameters())
    before = snapshot(other, optimizer)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "c", other, optimizer)
    assert_same(snapshot(other, optimizer), before)


def test_wrong_optimizer_is_named_and_nothing_changes(tmp_path: Path) -> None:
    model = net()
    save(tmp_path / "c", model, trained(torch.optim.AdamW, model))
    other = net()
    groups = [{"params": list(other.parameters())[:2]}, {"params": list(other.parameters())[2:]}]
    cases = [
        (torch.optim.Adam(other.parameters()), "an? Adam;.* holds AdamW"),
        (torch.optim.AdamW(groups), r"\[2, 4\] tensors.* has \[6\]"),
    ]
    for optimizer, message in cases:
        before = snapshot(other, optimizer)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "c", other, optimizer)
        assert_same(snapshot(other, optimizer), before)
    save(tmp_path / "c", model)
    with pytest.raises(CheckpointError, match="holds none"):
        load(tmp_path / "c", other, torch.optim.AdamW(other.parameters()))


# --- damage ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    model = net()
    save(tmp_path / "c", model, trained(torch.optim.AdamW, model), {"step": 2})
    return tmp_path / "c"


def spans(data: bytes) -> tuple[int, dict[str, tuple[int, int]]]:
    """First data byte of the file, and each tensor's byte range, from the safetensors header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    start = 8 + length
    return start, {name: (start + e["data_offsets"][0], start + e["data_offsets"][1]) for name, e in header.items() if name != "__metadata__"}


def assert_refused(path: Path, *names: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError) as caught:
        load(path, model, optimizer)
    message = str(caught.value)
    assert message.startswith("checkpoint.load: expected an intact checkpoint; ") and "nothing was loaded" in message
    assert not names or any(f"tensor {name}" in message for name in names), message
    assert_same(snapshot(model, optimizer), before)


def test_every_tensor_with_a_flipped_bit_is_named(intact: Path) -> None:
    data = intact.read_bytes()
    rng = random.Random(0)
    _, tensors = spans(data)
    assert len(tensors) >= 25
    for name, (first, end) in tensors.items():
        for position in {first, end - 1, rng.randrange(first, end)}:
            damaged = bytearray(data)
            damaged[position] ^= 1 << rng.randrange(8)
            intact.write_bytes(damaged)
            assert_refused(intact, name)


def test_flipped_bits_in_the_header(intact: Path) -> None:
    data = intact.read_bytes()
    rng = random.Random(1)
    start, _ = spans(data)
    for position in [*range(12), *(rng.randrange(start) for _ in range(200)), *range(start - 12, start)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        intact.write_bytes(damaged)
        assert_refused(intact)


def test_truncated_anywhere_names_the_first_missing_tensor(intact: Path) -> None:
    data = intact.read_bytes()
    start, tensors = spans(data)
    cuts = {0, 1, 7, 8, 9, start - 1, start, len(data) - 1} | {edge + d for span in tensors.values() for edge in span for d in (-1, 0, 1)}
    for cut in sorted(c for c in cuts if c < len(data)):
        intact.write_bytes(data[:cut])
        missing = [name for name, (_, end) in tensors.items() if end > cut] if cut >= start else []
        assert_refused(intact, *missing)


def test_other_damage(intact: Path, tmp_path: Path) -> None:
    data = intact.read_bytes()
    intact.write_bytes(data + b"\0")
    assert_refused(intact)
    _, tensors = spans(data)
    first, second = tensors["model//0.weight"], tensors["optimizer//state_dict/state/0/exp_avg"]
    swapped = bytearray(data)
    swapped[slice(*first)], swapped[slice(*second)] = data[slice(*second)], data[slice(*first)]
    intact.write_bytes(swapped)
    assert_refused(intact, "model//0.weight", "optimizer//state_dict/state/0/exp_avg")
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "absent")
    save_file({"w": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not one of ours"):
        load(tmp_path / "foreign")
    save_tree(tmp_path / "tree", [1])
    with pytest.raises(CheckpointError, match="use load_tree"):
        load(tmp_path / "tree")


# --- kill -9 ---------------------------------------------------------------------------------------------------------------

# Forked, not started anew: importing torch 50 times would take minutes. The child touches no thread pool.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fusedadapt.checkpoint import load_tree, save_tree
torch.set_num_threads(1)
path, rng = Path(sys.argv[1]), random.Random(7)
save_tree(path, {"n": 0, "x": torch.zeros(200_000)})
during = kill = 0
while during < 50 and kill < 500:
    kill += 1
    child = os.fork()
    if child == 0:
        n = kill * 1000
        while True:
            n += 1
            save_tree(path, {"n": n, "x": torch.full((200_000,), float(n))})
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    during += any(path.parent.glob(".*.tmp"))
    tree = load_tree(path)
    assert (tree["x"] == tree["n"]).all()
save_tree(path, None)
assert [p.name for p in path.parent.iterdir()] == [path.name], list(path.parent.iterdir())
print(during)
"""


def test_killed_while_saving_never_leaves_an_unreadable_file(tmp_path: Path) -> None:
    """Kills at random moments until 50 have hit inside a save: the file is readable and whole after each. Leftovers go with the next save."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "c")], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 50, f"only {done.stdout} kills came during a save"


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tree(tmp_path / "c", {"x": torch.ones(3)})

    def full(tensor: torch.Tensor) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusedadapt.checkpoint._hash", lambda tensor: "0" * 32)
    monkeypatch.setattr("fusedadapt.files.tensor_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_tree(tmp_path / "c", {"x": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["c"]
    assert torch.equal(load_tree(tmp_path / "c")["x"], torch.ones(3))


def test_temporary_file_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        theirs = tmp_path / f".c.{sleeper.pid}.tmp"
        theirs.write_bytes(b"in use")
        save_tree(tmp_path / "c", 1)
        assert theirs.exists()
    finally:
        sleeper.send_signal(signal.SIGKILL)
        sleeper.wait()
    save_tree(tmp_path / "c", 2)
    assert not theirs.exists()
