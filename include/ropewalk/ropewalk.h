// Ropewalk: rotary position embedding on queries and keys, fused with the per-head RMSNorm before it and the KV-cache
// store after it. This header is the whole C ABI; ropewalk.hpp adds a C++ face to it.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_ROPEWALK_H_
#define ROPEWALK_ROPEWALK_H_

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

#define ROPEWALK_VERSION_MAJOR 0
#define ROPEWALK_VERSION_MINOR 2
#define ROPEWALK_VERSION_PATCH 0

#define ROPEWALK_API __attribute__((visibility("default")))

#ifdef __cplusplus
#define ROPEWALK_DEFAULT(value) = value
extern "C" {
#else
#define ROPEWALK_DEFAULT(value)
#endif

// What a function returns. Text for anything but ROPEWALK_OK: ropewalk_last_error().
typedef enum ropewalk_code {
  ROPEWALK_OK = 0,
  ROPEWALK_INVALID_ARGUMENT = 1,  // the caller's fault; nothing was written
  ROPEWALK_UNAVAILABLE = 2,       // no backend can serve this call here
  ROPEWALK_DRIVER_ERROR = 3,      // a driver or the operating system refused
  ROPEWALK_FAULT = 4,             // found by ropewalk_check_faults()
  ROPEWALK_INTERNAL = 5           // a bug in Ropewalk
} ropewalk_code;

// Which elements of the rotated part form a pair.
typedef enum ropewalk_pairing {
  ROPEWALK_NEOX = 0,        // (i, i + rotary_dim/2): the two halves
  ROPEWALK_INTERLEAVED = 1  // (2i, 2i + 1): neighbours (GPT-J)
} ropewalk_pairing;

// What happens to each head before the rotation. A weight given means RMS.
typedef enum ropewalk_norm { ROPEWALK_NORM_NONE = 0, ROPEWALK_NORM_RMS = 1 } ropewalk_norm;

// Where results are rounded to the tensors' dtype.
typedef enum ropewalk_rounding {
  ROPEWALK_ROUND_FUSED = 0,     // once, at the store
  ROPEWALK_ROUND_REFERENCE = 1  // after each operation, where the Hugging Face chain rounds
} ropewalk_rounding;

// Rotation frequencies and what belongs to them; see ropewalk_frequencies_create.
typedef struct ropewalk_frequencies ropewalk_frequencies;

// The arguments of the one operation: normalise (optional), rotate, store. Absent tensors are NULL. `batch?` marks a
// dimension that q's rank decides: q of 4 dimensions has it. Strides are free, but for q, k, v, the outputs, the caches
// and the weights the last one must be 1. T is q's dtype: float32, float16 or bfloat16.
typedef struct ropewalk_rope_args {
  uint32_t struct_size ROPEWALK_DEFAULT(sizeof(ropewalk_rope_args));  // sizeof of the caller's struct

  int32_t pairing ROPEWALK_DEFAULT(ROPEWALK_NEOX);  // ropewalk_pairing: which elements form a pair

  DLTensor* q ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, q_heads, head_dim] T: rotated in place
  DLTensor* k ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, k_heads, head_dim] T, optional: rotated in place
  const DLTensor* positions ROPEWALK_DEFAULT(nullptr);  // [axes?, batch?, tokens] int32 | int64; NULL: 0, 1, 2, ..
  const DLTensor* offsets ROPEWALK_DEFAULT(nullptr);    // [batch?, tokens] int32 | int64: added to positions

  const ropewalk_frequencies* frequencies ROPEWALK_DEFAULT(nullptr);  // angles are computed; or a table:
  const DLTensor* cos ROPEWALK_DEFAULT(nullptr);      // [batch?, rows, rotary_dim/2] float32 | float16 | bfloat16
  const DLTensor* sin ROPEWALK_DEFAULT(nullptr);      // [batch?, rows, rotary_dim/2] as cos
  const DLTensor* cos_sin ROPEWALK_DEFAULT(nullptr);  // [batch?, rows, rotary_dim] as cos: cosines, then sines
  const DLTensor* axes ROPEWALK_DEFAULT(nullptr);     // [rotary_dim/2] int32: the row of positions that each pair takes

  int32_t rotary_dim ROPEWALK_DEFAULT(0);     // 0: as many as frequencies or the table say
  int32_t rotary_offset ROPEWALK_DEFAULT(0);  // where the rotated part begins in the head
  int32_t inverse ROPEWALK_DEFAULT(0);        // 1: turn by the negative angles

  int32_t norm ROPEWALK_DEFAULT(ROPEWALK_NORM_NONE);        // ropewalk_norm
  const DLTensor* q_weight ROPEWALK_DEFAULT(nullptr);       // [head_dim] float32 | float16 | bfloat16
  const DLTensor* k_weight ROPEWALK_DEFAULT(nullptr);       // [head_dim] as q_weight
  int32_t zero_centered_weight ROPEWALK_DEFAULT(0);         // 1: multiply by 1 + weight (Gemma)
  int32_t rounding ROPEWALK_DEFAULT(ROPEWALK_ROUND_FUSED);  // ropewalk_rounding
  double eps ROPEWALK_DEFAULT(1e-6);                        // added to the mean square of the norm

  DLTensor* q_out ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, q_heads, head_dim] T: written instead of q
  DLTensor* k_out ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, k_heads, head_dim] T: written instead of k

  const DLTensor* v ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, k_heads, v_dim] T: only stored in v_cache
  // Without `pages` the size of a page is the number of slots. In an fp8 cache a number beyond the largest, or
  // infinity, is stored as the largest: 448 (e4m3fn), 57344 (e5m2). NaN stays NaN.
  DLTensor* k_cache ROPEWALK_DEFAULT(nullptr);  // [pages?, page_size, k_heads, head_dim] T | fp8: takes the rotated k
  DLTensor* v_cache ROPEWALK_DEFAULT(nullptr);  // [pages?, page_size, k_heads, v_dim] T | fp8: takes v
  const DLTensor* slots ROPEWALK_DEFAULT(nullptr);    // [batch?, tokens] int32 | int64; negative: not stored
  const DLTensor* k_scale ROPEWALK_DEFAULT(nullptr);  // [k_heads?] float32: an fp8 k_cache holds k / k_scale
  const DLTensor* v_scale ROPEWALK_DEFAULT(nullptr);  // [k_heads?] float32: an fp8 v_cache holds v / v_scale

  // A sycl::queue* to work on instead of `stream`; tensors are its unified shared memory (kDLOneAPI).
  void* sycl_queue ROPEWALK_DEFAULT(nullptr);
  int32_t disable_pdl ROPEWALK_DEFAULT(0);  // 1: no programmatic dependent launch (CUDA, sm_90 and later)
  int32_t reserved ROPEWALK_DEFAULT(0);     // keep 0

  int32_t k_store_only ROPEWALK_DEFAULT(0);  // 1: k goes to k_cache alone, and its own memory is only read
  int32_t reserved_2 ROPEWALK_DEFAULT(0);    // keep 0
} ropewalk_rope_args;

