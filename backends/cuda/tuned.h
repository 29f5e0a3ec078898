// What `ropewalk tune` found, kept beside the kernels: a file for each device, driver and version of Ropewalk, which
// every later process reads when it opens the driver.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backends/cuda/plan.h"
#include "base/status.h"

namespace ropewalk {

// The entries of such a file, one a line; none if a line is not as it was written.
std::vector<RopeCudaTuned::Entry> ParseTunedShapes(std::string_view text);
// The entries for a device of this name under this driver, never freed; null if there are none, or no place for any.
const RopeCudaTuned* LoadTunedShapes(const std::string& device, int driver_version);
// Adds entries; older ones for the same calls go. `path`: where they are now.
Status KeepTunedShapes(const std::string& device, int driver_version, const std::vector<RopeCudaTuned::Entry>& entries,
                       std::string* path);

}  // namespace ropewalk
