"""Plans that launch kernels on the same table: CUDA C++, Triton, and their CPU stand-ins (emulator, interpreter).

Step counts live on the device and a prologue writes the rows there, so nothing waits for the host: not GradScaler's found_inf, not a captured
CUDA graph. Descriptors and chunks are uploaded only when they changed.
"""

from __future__ import annotations

import importlib
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..ops import sparse as ops
from ..reference import optim as reference
from .plans import Entry, Plan, Scalars, address
from .spec import BITS, DTYPE_CODES, HYPER_FIELDS, ROW_FIELDS
from .table import ANCHOR, INDEX, KINDS, MASK, NUMEL, SCALE0, WORDS, local

if TYPE_CHECKING:
    from .base import FusedOptimizer

ROW_WIDTH = len(ROW_FIELDS)
# Pinned buffers for uploads in captures. Of an optimizer, not of a plan: gradients that are released one by one have a plan for each parameter, and
# 16 MiB of pinned memory for each would be gigabytes.
SPARE = 8  # a plan's uploads in a capture
_spare: weakref.WeakKeyDictionary[FusedOptimizer, list[Tensor]] = weakref.WeakKeyDictionary()


class Share(NamedTuple):
    """Chunks that one launch takes. ``scattered``: of compact entries or such with an anchor; ``block``: of entries whose coded states have
    blocks of so many elements, or 0."""

    scattered: bool
    block: int
    chunks: Tensor


