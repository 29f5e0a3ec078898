"""Ropewalk in place of the norm of q and k and the rotation of a diffusers transformer.

    with ropewalk.diffusers.patch(pipeline):
        pipeline(..)

The attention processors of the transformer become processors of a class of their own, with Ropewalk's one launch where
the norm and the rotation were. What they need to know lies in themselves, so that copies and pickles are patched, too.
Every layer is run before it is served and compared with its stock self: what differs stays stock.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from typing import Any

import torch

from ._arrays import _shown
from ._trial import TOLERANCE, in_eval, same

__all__ = ["Patch", "patch"]

STATE = "_ropewalk_diffusers"  # the attribute of a patched processor
VERSIONS = ("0.42.1",)  # of diffusers, whose code the calls were written after
_ROTATES = ("image_rotary_emb", "rotary_emb", "freqs_cis")  # what hands cosines and sines to a processor


class Patch:
    """A patched transformer, or those of a pipeline. `unpatch()`, or the end of a `with` block, restores them. A copy
    of a patched one is patched, too: `Patch(copy).unpatch()` restores that."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = 0  # attention layers whose rotation Ropewalk serves
        self.fused_norms = 0  # of these, with the norm of q and k in the same launch
        self.skipped: dict[str, str] = {}  # attention layers that rotate and were left alone, with the reason
        self._patched: list[Any] = []
        self._find()

    def _find(self) -> None:
        self._patched = _patched_in(self.model)
        states = [
            module.processor.__dict__[STATE]
            for name, part in _modules(self.model).items()
            for path, module in part.named_modules(prefix=name)
            if STATE in getattr(getattr(module, "processor", None), "__dict__", {}) and not _is_of_text(path)
        ]
        self.layers = len(states)
        self.fused_norms = sum(state.fuses_norm for state in states)
        self._calls = list({id(state.calls): state.calls for state in states}.values())

    @property
    def calls(self) -> dict[str, int]:
        """How many calls of layers were served, with the norm or without it, with a gradient or without, and how many
        went the stock way, by reason. Those inside torch.compile are not counted."""
        total: dict[str, int] = {}
        for calls in self._calls:
            for name, count in calls.items():
                total[name] = total.get(name, 0) + count
        return total

    def __repr__(self) -> str:
        norms = f", {self.fused_norms} with the norm" if self.fused_norms else ""
        skipped = f"; {len(self.skipped)} left stock" if self.skipped else ""
        state = f"{self.layers} layers of it by Ropewalk{norms}{skipped}" if self._patched else "as it was"
        return f"<ropewalk.diffusers.Patch of {type(self.model).__name__}: {state}>"

    def unpatch(self) -> None:
        """Restores the model. Processors that were put there since stay."""
        if self._patched:
            from . import _patched_processor  # noqa: PLC0415

            for target in self._patched:
                _patched_processor.take_off(target)
        self._patched = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.unpatch()


def patch(model: Any, *, rounding: str = "fused", fuse_norm: bool = True) -> Patch:
    """Puts Ropewalk in place of the rotation in a diffusers transformer, and of the norm of q and k before it.

    It serves Flux, Flux 2, Qwen-Image, Z-Image, Wan, LTX, HunyuanVideo, CogVideoX and Lumina 2 of diffusers 0.42.1, in
    float32, bfloat16 and float16. RMSNorms per head are done in the launch of the rotation; those over all heads (Wan,
    LTX) as well, as one wide head; CogVideoX has LayerNorms, which stay its own. Where a layer joins text and image,
    both are written where the attention reads them. Training goes through it, too: where a gradient is needed q and k
    are rotated into new tensors, else in place, in the outputs of their projections. A copy of the model, by
    `copy.deepcopy`, `pickle` or `torch.save`, is patched, too.

    Args:
        model: a transformer of diffusers, a module that holds some, or a pipeline, whose transformers are patched.
        rounding: as in `ropewalk.rope_`.
        fuse_norm: do the RMSNorm of q and k in the same launch.

    Returns:
        A Patch, also a context manager. Its `skipped` names the layers that rotate and were left as they are, with the
        reason; its `calls` counts what was served.

    Raises:
        TypeError: model is no module and no pipeline.
        ValueError: diffusers is of another version, the model is of no class that is known, is patched already, or none
            of its layers can be served. It is then as it was.
    """
    if rounding not in ("fused", "reference"):
        raise ValueError(f"patch: rounding must be 'fused' or 'reference', but is {_shown(rounding)}")
    parts = _modules(model)
    if not parts:
        raise TypeError(
            "patch: model must be a transformer (a torch.nn.Module) or a pipeline of diffusers, but is a "
            f"{type(model).__name__}"
        )
    import diffusers  # noqa: PLC0415

    if diffusers.__version__ not in VERSIONS:
        raise ValueError(f"patch: diffusers must be {' or '.join(VERSIONS)}, but is {diffusers.__version__}")
    from . import _patched_processor as known  # noqa: PLC0415

    named = (pair for name, part in parts.items() for pair in part.named_modules(prefix=name))
    transformers = {path: module for path, module in named if isinstance(module, known.MODELS)}
    if not transformers:
        names = ", ".join(cls.__name__ for cls in known.MODELS)
        of_pipeline = ", ".join(type(part).__name__ for part in parts.values())
        what = f"{type(model).__name__} is" if "" in parts else f"{type(model).__name__} has {of_pipeline},"
        raise ValueError(f"patch: {what} none of those that Ropewalk knows: {names}")
    if any(_patched_in(transformer) for transformer in transformers.values()):
        raise ValueError(f"patch: {type(model).__name__} is patched already, by Ropewalk")
    result = Patch(model)
    trial = _Trial(known, result, rounding, fuse_norm)
    try:
        with torch.no_grad():
            for path, transformer in transformers.items():
                trial.serve(path, transformer)
    except BaseException:
        result.unpatch()
        raise
    trial.calls.clear()  # they count what is called from here on
    result._find()
    if not result.layers:
        for path, reason in result.skipped.items():
            raise ValueError(f"patch: no layer of {type(model).__name__} can be served: {path}: {reason}")
        raise ValueError(f"patch: no layer of {type(model).__name__} is handed cosines and sines")
    return result


