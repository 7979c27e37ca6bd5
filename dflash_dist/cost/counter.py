"""Counts what a training step asks of one rank: memory by what it is for, operations, bytes moved, collectives.

Of tensors only shapes, dtypes and lifetimes are looked at, so they need no numbers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from weakref import ref

import torch
import torch.nn.attention.flex_attention as flex
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GATHERED = "gathered layer"  # owner of what FSDP gathers, and of the buffers for it
# In these FlexAttention's mask is dense, which it never is where they are compiled, as on a GPU.
DENSE = ("create_mask", "_convert_mask_to_block_mask")
aten = torch.ops.aten
# Of a table these read as much as they give. All others read what they are given and write what they return.
LOOKUPS = {aten.embedding, aten.index_select, aten.gather, aten.index}
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


@dataclass(frozen=True)
class Collective:
    """One call, as one rank makes it."""

    operator: str  # of torch's namespace c10d
    ranks: int  # that take part
    handed: float  # bytes that a rank hands over

    @property
    def received(self) -> float:
        """Bytes that reach a rank, around a ring; as many leave it. A sum passes twice, but for the rank's own share; a
        gather brings the share of every other rank."""
        others = self.ranks - 1
        return self.handed * {"allreduce_": 2 * others / self.ranks, "_allgather_base_": others}.get(self.operator, 1)

    @property
    def hops(self) -> int:
        """Times that something waits for a neighbour, however little is carried. For a sum NCCL goes up and down a tree
        where that is sooner."""
        sum_of_all = 2 * math.ceil(math.log2(self.ranks))
        return {"allreduce_": sum_of_all, "_allgather_base_": self.ranks - 1}.get(self.operator, 1)


@dataclass
class Work:
    """What a stage of a step does."""

    flops: float = 0.0  # in matrix products and attention
    moved: int = 0  # bytes read and written, each operator for itself: nothing is fused
    collectives: list[Collective] = field(default_factory=list)


class StepCounter(TorchDispatchMode):
    """While it is entered, operations are work of `stage`, and the memory that they allocate belongs to `owner`.

    Memory is that of live storages: what a caching allocator has given out, but for rounding.

    Args:
        formulas: operations by operator, from what it is called with, where torch's own counter has none or others.
        counts_work: otherwise memory alone.
    """

    supports_higher_order_operators = True

    def __init__(self, formulas: Mapping[Any, Callable[..., float]], counts_work: bool = True):
        super().__init__()
        self.formulas, self.counts_work = {**flop_registry, **formulas}, counts_work
        self.owner, self.stage = "", ""
        self.work: defaultdict[str, Work] = defaultdict(Work)  # by stage
        self.held: Counter[str] = Counter()  # bytes by owner, now
        self.most: Counter[str] = Counter()  # the same when it was most, since `watch`
        self.apart: Counter[str] = Counter()  # the most of each owner since then, not all at one moment
        self._looks_away = False
        self._live: dict[int, tuple[ref, str, int]] = {}  # storages by address

    def __enter__(self) -> StepCounter:
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._keep(storage, GATHERED)
            return result

        # FSDP frees gathered parameters and brings them back in this way, which no operator sees.
        self._patches = [mock.patch.object(torch.UntypedStorage, "resize_", counted)]
        self._patches += [mock.patch.object(flex, name, self._unseen(getattr(flex, name))) for name in DENSE]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for patch in self._patches:
            patch.stop()

    def _unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def unseen(*args: Any, **kwargs: Any) -> Any:
            self._looks_away = True
            try:
                return function(*args, **kwargs)
            finally:
                self._looks_away = False

        return unseen

    def watch(self) -> None:
        """Looks for the most that is held from here on."""
        self.most, self.apart = self.held.copy(), self.held.copy()

    def belongs(self, tensors: Any, owner: str) -> None:
        """Gives the memory of tensors to another owner, also such as was allocated unseen."""
        for tensor in _tensors(tensors):
            self._keep(tensor.untyped_storage(), owner)

    def _keep(self, storage: torch.UntypedStorage, owner: str) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._live:
            self._release(address)
        self._live[address] = ref(storage, lambda _: self._release(address)), owner, size
        self.held[owner] += size
        self.apart[owner] = max(self.apart[owner], self.held[owner])
        if self.held.total() > self.most.total():
            self.most = self.held.copy()

    def _release(self, address: int) -> None:
        _, owner, size = self._live.pop(address)
        self.held[owner] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # What is done to a sharded tensor comes again, for this rank's part of it.
        if self._looks_away or DTensor in types or func.namespace in ("prim", "profiler"):
            return result
        new = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in self._live]
        self.belongs(new, self.owner)
        if func.namespace == "fsdp":
            self.belongs([tensor for tensor in _tensors((args, kwargs)) if self._owner(tensor) == self.owner], GATHERED)
        if self.stage and self.counts_work:
            self._count(func, args, kwargs, result, new)
        return result

    def _owner(self, tensor: torch.Tensor) -> str:
        address = tensor.untyped_storage()._cdata
        return self._live[address][1] if address in self._live else self.owner

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, new: list[torch.Tensor]) -> None:
        work, packet = self.work[self.stage], getattr(func, "_overloadpacket", func)
        if packet in self.formulas:
            work.flops += self.formulas[packet](*args, **kwargs, out_val=result)
        if func.namespace == "c10d":
            work.collectives.append(_collective(packet.__name__, args))
        elif packet in LOOKUPS:
            work.moved += 2 * _size(result)
        elif packet not in EMPTY:
            work.moved += sum(map(_size, new)) + _passed(func, args, kwargs, bool(new))


def _collective(operator: str, args: Any) -> Collective:
    [group] = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
    gives = args[1] if "base" in operator else args[0]  # behind what it is written to
    return Collective(operator, ProcessGroup.unbox(group).size(), sum(map(_size, _tensors(gives))))


def _passed(func: Any, args: Any, kwargs: Any, makes: bool) -> int:
    """Bytes that an operator reads and writes of what it is given; none if it only looks at that in another shape."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return sum(map(_size, _tensors(args)))
    passed, writes = 0, makes
    for argument, value in [*zip(schema.arguments, args), *((of, kwargs.get(of.name)) for of in schema.arguments)]:
        changed = argument.alias_info is not None and argument.alias_info.is_write
        passed += sum(map(_size, _tensors(value))) * (changed + (not argument.is_out))
        writes |= changed
    return passed if writes else 0


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes of its own elements: what is only repeated counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
