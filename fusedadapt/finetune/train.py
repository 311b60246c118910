"""The run: data, lanes, steps, checkpoints, judgement before and after. Everything the maths depends on is in ``Config``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import checkpoint
from ..files import write_safetensors
from . import adapters, data, model, quantized, sparse
from .errors import FinetuneError
from .lane import History, Lane, gradients
from .metrics import Quality
from .optimizers import Rule, resolve, torch_twin
from .tokens import Hashed, Pretrained, Tokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINT = "checkpoint.safetensors"
REPORT = "report.json"
#: what `export` brings of the pretrained model's folder
COMPANIONS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
#: folder -> files that a run may leave there, beside checkpoint, report and curves, which every run replaces
RESULTS = {
    "adapter": adapters.FILES,
    "model": ("model.safetensors", *COMPANIONS),
    "model-compared": ("model.safetensors", *COMPANIONS),
    ".": (sparse.DELTA,),
}
HELD_OUT = 512
QUICK_FILES, QUICK_HELD_OUT = 40, 32
#: quality of the model as it came, and what quantizing did to it
Start = tuple[Quality, quantized.Summary | None]


@dataclass(frozen=True)
class Config:
    """A resumed run must agree in every field. ``lr``, ``weight_decay`` None: the rule's own. ``threads``: sums depend on how they are
    split."""

    optimizer: str = "AdamW"
    compare: str | None = None
    steps: int = 60
    batch: int = 24
    lr: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "fp32"
    master_weights: str | None = None
    stochastic_rounding: bool = False
    adapter: str | None = None
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    init: str | None = None
    quant: str | None = None
    sparse: float | None = None
    select: str = "magnitude"
    quick: bool = False
    threads: int = field(default_factory=torch.get_num_threads)


class Watcher(Protocol):
    """Told what happens, so that the run itself prints nothing."""

    def say(self, text: str) -> None: ...
    def begin(self, done: int, total: int) -> None: ...
    def stepped(self, lanes: list[Lane], done: int) -> None: ...
    def end(self) -> None: ...


@dataclass
class Adapted:
    """What an adapter cost and left: parameters trained and in all; bytes a batch keeps for backward; layer -> share of the change that
    merging kept (PEFT reports none); quality of the merged model."""

    trained: int
    parameters: int
    kept_for_backward: int
    retained: dict[str, float]
    merged: Quality


@dataclass
class Result:
    config: Config
    lanes: list[Lane]
    before: Quality
    after: list[Quality]
    pairs: tuple[int, int]
    data_digest: str
    seconds: float
    adapted: list[Adapted] = field(default_factory=list)
    sparse: sparse.Summary | None = None
    quantized: quantized.Summary | None = None


def run(config: Config, out: Path, watcher: Watcher, *, save_every: int, resume: bool) -> Result:
    """The whole job; leaves ``checkpoint.safetensors`` and ``model/`` in ``out``. Killed and resumed equals uninterrupted, bit for bit, on
    a CPU. What ``out`` holds of a finished run stays until everything that can be refused has been looked at, its model and the files
    beside it until this one has been trained."""
    began = time.perf_counter()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    train, held_out = load_data(config)
    digest = data.digest(train, held_out)
    watcher.say(f"{len(train)} training pairs and {len(held_out)} held-out pairs from the Python standard library")
    lanes = build_lanes(config, train, stored_masks(out / CHECKPOINT, config) if resume else None)
    batch = [train[i] for i in data.batch_indices(len(train), config.batch, config.seed, 0)]
    if resume:
        before, packed, done = restore(out / CHECKPOINT, config, lanes, digest)
        watcher.say(f"resumed {out / CHECKPOINT} at step {done} of {config.steps}")
    else:
        watcher.say("judging the model before training")
        before, packed, done = *judge_start(config, lanes[0], held_out, batch), 0
        (out / CHECKPOINT).unlink(missing_ok=True)  # a finished run's: what is resumed from now on is this one
    (out / REPORT).unlink(missing_ok=True)  # its presence marks a finished run

    def keep(step: int) -> None:
        store(out / CHECKPOINT, config, lanes, (before, packed), digest, step)

    kept = [lane.kept_for_backward(batch) for lane in lanes] if config.adapter is not None else []
    train_steps(config, train, lanes, watcher, done, save_every, keep)
    watcher.say("judging the model after training")
    after = [lane.evaluate(held_out) for lane in lanes]
    clear(out)
    adapted = [finish_adapter(lane, size, held_out, out) for lane, size in zip(lanes, kept, strict=False)]
    for lane, folder in zip(lanes, ("model", "model-compared"), strict=False):
        export(lane, out / folder, config)
    thinned = finish_sparse(config, lanes[0], out)
    return Result(config, lanes, before, after, (len(train), len(held_out)), digest, time.perf_counter() - began, adapted, thinned, packed)


def judge_start(config: Config, lane: Lane, held_out: list[data.Pair], batch: list[data.Pair]) -> tuple[Quality, quantized.Summary | None]:
    """Quality of the model as it came, and, with --quant, what quantizing it did."""
    quality = lane.evaluate(held_out)
    if config.quant is None:
        return quality, None
    encoder, tokens = _encoder(replace(config, quant=None))
    summary = quantized.summarise(config.quant, encoder, lane.model, quality, tokens, batch)
    return lane.judge(encoder, held_out), summary


def clear(out: Path) -> None:
    """Removes what an earlier run left: an adapter or a configuration beside a model that it is not of would be taken for its own."""
    for folder, names in RESULTS.items():
        for name in names:
            (out / folder / name).unlink(missing_ok=True)
    for name in ("adapter", "model/1_Pooling", "model-compared/1_Pooling", "model-compared"):
        if (out / name).is_dir() and not any((out / name).iterdir()):
            (out / name).rmdir()


def finish_adapter(lane: Lane, kept: int, held_out: list[data.Pair], out: Path) -> Adapted:
    """Saves the adapter apart (ours), merges it, judges the merged model."""
    if isinstance(lane.adapter, adapters.Adapter):
        lane.save_adapter(out / "adapter")
    return Adapted(*lane.parameters(), kept, lane.merge(), lane.evaluate(held_out))


def finish_sparse(config: Config, lane: Lane, out: Path) -> sparse.Summary | None:
    """With --sparse: saves what was trained as a delta of the model that the run began with."""
    if lane.masks is None:
        return None
    base = {name: p.detach().cpu() for name, p in _encoder(config)[0].named_parameters()}
    final = lane.final_weights()
    return sparse.finish(base, {name: final[name] for name in base}, lane.masks, lane.optimizer, out)


def load_data(config: Config) -> tuple[list[data.Pair], list[data.Pair]]:
    files = data.library_files(limit=QUICK_FILES if config.quick else None)
    return data.split(data.collect(files), QUICK_HELD_OUT if config.quick else HELD_OUT)


def build_lanes(config: Config, train: list[data.Pair] | None = None, masks: sparse.Masks | None = None) -> list[Lane]:
    """One lane, or two from the same start. The second one's hyper-parameters are read from the first one's constructed optimizer.
    ``masks``: a stored run's; without, --sparse chooses them, by gradients of the first batch of ``train`` if told so."""
    extras: dict[str, Any] = {}
    if config.master_weights is not None:
        extras["master_weights"] = config.master_weights
    if config.stochastic_rounding:
        extras["stochastic_rounding"] = True
    rule = resolve(config.optimizer, lr=config.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, extras=extras)
    if config.adapter is not None and config.lr is None:
        rule = replace(rule, lr=adapters.learning_rate(rule.lr, config.adapter))
    if config.sparse is not None:
        rule = replace(rule, lr=rule.lr if config.lr is not None else rule.lr * sparse.LR_FACTOR)
        return [_sparse_lane(config, rule, train or [], masks)]
    lanes = [_lane(config, rule)]
    if config.compare == "peft":
        lanes.append(_peft_lane(config, rule, lanes[0]))
    elif config.compare is not None:
        if rule.label.startswith("torch "):
            raise FinetuneError(f"finetune: expected one of our rules with --compare torch; got {config.optimizer!r}; drop the 'torch:' or --compare")
        lanes.append(_lane(config, torch_twin(rule, lanes[0].optimizer, config.max_grad_norm)))
    return lanes


