"""`rope_backward`: the gradient of norm and rotation, for those who call it themselves. torch's autograd has it
already: `rope` is differentiable."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from . import _arrays, _call, _face, _module

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._arrays import SupportsDLPack
    from ._face import RopeOptions

_launch = _module.function("rope_backward")
_workspace = _module.function("rope_backward_workspace")
# The gradient's own arguments, in the order in which the module takes them before those of the call.
_OWN = ("q_grad", "k_grad", "q_grad_out", "k_grad_out", "q_weight_grad", "k_weight_grad", "workspace")
assert tuple(arg["name"] for arg in json.loads(_module.function("backward_description")())["args"]) == _OWN
_PLACES = {arg["name"]: i for i, arg in enumerate(_module.description(), len(_OWN))}  # of those of the call
assert list(_PLACES)[:2] == ["q", "k"]


def _new_workspace(like: Any, size: int) -> Any:
    """So many float32 elements where the tensors are."""
    if _arrays.torch is not None and _arrays.is_a(like, _arrays.torch.Tensor):
        return _arrays.torch.empty(size, dtype=_arrays.torch.float32, device=like.device)
    module = _arrays.numpy if _arrays.is_a(like, _call.NumpyArray) else None
    module = module or sys.modules.get(type(like).__module__.partition(".")[0])
    if module is None or not hasattr(module, "empty"):
        raise TypeError(f"rope: q_grad must be a torch, numpy or cupy array, but is a {_arrays._type_name(like)}")
    return module.empty(size, "float32")


def rope_backward(
    q_grad: SupportsDLPack,
    k_grad: SupportsDLPack | None = None,
    *,
    q: SupportsDLPack | None = None,
    k: SupportsDLPack | None = None,
    q_grad_out: SupportsDLPack | None = None,
    k_grad_out: SupportsDLPack | None = None,
    q_weight_grad: SupportsDLPack | None = None,
    k_weight_grad: SupportsDLPack | None = None,
    **options: Unpack[RopeOptions],
) -> tuple[Any, Any]:
    """The gradient of `rope`: of its norm and its rotation, from that of what it returned, in place.

    With torch nobody needs it, as `rope` is differentiable. It is for other frameworks' autograd and for
    `torch.autograd.Function`s of one's own; no autograd goes through it.

    With n = x / rms(x) and y = R (n * weight), where R turns pairs: g = R^T dY, dX = (g * weight - n * mean(g * weight
    * n)) / rms(x), and a weight's gradient is the sum of g * n over all heads of all tokens. The sums are the same to
    the bit each time, on any number of threads; dX of a token does not depend on the others.

    Args:
        q_grad: [batch?, tokens, q_heads, head_dim] float32, float16 or bfloat16. The gradient of the rotated q; becomes
            that of q, unless q_grad_out is given.
        k_grad: [batch?, tokens, k_heads, head_dim] q_grad's dtype. That of the rotated k; becomes that of k, unless
            k_grad_out is given.
        q: [batch?, tokens, q_heads, head_dim] q_grad's dtype. As it was before the call. Only read, and needed for a
            norm alone.
        k: [batch?, tokens, k_heads, head_dim] q_grad's dtype. Likewise.
        q_grad_out: [batch?, tokens, q_heads, head_dim] q_grad's dtype. Written instead of q_grad, for example a slice
            of a packed row of gradients.
        k_grad_out: [batch?, tokens, k_heads, head_dim] q_grad's dtype. Written instead of k_grad.
        q_weight_grad: [head_dim] float32. Gets the gradient of q_weight. None: it is not wanted, and not worked out.
        k_weight_grad: [head_dim] float32. Gets the gradient of k_weight.
        options: the keywords of the call whose gradient this is: positions, frequencies, q_weight and so on. Outputs,
            caches, slots and scales have no gradient, and are refused.

    Returns:
        q_grad and k_grad, or what was written instead of them.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is accepted. Nothing was
            written.
        TypeError: an argument is of the wrong Python type.
        RuntimeError: no backend can serve the call, or a driver failed.
    """
    for name in options:
        if name not in _PLACES:
            raise TypeError(f"rope_backward() got an unexpected keyword argument {_arrays._shown(name)}")
    own = q_grad, k_grad, q_grad_out, k_grad_out, q_weight_grad, k_weight_grad, None
    new = q_grad if q_grad_out is None else q_grad_out, k_grad if k_grad_out is None else k_grad_out
    if not _call.is_compiling():
        values = [*own, q, k, *_face.DEFAULTS[2:]]
        for name, value in options.items():
            values[_PLACES[name]] = value
        done = _face.direct_backward(*values)
        if type(done) is int:
            values[_OWN.index("workspace")] = _new_workspace(q_grad, done)
            done = _face.direct_backward(*values)
        if done is True:
            return new
    given = dict(zip(_OWN, own, strict=True))
    if _call.is_watched((*own, q, k, *options.values())):
        arguments = {**_call.defaults(), **options, "q": q, "k": k}
        _call.backward_watched({name: value for name, value in given.items() if name != "workspace"}, arguments)
        return new
    gradients = []
    for name, value in given.items():
        written = given.get(f"{name}_out") is None
        gradients.append(None if value is None else _arrays.convert(name, value, written=written))
    of_call = _arrays.values({"q": q, "k": k, **options}, reads=("q", "k"))
    if q_weight_grad is not None or k_weight_grad is not None:
        size = _workspace(*gradients, *of_call)
        if size:
            gradients[-1] = _arrays.convert("workspace", _new_workspace(q_grad, size), written=True)
    _launch(*gradients, *of_call)
    _call.wrote(*new, q_weight_grad, k_weight_grad)
    return new
