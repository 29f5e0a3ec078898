// SPDX-License-Identifier: Apache-2.0
#include "base/overlap.h"

#include <utility>

#include "base/tensor.h"

namespace ropewalk {
namespace {

constexpr int kMostSteps = 1 << 16;

// The bytes from the first to the last of one step of the outermost axis.
uintptr_t RowExtent(const Footprint& f) {
  int64_t last = f.item;
  for (int i = 1; i < f.count; ++i) last += f.axes[i].stride * (f.axes[i].size - 1);
  return static_cast<uintptr_t>(last);
}

// Makes `part` the `size` steps of the outermost axis of `whole` that begin at step `from`.
void Take(const Footprint& whole, int64_t from, int64_t size, Footprint* part) {
  *part = whole;
  part->base += static_cast<uintptr_t>(from * whole.axes[0].stride);
  part->axes[0].size = size;
  if (size > 1) return;
  for (int i = 1; i < part->count; ++i) part->axes[i - 1] = part->axes[i];
  --part->count;
}

// Splits the footprint with the longer outermost axis until the ranges are apart or dense runs meet. No axis has a
// stride of 0. One level halves one axis, so that there are at most 132 (each tensor has less than 2^62 bytes and four
// axes), of 200 bytes of stack each: both footprints are changed in place, and are as they were where the answer is
// false.
bool Search(Footprint* a, Footprint* b, int* budget) {
  if (a->base >= b->end() || b->base >= a->end()) return false;
  if (a->count == 0 && b->count == 0) return true;
  if (--*budget < 0) return true;
  // Rows of one period that lie beside each other, as packed q, k and v do, however many rows there are.
  if (a->count && b->count && a->axes[0].stride == b->axes[0].stride) {
    const auto period = static_cast<uintptr_t>(a->axes[0].stride);
    const uintptr_t shift =
        b->base >= a->base ? (b->base - a->base) % period : (period - (a->base - b->base) % period) % period;
    if (shift >= RowExtent(*a) && shift + RowExtent(*b) <= period) return false;
  }
  const auto outer = [](const Footprint& f) { return f.count ? f.axes[0].stride * f.axes[0].size : 0; };
  Footprint* const longer = outer(*a) < outer(*b) ? b : a;
  const Footprint whole = *longer;
  const int64_t size = whole.axes[0].size, half = size / 2;
  Take(whole, 0, half, longer);
  if (Search(a, b, budget)) return true;
  Take(whole, half, size - half, longer);
  if (Search(a, b, budget)) return true;
  *longer = whole;
  return false;
}

// An axis whose steps continue the dense run becomes part of it.
void MergeDense(Footprint* f) {
  while (f->count && f->axes[f->count - 1].stride == f->item) {
    f->item *= f->axes[f->count - 1].size;
    --f->count;
  }
}

// Without the axes of stride 0, which come last: they add no bytes.
Footprint WithoutRepeats(Footprint f) {
  while (f.count && f.axes[f.count - 1].stride == 0) --f.count;
  MergeDense(&f);
  return f;
}

}  // namespace

bool Footprint::repeats() const {
  // Axes by falling stride. A step beyond what the axes behind it span meets nothing; one inside may meet elements of
  // theirs, or fall between them.
  int budget = kMostSteps;
  Footprint inner = *this;  // the axes behind the i-th
  for (int i = count - 1; i >= 0; --i) {
    const Axis axis = axes[i];
    inner.count = count - 1 - i;
    for (int j = 0; j < inner.count; ++j) inner.axes[j] = axes[i + 1 + j];
    const auto extent = static_cast<int64_t>(inner.end() - inner.base);
    if (axis.stride == 0) return true;
    for (int64_t step = 1; step < axis.size && step * axis.stride < extent; ++step) {
      Footprint still = inner, shifted = inner;
      shifted.base += static_cast<uintptr_t>(step * axis.stride);
      if (--budget < 0 || Search(&still, &shifted, &budget)) return true;
    }
  }
  return false;
}

uintptr_t Footprint::end() const {
  int64_t last = item;
  for (int i = 0; i < count; ++i) last += axes[i].stride * (axes[i].size - 1);
  return base + static_cast<uintptr_t>(last);
}

bool SameElements(const DLTensor& a, const DLTensor& b) {
  if (DataOf(a) != DataOf(b) || a.ndim != b.ndim || a.dtype.bits != b.dtype.bits) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && StrideOf(a, i) != StrideOf(b, i))) return false;
  }
  return true;
}

Footprint FootprintOf(const DLTensor& tensor) {
  Footprint f;
  f.count = 0;
  const int64_t bytes = tensor.dtype.bits / 8;
  f.base = reinterpret_cast<uintptr_t>(DataOf(tensor));
  f.item = bytes;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] != 0) continue;
    f.item = 0;  // and strides may be anything
    return f;
  }
  for (int i = 0; i < tensor.ndim; ++i) {
    const int64_t size = tensor.shape[i];
    if (size == 1) continue;
    int64_t stride = StrideOf(tensor, i) * bytes;
    if (stride < 0) {
      f.base -= static_cast<uintptr_t>(-stride * (size - 1));
      stride = -stride;
    }
    int place = f.count++;
    for (; place > 0 && f.axes[place - 1].stride < stride; --place) f.axes[place] = f.axes[place - 1];
    f.axes[place] = {stride, size};
  }
  MergeDense(&f);
  return f;
}

bool Overlap(const Footprint& a, const Footprint& b) {
  int budget = kMostSteps;
  Footprint left = WithoutRepeats(a), right = WithoutRepeats(b);
  return Search(&left, &right, &budget);
}

}  // namespace ropewalk
