// ropewalk describe --python: bindings/python/ropewalk/_face.py, the function `rope_` and its keywords, from the
// description of the operation.
// SPDX-License-Identifier: Apache-2.0
#include "cli/common.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <vector>

namespace ropewalk::cli {
namespace {

constexpr size_t kWidth = 120;

struct PythonArg {
  std::string name, kind, type, default_text, dtypes = "", text = "";
  bool host_scalar = false, integers = false, written_only = false;
  bool tensor() const { return kind == "tensor"; }
};

std::string TypeOf(const Json& arg) {
  const std::string kind = arg["kind"];
  const bool none = arg["default"] == "None";
  if (kind == "tensor") {
    return fmt::format("SupportsDLPack{}{}", arg["host_scalar"].get<bool>() ? " | float" : "", none ? " | None" : "");
  }
  if (kind == "handle") return "Frequencies | None";
  if (kind == "choice") {
    std::string names;
    for (const Json& choice : arg["choices"]) {
      names += fmt::format("{}\"{}\"", names.empty() ? "" : ", ", choice.get<std::string>());
    }
    return fmt::format("Literal[{}]{}", names, none ? " | None" : "");
  }
  if (kind == "int" || kind == "bool" || kind == "float") return kind + (none ? " | None" : "");
  return "Any";
}

// "float32, float16 or bfloat16" and "q's dtype, or fp8" for "that of q, or fp8".
std::string DtypesOf(const Json& arg) {
  std::string text = arg["dtypes"];
  if (!text.starts_with("that of ")) return text;
  const size_t end = std::min(text.find(',', 8), text.size());
  return text.substr(8, end - 8) + "'s dtype" + text.substr(end);
}

std::vector<PythonArg> Args(const Json& description) {
  std::vector<PythonArg> args;
  for (const Json& arg : description["args"]) {
    PythonArg made{.name = arg["name"], .kind = arg["kind"], .type = TypeOf(arg), .default_text = arg["default"]};
    if (made.tensor()) {
      made.dtypes = DtypesOf(arg);
      made.host_scalar = arg["host_scalar"];
      made.integers = made.dtypes.starts_with("int");
      made.written_only = arg["intent"] == "out";
      made.text = fmt::format("{} {}. {}", arg["shape"].get<std::string>(), made.dtypes, Sentence(arg["doc"]));
    } else {
      made.text = Sentence(arg["doc"]);
    }
    args.push_back(std::move(made));
  }
  return args;
}

// Words in lines of at most kWidth, the first behind `first`, the others behind `indent` spaces.
std::string FilledLines(const std::string& first, size_t indent, const std::vector<std::string>& words) {
  std::string out, line = first;
  for (const std::string& word : words) {
    const bool fresh = line.empty() || line.back() == ' ' || line.back() == '(';
    if (line.size() + word.size() + (fresh ? 0 : 1) > kWidth) {
      out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
      line = std::string(indent, ' ') + word;
    } else {
      line += (fresh ? "" : " ") + word;
    }
  }
  return out + line;
}

std::vector<std::string> Words(const std::string& text) {
  std::vector<std::string> words;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(' ', at), text.size());
    words.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return words;
}

// What is handed to the module for an argument.
std::string Handed(const PythonArg& arg) {
  if (arg.kind == "handle") return "handle";
  if (arg.kind != "choice") return arg.name;
  std::string table = arg.name;
  for (char& c : table) c = static_cast<char>(c - 'a' + 'A');
  return fmt::format("{}[{}]", table, arg.name);
}

// `head` + the arguments up to `end`, by position, as lines.
std::string Call(const std::string& head, const std::vector<PythonArg>& args, size_t end) {
  std::vector<std::string> words = {"q_own,", "k_own,"};
  for (size_t i = 0; i < end; ++i) words.push_back(Handed(args[i]) + (i + 1 < end ? "," : ")"));
  const std::string call = FilledLines(head, head.size(), words);
  return call + (call.find('\n') != std::string::npos ? "  # fmt: skip\n" : "\n");
}

// "a is b is None" and "and c is False" and so on, for those that have their defaults.
std::string Defaults(const std::vector<PythonArg>& args, size_t begin, size_t end, const std::string& indent) {
  std::string none, no, others;
  for (size_t i = begin; i < end; ++i) {
    const PythonArg& arg = args[i];
    if (arg.default_text == "None") {
      none += arg.name + " is ";
    } else if (arg.default_text == "False") {
      no += arg.name + " is ";
    } else {
      others += fmt::format("{}and {} == {}\n", indent, arg.name, arg.default_text);
    }
  }
  return indent + none + "None\n" + (no.empty() ? "" : indent + "and " + no + "False\n") + others;
}

// Lines "or (name is not None and ..)" for the tensors of a part of the arguments.
std::string Plain(const std::vector<PythonArg>& args, size_t begin, size_t end, const std::string& indent) {
  std::string out;
  for (size_t i = begin; i < end; ++i) {
    const PythonArg& arg = args[i];
    if (!arg.tensor()) continue;
    const std::string kind = arg.integers ? fmt::format("type({0}) is not Tensor", arg.name)
                                          : fmt::format("(type({0}) not in PLAIN or {0}.is_neg())", arg.name);
    const char* const joint = out.empty() ? "" : "or ";
    out += arg.host_scalar ? fmt::format(
                                 "{0}{1}(\n{0}    {2} is not None\n{0}    and type({2}) is not float\n{0}    and "
                                 "{3}\n{0})\n",
                                 indent, joint, arg.name, kind)
                           : fmt::format("{}{}({} is not None and {})\n", indent, joint, arg.name, kind);
  }
  return out;
}

std::string WithGradient(const std::vector<PythonArg>& args, size_t begin, size_t end, const std::string& indent) {
  std::string out;
  for (size_t i = begin; i < end; ++i) {
    const PythonArg& arg = args[i];
    if (!arg.tensor() || arg.integers) continue;
    out += fmt::format("{}{}({} is not None and {}{}.requires_grad)\n", indent, out.empty() ? "" : "or ", arg.name,
                       arg.host_scalar ? fmt::format("type({}) is not float and ", arg.name) : "", arg.name);
  }
  return out;
}

std::string Names(const std::vector<PythonArg>& args, size_t begin, size_t end, const char* joint) {
  std::string out;
  for (size_t i = begin; i < end; ++i) {
    if (args[i].tensor()) out += (out.empty() ? "" : joint) + args[i].name;
  }
  return out;
}

}  // namespace

