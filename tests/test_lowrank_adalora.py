"""AdaLoRA's rank allocation and LoRA+'s parameter groups, step by step against PEFT."""

import copy

import pytest
import torch
from lowrank_layers import N, build
from torch import nn

from fusedadapt.lowrank import LoRALinear, RankAllocator, loraplus_groups, orthogonal_penalty


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def adalora_pair():
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    plain = Tiny()
    ours = copy.deepcopy(plain)
    settings = {"target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 2}
    config = peft.AdaLoraConfig(init_r=5, lora_alpha=6, total_step=20, target_modules=["one", "two"], orth_reg_weight=0.5, **settings)
    theirs = peft.get_peft_model(plain, config).base_model
    for name in ("one", "two"):
        setattr(ours, name, LoRALinear.from_linear(getattr(ours, name), r=5, lora_alpha=6, method="adalora"))
        with torch.no_grad():
            for part in ("lora_A", "lora_E", "lora_B"):
                getattr(getattr(ours, name), part).copy_(getattr(getattr(theirs.model, name), part)["default"])
    allocator = RankAllocator(ours, 20, target_r=2, tinit=3, tfinal=4, delta_t=2)
    return ours, allocator, theirs


def test_adalora_follows_peft_step_by_step():
    ours, allocator, theirs = adalora_pair()
    official = theirs.rankallocator
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (ours, theirs.model)]
    for step in range(1, 21):
        x, target = torch.randn(16, 6), torch.randn(16, 4)
        for model in (ours, theirs.model):
            (model(x) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        budget, keep = allocator.step(step)
        want_budget, pattern = official.update_and_allocate(theirs.model, step)
        assert budget == want_budget and (keep is None) == (pattern is None), step
        for name in ("one", "two"):
            mine, other = getattr(ours, name), getattr(theirs.model, name)
            for part in ("lora_A", "lora_E", "lora_B"):
                torch.testing.assert_close(getattr(mine, part), getattr(other, part)["default"], rtol=1e-4, atol=1e-6)
            if keep is not None:
                assert keep[name].tolist() == pattern[f"{name}.lora_E.default"], step
                assert torch.equal(mine.lora_E.view(-1) != 0, keep[name] & (mine.lora_E.view(-1) != 0))
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert keep is not None and sum(int(k.sum()) for k in keep.values()) <= 4


def test_adalora_penalty_is_pefts_and_never_nan():
    ours, _, theirs = adalora_pair()
    got = orthogonal_penalty(ours)
    terms = []
    for name, p in theirs.model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.norm(gram - torch.eye(len(gram))))
    want = sum(terms) / len(terms)
    torch.testing.assert_close(got, want)
    mine = torch.autograd.grad(got, [ours.one.lora_A, ours.two.lora_B])
    other = torch.autograd.grad(want, [theirs.model.one.lora_A["default"], theirs.model.two.lora_B["default"]])
    torch.testing.assert_close(mine, other)
    layer = LoRALinear(6, 6, r=2, method="adalora")
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(2, 6))
        layer.lora_B.copy_(torch.eye(6, 2))
    orthogonal_penalty(nn.Sequential(layer)).backward()
    assert torch.equal(layer.lora_A.grad, torch.zeros(2, 6)) and torch.equal(layer.lora_B.grad, torch.zeros(6, 2))


def test_adalora_allocator_at_its_edges():
    model = nn.Sequential(LoRALinear(6, 6, r=3, method="adalora"))
    with torch.no_grad():
        model[0].lora_E.fill_(1)
    allocator = RankAllocator(model, 10, target_r=3)
    with pytest.raises(RuntimeError, match="after backward"):
        allocator.step(1)
    model(torch.randn(4, 6)).sum().backward()
    assert allocator.step(1, force=True)[1]["0"].all()  # nothing to drop: torch's kthvalue would refuse k = 0
    everything = RankAllocator(model, 10, target_r=0)
    for step in range(1, 10):
        everything.step(step)
    assert everything.step(10)[0] == 0 and not model[0].lora_E.any()
    twin = RankAllocator(model, 10, target_r=0)
    twin.load_state_dict(copy.deepcopy(everything.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(twin.scores().values(), everything.scores().values()))
    with pytest.raises(ValueError, match="into the same model"):
        twin.load_state_dict({"sensitivity": {"other": torch.ones(1)}, "uncertainty": {}})
    for bad in ({"beta1": 1.0}, {"tinit": 6, "tfinal": 4}, {"target_r": 4}, {"delta_t": 0}):
        with pytest.raises(ValueError, match="RankAllocator: expected"):
            RankAllocator(model, 10, **{"target_r": 1} | bad)
    with pytest.raises(ValueError, match="got none"):
        RankAllocator(nn.Linear(2, 2), 10)


# --- LoRA+ -----------------------------------------------------------------------------------------------------------------------------------


def test_loraplus_groups_are_pefts():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.one, self.norm, self.two = nn.Embedding(11, 6), nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)

    config = peft.LoraConfig(target_modules=["emb", "one", "two"], use_dora=True, modules_to_save=["norm"], bias="all")
    model = peft.get_peft_model(Net(), config)
    for ratio, decay in ((16.0, 0.0), (4.0, 0.1)):
        want = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay)
        got = torch.optim.AdamW(loraplus_groups(model, 1e-3, ratio, weight_decay=decay))

        def rows(optimizer):
            return [({id(p) for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups if g["params"]]

        assert rows(got) == rows(want)


def test_loraplus_on_our_layers():
    model = nn.Sequential(build("dora", {}), nn.LayerNorm(N), build("lora", {}))
    groups = loraplus_groups(model, 1e-4, 8.0, weight_decay=0.01)
    owner = {id(p): name for name, p in model.named_parameters()}
    named = [([owner[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups]
    assert named == [
        (["0.lora_A", "2.lora_A"], 1e-4, 0.01),
        (["0.lora_B", "0.lora_magnitude", "2.lora_B"], 8e-4, 0.01),
        (["1.weight", "1.bias"], 8e-4, 0.0),
    ]
    with pytest.raises(ValueError, match="got none"):
        loraplus_groups(nn.Linear(2, 2).requires_grad_(False), 1e-4, 8.0)
    with pytest.raises(ValueError, match="ratio > 0"):
        loraplus_groups(model, 1e-4, 0.0)


@pytest.mark.parametrize("target", [-1, 2.5, True, "2", None])
def test_adalora_target_is_an_integer(target):
    with pytest.raises(ValueError, match="expected target_r: an integer of at least 0"):
        RankAllocator(LoRALinear(8, 8, r=4, method="adalora"), 10, target_r=target)


def test_adalora_keeps_ranks_whose_scores_are_no_numbers():
    """As PEFT: one bad step must not zero what it can say nothing about."""
    torch.manual_seed(0)
    model = nn.ModuleList([LoRALinear(8, 8, r=4, method="adalora") for _ in range(2)])
    allocator = RankAllocator(model, 100, target_r=2)
    x = torch.randn(4, 8)
    for layer in model:
        nn.init.ones_(layer.lora_E)
    (model[0](x).square() + model[1](x).square()).sum().backward()
    model[0].lora_E.grad.fill_(float("nan"))
    keep = allocator.step(60)[1]
    assert keep is not None and bool(keep["0"].all()) and bool(model[0].lora_E.all())
    assert not keep["1"].all()
