"""Rotation frequencies: made once on the host by the C++ core, exact at every position."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import array
import base64
import json
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _arrays, _module

_create = _module.function("frequencies_create")
_from_array = _module.function("frequencies_from_array")
_from_config = _module.function("frequencies_from_config")
_from_turns = _module.function("frequencies_from_turns")
_release = _module.function("frequencies_release")
_rotary_dim = _module.function("frequencies_rotary_dim")
_attention_scaling = _module.function("frequencies_attention_scaling")
_inv_freq = _module.function("frequencies_inv_freq")
_turns = _module.function("frequencies_turns")
_axes = _module.function("frequencies_axes")
_warnings = _module.function("frequencies_warnings")
_table = _module.function("frequencies_table")

_MOST_BYTES = 8 << 20  # of a config.json, as in the core: a larger file is not read


def _length(sequence_length: int | None) -> int:
    if sequence_length is None:
        return 0
    length = _arrays.integer("frequencies: sequence_length", sequence_length)
    if length < 1:
        raise ValueError(f"frequencies: sequence_length must be at least 1, or None, but is {length}")
    return length


def _json(value: Mapping[str, Any]) -> str:
    """The text of a configuration or a rule: numpy's and torch's scalars as the numbers that they are."""
    if not isinstance(value, Mapping):
        example = '{"rope_type": "yarn", "factor": 4.0}'
        raise TypeError(f"frequencies: scaling must be a dict such as {example}, but is a {type(value).__name__}")

    def plain(item: Any) -> Any:
        if getattr(item, "shape", None) == () and hasattr(item, "item"):
            return item.item()
        return item.tolist() if hasattr(item, "tolist") else str(item)

    return json.dumps(dict(value), default=plain)


def _read(path: str) -> str:
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not JSON in UTF-8: {error.reason} at byte {error.start}") from None


class Frequencies:
    """The rotation frequencies of a model, and what belongs to them. Immutable; share it between layers and threads.

    A pair i of a head is rotated by `position * inv_freq[i]` radians, where `inv_freq[i]` is
    `theta ** (-2 * i / rotary_dim)` (Su et al., "RoFormer", 2021) changed by a scaling rule. A frequency is held as a
    64-bit fraction of a turn, so that the angle is exact at every 64-bit position.

    Args:
        theta: the base, such as 10000.0. A number above 0.
        rotary_dim: how many elements of a head are rotated. Even.
        scaling: a rule in the spelling of Hugging Face's `rope_parameters`, such as
            `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`. Rules: default, linear,
            dynamic, yarn, llama3, longrope, proportional. None: no scaling.
        sequence_length: in tokens, for the rules that depend on it (dynamic, longrope). None: the original length.

    Raises:
        ValueError: a field is unknown, missing or contradictory. The message names it.

    Warns:
        UserWarning: a field was ignored, as transformers ignores it (`attn_factor`, a stale `type`).
    """

    __slots__ = ("__weakref__", "_content", "_handle", "_recipe")
    _handle: int  # address of the core's object, of which this one holds a reference
    _content: str  # all that a call goes by: what graphs hold, in any process; the same for equal frequencies
    _recipe: tuple[str, tuple[Any, ...]]  # how to make it again, for pickle

    def __init__(
        self,
        theta: float,
        rotary_dim: int,
        scaling: Mapping[str, Any] | None = None,
        sequence_length: int | None = None,
    ) -> None:
        text = None if scaling is None else _json(scaling)
        base = _arrays.number("frequencies: theta", theta)
        dim = _arrays.integer("frequencies: rotary_dim", rotary_dim)
        try:
            self._own(_create(base, dim, text, _length(sequence_length)))
        except ValueError as error:
            if scaling and "rope_type" not in scaling and "type" not in scaling:
                raise ValueError(f"{error}: scaling has no rope_type, which says the rule") from None
            raise
        self._recipe = ("_again", (base, dim, text, sequence_length))

    @classmethod
    def from_array(
        cls, inv_freq: Iterable[float], attention_scaling: float = 1.0, axes: Sequence[int] | None = None
    ) -> Frequencies:
        """From the frequencies themselves.

        Args:
            inv_freq: [rotary_dim/2] radians per position, as a sequence, an array or a tensor; taken as float64.
            attention_scaling: multiplies the cosines and sines.
            axes: [rotary_dim/2] the row of `positions` that each pair takes (mrope, 2-D and 3-D rope). None: one row.

        Raises:
            ValueError: a frequency is not finite, there are none, or `axes` has another length or a negative entry.
        """
        shape = getattr(inv_freq, "shape", None)
        if shape is not None and len(shape) != 1:
            raise ValueError(f"frequencies: inv_freq must have 1 dimension, but has {len(shape)}: {list(shape)}")
        values = array.array("d", [_arrays.number("frequencies: inv_freq", x) for x in inv_freq])
        rows = None
        if axes is not None:
            rows = array.array("i", [_arrays.integer("frequencies: axes", x, -(2**31), 2**31 - 1) for x in axes])
        if rows is not None and len(rows) != len(values):
            raise ValueError(f"frequencies: axes must have {len(values)} entries like inv_freq, but has {len(rows)}")
        self = cls.__new__(cls)
        scaling = _arrays.number("frequencies: attention_scaling", attention_scaling)
        self._own(_from_array(values.tobytes(), scaling, None if rows is None else rows.tobytes()))
        self._recipe = ("from_array", (list(values), scaling, None if rows is None else list(rows)))
        return self

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike[str] | Mapping[str, Any] | Any,
        layer_type: str | None = None,
        sequence_length: int | None = None,
    ) -> Frequencies:
        """From a model's configuration, in the old (`rope_scaling`, `rope_theta`) and the new (`rope_parameters`)
        spelling of Hugging Face.

        Args:
            config: the path of a `config.json` or of the folder that holds one, the parsed JSON, or a transformers
                configuration.
            layer_type: a key of nested `rope_parameters`, such as "full_attention" (Gemma 3).
            sequence_length: in tokens, for the rules that depend on it (dynamic, longrope). None: the original length.

        Raises:
            ValueError: a field is unknown, missing or contradictory; or the model has no rotary embedding (ALiBi,
                absolute positions, NoPE). The message names the field and the file. A `model_type` that is not in
                docs/models.md is served if fields with known names say everything, `rope_theta` among them.
            OSError: the file cannot be read.

        Warns:
            UserWarning: a field was ignored, as transformers ignores it.
        """
        if isinstance(config, (str, os.PathLike)):
            name = os.fspath(config)
            text = _read(name)
        elif isinstance(config, Mapping):
            text, name = _json(config), "config"
        elif hasattr(config, "to_dict"):
            text, name = _json(config.to_dict()), type(config).__name__
        else:
            raise TypeError(
                "frequencies: config must be a path, a dict or a transformers configuration, "
                f"but is a {type(config).__name__}"
            )
        return cls._parsed(text, name, layer_type, sequence_length)

    @classmethod
    def _parsed(cls, text: str, name: str, layer_type: str | None, sequence_length: int | None) -> Frequencies:
        if layer_type is not None and not _arrays.is_a(layer_type, str):
            raise TypeError(f"frequencies: layer_type must be a str or None, but is a {type(layer_type).__name__}")
        self = cls.__new__(cls)
        self._own(_from_config(text, name, layer_type, _length(sequence_length)), callers=2)
        self._recipe = ("_parsed", (text, name, layer_type, sequence_length))
        return self

    @classmethod
    def _again(cls, theta: float, rotary_dim: int, scaling: str | None, sequence_length: int | None) -> Frequencies:
        return cls(theta, rotary_dim, None if scaling is None else json.loads(scaling), sequence_length)

    def _own(self, handle: int, callers: int = 1) -> None:
        self._handle = handle
        rows = _axes(handle)
        arrays = [base64.b64encode(data).decode() for data in (_turns(handle), rows) if data is not None]
        self._content = " ".join((_attention_scaling(handle).hex(), *arrays))
        for sentence in _warnings(handle).decode().splitlines():
            warnings.warn(sentence, stacklevel=2 + callers)

    @classmethod
    def _of_content(cls, content: str) -> Frequencies:
        """As those of that content, in calls; `inv_freq` are the doubles next to theirs."""
        try:
            scaling, *arrays = content.split(" ")
            turns, rows = ([base64.b64decode(data, validate=True) for data in arrays] + [None])[:2]
            if len(arrays) not in (1, 2) or len(turns) % 8 or (rows is not None and 2 * len(rows) != len(turns)):
                raise ValueError
            handle = _from_turns(turns, float.fromhex(scaling), rows)
        except ValueError:
            shown = _arrays._shown(content)
            raise ValueError(
                f"rope: frequencies must be what a graph holds of ropewalk.Frequencies, but is {shown}"
            ) from None
        self = cls.__new__(cls)
        self._own(handle)
        self._recipe = ("_of_content", (content,))
        return self

    def _give_away(self) -> int:
        """The address of the core's object, which from here on nobody releases."""
        handle = self._handle
        del self._handle
        return handle

    def __del__(self, release: Any = _release) -> None:
        if hasattr(self, "_handle"):
            release(self._handle)

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are rotated."""
        return _rotary_dim(self._handle)

    @property
    def attention_scaling(self) -> float:
        """What multiplies the cosines and sines (yarn, longrope); 1.0 for most models."""
        return _attention_scaling(self._handle)

    @property
    def inv_freq(self) -> Any:
        """[rotary_dim/2] radians per position: a float64 numpy array, or a list where numpy is not installed."""
        return _listed("d", "float64", _inv_freq(self._handle))

    @property
    def axes(self) -> Any:
        """[rotary_dim/2] the row of positions that each pair takes: an int32 numpy array, or a list; None: one row."""
        rows = _axes(self._handle)
        return None if rows is None else _listed("i", "int32", rows)

    def table(self, max_position: int, dtype: Any = "float32") -> tuple[Any, Any]:
        """The table of cosines and sines as transformers makes it (float32 products of position and frequency), for
        parity. At large positions it is less exact than `frequencies=`.

        Args:
            max_position: the number of rows: positions 0 to max_position - 1.
            dtype: a torch dtype gives torch tensors; a numpy dtype or its name gives numpy arrays. float32, float16 or
                bfloat16 (for numpy: with ml_dtypes).

        Returns:
            cos and sin, each [max_position, rotary_dim/2].
        """
        rows = _arrays.integer("frequencies: max_position", max_position)
        if rows < 0:
            raise ValueError(f"frequencies: max_position must be >= 0, but is {rows}")
        shape = (rows, self.rotary_dim // 2)
        cos, sin = _arrays.empty(shape, dtype), _arrays.empty(shape, dtype)
        made = str(cos.dtype).rpartition(".")[2]
        if made not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"frequencies: dtype of a table must be float32, float16 or bfloat16, but is {made[:60]}")
        _table(self._handle, _arrays.convert("cos", cos, written=True), _arrays.convert("sin", sin, written=True))
        return cos, sin

    def __repr__(self) -> str:
        """Where they come from, as far as that is known: theta and rule, or the configuration."""
        parts = [f"rotary_dim {self.rotary_dim}"]
        made_by, how = self._recipe
        if made_by == "_again":
            rule = json.loads(how[2] or "{}")
            parts.append(f"theta {how[0]:g}")
            parts += [str(rule[name]) for name in ("rope_type", "type") if name in rule][:1]
        elif made_by == "_parsed":
            parts += [f"from {how[1]}"] + [f"layer type {how[2]}"] * (how[2] is not None)
        rows = self.axes
        if rows is not None:
            parts.append(f"{int(max(rows)) + 1} axes")
        if self.attention_scaling != 1.0:
            parts.append(f"attention_scaling={self.attention_scaling!r}")
        return f"<ropewalk.Frequencies of {', '.join(parts)}>"

    def __eq__(self, other: object) -> bool:
        """Whether they rotate alike: by the same fractions of a turn, the same scaling and the same axes."""
        return self._content == other._content if _arrays.is_a(other, Frequencies) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    def __copy__(self) -> Frequencies:
        return self

    def __deepcopy__(self, memo: Any) -> Frequencies:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        name, arguments = self._recipe
        return getattr(Frequencies, name), arguments


def _listed(code: str, dtype: str, data: bytes) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        return numpy.frombuffer(data, dtype=dtype).copy()
    values = array.array(code)
    values.frombytes(data)
    return values.tolist()