def _is_of_text(path: str) -> bool:
    """Attention to a text, which is handed no cosines and sines though it is of the same class as the other."""
    return path.endswith("attn2")


def _modules(model: Any) -> dict[str, torch.nn.Module]:
    """The model, or those of a pipeline by their names there."""
    if isinstance(model, torch.nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    named = components.items() if isinstance(components, dict) else ()
    return {name: x for name, x in named if isinstance(x, torch.nn.Module)}


def _patched_in(model: Any) -> list[Any]:
    """Its patched processors, and rotary modules."""
    found: dict[int, Any] = {}
    for module in (m for part in _modules(model).values() for m in part.modules()):
        for target in (module, getattr(module, "processor", None)):
            if STATE in getattr(target, "__dict__", {}) and "_ropewalk_base" in vars(type(target)):
                found[id(target)] = target
    return list(found.values())


class _NotServedError(Exception):
    """Of a layer that stays stock."""


class _Trial:
    """Puts Ropewalk into the layers of a transformer that then give what they gave."""

    def __init__(self, known: Any, result: Patch, rounding: str, fuse_norm: bool) -> None:
        self.known = known
        self.result = result
        self.rounding = rounding
        self.fuse_norm = fuse_norm
        self.calls: dict[str, int] = {}
        self.wants: dict[Any, Any] = {}  # what the layers gave

    def serve(self, name: str, transformer: Any) -> None:
        layers: dict[int, list[tuple[str, Any]]] = {}  # by processor: one may serve many layers
        skipped: dict[str, str] = {}
        for path, attn in transformer.named_modules(prefix=name):
            processor = getattr(attn, "processor", None)
            if processor is None or not self._rotates(transformer, path, processor):
                continue
            if type(processor) in self.known.FAMILIES:
                layers.setdefault(id(processor), []).append((path, attn))
            else:
                skipped[path] = f"{type(processor).__name__} is no processor that Ropewalk knows"
        for of_processor in layers.values():
            try:
                self._serve_processor([attn for _, attn in of_processor])
            except _NotServedError as error:
                skipped.update({path: str(error) for path, _ in of_processor})
        if isinstance(transformer, self.known.of_wan.WanTransformer3DModel) and self.fuse_norm and not skipped:
            self._serve_wan(transformer.rope, [attn for each in layers.values() for _, attn in each])
        self.result.skipped.update(skipped)

    def _rotates(self, transformer: Any, path: str, processor: Any) -> bool:
        """Whether a layer is handed cosines and sines."""
        if _is_of_text(path) or not getattr(transformer.config, "use_rotary_positional_embeddings", True):
            return False
        parameters = inspect.signature(type(processor).__call__).parameters if callable(processor) else ()
        return any(name in parameters for name in _ROTATES)

    def _serve_processor(self, layers: list[Any]) -> None:
        """All layers of a processor, or none."""
        processor = layers[0].processor
        self.wants.update({attn: self._run(attn) for attn in layers})
        reason: str | None = None
        for fuses_norm in (True, False) if self.fuse_norm else (False,):
            state = self.known.State(self.rounding, fuses_norm, {})
            self.known.put(processor, state)
            try:
                reasons = (self._difference(attn) for attn in layers)
                reason = next((x for x in reasons if x is not None), None)
            except BaseException:
                self.known.take_off(processor)
                raise
            reason = reason or next((x.removeprefix("stock: ") for x in state.calls if x.startswith("stock")), None)
            if reason is None:
                state.fuses_norm = self.known.NORM_AND_ROTATION in state.calls
                state.calls = self.calls
                self.result._patched.append(processor)
                return
            self.known.take_off(processor)
        raise _NotServedError(reason)

    def _difference(self, attn: Any, wide: bool = False) -> str | None:
        """What is wrong with a layer as it is now; None if nothing is."""
        want = self.wants[attn]
        try:
            got = self._run(attn, wide)
        except _NotServedError as error:
            return f"with Ropewalk it {error}"
        equal = len(got) == len(want) and all(same(x, y, d) for (x, d), (y, _) in zip(got, want, strict=True))
        return None if equal else "with Ropewalk it gives another result"

    def _run(self, attn: Any, wide: bool = False) -> list[tuple[Any, torch.dtype]]:
        """What a layer gives for an input and for cosines and sines drawn at random."""
        try:
            with in_eval(attn):
                result = attn(**self._inputs(attn, wide))
        except Exception as error:  # noqa: BLE001  # the stock layer's, whatever it is
            raise _NotServedError(f"alone ends in {type(error).__name__}: {str(error)[:200]}") from None
        outputs = result if isinstance(result, tuple) else (result,)
        return [(x.float(), x.dtype) for x in outputs if x is not None]

    def _inputs(self, attn: Any, wide: bool) -> dict[str, Any]:
        family = self.known.FAMILIES[getattr(type(attn.processor), "_ropewalk_base", type(attn.processor))]
        # That of a projection; of quantised ones, that of a norm.
        like = next((x for x in sorted(attn.parameters(), key=lambda x: x.dim() < 2) if x.dtype in TOLERANCE), None)
        if like is None or like.device.type == "meta":
            where = "of no dtype that Ropewalk has" if like is None else "on the meta device: patch before offloading"
            raise ValueError(f"its weights are {where}")
        generator = torch.Generator().manual_seed(7)

        def drawn(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like)

        def angles(*shape: int) -> Any:
            return 6.0 * torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device)

        def repeated(x: Any) -> Any:
            return x.cos().repeat_interleave(2, -1), x.sin().repeat_interleave(2, -1)

        def turns(x: Any) -> Any:
            return torch.polar(torch.ones_like(x), x)

        width = getattr(attn, "query_dim", attn.inner_dim)
        heads = attn.heads
        head_dim = getattr(attn, "head_dim", None) or attn.inner_dim // heads
        image, text = 5, 3
        given: dict[str, Any] = {"hidden_states": drawn(2, image, width)}
        added = getattr(attn, "added_kv_proj_dim", None)
        if family.text == "same":
            given["encoder_hidden_states"] = given["hidden_states"]
        elif family.text == "always" or (family.text == "added" and added is not None):
            given["encoder_hidden_states"] = drawn(2, text, added or width)
        tokens = image + text if family.text == "added" and added is not None else image
        half = head_dim // 2
        given[family.tables] = {
            "neighbours": lambda: repeated(angles(tokens, half)),
            "complex": lambda: turns(angles(2, tokens, half)),
            "of two streams": lambda: (turns(angles(image, half)), turns(angles(text, half))),
            "of wan": lambda: tuple(x[None, :, None] for x in repeated(angles(tokens, half))),
            "of all heads": lambda: repeated(angles(2, tokens, attn.inner_dim // 2)),
        }[family.kind]()
        if wide:
            given[family.tables] = self.known.of_all_heads(given[family.tables], heads)
        return given

    def _serve_wan(self, rotary: Any, layers: list[Any]) -> None:
        """Wan's norms are over all heads: its rotary module then gives the tables of all heads, once for all layers."""
        states = [getattr(attn.processor, STATE) for attn in layers]
        if type(rotary) is not self.known.WAN_ROTARY or len({attn.heads for attn in layers}) != 1:
            return
        for state in states:
            state.fuses_norm = True
        self.calls.clear()
        wrong = any(self._difference(attn, wide=True) is not None for attn in layers)
        if not wrong and self.calls == {self.known.NORM_AND_ROTATION: len(layers)}:
            self.known.put(rotary, layers[0].heads)
            # A hook may hold the forward that it had, and call that.
            if rotary(torch.zeros((1, 1, *rotary.patch_size), device="cpu"))[0].shape[2] == layers[0].heads:
                self.result._patched.append(rotary)
                return
            self.known.take_off(rotary)
        for state in states:
            state.fuses_norm = False
