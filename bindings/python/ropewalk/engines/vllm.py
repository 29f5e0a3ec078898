"""Ropewalk in vLLM: a plugin (entry point group vllm.general_plugins) that ROPEWALK_VLLM=1 switches on.

The operators `_C::rotary_embedding`, `_C::fused_qk_norm_rope` and `vllm::mrope` get Ropewalk's kernels, below
torch.compile and vLLM's fusion passes, which write these operators into graphs. FlashAttention's implementation learns
to normalise, rotate and store in one launch, for the pass that asks for it. Nothing of vLLM is imported before that.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from .. import rope_
from ..compat import _common
from ..compat import vllm as ours
from . import Engine, UnknownError

__all__ = ["register"]

_engine = Engine("vllm", "vllm.ropewalk")
_libraries: list[Any] = []  # an operator goes back to the engine's kernel when its library is gone
_DEVICES = ("CPU", "CUDA", "XPU")
_ROPE = "vllm.model_executor.layers.rotary_embedding"


def _mrope(
    positions: Any, query: Any, key: Any, cos_sin_cache: Any, head_size: int, rotary_dim: int, mrope_section_t: int,
    mrope_section_h: int, mrope_section_w: int, mrope_interleaved: bool, is_neox_style: bool,
) -> None:  # fmt: skip
    """`vllm::mrope`."""
    section = (mrope_section_t, mrope_section_h, mrope_section_w)
    _common.mrope("mrope", {}, positions, query, key, head_size, cos_sin_cache, is_neox_style, rotary_dim, section,
                  mrope_interleaved)  # fmt: skip


_OPERATORS = {
    "_C::rotary_embedding": (
        ours.rotary_embedding,
        "positions query key head_size cos_sin_cache is_neox rope_dim_offset inverse",
    ),
    "_C::fused_qk_norm_rope": (
        ours.fused_qk_norm_rope,
        "qkv num_heads_q num_heads_k num_heads_v head_dim eps q_weight k_weight cos_sin_cache is_neox position_ids "
        "forced_token_heads_per_warp",
    ),
    "vllm::mrope": (
        _mrope,
        "positions query key cos_sin_cache head_size rotary_dim mrope_section_t mrope_section_h mrope_section_w "
        "mrope_interleaved is_neox_style",
    ),
}


def _operator(name: str) -> Any:
    namespace, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), short, None)
    if packet is None:
        raise UnknownError("the operator is not there")
    return packet.default


def _parameters_of(operator: Any) -> list[str]:
    return [argument.name.lower() for argument in operator._schema.arguments]


class _Stock:
    """vLLM's own kernel of an operator on a kind of device, for calls that Ropewalk refuses; and their count."""

    def __init__(self, name: str, key: str) -> None:
        self.key = getattr(torch._C.DispatchKey, key)
        try:
            self.kernel = torch.library.get_kernel(name, key)
        except (RuntimeError, AttributeError):  # none there, or an older torch
            self.kernel = None

    def __call__(self, *args: Any) -> None:
        self.kernel.call_boxed(torch._C.DispatchKeySet(self.key), *args)


def _kernel(name: str, function: Any, stock: _Stock) -> Any:
    def serve(*args: Any) -> None:
        if stock.kernel is None:
            function(*args)
            _engine.count(name)
        else:
            _engine.serve(name, stock, lambda: function(*args), lambda: stock(*args))

    return serve


def _put_operator(name: str, function: Any, parameters: str) -> None:
    found = _parameters_of(_operator(name))
    if found != parameters.split()[: len(found)]:
        raise UnknownError(f"its parameters are {' '.join(found)}, not {parameters}")
    namespace, _, short = name.partition("::")
    library = torch.library.Library(namespace, "IMPL")
    for key in _DEVICES:
        library.impl(short, _kernel(name, function, _Stock(name, key)), key, allow_override=True)
    _libraries.append(library)


# ---------------------------------------------------------------------------------------------------------------------
# Norm, rotation and store by the methods of an attention backend


def _cache_of(impl: Any, layer: Any, kv_cache: Any) -> dict[str, Any]:
    """The halves of a cache [blocks, heads, block_size, 2 * head_size] as [blocks, block_size, heads, head_size]."""
    key_cache, value_cache = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    if impl.kv_cache_dtype.startswith("fp8"):
        dtype = torch.float8_e5m2 if impl.kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn
        key_cache, value_cache = key_cache.view(dtype), value_cache.view(dtype)
        return {"k_cache": key_cache, "v_cache": value_cache, "k_scale": layer._k_scale, "v_scale": layer._v_scale}
    return {"k_cache": key_cache, "v_cache": value_cache}


