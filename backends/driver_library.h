// A driver's library: opened when it is first wanted, once in a process, and kept to its end. What runs but then is
// cold, which compiles it for size.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "base/environment.h"
#include "base/fork.h"
#include "base/status.h"
#include "base/text.h"
#include "base/wide_stack.h"

namespace ropewalk {

// The handle of the library that `variable` of the environment names, or else of `name`, one that is loaded already
// before the system's, or of `other` (a path, or null); null with the reason in `why`.
[[gnu::cold]] inline void* OpenLibrary(const char* variable, const char* name, const char* other, std::string* path,
                                       std::string* why) {
  if (const char* named = EnvironmentVariable(variable); named && *named) {
    *path = named;
    void* library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
    if (!library) *why = Text(variable, " names ", named, ", which cannot be opened: ", dlerror());
    return library;
  }
  std::string refused;
  for (const char* candidate : {name, other}) {
    if (!candidate) continue;
    *path = candidate;
    if (void* library = dlopen(candidate, RTLD_NOW | RTLD_LOCAL)) return library;
    // A file that is there, or lacks another library, is to be told from one that is not there.
    const std::string said = dlerror();
    if (said.starts_with(candidate) && said.ends_with(std::strerror(ENOENT))) continue;
    Append(&refused, Text(refused.empty() ? "" : "; ", said));
  }
  *why = refused.empty() ? Text(name, " was not found: looked for it as the system's loader does",
                                other ? Text(", and for ", other) : "")
                         : Text(name, " cannot be opened: ", refused);
  return nullptr;
}

// The one `Library` of the process, opened when it is first wanted. `kLoad` opens it and says whether it can be used.
template <class Library, Status (*kLoad)(Library*)>
class Once {
  [[gnu::cold]] static const Library* Load() {
    auto* loaded = new Library;
    OnWideStack([loaded] { loaded->status = kLoad(loaded); });
    return loaded;
  }

 public:
  static const Library& Get() { return OnceMade<Library, Load>::Get(); }
  static bool WasLoaded() { return OnceMade<Library, Load>::WasMade(); }
};

}  // namespace ropewalk