std::string Sentence(std::string text) {
  if (text.empty()) return text;
  const bool of_argument = text.size() > 1 && (text[1] == '_' || (text[1] == ' ' && text[0] != 'a'));
  if (text[0] >= 'a' && text[0] <= 'z' && !of_argument) text[0] = static_cast<char>(text[0] - 'a' + 'A');
  if (text.back() != '.') text += '.';
  return text;
}

std::string PythonFace(const Json& description) {
  const std::vector<PythonArg> args = Args(description);
  // q and k come by position. What is written besides them, and stored, is rare, and stands at the end; in between lie
  // what says the angles, up to the first choice, and then the norm.
  const size_t count = args.size(), first = 2;
  size_t choice = first, out_begin = first;
  while (args[choice].kind != "choice") ++choice;
  while (!args[out_begin].written_only) ++out_begin;

  std::string keywords, signature, by_place, documented, by_name;
  for (size_t i = 0; i < count; ++i) {
    const PythonArg& arg = args[i];
    if (i >= first) keywords += fmt::format("        {}: {}\n", arg.name, arg.type);
    if (i == first) signature += "    *,\n";
    if (i == first) by_place += "    unnamed: Any = NOTHING,\n";
    const std::string otherwise = i == 0 ? "" : " = " + arg.default_text;
    signature += fmt::format("    {}: {}{},\n", arg.name, arg.type, otherwise);
    by_place += fmt::format("    {}: Any{},\n", arg.name, otherwise);
    documented += FilledLines(fmt::format("        {}: ", arg.name), 12, Words(arg.text)) + "\n";
  }
  std::vector<std::string> pairs;
  for (size_t i = 0; i < count; ++i) {
    pairs.push_back(fmt::format("\"{0}\": {0},", args[i].name));
  }
  by_name = FilledLines("        ", 8, pairs);

  std::string out =
      R"("""`rope_` and its keywords. Made by `ropewalk describe --python` from the description of the operation: do not edit."""

# SPDX-License-Identifier: Apache-2.0
# What `type(q) is Tensor` says of q and of the others, no checker follows.
# mypy: disable-error-code="attr-defined,union-attr"
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from . import _call
from ._arrays import SupportsDLPack
from ._call import (
    NORM,
    NOTHING,
    PAIRING,
    PLAIN,
    ROUNDING,
    NumpyArray,
    Tensor,
    dual,
    grad_enabled,
    handle_of,
    increment_version,
    is_compiling,
    launch,
)
from ._frequencies import Frequencies

if TYPE_CHECKING:
    from typing import TypedDict

    class RopeOptions(TypedDict, total=False):
        """The keywords of `rope_`."""

)";
  out += keywords;
  out += "\n\ndef _rope(\n" + by_place + ") -> tuple[Any, Any]:\n";
  out += R"(    if unnamed is not NOTHING:
        raise TypeError("rope_() takes q and k by position and no more: name the others, as in positions=..")
    failure: Exception | None = None
    if not is_compiling():
)";
  std::vector<std::string> given;
  for (size_t i = 0; i < count; ++i) given.push_back(args[i].name + (i + 1 < count ? "," : ")"));
  out += FilledLines("        new = direct(", 21, given) + "  # fmt: skip\n";
  out += R"(        if new is not None:
            return new
        try:
            # What requires grad, is lazily negated, of a subclass or not torch's is looked at in detail by _call.
            # Written out: a loop over a list takes twice the time.
            inplace = (
)";
  out += Defaults(args, out_begin, count, "                ");
  out += "            )\n            plain = " + Names(args, first + 1, out_begin, " is ") + " is None\n";
  out += R"(            is_torch, q_own, k_own = type(q) is Tensor, 0, 0
            if not is_torch:
                for array in (q, k, q_out, k_out, k_cache, v_cache):  # what is written must be known to be writeable
                    if array is not None and type(array) is not NumpyArray:
                        raise TypeError
            else:
                if (
                    dual._current_level >= 0
                    or (k is not None and type(k) is not Tensor)
                    or (positions is not None and type(positions) is not Tensor)
                ):
                    raise TypeError
                if inplace:  # then the module asks torch about q and k, in less time
                    q_own, k_own = q._cdata, 0 if k is None else k._cdata
                elif q.is_neg() or (k is not None and k.is_neg()):
                    raise TypeError
                if not plain and (
)";
  const std::string deep(20, ' '), deeper(24, ' ');
  out += Plain(args, first + 1, out_begin, deep);
  out += "                ):\n                    raise TypeError\n                if not inplace and (\n";
  out += Plain(args, out_begin, count, deep);
  out += R"(                ):
                    raise TypeError
                if not (plain and inplace) and grad_enabled():
                    if not plain and (
)";
  out += WithGradient(args, first + 1, out_begin, deeper);
  out += R"(                    ):
                        raise TypeError
                    if not inplace and (
                        q.requires_grad
                        or (k is not None and k.requires_grad)
                        or )";
  out += WithGradient(args, out_begin, count, deeper).substr(deeper.size());
  out += R"(                    ):
                        raise TypeError
            handle = None if frequencies is None else handle_of(frequencies)
            if inplace:
                new_q, new_k = q, k
                # What is left out at the end need not be handed over.
                if (
)";
  out += Defaults(args, choice + 1, out_begin, deep);
  out += "                ):\n" + Call("                    launch(", args, choice + 1);
  out += "                else:\n" + Call("                    launch(", args, out_begin);
  out += R"(            else:
                new_q, new_k = q if q_out is None else q_out, None if k_store_only else k if k_out is None else k_out
)";
  out += Call("                launch(", args, count);
  out +=
      R"(        except (TypeError, KeyError, AttributeError, BufferError, OverflowError, RuntimeError, ValueError) as error:
            # Nothing was written: once more, more slowly. All but a RuntimeError and a ValueError come from the types
            # of the arguments, and get messages that name the argument.
            failure = error if isinstance(error, (RuntimeError, ValueError)) else None
        else:
            if is_torch and not inplace:
                try:  # autograd is to notice
                    if k_cache is None and v_cache is None:
                        increment_version((new_q,) if new_k is None else (new_q, new_k))
                    else:
                        _call.wrote(new_q, new_k, k_cache, v_cache)
                except RuntimeError:  # tensors of inference mode, which have no version
                    _call.wrote(new_q, new_k)
            return new_q, new_k
    return _call.slow({
)";
  out += by_name + "\n    }, failure)  # fmt: skip\n";
  out += "\n\n@_call.served_by(_rope)\ndef rope_(\n" + signature + ") -> tuple[Any, Any]:\n";
  out +=
      R"(    """Rotates q and k in place, optionally normalising each head before and storing k and v in a KV cache after.

    Shapes are written with `batch?` for a dimension that is there if q has four, `axes?` for one that is there if pairs
    are mapped to axes, and `pages?` for one that a flat cache lacks. Any strides will do, but the last dimension of q,
    k, v, the caches, the weights and the outputs must be contiguous; so slices of a packed QKV row and transposed views
    serve without a copy.

    A pair (x, y) of a head becomes (x cos a - y sin a, x sin a + y cos a), where the angle a is the token's position
    times the pair's frequency (Su et al., "RoFormer", 2021, equation 34).

    Args:
)";
  out += documented;
  out += R"(
    Returns:
        q and k, or what was written instead of them. None for k with k_store_only: k itself is not rotated.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is accepted. Nothing was
            written.
        TypeError: an argument is of the wrong Python type.
        RuntimeError: no backend can serve the call, or a driver failed.

    A position past the table gives NaN in that token, a slot past the cache is not stored; check_faults() tells of
    both.
    """
    raise NotImplementedError("rope_ is served by _rope")


direct, direct_backward, DEFAULTS = _call.direct(rope_)
)";
  return out;
}

}  // namespace ropewalk::cli