// clang-format off
#ifdef __cplusplus
#define ROPEWALK_ROPE_ARGS_INIT ropewalk_rope_args{}
#else
#define ROPEWALK_ROPE_ARGS_INIT {.struct_size = sizeof(ropewalk_rope_args), .eps = 1e-6}
#endif
// clang-format on

// The gradient of the operation's norm and rotation: what ropewalk_rope_backward takes beside the arguments of the
// call. Absent tensors are NULL. T is the dtype of q_grad.
typedef struct ropewalk_rope_gradients {
  uint32_t struct_size ROPEWALK_DEFAULT(sizeof(ropewalk_rope_gradients));  // sizeof of the caller's struct

  int32_t reserved ROPEWALK_DEFAULT(0);  // keep 0

  DLTensor* q_grad ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, q_heads, head_dim] T: the gradient of the rotated q
  DLTensor* k_grad ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, k_heads, head_dim] T, optional: that of the rotated k
  DLTensor* q_grad_out ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, q_heads, head_dim] T: written instead of q_grad
  DLTensor* k_grad_out ROPEWALK_DEFAULT(nullptr);  // [batch?, tokens, k_heads, head_dim] T: written instead of k_grad

  DLTensor* q_weight_grad ROPEWALK_DEFAULT(nullptr);  // [head_dim] float32, optional: the gradient of q_weight
  DLTensor* k_weight_grad ROPEWALK_DEFAULT(nullptr);  // [head_dim] float32, optional: the gradient of k_weight
  // [workspace] float32: room for sums, as many as ropewalk_rope_backward_workspace says
  DLTensor* workspace ROPEWALK_DEFAULT(nullptr);
} ropewalk_rope_gradients;

