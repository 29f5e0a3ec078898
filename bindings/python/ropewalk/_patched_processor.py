"""What `ropewalk.diffusers.patch` makes of a model's attention processors: processors of a class of their own, derived
from theirs, whose call does the norm of q and k and the rotation by Ropewalk and the rest as the stock one.

What such a processor needs to know lies in itself, so that copies and pickles of it are patched, too; weights are taken
from the layer that calls it. Without that it does what its stock class does.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_flux as of_flux
from diffusers.models.transformers import transformer_flux2 as of_flux2
from diffusers.models.transformers import transformer_wan as of_wan
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0, Lumina2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel, ZSingleStreamAttnProcessor

from . import rope, rope_
from ._patched_module import derived
from .compat import _common
from .diffusers import STATE, VERSIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = (torch.nn.RMSNorm, RMSNorm)
NORM_AND_ROTATION = "norm and rotation"
ROTATION = "rotation"
WITH_GRADIENT = ", with a gradient"


class RefusedError(Exception):
    """Of a call that Ropewalk refused before it wrote: it goes the stock way."""


class State:
    """How the layers of a processor are served. `calls` is one for all of a model."""

    def __init__(self, rounding: str, fuses_norm: bool, calls: dict[str, int]) -> None:
        self.rounding = rounding
        self.fuses_norm = fuses_norm
        self.calls = calls

    def count(self, what: str) -> None:
        if not torch.compiler.is_compiling():
            self.calls[what] = self.calls.get(what, 0) + 1


class Stream(NamedTuple):
    """The q and k of one stream of tokens, text or image, with what is to be done with them."""

    q: Any  # [batch, tokens, heads, head_dim]
    k: Any
    norms: tuple[Any, Any]  # modules, or None
    tables: tuple[Any, Any] | None  # cosines and sines, one column a pair; None: not rotated

    def normed(self) -> Stream:
        q, k = (x if norm is None else norm(x) for x, norm in zip((self.q, self.k), self.norms, strict=True))
        return Stream(q, k, (None, None), self.tables)

    def needs_gradient(self) -> bool:
        weights = (getattr(norm, "weight", None) for norm in self.norms)
        return any(x is not None and x.requires_grad for x in (self.q, self.k, *weights))

    def can_fuse(self) -> bool:
        """Whether both norms are RMSNorms over the last dimension, alike, of weights as q and k are."""
        first, second = self.norms
        if type(first) not in NORMS or type(second) not in NORMS or first.eps is None or first.eps != second.eps:
            return False
        weights = first.weight, second.weight
        if weights[0] is None or weights[1] is None:
            return weights[0] is weights[1]
        return all(
            getattr(norm, "bias", None) is None
            and norm.weight.shape == x.shape[-1:]
            and norm.weight.dtype == x.dtype
            and norm.weight.device == x.device
            for norm, x in zip(self.norms, (self.q, self.k), strict=True)
        )

    def options(self, rounding: str) -> dict[str, Any] | None:
        """Those of `rope`; None if there is nothing to do."""
        first, second = self.norms
        options: dict[str, Any] = {"pairing": "interleaved", "rounding": rounding}
        if first is not None:
            options.update(norm="rms", eps=first.eps, q_weight=first.weight, k_weight=second.weight)
        if self.tables is not None:
            return {**options, "cos": self.tables[0], "sin": self.tables[1]}
        return None if first is None else {**options, "frequencies": _common.still(self.q.shape[-1])}

    def turn(self, rounding: str, out: tuple[Any, Any]) -> None:
        """In place, or into `out`; with the norms if there are any."""
        options = self.options(rounding)
        if options is not None:
            _called(rope_, self.q, self.k, q_out=out[0], k_out=out[1], **options)
        elif out[0] is not None:
            out[0].copy_(self.q)
            out[1].copy_(self.k)

    def turned(self, rounding: str) -> tuple[Any, Any]:
        """New tensors; autograd goes through."""
        options = self.options(rounding)
        return (self.q, self.k) if options is None else _called(rope, self.q, self.k, **options)


def _called(function: Any, q: Any, k: Any, **options: Any) -> Any:
    if torch.compiler.is_compiling():
        return function(q, k, **options)
    try:
        return function(q, k, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RefusedError(str(error)) from None


def turned(state: State, *streams: Stream, inside: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """q and k of all streams, one stream after the other. inside: the streams are its parts, and it may be written."""
    needs_gradient = torch.is_grad_enabled() and any(stream.needs_gradient() for stream in streams)
    fused = [state.fuses_norm and stream.can_fuse() for stream in streams]
    normed = [stream if each else stream.normed() for stream, each in zip(streams, fused, strict=True)]
    what = NORM_AND_ROTATION if all(fused) else ROTATION
    if needs_gradient:
        done = [stream.turned(state.rounding) for stream in normed]
        state.count(what + WITH_GRADIENT)
        if len(done) == 1:
            return done[0]
        return torch.cat([q for q, _ in done], dim=1), torch.cat([k for _, k in done], dim=1)
    first = normed[0]
    outs: list[tuple[Any, Any]]
    if len(normed) == 1:
        whole, outs = (first.q, first.k), [(None, None)]
    elif inside is not None and all(fused):
        whole, outs = inside, [(None, None)] * len(normed)
    else:
        tokens = [stream.q.shape[1] for stream in normed]
        whole = tuple(x.new_empty((x.shape[0], sum(tokens), *x.shape[2:])) for x in (first.q, first.k))
        outs = list(zip(*(x.split(tokens, dim=1) for x in whole), strict=True))
    for stream, out in zip(normed, outs, strict=True):
        stream.turn(state.rounding, out)
    state.count(what)
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Cosines and sines, one column a pair


def _plain(table: Any) -> Any:
    return table if table.dtype in DTYPES else table.float()


def of_neighbours(tables: Any, like: Any) -> tuple[Any, Any]:
    """Of tables in which the entry of each pair stands twice, side by side."""
    cos, sin = tables
    return _plain(cos.to(like.device)[..., ::2]), _plain(sin.to(like.device)[..., ::2])


def of_complex(table: Any) -> tuple[Any, Any]:
    if table.dtype != torch.complex64:
        table = table.to(torch.complex64)
    parts = torch.view_as_real(table)
    return parts[..., 0], parts[..., 1]


def rows(tables: tuple[Any, Any], begin: int | None, end: int | None) -> tuple[Any, Any]:
    return tables[0][begin:end], tables[1][begin:end]


# ---------------------------------------------------------------------------------------------------------------------
# The calls. Each does what the call of its stock class does, in its order.


def _stock(processor: Any, attn: Any, hidden_states: Any, *others: Any) -> Any:
    base = type(processor)._ropewalk_base
    if base is of_wan.WanAttnProcessor and others[-1] is not None and _is_wide(others[-1][0], attn):
        tables = (x[:, :, :1].repeat_interleave(2, dim=-1) for x in others[-1])
        others = (*others[:-1], tuple(tables))
    return base.__call__(processor, attn, hidden_states, *others)


def _serve(processor: Any, body: Callable[..., Any], tables: Any, attn: Any, hidden_states: Any, *others: Any) -> Any:
    state = getattr(processor, STATE, None)
    if state is None or tables is None:
        return _stock(processor, attn, hidden_states, *others)
    if hidden_states.dtype not in DTYPES:
        state.count(f"stock: {str(hidden_states.dtype).removeprefix('torch.')}")
        return _stock(processor, attn, hidden_states, *others)
    if torch.compiler.is_compiling():
        return body(processor, state, attn, hidden_states, *others)
    try:
        return body(processor, state, attn, hidden_states, *others)
    except RefusedError as error:
        state.count(f"stock: {error}")
    return _stock(processor, attn, hidden_states, *others)


def _attend(processor: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    out = dispatch_attention_fn(
        query, key, value, attn_mask=mask, backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )  # fmt: skip
    return out.flatten(2, 3).to(query.dtype)


def _attend_by_torch(query: Any, key: Any, value: Any, mask: Any, scale: Any = None) -> Any:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _mask_of_heads(attn: Any, hidden_states: Any, attention_mask: Any) -> Any:
    if attention_mask is None:
        return None
    batch, tokens, _ = hidden_states.shape
    attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
    return attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])


def _turned_as_one(state: State, attn: Any, query: Any, key: Any, tables: tuple[Any, Any]) -> tuple[Any, Any]:
    """All heads are one row, of pairs that are neighbours: norm and rotation are over it."""
    query, key = turned(state, Stream(query.unsqueeze(2), key.unsqueeze(2), (attn.norm_q, attn.norm_k), tables))
    query, key = (x.squeeze(2).unflatten(2, (attn.heads, -1)) for x in (query, key))
    return query, key


def _call_of(body: Callable[..., Any], served: Callable[[Any], bool] | None = None) -> Callable[..., Any]:
    """The call of a class whose stock one has these arguments. served: whether it is, by the other stream of tokens."""

    def call(
        self: Any,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        tables = image_rotary_emb if served is None or served(encoder_hidden_states) else None
        return _serve(self, body, tables, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    return call


def _heads_of_flux(state: State, attn: Any, projections: Any, tables: Any) -> tuple[Any, Any, Any]:
    heads = [x.unflatten(-1, (-1, attn.head_dim)) if isinstance(x, torch.Tensor) else None for x in projections]
    query, key, value, encoder_query, encoder_key, encoder_value = heads
    tables = of_neighbours(tables, query)
    norms = attn.norm_q, attn.norm_k
    if attn.added_kv_proj_dim is None:
        return *turned(state, Stream(query, key, norms, tables)), value
    text = encoder_query.shape[1]
    query, key = turned(
        state,
        Stream(encoder_query, encoder_key, (attn.norm_added_q, attn.norm_added_k), rows(tables, None, text)),
        Stream(query, key, norms, rows(tables, text, None)),
    )
    return query, key, torch.cat([encoder_value, value], dim=1)


def _flux(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
) -> Any:
    projections = of_flux._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    query, key, value = _heads_of_flux(state, attn, projections, image_rotary_emb)
    hidden_states = _attend(self, query, key, value, attention_mask)
    if encoder_hidden_states is None:
        return hidden_states
    text = encoder_hidden_states.shape[1]
    encoder_hidden_states, hidden_states = hidden_states[:, :text], hidden_states[:, text:]
    hidden_states = attn.to_out[1](attn.to_out[0](hidden_states.contiguous()))
    return hidden_states, attn.to_add_out(encoder_hidden_states.contiguous())


flux = _call_of(_flux)


def _flux2(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
) -> Any:
    projections = of_flux2._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    query, key, value = _heads_of_flux(state, attn, projections, image_rotary_emb)
    hidden_states = _attend(self, query, key, value, attention_mask)
    if encoder_hidden_states is None:
        return attn.to_out[1](attn.to_out[0](hidden_states))
    text = encoder_hidden_states.shape[1]
    encoder_hidden_states, hidden_states = hidden_states[:, :text], hidden_states[:, text:]
    encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
    return attn.to_out[1](attn.to_out[0](hidden_states)), encoder_hidden_states


flux2 = _call_of(_flux2)


def flux2_parallel(
    self: Any, attn: Any, hidden_states: Any, attention_mask: Any = None, image_rotary_emb: Any = None
) -> Any:
    return _serve(self, _flux2_parallel, image_rotary_emb, attn, hidden_states, attention_mask, image_rotary_emb)


def _flux2_parallel(
    self: Any, state: State, attn: Any, hidden_states: Any, attention_mask: Any, image_rotary_emb: Any
) -> Any:
    hidden_states = attn.to_qkv_mlp_proj(hidden_states)
    width = hidden_states.shape[-1]
    qkv_dim = 3 * attn.inner_dim
    local = width * qkv_dim // (qkv_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor)  # of this rank
    qkv, mlp = torch.split(hidden_states, [local, width - local], dim=-1)
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv.chunk(3, dim=-1))
    tables = of_neighbours(image_rotary_emb, query)
    query, key = turned(state, Stream(query, key, (attn.norm_q, attn.norm_k), tables))
    hidden_states = _attend(self, query, key, value, attention_mask)
    return attn.to_out(torch.cat([hidden_states, attn.mlp_act_fn(mlp)], dim=-1))


def qwen_image(
    self: Any,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any = None,
    encoder_hidden_states_mask: Any = None,
    attention_mask: Any = None,
    image_rotary_emb: Any = None,
) -> Any:
    # What stock refuses, it refuses itself.
    served = encoder_hidden_states is not None and attention_mask is None
    return _serve(self, _qwen_image, image_rotary_emb if served else None, attn, hidden_states, encoder_hidden_states,
                  encoder_hidden_states_mask, attention_mask, image_rotary_emb)  # fmt: skip


def _qwen_image(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    encoder_hidden_states_mask: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
) -> Any:
    if encoder_hidden_states_mask is not None:
        of_image = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        attention_mask = torch.cat([encoder_hidden_states_mask, of_image], dim=1)[:, None, None, :]
    head_dim = attn.inner_dim // attn.heads

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (-1, head_dim))

    query, key, value = (heads(each(hidden_states)) for each in (attn.to_q, attn.to_k, attn.to_v))
    added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    text_query, text_key, text_value = (heads(each(encoder_hidden_states)) for each in added)
    of_image, of_text = image_rotary_emb
    query, key = turned(
        state,
        Stream(text_query, text_key, (attn.norm_added_q, attn.norm_added_k), of_complex(of_text)),
        Stream(query, key, (attn.norm_q, attn.norm_k), of_complex(of_image)),
    )
    hidden_states = _attend(self, query, key, torch.cat([text_value, value], dim=1), attention_mask)
    text = encoder_hidden_states.shape[1]
    image = attn.to_out[0](hidden_states[:, text:].contiguous())
    if len(attn.to_out) > 1:
        image = attn.to_out[1](image)
    return image, attn.to_add_out(hidden_states[:, :text].contiguous())


def z_image(
    self: Any,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any = None,
    attention_mask: Any = None,
    freqs_cis: Any = None,
) -> Any:
    return _serve(self, _z_image, freqs_cis, attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)


def _z_image(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    freqs_cis: Any,
) -> Any:
    projections = attn.to_q, attn.to_k, attn.to_v
    query, key, value = (each(hidden_states).unflatten(-1, (attn.heads, -1)) for each in projections)
    query, key = turned(state, Stream(query, key, (attn.norm_q, attn.norm_k), of_complex(freqs_cis)))
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :]
    output = attn.to_out[0](_attend(self, query, key, value, attention_mask))
    return attn.to_out[1](output) if len(attn.to_out) > 1 else output


def wan(
    self: Any,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any = None,
    attention_mask: Any = None,
    rotary_emb: Any = None,
) -> Any:
    # Attention to a text does not rotate; what does, attends to itself.
    served = encoder_hidden_states is None and attn.add_k_proj is None
    return _serve(self, _wan, rotary_emb if served else None, attn, hidden_states, encoder_hidden_states,
                  attention_mask, rotary_emb)  # fmt: skip


def _is_wide(table: Any, attn: Any) -> bool:
    """Of all heads, [1, tokens, heads, head_dim/2], from our rotary module: its own are [1, tokens, 1, head_dim]."""
    return table.shape[-1] == attn.inner_dim // attn.heads // 2


def _wan(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    rotary_emb: Any,
) -> Any:
    query, key, value = of_wan._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    cos, sin = rotary_emb
    if _is_wide(cos, attn):
        query, key = _turned_as_one(state, attn, query, key, (cos[0].flatten(1), sin[0].flatten(1)))
    else:
        tables = _plain(cos[0, :, 0, 0::2]), _plain(sin[0, :, 0, 1::2])
        query, key = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key)))
        query, key = turned(state, Stream(query, key, (None, None), tables))
    value = value.unflatten(2, (attn.heads, -1))
    hidden_states = _attend(self, query, key, value, attention_mask)
    return attn.to_out[1](attn.to_out[0](hidden_states))


def _ltx(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
) -> Any:
    attention_mask = _mask_of_heads(attn, hidden_states, attention_mask)
    query, key, value = (each(hidden_states) for each in (attn.to_q, attn.to_k, attn.to_v))
    tables = of_neighbours(image_rotary_emb, query)
    tables = (tables[0][0], tables[1][0]) if tables[0].shape[0] == 1 else tables
    query, key = _turned_as_one(state, attn, query, key, tables)
    hidden_states = _attend(self, query, key, value.unflatten(2, (attn.heads, -1)), attention_mask)
    return attn.to_out[1](attn.to_out[0](hidden_states))


ltx = _call_of(_ltx, served=lambda encoder_hidden_states: encoder_hidden_states is None)


def _hunyuan_video(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
) -> Any:
    text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
    added = attn.add_q_proj is not None
    if text and not added:
        hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)

    def heads(x: Any, *projections: Any) -> list[Any]:
        return [each(x).unflatten(2, (attn.heads, -1)) for each in projections]

    query, key, value = heads(hidden_states, attn.to_q, attn.to_k, attn.to_v)
    norms, tables = (attn.norm_q, attn.norm_k), of_neighbours(image_rotary_emb, query)
    if not text:
        query, key = turned(state, Stream(query, key, norms, tables))
    elif added:
        of_text = heads(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        query, key = turned(
            state,
            Stream(query, key, norms, tables),
            Stream(of_text[0], of_text[1], (attn.norm_added_q, attn.norm_added_k), None),
        )
        value = torch.cat([value, of_text[2]], dim=1)
    else:
        image = query.shape[1] - text
        query, key = turned(
            state,
            Stream(query[:, :image], key[:, :image], norms, tables),
            Stream(query[:, image:], key[:, image:], norms, None),
            inside=(query, key),
        )
    hidden_states = _attend(self, query, key, value, attention_mask)
    if encoder_hidden_states is not None:
        image = hidden_states.shape[1] - text
        hidden_states, encoder_hidden_states = hidden_states[:, :image], hidden_states[:, image:]
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
    return hidden_states, encoder_hidden_states


hunyuan_video = _call_of(_hunyuan_video)


def cogvideox(
    self: Any,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any = None,
    image_rotary_emb: Any = None,
) -> Any:
    served = not attn.is_cross_attention
    return _serve(self, _cogvideox, image_rotary_emb if served else None, attn, hidden_states, encoder_hidden_states,
                  attention_mask, image_rotary_emb)  # fmt: skip


def _cogvideox(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
) -> Any:
    text = encoder_hidden_states.shape[1]
    hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    attention_mask = _mask_of_heads(attn, hidden_states, attention_mask)
    projections = attn.to_q, attn.to_k, attn.to_v
    query, key, value = (each(hidden_states).unflatten(-1, (attn.heads, -1)) for each in projections)
    # The norms are LayerNorms, and the model's own.
    query, key, *_ = Stream(query, key, (attn.norm_q, attn.norm_k), None).normed()
    tables = of_neighbours(image_rotary_emb, query)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        image = turned(state, Stream(query[:, text:], key[:, text:], (None, None), tables))
        query, key = (torch.cat([x[:, :text], y], dim=1) for x, y in zip((query, key), image, strict=True))
    else:
        turned(state, Stream(query[:, text:], key[:, text:], (None, None), tables))
    hidden_states = _attend_by_torch(query, key, value, attention_mask)
    hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
    return hidden_states[:, text:], hidden_states[:, :text]


def lumina2(
    self: Any,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any = None,
    image_rotary_emb: Any = None,
    base_sequence_length: Any = None,
) -> Any:
    return _serve(self, _lumina2, image_rotary_emb, attn, hidden_states, encoder_hidden_states, attention_mask,
                  image_rotary_emb, base_sequence_length)  # fmt: skip


def _lumina2(
    self: Any,
    state: State,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
    base_sequence_length: Any,
) -> Any:
    batch, tokens, _ = hidden_states.shape
    scale = attn.scale
    if base_sequence_length is not None:
        scale *= math.sqrt(math.log(tokens, base_sequence_length))
    query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
    dtype, head_dim = query.dtype, query.shape[-1] // attn.heads
    query, key, value = (x.view(batch, -1, x.shape[-1] // head_dim, head_dim) for x in (query, key, value))
    tables = of_complex(image_rotary_emb)
    query, key = turned(state, Stream(query, key, (attn.norm_q, attn.norm_k), tables))
    query, key = query.to(dtype), key.to(dtype)
    repeats = attn.heads // key.shape[2]
    if repeats >= 1:
        key, value = (x.unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3) for x in (key, value))
    if attention_mask is not None:
        attention_mask = attention_mask.bool().view(batch, 1, 1, -1)
    hidden_states = _attend_by_torch(query, key, value, attention_mask, scale).type_as(query)
    return attn.to_out[1](attn.to_out[0](hidden_states))


# ---------------------------------------------------------------------------------------------------------------------
# What is known of each model


class Family(NamedTuple):
    """One kind of processor."""

    call: Callable[..., Any]
    tables: str  # the argument that hands the cosines and sines to it
    kind: str  # of these: "neighbours", "complex", "of two streams", "of wan", "of all heads"
    text: str  # the other stream of tokens: "added" where the layer has projections for it, "always", "never", "same"


FAMILIES: dict[Any, Family] = {
    of_flux.FluxAttnProcessor: Family(flux, "image_rotary_emb", "neighbours", "added"),
    of_flux2.Flux2AttnProcessor: Family(flux2, "image_rotary_emb", "neighbours", "added"),
    of_flux2.Flux2ParallelSelfAttnProcessor: Family(flux2_parallel, "image_rotary_emb", "neighbours", "never"),
    QwenDoubleStreamAttnProcessor2_0: Family(qwen_image, "image_rotary_emb", "of two streams", "always"),
    ZSingleStreamAttnProcessor: Family(z_image, "freqs_cis", "complex", "never"),
    of_wan.WanAttnProcessor: Family(wan, "rotary_emb", "of wan", "never"),
    LTXVideoAttnProcessor: Family(ltx, "image_rotary_emb", "of all heads", "never"),
    HunyuanVideoAttnProcessor2_0: Family(hunyuan_video, "image_rotary_emb", "neighbours", "always"),
    CogVideoXAttnProcessor2_0: Family(cogvideox, "image_rotary_emb", "neighbours", "always"),
    Lumina2AttnProcessor2_0: Family(lumina2, "image_rotary_emb", "complex", "same"),
}
MODELS = (
    of_flux.FluxTransformer2DModel,
    of_flux2.Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
    of_wan.WanTransformer3DModel,
    LTXVideoTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    CogVideoXTransformer3DModel,
    Lumina2Transformer2DModel,
)


def of_all_heads(tables: Any, heads: int) -> tuple[Any, ...]:
    """Of Wan's tables those of all heads as one, [1, tokens, heads, head_dim/2], one column a pair."""
    cos, sin = tables
    return tuple(_plain(x).expand(-1, -1, heads, -1).contiguous() for x in (cos[..., 0::2], sin[..., 1::2]))


