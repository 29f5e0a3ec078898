"""The rules by which torch.ops.ropewalk serves DTensors: each rank rotates what it has, and nothing is sent.

Every head of every token is rotated by itself. So q and k may be sharded by batch, by tokens and by heads, over any
dimensions of a mesh, and the other arguments follow: positions go with their tokens, caches with their heads, weights
and tables are whole. What is only read is redistributed by torch where it lies otherwise; what is written never is.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import _module

_TENSORS = {arg["name"]: arg for arg in _module.description() if arg["kind"] == "tensor"}
_TENSORS.update({f"{name}_grad": {**_TENSORS[name], "intent": "in"} for name in ("q", "k")})
_DIMS = {name: [dim.rstrip("?") for dim in arg["shape"][1:-1].split(", ")] for name, arg in _TENSORS.items()}


def _dims(name: str, x: Any, batched: bool) -> list[str | None]:
    """What the dimensions of an argument are, as the core takes them: those that it lacks are the first."""
    dims = [dim for dim in _DIMS[name] if batched or dim != "batch"]
    return [None] * (x.ndim - len(dims)) + dims[max(len(dims) - x.ndim, 0) :]


def _split(name: str, x: Any, dims: list[str | None]) -> list[str | None]:
    """For each dimension of the mesh, which dimension of q or k is sharded over it."""
    split: list[str | None] = []
    for placement in x.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"rope: {name} must be Shard or Replicate on each dimension of the mesh, but is {placement}: call "
                f"{name}.redistribute first"
            )
        split.append(dims[placement.dim] if type(placement) is Shard else None)
    if "head_dim" in split:
        raise ValueError(
            f"rope: {name} must not be sharded in head_dim, whose elements are rotated and normalised together, but "
            f"is {list(x.placements)}: shard its heads or tokens, or call {name}.redistribute first"
        )
    # The order in which dimensions of the mesh divide one of the tensor: what follows q is divided in torch's own.
    for entry in getattr(x._spec, "shard_order", None) or ():
        if list(entry.mesh_dims) != sorted(entry.mesh_dims):
            raise ValueError(
                f"rope: {name} must be sharded in the order of the mesh's dimensions, but its dimension "
                f"{entry.tensor_dim} is in the order {list(entry.mesh_dims)}: call {name}.redistribute first"
            )
    return split


def _check(tensors: dict[str, Any], written: set[str]) -> Any:
    """The mesh of the DTensors. Others are the same on all ranks, and only read."""
    first = next(name for name, x in tensors.items() if isinstance(x, DTensor))
    mesh = tensors[first].device_mesh
    for name, x in tensors.items():
        if isinstance(x, DTensor):
            if x.device_mesh != mesh:
                raise ValueError(f"rope: {name} must be on the mesh of {first}, {mesh}, but is on {x.device_mesh}")
        elif name in written or name in ("q", "k"):
            raise ValueError(
                f"rope: {name} must be a DTensor where {first} is one, but is a torch.Tensor: give DTensor.from_local("
                f"{name}, mesh, placements), or {first}.to_local() or {first}.full_tensor()"
            )
    return mesh


class _Call:
    """How the arguments of one call lie: by what is sharded over each dimension of the mesh."""

    def __init__(self, tensors: dict[str, Any], written: set[str]) -> None:
        self.tensors, self.written = tensors, written
        self.mesh = _check(tensors, written)
        batched = tensors["q"].ndim == 4
        self.dims = {name: _dims(name, x, batched) for name, x in tensors.items()}
        self.sizes = dict(zip(self.dims["q"], tensors["q"].shape, strict=True))
        self.split = _split("q", tensors["q"], self.dims["q"])
        self.split_of_k = self.split
        if "k" in tensors:
            self.sizes.update(zip(self.dims["k"][-2:-1], tensors["k"].shape[-2:-1], strict=True))
            self.split_of_k = _split("k", tensors["k"], self.dims["k"])
            for of_q, of_k in zip(self.split, self.split_of_k, strict=True):
                if of_q != of_k and not {of_q, of_k} <= {"q_heads", "k_heads", None}:
                    raise ValueError(
                        f"rope: k must be sharded by {of_q if of_q in ('batch', 'tokens') else 'heads'} as q is, "
                        f"{list(tensors['q'].placements)}, but is {list(tensors['k'].placements)}"
                    )

    def placements(self, name: str) -> list[Any]:
        """Where an argument has to lie."""
        x, dims = self.tensors[name], self.dims[name]
        placements: list[Any] = []
        for each in self.split_of_k if "k_heads" in dims else self.split:
            if each in ("batch", "tokens") and name in ("k_cache", "v_cache"):
                raise ValueError(
                    f"rope: q must not be sharded by {each} where {name} is given, as each rank would store its own "
                    f"tokens alone, but is {list(self.tensors['q'].placements)}"
                )
            place = dims.index(each) if each in dims else None
            if place is not None and x.shape[place] != self.sizes[each]:
                if x.shape[place] != 1 or _TENSORS[name]["intent"] != "in":
                    raise ValueError(
                        f"rope: {name} has {x.shape[place]} {each}, but {'k' if each == 'k_heads' else 'q'} has "
                        f"{self.sizes[each]}"
                    )
                place = None  # one for all
            placements.append(Replicate() if place is None else Shard(place))
        return placements

    def local(self, name: str) -> Any:
        """This rank's part of an argument."""
        x, placements = self.tensors[name], self.placements(name)
        if not isinstance(x, DTensor):
            if any(placement.is_shard() for placement in placements):
                raise ValueError(
                    f"rope: {name} must be a DTensor, {placements} as q and k are sharded, but is a torch.Tensor: give "
                    "distribute_tensor of the whole, or DTensor.from_local of what each rank has"
                )
            return x
        if list(x.placements) != placements:
            if name in self.written:
                raise ValueError(f"rope: {name} must be {placements} to go with q and k, but is {list(x.placements)}")
            x = x.redistribute(placements=placements)
        return x.to_local()

    def number_tokens(self) -> None:
        """Without positions tokens are 0, 1, 2 and so on, over all ranks."""
        if "positions" in self.tensors or "tokens" not in self.split:
            return
        tables = [name for name in ("cos", "sin", "cos_sin") if name in self.tensors]
        if tables and "offsets" not in self.tensors:
            rows = [(self.tensors[name], self.dims[name].index("rows")) for name in tables]
            if all(isinstance(x, DTensor) and x.shape[dim] == self.sizes["tokens"] for x, dim in rows):
                for name in tables:  # a row for each token: each rank takes those of its own, which it numbers itself
                    self.dims[name] = ["tokens" if dim == "rows" else dim for dim in self.dims[name]]
                return
        numbers = torch.arange(self.sizes["tokens"], device=self.tensors["q"].device)
        self.tensors["positions"] = DTensor.from_local(
            numbers, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False
        )
        self.dims["positions"] = ["tokens"]