def _slots(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    """A slot for each token: rows behind the last are padding, which is not stored."""
    return _common.slot_of_each(slots[:tokens], tokens)


def _norm_rope_store(
    self: Any, layer: Any, qkv: Any, q_out: Any, k_out: Any, positions: Any, q_weight: Any, k_weight: Any,
    rms_norm_eps: float, cos_sin_cache: Any, is_neox: bool, kv_cache: Any, layer_slot_mapping: Any,
) -> None:  # fmt: skip
    """`do_qk_norm_rope_kvcache_update`: into q_out and k_out, k and v into the cache. qkv is only read."""
    rows = qkv.unflatten(-1, (-1, self.head_size))
    q, k, v = rows.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
    rope_(q, k, positions=positions, cos_sin=cos_sin_cache, pairing=_common.pairing(is_neox),
          q_weight=q_weight.flatten(), k_weight=k_weight.flatten(), eps=rms_norm_eps, q_out=q_out.view(q.shape),
          k_out=k_out.view(k.shape), v=v, slots=_slots(layer_slot_mapping, qkv.shape[0]),
          **_cache_of(self, layer, kv_cache))  # fmt: skip
    _engine.count("norm + rope + store")


def _norm_mrope_store(
    self: Any, layer: Any, qkv: Any, q_out: Any, positions: Any, q_weight: Any, k_weight: Any, rms_norm_eps: float,
    cos_sin_cache: Any, is_neox: bool, mrope_section: Any, is_interleaved: bool, rotary_dim: int, kv_cache: Any,
    layer_slot_mapping: Any,
) -> None:  # fmt: skip
    """`do_qk_norm_mrope_kvcache_update`: likewise with positions [3, tokens]; k goes into the cache alone."""
    axes = _common.known_axes(tuple(mrope_section), bool(is_interleaved), str(qkv.device))
    rows = qkv.unflatten(-1, (-1, self.head_size))
    q, k, v = rows.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
    rope_(q, k, positions=positions, cos_sin=cos_sin_cache, rotary_dim=rotary_dim,
          axes=axes, pairing=_common.pairing(is_neox),
          q_weight=q_weight.flatten(), k_weight=k_weight.flatten(), eps=rms_norm_eps, q_out=q_out.view(q.shape),
          k_store_only=True, v=v, slots=_slots(layer_slot_mapping, qkv.shape[0]),
          **_cache_of(self, layer, kv_cache))  # fmt: skip
    _engine.count("norm + mrope + store")


def _rope_store(
    self: Any, layer: Any, query: Any, key: Any, value: Any, positions: Any, cos_sin_cache: Any, is_neox: bool,
    kv_cache: Any, layer_slot_mapping: Any,
) -> None:  # fmt: skip
    """`do_rope_and_kv_cache_update`: query and key in place, key and value into the cache."""
    q, k = _common.heads("do_rope_and_kv_cache_update", positions, self.head_size, query=query, key=key)
    rope_(q, k, positions=positions, cos_sin=cos_sin_cache, pairing=_common.pairing(is_neox), v=value.view(k.shape),
          slots=_slots(layer_slot_mapping, q.shape[0]), **_cache_of(self, layer, kv_cache))  # fmt: skip
    _engine.count("rope + store")


def _supported(self: Any) -> bool:
    """Asked by the fusion passes of each layer's implementation."""
    plain = self.kv_cache_dtype in ("auto", "bfloat16", "float16") or self.kv_cache_dtype.startswith("fp8")
    return plain and self.attn_type == "decoder" and getattr(self, "kv_sharing_target_layer_name", None) is None


_METHODS = {
    "fused_qk_norm_rope_kvcache_supported": _supported,
    "fused_qk_norm_mrope_kvcache_supported": _supported,
    "fused_rope_kvcache_supported": _supported,
    "do_qk_norm_rope_kvcache_update": _norm_rope_store,
    "do_qk_norm_mrope_kvcache_update": _norm_mrope_store,
    "do_rope_and_kv_cache_update": _rope_store,
}


def _put_store() -> None:
    base = importlib.import_module("vllm.v1.attention.backend").AttentionImpl
    cls = importlib.import_module("vllm.v1.attention.backends.flash_attn").FlashAttentionImpl
    for name, method in _METHODS.items():
        stock = getattr(base, name, None)
        if stock is None or name in vars(cls):
            raise UnknownError(f"its {name} is not the one that is known")
        _engine.check(stock, " ".join(method.__code__.co_varnames[: method.__code__.co_argcount]))
    for name, method in _METHODS.items():
        setattr(cls, name, method)


def _put_mrope() -> None:
    cls = importlib.import_module(f"{_ROPE}.mrope").MRotaryEmbedding
    _engine.check(cls.forward_cuda, "self positions query key offsets")
    _engine.check(cls.forward_hip, "self positions query key offsets")
    stock, by_operator = cls.forward_cuda, cls.forward_hip

    @functools.wraps(stock)
    def forward_cuda(self: Any, positions: Any, query: Any, key: Any = None, offsets: Any = None) -> Any:
        """Positions with axes by the operator, as on AMD's GPUs; others as they were, by torch."""
        if positions.ndim == 2 and offsets is None:
            return by_operator(self, positions, query, key)
        return stock(self, positions, query, key, offsets)

    cls.forward_cuda = forward_cuda


def _put() -> None:
    importlib.import_module("vllm._custom_ops")  # so that the operators are there
    importlib.import_module(f"{_ROPE}.mrope")
    for name, (function, parameters) in _OPERATORS.items():
        try:
            _put_operator(name, function, parameters)
            if name == "vllm::mrope":
                _put_mrope()
        except Exception as error:
            _engine.left[name] = str(error).partition("\n")[0][:200] or type(error).__name__
            continue
        _engine.served.append(name)
    try:
        _put_store()
    except Exception as error:
        _engine.left["norm + rope + store"] = str(error).partition("\n")[0][:200] or type(error).__name__
    else:
        _engine.left["norm + rope + store"] = (
            "FlashAttention has it, but vLLM runs the pass that asks for it on AMD's GPUs alone: see docs/engines.md"
        )
    _engine.left["MLA, indexers, gates, q in fp8"] = "no operation of Ropewalk"


def register() -> None:
    """vLLM calls this in each of its processes. Does nothing unless it is asked to."""
    _engine.register(_put)