class DevicePlan(Plan):
    """Table, chunks, rows and hyper-parameters as tensors on the device."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._version = self._structure = -1
        self._desc = self._gradient_chunks = self._rows = self._clocks = torch.empty(0, dtype=torch.float32, device="cpu")
        self._shares: list[Share] = []
        self._masked: list[tuple[int, Tensor, int]] = []  # descriptor, parameter, elements
        self._captured: list[Tensor] = []  # what graphs read at each replay
        self._late_hypers = False  # only a replay fills them
        self._kept: tuple[Any, int] = (None, 0)  # the stream that was told of the tensors here, and the table it was told of
        self._chunk = self._gradient_chunk = 0

    def _upload(self, data: bytes | Tensor, dtype: torch.dtype, width: int) -> Tensor:
        host = (
            data
            if isinstance(data, Tensor)
            else torch.frombuffer(bytearray(data), dtype=dtype)
            if data
            else torch.empty(0, dtype=dtype, device="cpu")
        )
        if self.device.type == "cuda":
            host = self._pin(host.view(-1))
        return host.to(self.device, non_blocking=True).view(-1, width)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _unprepared(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self.opt).__name__}.step: expected a step before the CUDA graph capture, with all parameters that are in it; "
            "none was made; run one eager step first"
        )

    def _make_states(self, entries: list[Entry]) -> None:
        if self._capturing():
            raise self._unprepared()  # each replay would begin them anew
        super()._make_states(entries)

    def _complete(self, entries: list[Entry]) -> None:
        if self._capturing():
            raise self._unprepared()
        super()._complete(entries)

    def release(self) -> None:
        if self._capturing():
            self._captured += self.given.values()  # a replay fills and reads them
        super().release()

    def _pin(self, host: Tensor) -> Tensor:
        """A pinned copy. Eager: torch's pinned allocator keeps it until the upload is done. During a graph capture the upload becomes a node that
        reads this very memory at each replay, and pinning is not allowed: a buffer set aside earlier is used up and kept for good."""
        spare = _spare.setdefault(self.opt, [])
        if not self._capturing():
            room = WORDS * max(len(self.entries), len(self.table.owners)) + 2 * 65536
            for _ in range(SPARE * max(1, len(self.opt._plans)) - sum(len(buffer) >= room for buffer in spare)):
                spare.append(torch.empty(room, dtype=torch.int64, device="cpu").pin_memory())
            return host.pin_memory()
        raw = host.view(torch.int64)
        fitting = next((k for k, buffer in enumerate(spare) if len(buffer) >= len(raw)), None)
        if fitting is None:
            raise self._unprepared()
        self._captured.append(spare.pop(fitting))
        kept = self._captured[-1][: len(raw)]
        kept.copy_(raw)
        return kept.view(host.dtype)

    def prepare(self) -> None:
        super().prepare()
        capturing = self._capturing()
        if self._late_hypers and not capturing:
            self.set_hypers(self.hypers)
            self.opt._send_lr([self])
        if self._version == self.table.version:
            return
        # What is uploaded in a graph is there after its first replay: the next step outside, and the next graph, upload their own.
        self._version = -1 if capturing else self.table.version
        described = self._list_masks(self.table.descriptors(True))
        self._desc = self._upload(described, torch.int64, WORDS)
        if self._structure != self.table.structure:
            self._structure = -1 if capturing else self.table.structure
            workers = torch.cuda.get_device_properties(self.device).multi_processor_count if self.device.type == "cuda" else 132
            self._chunk, self._gradient_chunk = self.table.chunk_for(workers), self.table.chunk_for(workers, True)
            self._split(described)
            n = len(self._desc)
            self._rows = torch.zeros(n, ROW_WIDTH, dtype=torch.float32, device=self.device)
            self._clocks = torch.zeros(n, 3, dtype=torch.float64, device=self.device)

    def _list_masks(self, described: bytes) -> bytes:
        """Descriptors as the kernels take them: an index that is a mask becomes a list, whose address each step fills in."""
        if self.opt.mask_state == "dense" or not described:
            return described
        words = torch.frombuffer(bytearray(described), dtype=torch.int64).view(-1, WORDS)
        rows = (words[:, KINDS] & 255 == BITS).nonzero()[:, 0]
        owners = self.owners()
        self._masked = [(k, owners[k].param, n) for k, n in zip(rows.tolist(), words[rows, NUMEL].tolist(), strict=True)]
        for k, p, _ in self._masked:
            words[k, KINDS] += DTYPE_CODES[torch.int64 if local(p).numel() >> 31 else torch.int32] - BITS
            words[k, MASK] = 0
        return words.numpy().tobytes()

    def _expand(self) -> list[Tensor]:
        """The lists, for this step: between steps the masks are all there is of them."""
        lists = []
        for k, p, n in self._masked:
            state = self.opt._state_of(p)
            lists.append(ops.run("indices", state["mask"])(state["mask"], local(p).numel(), (state["prefix"], n)))
            self._desc[k, INDEX].fill_(lists[-1].data_ptr())
        return lists

    def _split(self, described: bytes) -> None:
        """The chunks of each sweep and of the gradient norm."""
        chunks = self.table.chunk_list(self._chunk)
        words = (
            torch.frombuffer(bytearray(described), dtype=torch.int64).view(-1, WORDS)
            if described
            else torch.empty(0, WORDS, dtype=torch.int64, device="cpu")
        )
        pieces = torch.frombuffer(bytearray(chunks), dtype=torch.int64).view(-1, 2) if chunks else torch.empty(0, 2, dtype=torch.int64, device="cpu")
        scattered = (words[:, INDEX] != 0) | (words[:, ANCHOR] != 0)
        block = torch.where((words[:, SCALE0:] != 0).any(1), 1 << (words[:, KINDS] >> 24 & 255), 0)
        kind = (2 * block + scattered)[pieces[:, 0]]
        parts = [(int(k), pieces[kind == k]) for k in kind.unique()]
        self._shares = [Share(bool(k % 2), k // 2, self._upload(part, torch.int64, 2)) for k, part in parts]
        if len(parts) == 1 and self.opt.mask_state == "dense":
            self._gradient_chunks = self._shares[0].chunks
        else:
            self._gradient_chunks = self._upload(self.table.chunk_list(self._gradient_chunk, True), torch.int64, 2)

    def set_hypers(self, hypers: list[list[float]]) -> None:
        super().set_hypers(hypers)
        self._late_hypers = self._capturing()
        self._hypers = self._upload(torch.tensor(hypers, dtype=torch.float64, device="cpu"), torch.float64, len(HYPER_FIELDS))

    def set_lr(self, group: int, lr: Tensor) -> None:
        """A Tensor lr on this device: read by the prologue, never by the host."""
        self._hypers[group, HYPER_FIELDS.index("lr")].copy_(lr)

    def squares(self, scalars: Scalars) -> Tensor:
        partial = torch.zeros(len(self._gradient_chunks), dtype=torch.float64, device=self.device)
        if len(partial):
            self._squares(partial, scalars)
        out = torch.zeros(len(self._desc), dtype=torch.float64, device=self.device)
        return self._per_tensor(partial, out)

    def _per_tensor(self, partial: Tensor, out: Tensor) -> Tensor:
        """Sums of the chunks of each tensor, segment by segment: index_add_ on a GPU adds in no fixed order, and differences of prefix sums turn
        an infinite norm into NaN."""
        if not len(partial):
            return out
        owner = self._gradient_chunks[:, 0].contiguous()
        index = torch.arange(len(out), device=self.device)
        lengths = torch.searchsorted(owner, index, right=True) - torch.searchsorted(owner, index)
        return torch.segment_reduce(partial, "sum", lengths=lengths, unsafe=True)

    def run(self, scalars: Scalars) -> None:
        if not len(self._desc):
            return
        if self._capturing():  # a step outside the graph may replace these: their memory must stay
            self._captured += self._held()
        elif self.device.type == "cuda":
            self._keep_for(torch.cuda.current_stream(self.device))
        self._prologue(scalars)
        lists = self._expand()
        for share in self._shares:
            self._sweep(scalars, share)
        del lists
        self.bump_versions()

    def _held(self) -> list[Tensor]:
        return [t for t in vars(self).values() if isinstance(t, Tensor)] + [share.chunks for share in self._shares]

    def _keep_for(self, stream: torch.cuda.Stream) -> None:
        """What was uploaded on one stream and is read on another must not be given away before that one has read it."""
        if self._kept != (stream, self._version):
            self._kept = stream, self._version
            for t in self._held():
                if t.device == self.device:
                    t.record_stream(stream)

    def _squares(self, partial: Tensor, scalars: Scalars) -> None:
        raise NotImplementedError

    def _prologue(self, scalars: Scalars) -> None:
        raise NotImplementedError

    def _sweep(self, scalars: Scalars, share: Share) -> None:
        raise NotImplementedError


class CudaPlan(DevicePlan):
    """CUDA C++ from the compiled core, or the same files under the emulator."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        core = dispatch.core_emulated() if self.choice.backend == "emulated" else dispatch.core()
        assert core is not None
        self._core = core
        self._index = [name for name, _, _ in core.RULES].index(self.rule)

    def _where(self) -> tuple[int, int]:
        if self.device.type != "cuda":
            return 0, 0
        return self.device.index or 0, torch.cuda.current_stream(self.device).cuda_stream

    def _squares(self, partial: Tensor, scalars: Scalars) -> None:
        chunks = self._gradient_chunks
        self._core.cuda_squares(self._desc.data_ptr(), chunks.data_ptr(), len(chunks), self._gradient_chunk, partial.data_ptr(),
                                address(scalars.grad_scale), *self._where())  # fmt: skip

    def _prologue(self, scalars: Scalars) -> None:
        self._core.cuda_prologue(self._index, self._desc.data_ptr(), len(self._desc), self._hypers.data_ptr(), self._rows.data_ptr(),
                                 self._clocks.data_ptr(), address(scalars.found_inf), *self._where())  # fmt: skip

    def _sweep(self, scalars: Scalars, share: Share) -> None:
        scale, found, clip, seed, stochastic = scalars
        self._core.cuda_sweep(self._index, self._desc.data_ptr(), len(self._desc), share.chunks.data_ptr(), len(share.chunks), self._chunk,
                              self._rows.data_ptr(), address(scale), address(found), address(clip), seed, stochastic, *self._where(),
                              2 if share.block else int(share.scattered))  # fmt: skip