def _rotary_of_wan(base: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Any) -> tuple[Any, ...]:
        tables = base.forward(self, hidden_states)  # hooks may have kept this function, and call it after `take_off`
        heads = getattr(self, STATE, None)
        return tables if heads is None else of_all_heads(tables, heads)

    return forward


WAN_ROTARY = of_wan.WanRotaryPosEmbed


@functools.cache
def _class(base: Any) -> Any:
    """`base` with our call."""
    call = {"forward": _rotary_of_wan(base)} if base is WAN_ROTARY else {"__call__": FAMILIES[base].call}
    made = derived(base, call, _new, base)
    with contextlib.suppress(ValueError):  # diffusers' hooks that skip layers go by the class, where they know it
        AttentionProcessorRegistry.register(made, AttentionProcessorRegistry.get(base))
    return made


def _new(base: Any) -> Any:
    """An empty object of that class, for pickle and copy; of the stock one where diffusers is of another version."""
    cls = _class(base) if diffusers.__version__ in VERSIONS else base
    return cls.__new__(cls)


def put(target: Any, state: Any) -> None:
    """Makes a processor, or Wan's rotary module, one of its class with our call."""
    target.__class__ = _class(type(target))
    target.__dict__[STATE] = state


def take_off(target: Any) -> None:
    """Undoes `put`, and nothing else."""
    if target.__dict__.pop(STATE, None) is not None and "_ropewalk_base" in type(target).__dict__:
        target.__class__ = type(target)._ropewalk_base