// clang-format off
#ifdef __cplusplus
#define ROPEWALK_ROPE_GRADIENTS_INIT ropewalk_rope_gradients{}
#else
#define ROPEWALK_ROPE_GRADIENTS_INIT {.struct_size = sizeof(ropewalk_rope_gradients)}
#endif
// clang-format on

// Does the operation. `stream` is the caller's stream or queue on the device of q (a CUstream, a
// ze_command_list_handle_t, a cl_command_queue); NULL: the device's default; on an Intel GPU the call then returns when
// the work is done, and a sycl::queue goes in args->sycl_queue. On the CPU it is ignored and the call returns when the
// work is done. Bad arguments are refused with one sentence and nothing is written. A position past the table gives NaN
// in that token, a slot past the cache is not stored, and ropewalk_check_faults() tells of both.
ROPEWALK_API int ropewalk_rope(const ropewalk_rope_args* args, void* stream);

// The gradient of that: with y = R (x / rms(x) * weight), q_grad and k_grad hold that of y and get that of x, and the
// gradients of the weights are sums over all heads of all tokens, the same to the bit for a shape on a device. `args`
// are those of the call: its q and k are x, before the norm, which are read for a norm alone and may be NULL without
// one. The call's outputs, caches, slots and scales must be NULL, as nothing but the norm and the rotation has a
// gradient. Else as ropewalk_rope; a position past the table gives NaN in that token and adds nothing to the weights'.
ROPEWALK_API int ropewalk_rope_backward(const ropewalk_rope_args* args, const ropewalk_rope_gradients* gradients,
                                        void* stream);
// How many elements the workspace of such a call must have; 0: it needs none. Negative: minus the code of a refusal.
// `gradients` may be without one, or with any.
ROPEWALK_API int64_t ropewalk_rope_backward_workspace(const ropewalk_rope_args* args,
                                                      const ropewalk_rope_gradients* gradients);

// Makes everything a later ropewalk_rope with such arguments needs (code, device copies), so that it neither compiles
// nor allocates and may be captured. Tensors' data is neither read nor written, but for scales on the host, which this
// function and ropewalk_explain read too, and which must be finite numbers from 2^-126 on. Scales on a device are the
// caller's to check: one of 0 or NaN spoils its head in the cache.
ROPEWALK_API int ropewalk_prepare(const ropewalk_rope_args* args);

// Which backend, kernel and source would serve the call, and why: a JSON object. NULL if the arguments are refused.
// The text is this thread's until its next call of a Ropewalk function that returns text.
ROPEWALK_API const char* ropewalk_explain(const ropewalk_rope_args* args);

// ROPEWALK_OK if no kernel finished since the last call met a position outside its table or a slot outside its cache;
// else ROPEWALK_FAULT, and the text names the first such token. Waits for the devices. The record is cleared.
ROPEWALK_API int ropewalk_check_faults(void);

// The text of this thread's last failure; "" if there was none.
ROPEWALK_API const char* ropewalk_last_error(void);

// The backends, available or not: a JSON array of {name, available, detail, remedy}.
ROPEWALK_API const char* ropewalk_backends(void);

// Serves calls with this backend only ("cpu", "cuda", ..) or with one CPU target ("cpu:avx2"); NULL ends that.
ROPEWALK_API int ropewalk_force_backend(const char* name);

// How often each kernel was launched since the start: a JSON object from "backend kernel" to a count.
ROPEWALK_API const char* ropewalk_counters(void);

