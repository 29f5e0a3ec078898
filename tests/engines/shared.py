"""What the walks share: the device (`WALK.py cuda`, else the CPU), a call as it is or in a graph, and packages that an
engine imports and that these tests do without. Each name in those, and in their modules, is a class that takes
anything."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

CUDA = "cuda" in sys.argv[1:2]
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
stands_in: set[str] = set()  # what was imported of what is not there
_graphs: list[Any] = []  # their memory holds results
_in_graphs = False


class Ran(NamedTuple):
    result: Any
    served: dict[str, int]  # by `ropewalk.engines`
    launches: int


def walked(walk: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `walk` finds, and on a GPU under "graph" what it finds where each call is recorded in a graph."""
    global _in_graphs
    found = walk()
    if CUDA:
        _in_graphs = True
        gc.freeze()  # a capture collects garbage, and the engines' modules are many
        found["graph"] = walk()
    return found


def run(engine: str, call: Callable[[], Any], *given: torch.Tensor) -> Ran:
    """What `call` gives, and who served it. In a graph it is recorded while other values lie in the tensors that
    it reads and writes, after a call outside of it, as the engines have it; and replayed twice with the ones given."""
    if not _in_graphs:
        return _counted(engine, call)
    kept = [x.clone() for x in given]

    def fill(values: list[torch.Tensor]) -> None:
        for x, value in zip(given, values, strict=True):
            x.copy_(value)

    fill([x.flip(-1) for x in kept])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        ran = _counted(engine, call)
    _graphs.append(graph)
    for _ in range(2):
        fill(kept)
        graph.replay()
    torch.cuda.synchronize()
    return ran


def _counted(engine: str, call: Callable[[], Any]) -> Ran:
    import ropewalk  # noqa: PLC0415
    from ropewalk import engines  # noqa: PLC0415

    before, launches = engines.counters()[engine], sum(ropewalk.counters().values())
    result = call()
    after = engines.counters()[engine]
    served = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
    return Ran(result, served, sum(ropewalk.counters().values()) - launches)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.double().reshape(got.shape)
    return float((got.double() - want).norm() / want.norm())


def stand_in(*names: str) -> None:
    """For each that is not installed; of a package that is, for a module alone."""
    missing = {name for name in names if "." in name or importlib.util.find_spec(name) is None}
    sys.meta_path.append(_Finder(missing))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in self.names or name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        stands_in.add(spec.name if spec.name in self.names else spec.name.partition(".")[0])
        module = types.ModuleType(spec.name)
        module.__getattr__ = _empty  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None: ...


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        return _empty(name)


def _empty(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Meta(name, (), {"__init__": _takes_anything})


def _takes_anything(self: Any, *args: Any, **kwargs: Any) -> None: ...