def _encoder(config: Config) -> tuple[model.Encoder, Tokens]:
    encoder = model.tiny(config.seed) if config.quick else model.pretrained()
    tokens: Tokens = Hashed(model.TINY.vocab_size) if config.quick else Pretrained(model.pretrained_dir())
    encoder = encoder.to(config.device, DTYPES[config.dtype])
    if config.quant is not None:
        quantized.apply(encoder, config.quant)
    return encoder, tokens


def _lane(config: Config, rule: Rule) -> Lane:
    encoder, tokens = _encoder(config)
    adapter = None
    if config.adapter is not None:
        options = adapters.Options(config.adapter, config.rank, config.alpha, config.dropout, config.init)
        adapter = adapters.Adapter(encoder, options, config.steps, config.seed)
    return Lane(encoder, rule, tokens, config.seed, adapter)


def _sparse_lane(config: Config, rule: Rule, train: list[data.Pair], masks: sparse.Masks | None) -> Lane:
    encoder, tokens = _encoder(config)
    assert config.sparse is not None
    if masks is None:
        if config.select == "gradient":
            first = [train[i] for i in data.batch_indices(len(train), config.batch, config.seed, 0)]
            gradients(encoder, tokens, first)
        masks = sparse.choose(encoder, config.sparse, config.select)
    more = sparse.options(encoder, masks)
    return Lane(encoder, replace(rule, arguments=rule.arguments | more), tokens, config.seed, masks=masks)


