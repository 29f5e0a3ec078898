// SPDX-License-Identifier: Apache-2.0
#include "base/fork.h"

#include <pthread.h>

namespace ropewalk {

struct ForkMutexes {
  static void Hook() {  // under `lists`
    static bool hooked = false;
    if (!hooked) hooked = pthread_atfork(Prepare, Parent, Child) == 0;
  }
  static void List(ForkMutex* mutex) {
    const std::lock_guard lock(lists);
    if (mutex->listed_.load(std::memory_order_relaxed)) return;
    Hook();
    mutex->next_ = mutexes;
    mutexes = mutex;
    mutex->listed_.store(true, std::memory_order_release);
  }
  static void List(OnFork* on_fork) {
    const std::lock_guard lock(lists);
    Hook();
    on_fork->next_ = on_forks;
    on_forks = on_fork;
  }

  static void Prepare() {
    lists.lock();
    for (ForkMutex* mutex = mutexes; mutex; mutex = mutex->next_) mutex->mutex_.lock();
  }
  static void Parent() {
    for (ForkMutex* mutex = mutexes; mutex; mutex = mutex->next_) mutex->mutex_.unlock();
    lists.unlock();
  }
  static void Child() {
    for (OnFork* on_fork = on_forks; on_fork; on_fork = on_fork->next_) on_fork->forget_();
    Parent();
  }

  static constinit inline std::mutex lists;
  static constinit inline ForkMutex* mutexes = nullptr;
  static constinit inline OnFork* on_forks = nullptr;
};

void ForkMutex::lock() {
  if (!listed_.load(std::memory_order_acquire)) ForkMutexes::List(this);
  mutex_.lock();
}

OnFork::OnFork(void (*forget)()) : forget_(forget) { ForkMutexes::List(this); }

}  // namespace ropewalk
