// The C ABI of the operation and of what serves it: struct versions, statuses to codes, text to the caller.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/ropewalk.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "api/guard.h"
#include "backends/registry.h"
#include "base/text.h"
#include "base/thread_key.h"
#include "rope/backward.h"
#include "rope/call.h"
#include "rope/known_calls.h"

namespace ropewalk {
namespace {

// What Ropewalk keeps for a thread.
struct ThreadState {
  const char* last_error = "";  // of `error`, or a text that needs no memory
  std::string error, returned;
  KnownCalls known_calls;
};

constinit ThreadKey thread_state([]() -> void* { return new (std::nothrow) ThreadState; },
                                 [](void* state) { delete static_cast<ThreadState*>(state); });
// Null if there is no memory for one.
ThreadState* OwnState() { return static_cast<ThreadState*>(thread_state.Get()); }

constexpr const char* kNoMemory = "out of memory";
std::atomic<bool> lost_error{false};  // of a thread that could not have a state

int Failed(int code, const char* text) {
  if (ThreadState* const state = OwnState()) {
    state->last_error = text;
  } else {
    lost_error.store(true, std::memory_order_relaxed);
  }
  return code;
}

}  // namespace

int Return(Status status) {
  if (status.ok()) return ROPEWALK_OK;
  ThreadState* const state = OwnState();
  if (!state || status.text().empty()) return Failed(status.code(), kNoMemory);
  const ropewalk_code code = status.code();
  state->error = std::move(status).text();
  state->last_error = state->error.c_str();
  return code;
}

Status Thrown() noexcept {
  return WithoutThrowing([]() -> Status {
    try {
      throw;
    } catch (const std::exception&) {
      throw;
    } catch (...) {  // from a caller's function
      return Status::Internal("an exception that is none");
    }
  });
}

namespace {

template <class Body>
const char* GuardText(const Body& body) {
  ThreadState* const state = OwnState();
  const int code = Guard([&]() -> Status {
    if (!state) throw std::bad_alloc();
    return body(&state->returned);
  });
  return code == ROPEWALK_OK ? state->returned.c_str() : nullptr;
}

// Lets callers be older than the library: what their struct lacks has its default. `least`: up to its first tensor.
template <class Args, class Body>
Status WithStruct(const char* name, const char* type, const Args* args, size_t least, const Body& body) {
  if (!args) return Status::Invalid(Text("rope: ", name, " is null"));
  const uint32_t size = args->struct_size;
  if (size == sizeof(Args)) return body(*args);
  if (size > sizeof(Args)) {
    return Status::Invalid(Text("rope: struct_size must be at most ", sizeof(Args), " for Ropewalk ",
                                ropewalk_version(), ", but is ", size, ": the caller was built for a newer one"));
  }
  if (size < least || size % alignof(Args) != 0) {
    return Status::Invalid(Text("rope: struct_size must be sizeof(", type, ") (", sizeof(Args), "), but is ", size));
  }
  Args full;
  std::memcpy(&full, args, size);
  return body(full);
}
template <class Body>
Status WithArgs(const ropewalk_rope_args* args, const Body& body) {
  return WithStruct("args", "ropewalk_rope_args", args, offsetof(ropewalk_rope_args, k), body);
}

Status LoweredBackward(const ropewalk_rope_args* args, const ropewalk_rope_gradients* gradients, void* stream,
                       RopeBackwardCall* call, const Backend** backend) {
  return WithArgs(args, [&](const ropewalk_rope_args& full) -> Status {
    return WithStruct("gradients", "ropewalk_rope_gradients", gradients, offsetof(ropewalk_rope_gradients, k_grad),
                      [&](const ropewalk_rope_gradients& full_gradients) -> Status {
                        ROPEWALK_TRY(LowerRopeBackward(full, full_gradients, stream, call));
                        return ChooseBackend(call->turn.device, backend);
                      });
  });
}

Status Lowered(const ropewalk_rope_args* args, void* stream, RopeCall* call, const Backend** backend) {
  return WithArgs(args, [&](const ropewalk_rope_args& full) -> Status {
    ROPEWALK_TRY(LowerRope(full, stream, call));
    return ChooseBackend(call->device, backend);
  });
}

Status Launch(const RopeCall& call) {
  const Backend* backend;
  ROPEWALK_TRY(ChooseBackend(call.device, &backend));
  return backend->launch(call);
}

Status LaunchKnown(KnownCalls::Known* known) {
  const KnownCalls::Use use(known);
  return Launch(known->call);
}

Status LaunchNew(const ropewalk_rope_args& args, void* stream, ThreadState* state) {
  RopeCall call;
  ROPEWALK_TRY(LowerRope(args, stream, &call));
  KnownCalls::Known* const known = state ? state->known_calls.Remember(args, call) : nullptr;
  return known ? LaunchKnown(known) : Launch(call);
}

}  // namespace
}  // namespace ropewalk

using namespace ropewalk;

