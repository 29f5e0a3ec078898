// What Ropewalk keeps in a Level Zero context of a device, and how a kernel is built for one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <mutex>

#include "backends/intel/level_zero/driver.h"
#include "backends/known_pages.h"
#include "backends/spirv/context.h"

namespace ropewalk {

// Fills module, function and spilled_bytes. The driver's log is part of the message if it refuses the SPIR-V.
Status BuildLevelZeroKernel(const LevelZeroDriver& driver, ze::Context context, ze::Device device,
                            const RopeSpirvKey& key, SpirvKernel* kernel);

class LevelZeroContext final : public SpirvContext {
 public:
  LevelZeroContext(const LevelZeroDriver& driver, int ordinal, ze::Context handle);

  const LevelZeroDriver& driver;
  const int ordinal;  // of the device
  const ze::Context handle;
  LevelZeroContext* next = nullptr;  // in the list of its device
  KnownPages<16> pages;              // 64 KB, the smallest piece of device memory

  const LevelZeroDevice& device() const { return driver.devices[static_cast<size_t>(ordinal)]; }
  // Appends to the caller's command list, or without one runs it on a list of ours and waits for it.
  // `is_last`: nothing that follows reads what it writes; else a barrier comes behind it, as a list need not be in
  // order.
  Status Launch(SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args, ze::CommandList list,
                bool is_last = true);

  Status Allocate(size_t bytes, void** out) override;
  Status CopyIn(void* to, const void* from, size_t bytes) override { return Copy(to, from, bytes); }
  Status CopyOut(void* to, const void* from, size_t bytes) override { return Copy(to, from, bytes); }

 protected:
  Status Build(const RopeSpirvKey& key, SpirvKernel* kernel) override;
  // Nothing: what is launched without a list has been waited for, and a caller's list is the caller's to wait for.
  Status Wait() override { return {}; }

 private:
  Status Copy(void* to, const void* from, size_t bytes);
  Status OwnList(ze::CommandList* list);  // under list_mutex_

  std::mutex list_mutex_;
  ze::CommandList list_ = nullptr;  // immediate and synchronous
};

// The context of the caller's command list, or of no list (null) our own. Known to the end of the process.
Status EnterLevelZero(const LevelZeroDriver& driver, int ordinal, ze::CommandList list, LevelZeroContext** out);
// All that have been entered so far.
void ForEachLevelZeroContext(const std::function<void(LevelZeroContext*)>& visit);

}  // namespace ropewalk