def next_rows(rule: str, hypers: Tensor, clocks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (fp32 [n, 24]) of the next step and the clocks after it, from hyper-parameters (fp64 [n, 28]) and clocks (fp64 [n, 3])."""
    count, *aux = clocks.unbind(1)
    step = count + 1.0
    row, aux = reference.make_rows(rule, dict(zip(HYPER_FIELDS, hypers.unbind(1), strict=True)), step, aux)
    absent = torch.zeros_like(step)  # made there: a number would be copied there, and a copy waits, which a captured graph may not
    columns = [getattr(row, f, absent).to(torch.float64) for f in ROW_FIELDS]
    return torch.stack(columns, 1).float(), torch.stack([step, *aux], 1)


class TritonPlan(DevicePlan):
    """Triton kernels; the rows are computed by the reference's row functions on device tensors (fp64, all tensors at once)."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._kernels = importlib.import_module("fusedadapt.kernels.optim")
        self._clocks_module = importlib.import_module("fusedadapt.kernels.optim_clocks")
        self._groups = torch.empty(0, dtype=torch.int64, device="cpu")

    def _split(self, described: bytes) -> None:
        super()._split(described)
        self._groups = self._upload(torch.tensor([e.group for e in self.owners()], dtype=torch.int64, device="cpu"), torch.int64, 1)[:, 0]

    def _squares(self, partial: Tensor, scalars: Scalars) -> None:
        partial.copy_(self._kernels.squares(self._desc, self._gradient_chunks, chunk=self._gradient_chunk, grad_scale=scalars.grad_scale))

    def _prologue(self, scalars: Scalars) -> None:
        clocks = self._clocks_module.read_clocks(self._desc)  # fp64 [n, 3]: step, aux0, aux1
        self._rows, after = next_rows(self.rule, self._hypers[self._groups], clocks)
        if scalars.found_inf is not None:
            after = torch.where(scalars.found_inf != 0, clocks, after)
        self._clocks_module.write_clocks(self._desc, after)

    def _sweep(self, scalars: Scalars, share: Share) -> None:
        scale, found, clip, seed, stochastic = scalars
        self._kernels.step_(self._desc, share.chunks, self._rows, self.rule, chunk=self._chunk, grad_scale=scale, found_inf=found, clip=clip,
                            seed=seed, stochastic=stochastic, scattered=share.scattered, block=share.block)  # fmt: skip


PLANS = {"triton": TritonPlan, "cuda": CudaPlan, "emulated": CudaPlan}
