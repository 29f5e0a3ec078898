"""Ropewalk in SGLang: a plugin (entry point group sglang.srt.plugins) that ROPEWALK_SGLANG=1 switches on.

The forwards of the rotary layers become calls of `ropewalk.rope_`, in place, and Qwen3's norm, rotation and store
become one. Each goes the engine's own way where Ropewalk refuses the call. Nothing of SGLang is imported before that.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .. import rope_
from ..compat import _common, sglang_jit
from . import Engine, UnknownError

__all__ = ["register"]

_engine = Engine("sglang", "sglang.srt.ropewalk")
_PLAIN = "self positions query key offsets fused_set_kv_buffer_arg"
_LAYERS = "sglang.srt.layers.rotary_embedding"
_OPS = "sglang.kernels.ops.attention"


# ---------------------------------------------------------------------------------------------------------------------
# The rotary layers


def _table(layer: Any, query: torch.Tensor, name: str = "cos_sin_cache") -> torch.Tensor:
    """The layer's table, on the device of the query; its dtype is left as it is."""
    table = getattr(layer, name)
    if table.device != query.device:
        table = table.to(query.device)
        setattr(layer, name, table)
    return table


def _kept(layer: Any, name: str, query: torch.Tensor, make: Callable[[], Any]) -> torch.Tensor:
    """An int32 tensor beside the layer's own, made once for each device."""
    kept = layer.__dict__.get(name)
    if kept is None or kept.device != query.device:
        kept = layer.__dict__[name] = torch.as_tensor(make(), dtype=torch.int32, device=query.device)
    return kept


