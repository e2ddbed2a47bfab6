"""Parameters sharded over processes: what this process keeps of each, and how a block's whole tensors come and go.

Every entry of every parameter belongs to one process, so that vectors and bases are sharded as the parameters are and their inner products
are sums over processes. A model of tensors split by PyTorch's DTensor (``fully_shard``, ``parallelize_module``) is evaluated by its own
modules on whole tensors, without the hooks of torch.distributed: a block, a module that ``fully_shard`` was called on, has them while its
forward pass runs. They enter as G w, with G the gathering from all processes, whose adjoint adds up over processes and cuts:

    Hessian product on this process = G^T (sum over processes of H_r) G v,

both linear, and so exact in derivatives of any order. What a graph would keep of gathered tensors is gathered again when it is needed.

Processes are not in step: batches differ in number and size. Whoever needs a block asks for it, all others serve (``Ranks.request``), and
what another process's product adds to this one's part is kept in an inbox until all have ended.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.objective.distributed import Ranks
from sharpkit.objective.memory import graph_nodes

_WEIGHTS, _VECTOR, _SUM = range(3)  # what a process may ask for: a block's parameters, its part of the vector, a sum of products
_HELD = 2  # blocks whose whole tensors are held at once besides those in a forward pass, by judgement: the root's and one more
_SMALL = 2**24  # bytes of whole tensors that are held anyway, by judgement: beside what torch itself takes, and each request takes time
_TORCH_HOOKS = "torch.distributed"
_NOT_HERE = (
    "is not available for parameters sharded over processes: gather the model into plain tensors (a full state dict) and measure that copy"
)


class Box(NamedTuple):
    """A part of a tensor: where it begins, and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """This part, a view."""
        return whole[tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))]

    def within(self, outer: Box) -> Box:
        """The same part, counted from where another begins."""
        return Box(tuple(a - b for a, b in zip(self.start, outer.start, strict=True)), self.shape)

    def share(self, index: int, of: int) -> Box:
        """One of several nearly equal parts along the longest dimension."""
        if of == 1:
            return self
        if not self.shape:
            return self if index == 0 else Box((), (0,))
        dim = max(range(len(self.shape)), key=self.shape.__getitem__)
        first, end = (self.shape[dim] * i // of for i in (index, index + 1))
        start = tuple(a + first if d == dim else a for d, a in enumerate(self.start))
        return Box(start, tuple(end - first if d == dim else n for d, n in enumerate(self.shape)))


@dataclass(frozen=True)
class _Own:
    """One parameter of the model.

    Attributes:
        name: in the model.
        live: the model's own parameter.
        local: the box that this process's tensor holds.
        boxes: what each process owns, in the order of ranks.
        leaf: this process's own part, a view of the live tensor, which graphs are differentiated with respect to.
    """

    name: str
    live: nn.Parameter
    local: Box
    boxes: tuple[Box, ...]
    leaf: nn.Parameter


@dataclass
class _Block:
    """Parameters that are whole at the same time.

    Attributes:
        module: whose forward pass needs them.
        members: their numbers.
        places: (dictionary, key, position among the members) of each place that holds one.
        flat: (module, its list of weights) of RNNs.
        types: what each is cast to before it is gathered.
        policy: mixed precision of ``fully_shard``, or None.
    """

    module: nn.Module
    members: list[int]
    places: list[tuple[dict[str, Any], str, int]]
    flat: list[nn.Module]
    types: list[torch.dtype]
    policy: Any


@dataclass(frozen=True)
class _Handle:
    """In place of a tensor that a graph would keep: a view of a gathered one."""

    block: int
    position: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one of PyTorch's distributed ones."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # without which there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return, unused-ignore]


def has_shards(model: nn.Module) -> bool:
    """Whether parameters of a model are sharded over processes; modules that hold whole ones since a forward pass give them back."""
    for part in _fully_sharded(model):
        part.reshard()  # type: ignore[operator]
    return any(is_sharded(p) for p in model.parameters())


def _fully_sharded(model: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` was called on, the outermost first."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    return [m for m in model.modules() if kind is not None and isinstance(m, kind)]


class Shards:
    """The parameters of one model over all processes; made by all of them together.

    Args:
        model: unwrapped.
        ranks: the processes.

    Attributes:
        leaves: this process's own part of each parameter, by the ``id`` of the model's own.
        counts: whether this process's batches count: of processes that hold the same batches, as tensor parallelism has them, one does.
        twins: of each process, the first one that must hold the same batches.
        compute: the device that the model runs on.
        open, over: see :class:`~sharpkit.objective.distributed.Service`.

    Raises:
        ObjectiveError: the processes hold different models.
        UnsupportedError: tensors are split in a way, or over processes, that this cannot put together.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks, self.open, self.over = model, ranks, False, False
        named = [(name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters()]
        told = ranks.gather([(name, tuple(p.shape), str(p.dtype), p.requires_grad, _local_box(name, p)) for name, p in named])
        _check_same(told)
        self.own = [_own(name, p, [rank[index][4] for rank in told], ranks) for index, (name, p) in enumerate(named)]
        self._number = {id(own.live): index for index, own in enumerate(self.own)}
        self._made_of = [own.leaf.data_ptr() for own in self.own]  # leaves themselves may be moved for a time
        self.blocks = self._find_blocks()
        self.compute = self._device()
        self.twins = self._find_twins()
        self.vector: dict[int, Tensor] | None = None  # this process's part of the vector that is multiplied, by parameter
        self.inbox: dict[int, Tensor] = {}
        self.way = ""  # what becomes of gradients: "graph" and "alone" keep this process's, "sum" adds up over processes
        self._held: OrderedDict[tuple[int, int], list[Tensor]] = OrderedDict()  # by kind and block
        self._pinned: dict[int, list[Tensor]] = {}
        self._known: dict[int, tuple[int, int]] = {}  # by address of the storage: block and position
        self._depth = 0

    # -- what there is ------------------------------------------------------------------------------------------------
    @property
    def leaves(self) -> dict[int, nn.Parameter]:
        return {id(own.live): own.leaf for own in self.own}

    @property
    def counts(self) -> bool:
        return self.twins[self.ranks.rank] == self.ranks.rank

    @property
    def held_bytes(self) -> int:
        """What whole tensors take at most at one time, with what they are received in."""
        every = [zip(block.members, block.types, strict=True) for block in self.blocks]
        sizes = sorted(sum(self.own[index].live.numel() * kind.itemsize for index, kind in block) for block in every)
        return 2 * min(sum(sizes), max(_SMALL, sum(sizes[-_HELD:])))

    def part_of(self, live: Tensor, tensor: Tensor) -> Tensor:
        """This process's own part of a tensor like a parameter, such as the state that an optimizer keeps for it; others as they are."""
        own = self.own[self._number[id(live)]]
        if tensor.shape != live.shape:
            return tensor
        local, box = local_part(tensor), own.boxes[self.ranks.rank]
        return box.within(own.local).of(local) if math.prod(box.shape) else own.leaf.detach().to(local.dtype)

    def part_of_whole(self, live: Tensor, whole: Tensor) -> Tensor:
        """This process's own part of a whole tensor, or of several, (k, ...)."""
        own = self.own[self._number[id(live)]]
        box = own.boxes[self.ranks.rank]
        if not math.prod(box.shape):
            return own.leaf.detach()
        return box.of(whole.view(live.shape))

    def settle(self) -> None:
        """Let modules that hold whole tensors since a forward pass give them back, and leaves be views of the model's present tensors."""
        has_shards(self.model)
        for index, own in enumerate(self.own):
            part = self.part_of(own.live, own.live.detach())
            if part.numel() and part.data_ptr() != self._made_of[index]:
                own.leaf.data, self._made_of[index] = part, part.data_ptr()

    def _device(self) -> torch.device:
        kinds = {own.live.device_mesh.device_type for own in self.own if is_sharded(own.live)}  # type: ignore[attr-defined, unused-ignore]
        kind = sorted(kinds)[-1] if kinds else "cpu"
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def _find_blocks(self) -> list[_Block]:
        roots = _fully_sharded(self.model)
        if not roots:  # tensor parallelism alone: the layers of a list, as transformers have them
            roots = [layer for m in self.model.modules() if isinstance(m, nn.ModuleList) for layer in m]
        others = [m for m in dict.fromkeys(roots) if m is not self.model]
        owner: dict[int, nn.Module] = {}  # by id of a module: the innermost block around it, as modules() goes from the outside in
        for root in (self.model, *others):
            for m in root.modules():
                owner[id(m)] = root
        blocks = []
        for root in (self.model, *others):
            inside = [m for m in root.modules() if owner[id(m)] is root]
            held = [(m._parameters, key, self._number[id(p)]) for m in inside for key, p in m._parameters.items() if p is not None]
            members = list(dict.fromkeys(number for _, _, number in held))
            if not members:
                continue
            policy = _policy(root)
            cast = getattr(policy, "param_dtype", None)
            kinds = [self.own[number].leaf.dtype for number in members]
            blocks.append(
                _Block(
                    root,
                    members,
                    [(place, key, members.index(number)) for place, key, number in held],
                    [m for m in inside if "_flat_weights" in vars(m)],
                    [cast if cast is not None and kind.is_floating_point else kind for kind in kinds],
                    policy,
                )
            )
        return blocks

    def _find_twins(self) -> list[int]:
        """Processes of one data-parallel number hold the same batches, by the meshes of ``fully_shard``; without, all do."""
        mine = None
        for part in _fully_sharded(self.model):
            state: Any = part._get_fsdp_state()  # type: ignore[operator]
            group = next(iter(getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]), None)
            if group is not None:
                mine = group.mesh_info.mesh.mesh.flatten().tolist()  # ranks of the world, those of other data
                break
        world = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        meshes: list[tuple[int, list[int]]] = self.ranks.gather((world, mine or [world]))
        numbers = [mesh.index(other) for other, mesh in meshes]
        return [numbers.index(number) for number in numbers]

    @property
    def is_parallel(self) -> bool:
        """Whether the modules compute with parts of tensors, which those who wrote them may have prepared them for."""
        hooks = [h for m in self.model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
        tensors = any(_is_torchs(hook) and "_fsdp" not in str(getattr(hook, "__module__", "")) for hook in hooks)
        return tensors or not _fully_sharded(self.model)

    # -- whole tensors within a forward pass ----------------------------------------------------------------------------
    @contextmanager
    def present(self) -> Iterator[None]:
        """Inside, blocks have whole tensors while their forward pass runs; to be entered under the guard."""
        self._depth += 1
        if self._depth > 1:
            try:
                yield
            finally:
                self._depth -= 1
            return
        modules = list(self.model.modules())
        names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
        kept = [(m, {name: getattr(m, name) for name in (*names, "_forward_hooks_always_called")}) for m in modules]
        held = [(place, key, place[key]) for block in self.blocks for place, key, _ in block.places]
        flat = [(m, vars(m)["_flat_weights"]) for block in self.blocks for m in block.flat]
        try:
            for m in modules:
                m._forward_pre_hooks = OrderedDict((k, h) for k, h in m._forward_pre_hooks.items() if not _is_torchs(h))
                m._forward_hooks = OrderedDict((k, h) for k, h in m._forward_hooks.items() if not _is_torchs(h))
                m._forward_pre_hooks_with_kwargs = OrderedDict(m._forward_pre_hooks_with_kwargs)
                m._forward_hooks_with_kwargs = OrderedDict(m._forward_hooks_with_kwargs)
                for name, b in m._buffers.items():
                    if b is not None and is_sharded(b):
                        m._buffers[name] = _whole_buffer(name, b)
            for number, block in enumerate(self.blocks):
                before, after = self._hooks(number)
                # a checkpoint calls what is inside of its wrapper again, without the wrapper
                inside = getattr(block.module, "_checkpoint_wrapped_module", block.module)
                inside.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                inside.register_forward_hook(after)
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._depth -= 1
            for m, hooks in kept:
                for name, value in hooks.items():
                    setattr(m, name, value)
            for place, key, p in held:
                place[key] = p
            for m, weights in flat:
                vars(m)["_flat_weights"] = weights
            self.forget()

    def forget(self) -> None:
        """Free all whole tensors."""
        self._held.clear()
        self._pinned.clear()
        self._known.clear()

    def _hooks(self, number: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        block = self.blocks[number]
        before: list[tuple[dict[str, Any], str, Any]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            leaves = [self.own[index].leaf for index in block.members]
            with torch._C.DisableTorchFunction():  # a mode looks at what the model does
                self._pinned[number] = self.whole(number)
                trained = iter(_Whole.apply(self, number, *[p for p in leaves if p.requires_grad]))  # type: ignore[no-untyped-call]
                frozen = zip(leaves, self._pinned[number], strict=True)
                wholes = [next(trained) if p.requires_grad else whole for p, whole in frozen]
            before[:] = [(place, key, place[key]) for place, key, _ in block.places]
            for place, key, position in block.places:
                place[key] = wholes[position]
            for m in block.flat:
                vars(m)["_flat_weights"] = [m._parameters[name] for name in m._flat_weights_names]  # type: ignore[union-attr, index]
            cast = getattr(block.policy, "param_dtype", None)
            if cast is not None and block.policy.cast_forward_inputs:
                return _cast(args, cast), _cast(kwargs, cast)
            return None

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            for place, key, p in before:
                place[key] = p
            self._unpin(number)
            cast = getattr(block.policy, "output_dtype", None)
            return None if cast is None else _cast(output, cast)

        return enter, leave

    def _unpin(self, number: int) -> None:
        wholes = self._pinned.pop(number, None)
        if wholes is not None and (_WEIGHTS, number) not in self._held:
            self._forget_addresses(wholes)

    def whole(self, number: int) -> list[Tensor]:
        """A block's whole tensors, gathered unless they are at hand."""
        return self._pinned[number] if number in self._pinned else self._fetch(_WEIGHTS, number)

    def whole_trained(self, number: int) -> list[Tensor]:
        """Those of them that are trained."""
        return [t for t, index in zip(self.whole(number), self.blocks[number].members, strict=True) if self.own[index].leaf.requires_grad]

    def _fetch(self, kind: int, number: int) -> list[Tensor]:
        if (kind, number) not in self._held:
            while len(self._held) >= _HELD and sum(t.nbytes for held in self._held.values() for t in held) > _SMALL:
                (of, other), wholes = self._held.popitem(last=False)
                if of == _WEIGHTS and other not in self._pinned:
                    self._forget_addresses(wholes)
            self._request(kind, number)
            self._held[kind, number] = wholes = self._gather(kind, number)
            if kind == _WEIGHTS:
                self._known.update({t.untyped_storage().data_ptr(): (number, i) for i, t in enumerate(wholes) if t.numel()})
        self._held.move_to_end((kind, number))
        return self._held[kind, number]

    def _forget_addresses(self, wholes: Iterable[Tensor]) -> None:
        for t in wholes:
            self._known.pop(t.untyped_storage().data_ptr(), None)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        if (known := self._known.get(tensor.untyped_storage().data_ptr())) is None:
            return tensor
        return _Handle(*known, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Handle):
            return kept  # type: ignore[no-any-return]
        with torch.no_grad():
            return self.whole(kept.block)[kept.position].as_strided(kept.size, kept.stride, kept.offset)

    # -- gradients and vectors --------------------------------------------------------------------------------------------
    @contextmanager
    def going(self, way: str) -> Iterator[None]:
        """What becomes of gradients inside.

        Args:
            way: ``"graph"`` where only their derivative along a vector is meant, ``"alone"`` for a few entries of this process's own,
                ``"sum"`` to add up over processes: for :meth:`collected`.
        """
        before, self.way = self.way, way
        try:
            yield
        finally:
            self.way = before

    def parts(self, number: int, wholes: Sequence[Tensor]) -> list[Tensor]:
        """This process's own parts of the gradient of a block's trained parameters."""
        if not self.way:
            raise UnsupportedError(f"this measurement takes gradients in a way that {_NOT_HERE}")
        if self.way == "sum":
            self._request(_SUM, number)
            return self._summed(number, wholes)
        if self.way == "graph":  # whose values nobody reads: views of whole gradients would keep them all
            return [leaf.new_zeros(()).expand(leaf.shape) for leaf in (self.own[index].leaf for index in self._trained(number))]
        return [self._cut(index, whole, self.ranks.rank).clone() for index, whole in zip(self._trained(number), wholes, strict=True)]

    def whole_vector(self, number: int) -> list[Tensor]:
        """The vector that is multiplied, at a block's trained parameters."""
        return self._fetch(_VECTOR, number)

    def _request(self, kind: int, number: int) -> None:
        if self.ranks.size > 1 and not self.open:
            raise UnsupportedError(f"this measurement evaluates the model in a way that {_NOT_HERE}")
        self.ranks.request(self, kind, number, device=self.compute)

    def serve(self, kind: int, number: int) -> None:
        """Take part in what another process has asked for."""
        if kind != _SUM:
            self._gather(kind, number)
            return
        for index, part in zip(self._trained(number), self._summed(number, None), strict=True):
            self.inbox[index] = self.inbox[index] + part if index in self.inbox else part

    def collected(self, live: Sequence[Tensor]) -> list[Tensor | None]:
        """What other processes' work has added to this one's parts of some parameters since the last time."""
        inbox, self.inbox = self.inbox, {}
        return [inbox.get(self._number[id(p)]) for p in live]

    def set_vector(self, live: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Say which vector is multiplied, by this process's parts of it; parameters that are not named have zeros."""
        for key in [key for key in self._held if key[0] == _VECTOR]:
            del self._held[key]
        self.vector = {self._number[id(p)]: part for p, part in zip(live, parts, strict=True)}

    def _trained(self, number: int) -> list[int]:
        return [index for index in self.blocks[number].members if self.own[index].leaf.requires_grad]

    def _cut(self, index: int, whole: Tensor, rank: int) -> Tensor:
        own = self.own[index]
        if not math.prod(own.boxes[rank].shape):
            return torch.zeros_like(own.leaf) if rank == self.ranks.rank else own.leaf.new_zeros(0)
        return own.boxes[rank].of(whole).to(device=own.leaf.device, dtype=own.leaf.dtype).contiguous()

    def _gather(self, kind: int, number: int) -> list[Tensor]:
        """Whole tensors of a block's parameters, or of the vector at its trained ones; a collective."""
        block = self.blocks[number]
        types = dict(zip(block.members, block.types, strict=True))
        members = block.members if kind == _WEIGHTS else self._trained(number)
        parts = [self._mine(kind, index).to(types[index]).reshape(-1) for index in members]
        sizes = [[math.prod(self.own[index].boxes[rank].shape) for index in members] for rank in range(self.ranks.size)]
        lengths = [sum(n * types[index].itemsize for n, index in zip(row, members, strict=True)) for row in sizes]
        device = self.own[members[0]].leaf.device if members else self.compute
        sent = torch.zeros(max(lengths, default=0), dtype=torch.uint8, device=device)  # as bytes: types may differ
        if parts:
            together = torch.cat([part.contiguous().view(torch.uint8) for part in parts if part.numel()] or [sent[:0]])
            sent[: len(together)] = together
        received = self.ranks.all_parts(sent)
        wholes = [torch.empty(self.own[index].live.shape, dtype=types[index], device=device) for index in members]
        for rank, row in enumerate(received):
            begin = 0
            for position, (index, count) in enumerate(zip(members, sizes[rank], strict=True)):
                if count:
                    end = begin + count * types[index].itemsize
                    box = self.own[index].boxes[rank]
                    # cloned, since numbers must begin at a multiple of their size
                    box.of(wholes[position]).copy_(row[begin:end].clone().view(types[index]).view(box.shape))
                    begin = end
        return [whole.to(self.compute) for whole in wholes]

    def _mine(self, kind: int, index: int) -> Tensor:
        leaf = self.own[index].leaf.detach()
        if kind == _WEIGHTS:
            return leaf
        if self.vector is None:
            raise UnsupportedError("a product of a sharded model was asked for without its vector")
        return self.vector[index] if index in self.vector else torch.zeros_like(leaf)

    def _summed(self, number: int, wholes: Sequence[Tensor] | None) -> list[Tensor]:
        """This process's parts of the sum over processes; None to add nothing. A collective."""
        trained = self._trained(number)
        leaves = [self.own[index].leaf for index in trained]
        sizes = [[math.prod(self.own[index].boxes[rank].shape) for index in trained] for rank in range(self.ranks.size)]
        kind = leaves[0].dtype
        for leaf in leaves:
            kind = torch.promote_types(kind, leaf.dtype)
        rows = torch.zeros(self.ranks.size, max(map(sum, sizes)), dtype=kind, device=leaves[0].device)
        for rank in range(self.ranks.size) if wholes is not None else ():
            begin = 0
            for position, (index, count) in enumerate(zip(trained, sizes[rank], strict=True)):
                if count and wholes is not None:
                    rows[rank, begin : begin + count] = self._cut(index, wholes[position], rank).reshape(-1)
                begin += count
        row, begin, parts = self.ranks.sum_of_part(rows), 0, []
        for leaf, count in zip(leaves, sizes[self.ranks.rank], strict=True):
            parts.append(row[begin : begin + count].to(leaf.dtype).reshape(leaf.shape))
            begin += count
        return parts

    def check_graph(self, loss: Tensor) -> None:
        """Refuse a loss that reaches the model's own parameters past the whole ones.

        Raises:
            UnsupportedError: it does.
        """
        for node in graph_nodes([loss]):
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self._number and self.own[self._number[id(variable)]].leaf is not variable:
                raise UnsupportedError(
                    f"the parameter {self.own[self._number[id(variable)]].name!r} of a sharded model is used outside the forward pass of "
                    "the module that fully_shard was called on: call that module, or shard the module around it"
                )


class _Whole(torch.autograd.Function):
    """G: whole trained tensors of this process's parts and all others'."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, number: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.shards, ctx.number = shards, number
        return tuple(t.detach() for t in shards.whole_trained(number))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *_Parts.apply(ctx.shards, ctx.number, *gradients)  # type: ignore[no-untyped-call]


class _Parts(torch.autograd.Function):
    """G^T: this process's parts of the sum over processes."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, number: int, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.shards, ctx.number = shards, number
        return tuple(shards.parts(number, wholes))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, None, *ctx.shards.whole_vector(ctx.number)  # whose own part the argument is


# -- what torch.distributed says ----------------------------------------------------------------------------------------------------
def _local_box(name: str, p: Tensor) -> Box:
    if not is_sharded(p):
        return Box((0,) * p.ndim, tuple(p.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor: Any = p
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedError(f"parameter {name!r} is a sum that is not added up yet ({tensor.placements}): redistribute it first")
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(tensor.to_local().shape):
        raise UnsupportedError(
            f"parameter {name!r} is split as {tensor.placements}, which does not say where this process's part "
            f"{tuple(tensor.to_local().shape)} lies"
        )
    return Box(tuple(start), tuple(shape)) if math.prod(shape) else Box((0,) * len(shape), tuple(shape))


def _check_same(told: Sequence[Sequence[tuple[Any, ...]]]) -> None:
    first = [each[:4] for each in told[0]]
    for rank, theirs in enumerate(told[1:], start=1):
        if [each[:4] for each in theirs] != first:
            at = next((i for i, (a, b) in enumerate(zip(first, theirs, strict=False)) if a != b[:4]), min(len(first), len(theirs)))
            said = [str(each[at][:3]) if at < len(each) else "none" for each in (told[0], theirs)]
            raise ObjectiveError(
                f"the processes hold different models: parameter {at} is {said[0]} on rank 0 and {said[1]} on rank {rank}; build the same "
                "model on all of them"
            )


def _own(name: str, live: nn.Parameter, locals_: Sequence[Box], ranks: Ranks) -> _Own:
    """A parameter whose every entry belongs to one process: what several hold is divided among them."""
    copies = [[rank for rank, other in enumerate(locals_) if other == box] for box in locals_]
    boxes = tuple(
        box.share(copies[rank].index(rank), len(copies[rank])) if math.prod(box.shape) else box for rank, box in enumerate(locals_)
    )
    if sum(math.prod(box.shape) for box in boxes) != live.numel():
        raise UnsupportedError(
            f"the {ranks.size} processes measured do not hold the whole of parameter {name!r}, which is sharded over others: leave "
            "process_group out, or pass the group of all processes that hold the model"
        )
    local, box = locals_[ranks.rank], boxes[ranks.rank]
    part = box.within(local).of(local_part(live.detach())) if math.prod(box.shape) else local_part(live.detach()).new_empty(box.shape)
    return _Own(name, live, local, boxes, nn.Parameter(part, requires_grad=live.requires_grad))


def _policy(module: nn.Module) -> Any:
    get = getattr(module, "_get_fsdp_state", None)
    return getattr(get(), "_mp_policy", None) if get is not None else None


def _is_torchs(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)
    return str(getattr(owner, "__module__", "")).startswith(_TORCH_HOOKS) or str(getattr(hook, "__module__", "")).startswith(_TORCH_HOOKS)


def _whole_buffer(name: str, buffer: Any) -> Tensor:
    if not all(placement.is_replicate() for placement in buffer.placements):
        raise UnsupportedError(f"the buffer {name!r} is sharded over processes ({buffer.placements}): replicate it")
    whole: Tensor = buffer.to_local()
    return whole


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype else x, values)