// The version, "major.minor.patch".
ROPEWALK_API const char* ropewalk_version(void);

// The description of the arguments, as JSON, and as a torch schema ("rope_(Tensor(a!) q, ..)"): for bindings and docs.
ROPEWALK_API const char* ropewalk_description(void);
ROPEWALK_API const char* ropewalk_torch_schema(void);

// How the CPU backend splits its work. `body(begin, end, body_context)` must be called for disjoint ranges that cover
// [begin, end), each of at least `grain` where possible, and all must have returned before the function does.
typedef void (*ropewalk_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t begin, int64_t end, const void* body_context),
                                      const void* body_context, void* context);
ROPEWALK_API int ropewalk_set_parallel_for(ropewalk_parallel_for parallel_for, void* context);  // NULL: the default
// The opt-in pool: `threads` threads of our own, the caller's included. 1 (the default): none. It may be called, and
// the process may fork, at any moment: a call in flight ends with the pool that it began with. If the system gives
// fewer threads, calls are served by those, and ropewalk_explain says so.
ROPEWALK_API int ropewalk_set_threads(int32_t threads);

// ---------------------------------------------------------------------------------------------------------------------
// Frequencies

// Frequencies theta^(-2i/rotary_dim), i < rotary_dim/2, changed by a scaling rule in Hugging Face's spelling:
// `scaling_json` is NULL or a JSON object such as {"rope_type": "yarn", "factor": 4.0, ..}. `sequence_length` chooses
// what depends on it (dynamic, longrope); 0: the original length. Unknown or contradictory fields are refused by name;
// those that transformers ignores are ignored, and ropewalk_frequencies_warnings names them.
ROPEWALK_API int ropewalk_frequencies_create(double theta, int64_t rotary_dim, const char* scaling_json,
                                             int64_t sequence_length, ropewalk_frequencies** out);

// From the frequencies themselves, in radians per position. `axes` is NULL or one row of positions for each.
ROPEWALK_API int ropewalk_frequencies_from_array(const double* inv_freq, int64_t count, double attention_scaling,
                                                 const int32_t* axes, ropewalk_frequencies** out);

// From the text of a model's config.json. `name` is what messages call it (its path). `layer_type` is NULL or a key of
// nested rope_parameters ("full_attention"). A model_type that is not in docs/models.md is served if fields with known
// names say everything, and else refused, as is a model without rotary embedding.
ROPEWALK_API int ropewalk_frequencies_from_config(const char* json, const char* name, const char* layer_type,
                                                  int64_t sequence_length, ropewalk_frequencies** out);

// Shared by counting: create and from_* begin at one, release at zero frees. A call in flight must hold one. NULL holds
// no pair: retain and release do nothing, the others return 0, 1.0 and NULL.
ROPEWALK_API void ropewalk_frequencies_retain(ropewalk_frequencies* frequencies);
ROPEWALK_API void ropewalk_frequencies_release(ropewalk_frequencies* frequencies);

ROPEWALK_API int64_t ropewalk_frequencies_rotary_dim(const ropewalk_frequencies* frequencies);
ROPEWALK_API double ropewalk_frequencies_attention_scaling(const ropewalk_frequencies* frequencies);
ROPEWALK_API const double* ropewalk_frequencies_inv_freq(const ropewalk_frequencies* frequencies);  // [rotary_dim/2]
// [rotary_dim/2] or NULL
ROPEWALK_API const int32_t* ropewalk_frequencies_axes(const ropewalk_frequencies* frequencies);
// What was ignored in the rule or the configuration, a sentence a line; "" for nothing. Lives as long as `frequencies`.
ROPEWALK_API const char* ropewalk_frequencies_warnings(const ropewalk_frequencies* frequencies);

// Fills cos and sin [rows, rotary_dim/2] (float32, float16 or bfloat16, on the host, any strides) for positions
// 0 .. rows-1 as Hugging Face does: the angle is a float32 product of position and float32 frequency.
ROPEWALK_API int ropewalk_frequencies_table(const ropewalk_frequencies* frequencies, DLTensor* cos, DLTensor* sin);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // ROPEWALK_ROPEWALK_H_