def _rotate(
    layer: Any, positions: torch.Tensor, query: torch.Tensor, key: Any, offsets: Any = None, buffers: Any = None,
    axes: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """query and key in place by the layer's table; with axes, positions are [3, tokens]."""
    if hasattr(layer, "sin_cos_cache"):
        raise ValueError("the layer has a table of its own for each token (sin_cos_cache)")
    tokens = positions[0] if axes is not None else positions
    q, k = _common.heads("forward", tokens, layer.head_size, query=query, key=key)
    store = {} if buffers is None else _common.stored("forward", k, buffers)
    rope_(q, k, positions=positions, offsets=offsets, cos_sin=_table(layer, query), axes=axes,
          pairing=_common.pairing(layer.is_neox_style), rotary_dim=layer.rotary_dim, **store)  # fmt: skip
    return query, key


def _rotary(
    original: Any, self: Any, positions: Any, query: Any, key: Any, offsets: Any = None,
    fused_set_kv_buffer_arg: Any = None,
) -> Any:  # fmt: skip
    """RotaryEmbedding and those of its kind."""
    return _engine.serve(
        type(self).__name__,
        self,
        lambda: _rotate(self, positions, query, key, offsets, fused_set_kv_buffer_arg),
        lambda: original(self, positions, query, key, offsets, fused_set_kv_buffer_arg),
    )


def _deepseek(original: Any, self: Any, positions: Any, query: Any, key: Any, offsets: Any = None) -> Any:
    """DeepseekScalingRotaryEmbedding, whose forward on the CPU is its own."""
    return _engine.serve(
        type(self).__name__,
        self,
        lambda: _rotate(self, positions, query, key, offsets),
        lambda: original(self, positions, query, key, offsets),
    )


def _axes_of(layer: Any, positions: torch.Tensor, query: torch.Tensor) -> Any:
    """The axis of each pair; None for positions of one axis."""
    if positions.ndim == 1:
        return None
    if not layer.mrope_section:
        raise ValueError("positions have axes, but the layer has no mrope_section")
    if getattr(layer, "axis_map", None) is not None:
        return _kept(layer, "_ropewalk_axes", query, lambda: layer.axis_map)
    # Of Ernie 4.5 VL and Bailing: height and width take turns, time is behind them.
    height, width, time = layer.mrope_section
    if height != width:
        raise ValueError(f"mrope_section must have as much height as width, but is {list(layer.mrope_section)}")
    return _kept(layer, "_ropewalk_axes", query, lambda: [1, 2] * height + [0] * time)


def _mrope(original: Any, self: Any, positions: Any, query: Any, key: Any, fused_set_kv_buffer_arg: Any = None) -> Any:
    """MRotaryEmbedding: every form of mrope by the axis of each pair."""

    def call() -> Any:
        axes = _axes_of(self, positions, query)
        return _rotate(self, positions, query, key, None, fused_set_kv_buffer_arg, axes)

    more = () if fused_set_kv_buffer_arg is None else (fused_set_kv_buffer_arg,)
    return _engine.serve(type(self).__name__, self, call, lambda: original(self, positions, query, key, *more))


def _bailing(
    original: Any, self: Any, positions: Any, query: Any, key: Any, fused_set_kv_buffer_arg: Any = None
) -> Any:
    """BailingMRotaryEmbedding, whose table begins at a position of its own."""

    def call() -> Any:
        rows = positions - self.position_start
        return _rotate(self, rows, query, key, None, fused_set_kv_buffer_arg, _axes_of(self, rows, query))

    return _engine.serve(
        type(self).__name__, self, call, lambda: original(self, positions, query, key, fused_set_kv_buffer_arg)
    )


def _longrope(original: Any, self: Any, positions: Any, query: Any, key: Any, offsets: Any = None) -> Any:
    """Phi3LongRoPEScaledRotaryEmbedding: the short table lies before the long one, which all tokens take if one is past
    the original length."""

    def call() -> Any:
        first = self.original_max_position_embeddings
        rows = positions + (positions > first).any() * first
        q, k = _common.heads("forward", positions, self.head_size, query=query, key=key)
        rope_(q, k, positions=rows, offsets=offsets, cos_sin=_table(self, query, "long_short_cos_sin_cache"),
              rotary_dim=self.rotary_dim)  # fmt: skip
        return query, key

    return _engine.serve(type(self).__name__, self, call, lambda: original(self, positions, query, key, offsets))


def _dual_chunk(original: Any, self: Any, positions: Any, query: Any, key: Any, offsets: Any = None) -> Any:
    """DualChunkRotaryEmbedding: q by five tables, side by side, and k by one; its six rotations as six launches."""

    def call() -> Any:
        rows = positions if offsets is None else positions + offsets
        q, k = _common.heads("forward", rows, self.head_size, query=query, key=key)
        if rows.dim() != 1:
            raise ValueError(f"positions must be [tokens], but are {list(rows.shape)}")
        options = {"pairing": _common.pairing(self.is_neox_style), "rotary_dim": self.rotary_dim}
        length = self.chunk_size - self.local_size
        within = rows % length
        q_out = query.new_empty((q.shape[0], 5, *q.shape[1:]))
        tables = (
            (self.cos_sin_q_cache, within),
            (self.cos_sin_qc_cache, within),
            (self.cos_sin_qc_cache, torch.full_like(within, length - 1)),
            (self.cos_sin_qc_no_clamp_cache, within),
            (self.cos_sin_q_inter_cache, within),
        )
        for i, (table, row) in enumerate(tables):
            rope_(q, None, positions=row, cos_sin=table, q_out=q_out[:, i], **options)
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        rope_(k, None, positions=rows, cos_sin=self.cos_sin_k_cache, q_out=k_out, **options)
        return q_out.flatten(1), k_out.flatten(1)

    return _engine.serve(type(self).__name__, self, call, lambda: original(self, positions, query, key, offsets))


# ---------------------------------------------------------------------------------------------------------------------
# Qwen3: norm, rotation and store


def _norms(attention: Any) -> dict[str, Any]:
    """The norm's arguments, if the layer's two are RMSNorms as `rope_` has them."""
    if _module("environ").envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE.get():
        raise ValueError("deterministic inference asks for SGLang's own norm")
    q_norm, k_norm = attention.q_norm, attention.k_norm
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        quantises = getattr(norm, "_quant_linear", None) is not None  # from 0.5.22 on
        if norm.cast_x_before_out_mul or norm.variance_size_override is not None or quantises:
            raise ValueError(f"{name} does more than an RMSNorm")
        if norm.weight.shape != (attention.head_dim,):
            raise ValueError(f"{name}'s weight must be [{attention.head_dim}], but is {list(norm.weight.shape)}")
    if q_norm.variance_epsilon != k_norm.variance_epsilon:
        raise ValueError(f"q_norm and k_norm have two eps, {q_norm.variance_epsilon} and {k_norm.variance_epsilon}")
    return {"norm": "rms", "q_weight": q_norm.weight, "k_weight": k_norm.weight, "eps": q_norm.variance_epsilon}


def _prepare(attention: Any, qkv: torch.Tensor, positions: torch.Tensor, store: Any = None) -> tuple[Any, Any, Any]:
    """q, k and v of a packed row, q and k normalised and rotated in it; k and v also in the cache of `store`."""
    layer = attention.rotary_emb
    if type(layer).__module__ not in (f"{_LAYERS}.base", f"{_LAYERS}.mrope", f"{_LAYERS}.yarn") and (
        type(layer).__name__ not in _PLAIN_VARIANTS
    ):
        raise ValueError(f"{type(layer).__name__} is not known to Qwen3's fused path")
    axes = _axes_of(layer, positions, qkv) if hasattr(layer, "mrope_section") else None
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    q, k, v = qkv.split(sizes, dim=-1)
    heads = [x.unflatten(-1, (-1, attention.head_dim)) for x in (q, k, v)]
    more: dict[str, Any] = {}
    if store is not None:
        buffers = store(v)
        more = _common.stored("forward", heads[1], buffers)
    rope_(heads[0], heads[1], positions=positions, cos_sin=_table(layer, qkv), axes=axes,
          pairing=_common.pairing(layer.is_neox_style), rotary_dim=layer.rotary_dim, **_norms(attention),
          **more)  # fmt: skip
    return q, k, v


_PLAIN_VARIANTS = (
    "Llama3RotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
)


class _Projected:
    """Stands for a layer's projection while its stock way goes on with what was projected already."""

    def __init__(self, attention: Any, qkv: Any) -> None:
        self.attention = attention
        self.qkv = qkv

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def qkv_proj(self, hidden_states: Any) -> Any:
        return self.qkv, None


def _qwen3_prepare(original: Any, self: Any, positions: Any, hidden_states: Any) -> Any:
    """Qwen3Attention.forward_prepare_native: norm and rotation in one launch."""
    qkv, _ = self.qkv_proj(hidden_states)
    return _engine.serve(
        "Qwen3Attention norm + rope",
        self,
        lambda: _prepare(self, qkv, positions),
        lambda: original(_Projected(self, qkv), positions, hidden_states),
    )


_STORES = "Qwen3Attention norm + rope + store"


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"sglang.srt.{name}")