def _peft_lane(config: Config, rule: Rule, ours: Lane) -> Lane:
    encoder, tokens = _encoder(config)
    assert isinstance(ours.adapter, adapters.Adapter)
    adapter = adapters.PeftAdapter(encoder, ours.adapter)
    return Lane(encoder, replace(rule, label=f"PEFT, {rule.label}"), tokens, config.seed, adapter)


def lr_factor(step: int, steps: int, constant: bool) -> float:
    """Linear warm-up over a tenth of the run, then linear decay towards 0, which no step gets; ``step`` from 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 1.0 if constant else (steps - step) / (steps - warm)


def train_steps(
    config: Config, train: list[data.Pair], lanes: list[Lane], watcher: Watcher, done: int, save_every: int, keep: Callable[[int], None]
) -> None:
    watcher.begin(done, config.steps)
    try:
        for index in range(done, config.steps):
            pairs = [train[i] for i in data.batch_indices(len(train), config.batch, config.seed, index)]
            # Odd steps run the lanes the other way round: whoever goes second finds the caches warm.
            for lane in lanes if index % 2 == 0 else reversed(lanes):
                lane.step(pairs, index, lr_factor(index, config.steps, lane.rule.recipe.constant_lr))
            step = index + 1
            watcher.stepped(lanes, step)
            if step == config.steps or (save_every and step % save_every == 0):
                keep(step)
    finally:
        watcher.end()


# --- keeping and resuming --------------------------------------------------------------------------------------------------


def store(path: Path, config: Config, lanes: list[Lane], start: Start, digest: str, step: int) -> None:
    extra = {
        "step": step,
        "config": asdict(config),
        "data": digest,
        "before": start[0].as_dict(),
        "quantized": None if start[1] is None else start[1].as_dict(),
        "history": [lane.history.as_dict() for lane in lanes],
        "adapter": [lane.adapter.state() if lane.adapter is not None else None for lane in lanes],
        "masks": None if lanes[0].masks is None else sparse.packed(lanes[0].masks),
    }
    names = [str(i) for i in range(len(lanes))]
    checkpoint.save(
        path,
        {name: lane.model for name, lane in zip(names, lanes, strict=True)},
        {name: lane.optimizer for name, lane in zip(names, lanes, strict=True)},
        extra,
    )


def restore(path: Path, config: Config, lanes: list[Lane], digest: str) -> tuple[Quality, quantized.Summary | None, int]:
    """Load ``path`` into the lanes; the caller has made ``config`` from the file's own (``stored_config``)."""
    names = [str(i) for i in range(len(lanes))]
    extra = checkpoint.load(
        path,
        {name: lane.model for name, lane in zip(names, lanes, strict=True)},
        {name: lane.optimizer for name, lane in zip(names, lanes, strict=True)},
    )
    if extra["data"] != digest:
        raise FinetuneError(
            f"finetune: expected the data of the stored run ({extra['data']}); this Python's library gives {digest}; use the same Python"
        )
    for lane, history in zip(lanes, extra["history"], strict=True):
        lane.history = History(**history)
    for lane, state in zip(lanes, extra.get("adapter", []), strict=False):  # files of before there were adapters have none
        if lane.adapter is not None:
            lane.adapter.load_state(state)
    packed = extra.get("quantized")
    return Quality(**extra["before"]), None if packed is None else quantized.Summary.from_dict(packed), int(extra["step"])


def stored_config(path: Path) -> Config:
    extra = checkpoint.load(path, rng=False)
    if not isinstance(extra, dict) or "config" not in extra:
        raise FinetuneError(f"finetune: expected the checkpoint of a finetune run; {path} is another one; name the run's folder")
    return Config(**extra["config"])


def stored_masks(path: Path, config: Config) -> sparse.Masks | None:
    """The masks that the stored run chose."""
    if config.sparse is None:
        return None
    return sparse.unpacked(checkpoint.load(path, rng=False)["masks"], config.device)


def export(lane: Lane, folder: Path, config: Config) -> None:
    """Final weights under Hugging Face's names, with the tokenizer and configuration beside them: a folder sentence-transformers can
    load."""
    folder.mkdir(parents=True, exist_ok=True)
    if not config.quick:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        for name in COMPANIONS:
            shutil.copy(model.pretrained_dir() / name, folder / name)
    write_safetensors(folder / "model.safetensors", lane.final_weights(), {"format": "pt"})
