// What a launch looks up in a context of a device without a lock: the kernel of a key, and the device's copy of
// frequencies. Both only grow, under the lock of the context that owns them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "frequencies/frequencies.h"

namespace ropewalk {

// From a kernel's `key`, plain bytes without padding, to the kernel.
template <class Kernel>
class KernelTable {
 public:
  using Key = decltype(Kernel::key);

  Kernel* Find(const Key& key) const {
    const Slots* slots = current_.load(std::memory_order_acquire);
    if (!slots) return nullptr;
    for (size_t i = HashOf(key) & slots->mask;; i = (i + 1) & slots->mask) {
      Kernel* kernel = slots->kernels[i].load(std::memory_order_acquire);
      if (!kernel || kernel->key == key) return kernel;
    }
  }
  // These two under the owner's lock.
  void Insert(std::unique_ptr<Kernel> kernel) {
    kernels_.push_back(std::move(kernel));
    if (slots_.empty() || kernels_.size() * 2 > slots_.back()->kernels.size()) {
      slots_.push_back(std::make_unique<Slots>(slots_.empty() ? 64 : slots_.back()->kernels.size() * 4));
      for (const auto& known : kernels_) Put(slots_.back().get(), known.get());
      current_.store(slots_.back().get(), std::memory_order_release);
    } else {
      Put(slots_.back().get(), kernels_.back().get());
    }
  }
  const std::vector<std::unique_ptr<Kernel>>& all() const { return kernels_; }

 private:
  struct Slots {
    explicit Slots(size_t count) : mask(count - 1), kernels(count) {}
    size_t mask;
    std::vector<std::atomic<Kernel*>> kernels;
  };
  static size_t HashOf(const Key& key) {
    std::array<uint64_t, (sizeof(Key) + 7) / 8> words{};
    std::memcpy(words.data(), &key, sizeof(key));
    uint64_t hash = 0;
    for (const uint64_t word : words) {
      hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return static_cast<size_t>(hash);
  }
  static void Put(Slots* slots, Kernel* kernel) {
    size_t i = HashOf(kernel->key) & slots->mask;
    while (slots->kernels[i].load(std::memory_order_relaxed)) i = (i + 1) & slots->mask;
    slots->kernels[i].store(kernel, std::memory_order_release);
  }

  std::vector<std::unique_ptr<Kernel>> kernels_;
  std::vector<std::unique_ptr<Slots>> slots_;  // the last is in use; a reader may still hold one before it
  std::atomic<const Slots*> current_{nullptr};
};

// Where the copies of frequencies are; equal frequencies share one. An `Address` of null (0) is none.
template <class Address>
class FrequencyCopies {
 public:
  // By the id. None too where the slot is another's by now: then FindEqual knows.
  Address Find(const ropewalk_frequencies& frequencies) const {
    // A writer clears the id before it changes the address: the address read between two equal ids is theirs.
    const Slot& slot = slots_[frequencies.id % slots_.size()];
    if (slot.id.load(std::memory_order_acquire) != frequencies.id) return Address{};
    const Address address = slot.address.load(std::memory_order_acquire);
    return slot.id.load(std::memory_order_relaxed) == frequencies.id ? address : Address{};
  }
  // These two under the owner's lock; afterwards Find finds it. By the content:
  Address FindEqual(const ropewalk_frequencies& frequencies) {
    const auto it = copies_.find(DeviceCopyOf(frequencies));
    return it == copies_.end() ? Address{} : Remember(frequencies.id, it->second);
  }
  Address Keep(const ropewalk_frequencies& frequencies, Address address) {
    return Remember(frequencies.id, copies_[DeviceCopyOf(frequencies)] = address);
  }

 private:
  struct Slot {
    std::atomic<uint64_t> id{0};
    std::atomic<Address> address{};
  };
  Address Remember(uint64_t id, Address address) {
    Slot& slot = slots_[id % slots_.size()];
    slot.id.store(0, std::memory_order_release);
    slot.address.store(address, std::memory_order_release);
    slot.id.store(id, std::memory_order_release);
    return address;
  }

  std::map<std::string, Address> copies_;
  std::array<Slot, 1024> slots_ = {};
};

}  // namespace ropewalk