def _may_store(attention: Any, forward_batch: Any) -> bool:
    """Whether SGLang itself would let a rotation store k and v here."""
    return not (
        attention.use_fused_qk_norm_mrope
        or getattr(attention, "use_fused_qk_norm_rope", False)  # from 0.5.23 on
        or attention.attn.k_scale is not None
        or attention.attn.v_scale is not None
        or _module("runtime_context").get_exec().deterministic.rl_on_policy_target is not None
        or not _module("models.utils").enable_fused_set_kv_buffer(forward_batch)
    )


def _qwen3_forward(original: Any, self: Any, positions: Any, hidden_states: Any, forward_batch: Any) -> Any:
    """Qwen3Attention.forward: norm, rotation and store in one launch where that may be. Else the layer's own forward,
    whose preparation is `_qwen3_prepare`."""
    if _engine.gave_up(_STORES, self) or not _may_store(self, forward_batch):
        return original(self, positions, hidden_states, forward_batch)
    qkv, _ = self.qkv_proj(hidden_states)

    def store(v: Any) -> Any:
        make = _module("models.utils").create_fused_set_kv_buffer_arg
        return make(value=v, layer=self.attn, forward_batch=forward_batch)

    def call() -> Any:
        return *_prepare(self, qkv, positions, store), False

    def stock() -> Any:
        prepare = type(self).forward_prepare_native
        prepare = getattr(prepare, "__wrapped__", prepare)
        return *prepare(_Projected(self, qkv), positions, hidden_states), True

    q, k, v, save = _engine.serve(_STORES, self, call, stock)
    output, _ = self.o_proj(self.attn(q, k, v, forward_batch, save_kv_cache=save))
    return output


# ---------------------------------------------------------------------------------------------------------------------

