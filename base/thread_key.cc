// SPDX-License-Identifier: Apache-2.0
#include "base/thread_key.h"

#include <pthread.h>

namespace ropewalk {

void* ThreadKey::Made(bool make) {
  int64_t key = key_.load(std::memory_order_acquire);
  if (key < 0) {
    // Made here rather than at the start: static objects of the program may call before ours are made.
    pthread_key_t made;
    if (!make || pthread_key_create(&made, destroy_) != 0) return nullptr;
    if (key_.compare_exchange_strong(key, int64_t{made})) {
      key = int64_t{made};
    } else {
      pthread_key_delete(made);
    }
  }
  const auto own = static_cast<pthread_key_t>(key);
  void* value = pthread_getspecific(own);
  if (value || !make) return value;
  value = make_();
  if (value && pthread_setspecific(own, value) != 0) {
    destroy_(value);
    return nullptr;
  }
  return value;
}

}  // namespace ropewalk