def _written(given: dict[str, Any]) -> set[str]:
    """The arguments that a call in place, or with outputs, writes."""
    names = {name for name, arg in _TENSORS.items() if arg["intent"] != "in"}
    instead = {"q": given.get("q_out"), "k": True if given.get("k_store_only") else given.get("k_out")}
    return names - {name for name, other in instead.items() if other is not None}


def _given(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> dict[str, Any]:
    names = (argument.name for argument in operator._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


def _run(operator: Any, given: dict[str, Any], written: set[str]) -> tuple[_Call, Any]:
    """The call on this rank's parts."""
    tensors = {name: given[name] for name in _TENSORS if given.get(name) is not None}
    with torch.no_grad():  # parts are those of autograd's tensors, and no views of them
        call = _Call(tensors, written)
        call.number_tokens()
        given = {**given, **{name: call.local(name) for name in tensors}}
        return call, operator(**given) if call.mesh.get_coordinate() is not None else None


def _together(given: dict[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    """q and k, or their gradients, that are only read: redistributed where one is a sum, or lies otherwise than the
    other. A gradient that autograd has filled with zeros is a plain tensor."""
    q, k = (given.get(name) for name in names)
    first = next((x for x in (q, k) if isinstance(x, DTensor)), None)
    if first is None:
        return given
    whole = [Replicate()] * first.device_mesh.ndim
    q, k = (
        x if x is None or isinstance(x, DTensor) else DTensor.from_local(x, first.device_mesh, whole, run_check=False)
        for x in (q, k)
    )

    def lying(x: Any, placements: list[Any]) -> Any:
        return x if list(x.placements) == placements else x.redistribute(placements=placements)

    q = lying(q, [Replicate() if placement.is_partial() else placement for placement in q.placements])
    if k is not None and k.device_mesh == q.device_mesh:
        heads = k.ndim - 2
        k = lying(k, [
            of_q if of_q.is_shard() and of_q.dim < heads
            else of_k if of_k.is_shard() and of_k.dim >= heads
            else Replicate()
            for of_q, of_k in zip(q.placements, k.placements, strict=True)
        ])  # fmt: skip
    return {**given, names[0]: q, names[1]: k}


def _like(new: Any, x: Any) -> Any:
    """A new DTensor of this rank's part, lying as x does."""
    strides, step = [0] * x.ndim, 1
    for dim in sorted(range(x.ndim), key=lambda dim: (new.stride(dim), -dim)):  # dense, in the order of the part's
        strides[dim], step = step, step * x.shape[dim]
    return DTensor.from_local(new, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=tuple(strides))


def _pure(operator: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    call, new = _run(operator, _together(given, ("q", "k")), set())
    q, k = (call.tensors.get(name) for name in ("q", "k"))
    whole = [Replicate()] * call.mesh.ndim
    return _like(new[0], q), DTensor.from_local(new[1], call.mesh, whole, run_check=False) if k is None else _like(
        new[1], k
    )


def _backward(operator: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    given = _together(_together(given, ("q", "k")), ("q_grad", "k_grad"))
    call, new = _run(operator, given, set())
    whole = [Replicate()] * call.mesh.ndim

    def summed(x: Any, split: list[str | None]) -> Any:
        """The gradient of a weight: each rank has that of its own tokens and heads."""
        places = [Partial() if each is not None and x.numel() else Replicate() for each in split]
        return DTensor.from_local(x, call.mesh, places, run_check=False)

    k = call.tensors.get("k")
    return (
        _like(new[0], call.tensors["q"]),
        DTensor.from_local(new[1], call.mesh, whole, run_check=False) if k is None else _like(new[1], k),
        summed(new[2], call.split),
        summed(new[3], call.split_of_k),
    )


def register(library: torch.library.Library, wrote: Callable[..., None]) -> None:
    """wrote: has autograd notice what was written."""

    def writing(operator: Any, given: dict[str, Any]) -> None:
        written = _written(given)
        call, _ = _run(operator, given, written)
        wrote(*(x for name, x in call.tensors.items() if name in written))

    of = dict.fromkeys(("rope_", "rope_out", "rope_short_", "rope_short_out"), writing)
    for name, served in {**of, "rope": _pure, "rope_backward": _backward}.items():

        def rule(
            cls: Any, operator: Any, types: Any, args: Any, kwargs: Any = None, served: Callable[..., Any] = served
        ) -> Any:
            return served(operator, _given(operator, args, kwargs))

        torch.library.register_torch_dispatch(f"ropewalk::{name}", DTensor, rule, lib=library)