_KV = "self positions query key fused_set_kv_buffer_arg"
_FORWARDS: dict[str, tuple[Any, str]] = {
    f"{_LAYERS}.base.RotaryEmbedding.forward_cuda": (_rotary, _PLAIN),
    f"{_LAYERS}.base.RotaryEmbedding.forward_xpu": (_rotary, _PLAIN),
    f"{_LAYERS}.base.RotaryEmbedding.forward_cpu": (_rotary, _PLAIN),
    f"{_LAYERS}.rope_variant.DeepseekScalingRotaryEmbedding.forward_cpu": (
        _deepseek,
        "self positions query key offsets",
    ),
    f"{_LAYERS}.rope_variant.Phi3LongRoPEScaledRotaryEmbedding.forward": (
        _longrope,
        "self positions query key offsets",
    ),
    f"{_LAYERS}.rope_variant.DualChunkRotaryEmbedding.forward": (_dual_chunk, "self positions query key offsets"),
    f"{_LAYERS}.mrope.MRotaryEmbedding.forward_cuda": (_mrope, _KV),
    f"{_LAYERS}.mrope.MRotaryEmbedding.forward_xpu": (_mrope, _KV),
    f"{_LAYERS}.mrope.MRotaryEmbedding.forward_cpu": (_mrope, _KV),
    f"{_LAYERS}.mrope.Ernie4_5_VLRotaryEmbedding.forward_cuda": (_mrope, "self positions query key"),
    f"{_LAYERS}.mrope.Ernie4_5_VLRotaryEmbedding.forward_xpu": (_mrope, "self positions query key"),
    f"{_LAYERS}.bailing_mrope.BailingMRotaryEmbedding.forward": (_bailing, _KV),
    "sglang.srt.models.qwen3.Qwen3Attention.forward_prepare_native": (_qwen3_prepare, "self positions hidden_states"),
    "sglang.srt.models.qwen3.Qwen3Attention.forward": (
        _qwen3_forward,
        "self positions hidden_states forward_batch",
    ),
}
# Functions, with the names of those of `ropewalk.compat.sglang_jit`.
_FUNCTIONS = {
    f"{_OPS}.rope.apply_rope_with_cos_sin_cache_inplace": "q k cos_sin_cache positions is_neox rope_dim fused_args",
    f"{_OPS}.rope.rotary_embedding": "positions query key head_size cos_sin_cache is_neox",
    f"{_OPS}.fused_qknorm_rope.fused_qk_norm_rope": (
        "qkv num_heads_q num_heads_k num_heads_v head_dim eps q_weight k_weight base is_neox position_ids factor low "
        "high attention_factor rotary_dim"
    ),
}
_LEFT = {
    "FourierRotaryEmbedding": "a table for each head",
    "Llama4VisionRotaryEmbedding": "complex frequencies of patches",
    "forward_npu, forward_hip, forward_musa": "no backend of Ropewalk",
    "MLA, indexers, gates, q in fp8": "no operation of Ropewalk",
}


def _of_function(name: str) -> Any:
    ours = getattr(sglang_jit, name)

    class Owner:
        """Remembers refusals."""

    owner = Owner()

    def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
        return _engine.serve(name, owner, lambda: ours(*args, **kwargs), lambda: original(*args, **kwargs))

    return hook


def _resolve(target: str) -> Any:
    """A function of a module, or a method of a class of one."""
    path, _, name = target.rpartition(".")
    try:
        owner: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        module, _, cls = path.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
        if name not in vars(owner):
            raise UnknownError(f"{cls} has no {name} of its own") from None
    return getattr(owner, name)


def _put() -> None:
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks = {target: (hook, parameters) for target, (hook, parameters) in _FORWARDS.items()}
    for target, parameters in _FUNCTIONS.items():
        hooks[target] = _of_function(target.rpartition(".")[2]), parameters
    _engine.left.update(_LEFT)
    for target, (hook, parameters) in hooks.items():
        name = target.rpartition(".")[2] if target in _FUNCTIONS else ".".join(target.split(".")[-2:])
        try:
            _engine.check(_resolve(target), parameters)
        except Exception as error:  # of its import too: whatever it is, this one stays as it is
            _engine.left[name] = str(error).partition("\n")[0][:200] or type(error).__name__
            continue
        registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
        _engine.served.append(name)


def register() -> None:
    """SGLang calls this in each of its processes. Does nothing unless it is asked to."""
    _engine.register(_put)