extern "C" {

int ropewalk_rope(const ropewalk_rope_args* args, void* stream) {
  return Guard([&]() -> Status {
    return WithArgs(args, [&](const ropewalk_rope_args& full) -> Status {
      ThreadState* const state = OwnState();
      KnownCalls::Known* const known = state ? state->known_calls.Find(full, stream) : nullptr;
      return known ? LaunchKnown(known) : LaunchNew(full, stream, state);
    });
  });
}

int ropewalk_rope_backward(const ropewalk_rope_args* args, const ropewalk_rope_gradients* gradients, void* stream) {
  return Guard([&]() -> Status {
    RopeBackwardCall call;
    const Backend* backend;
    ROPEWALK_TRY(LoweredBackward(args, gradients, stream, &call, &backend));
    if (!call.turn.variant.norm) return backend->launch(call.turn);
    int64_t needed = 0;
    ROPEWALK_TRY(backend->backward_workspace(call, &needed));
    ROPEWALK_TRY(CheckWorkspace(call, needed));
    return backend->launch_backward(call);
  });
}

int64_t ropewalk_rope_backward_workspace(const ropewalk_rope_args* args, const ropewalk_rope_gradients* gradients) {
  int64_t needed = 0;
  const int code = Guard([&]() -> Status {
    RopeBackwardCall call;
    const Backend* backend;
    ROPEWALK_TRY(LoweredBackward(args, gradients, nullptr, &call, &backend));
    return call.turn.variant.norm ? backend->backward_workspace(call, &needed) : Status();
  });
  return code == ROPEWALK_OK ? needed : -code;
}

int ropewalk_prepare(const ropewalk_rope_args* args) {
  return Guard([&]() -> Status {
    RopeCall call;
    const Backend* backend;
    ROPEWALK_TRY(Lowered(args, nullptr, &call, &backend));
    return backend->prepare(call);
  });
}

const char* ropewalk_explain(const ropewalk_rope_args* args) {
  return GuardText([&](std::string* text) -> Status {
    RopeCall call;
    const Backend* backend;
    ROPEWALK_TRY(Lowered(args, nullptr, &call, &backend));
    Explanation explanation = {{"backend", backend->name}};
    ROPEWALK_TRY(backend->explain(call, &explanation));
    explanation.emplace_back("tensors", ShapesText(call));  // to tell a layout that was meant otherwise
    *text = "{";
    for (const auto& [key, value] : explanation) {
      Append(text, Text(text->size() > 1 ? ", " : "", JsonString(key), ": ", JsonString(value)));
    }
    *text += "}";
    return {};
  });
}

int ropewalk_check_faults(void) {
  return Guard([]() -> Status {
    for (const Backend* backend : Backends()) ROPEWALK_TRY(backend->check_faults());
    return {};
  });
}

const char* ropewalk_last_error(void) {
  if (const auto* state = static_cast<const ThreadState*>(thread_state.Find())) return state->last_error;
  return lost_error.load(std::memory_order_relaxed) ? kNoMemory : "";
}

const char* ropewalk_backends(void) {
  return GuardText([](std::string* text) -> Status {
    *text = "[";
    for (const Backend* backend : Backends()) {
      const Availability a = backend->availability();
      Append(text, Text(text->size() > 1 ? ", " : "", "{\"name\": ", JsonString(backend->name),
                        ", \"available\": ", a.available ? "true" : "false", ", \"detail\": ", JsonString(a.detail),
                        ", \"remedy\": ", JsonString(a.remedy), ", \"parts\": ["));
      for (size_t i = 0; i < a.parts.size(); ++i) Append(text, Text(i ? ", " : "", JsonString(a.parts[i])));
      *text += "]}";
    }
    *text += "]";
    return {};
  });
}

int ropewalk_force_backend(const char* name) {
  return Guard([&] { return ForceBackend(name); });
}

const char* ropewalk_counters(void) {
  return GuardText([](std::string* text) -> Status {
    std::vector<std::pair<std::string, int64_t>> counters;
    for (const Backend* backend : Backends()) backend->counters(&counters);
    *text = "{";
    for (const auto& [kernel, count] : counters) {
      Append(text, Text(text->size() > 1 ? ", " : "", JsonString(kernel), ": ", count));
    }
    *text += "}";
    return {};
  });
}

#define ROPEWALK_STRING(x) #x
#define ROPEWALK_VERSION_TEXT(a, b, c) ROPEWALK_STRING(a) "." ROPEWALK_STRING(b) "." ROPEWALK_STRING(c)

const char* ropewalk_version(void) {
  return ROPEWALK_VERSION_TEXT(ROPEWALK_VERSION_MAJOR, ROPEWALK_VERSION_MINOR, ROPEWALK_VERSION_PATCH);
}

const char* ropewalk_description(void) {
  return GuardText([](std::string* text) -> Status {
    *text = DescriptionJson(RopeDescription());
    return {};
  });
}

const char* ropewalk_torch_schema(void) {
  return GuardText([](std::string* text) -> Status {
    *text = TorchSchema(RopeDescription());
    return {};
  });
}

int ropewalk_set_parallel_for(ropewalk_parallel_for parallel_for, void* context) {
  return Guard([&] { return SetParallelFor(parallel_for, context); });
}

int ropewalk_set_threads(int32_t threads) {
  return Guard([&] { return SetThreads(threads); });
}

}  // extern "C"
