// SPDX-License-Identifier: Apache-2.0

#include "process.h"

#include <pthread.h>

#include <atomic>

namespace tcpx {

namespace {

// Counted by the handler in each child; a call to getpid for each operation would cost a system call.
std::atomic<unsigned> forks{0};

void in_child() { forks.fetch_add(1, std::memory_order_relaxed); }

}  // namespace

Birth::Birth() {
  static const int watched = ::pthread_atfork(nullptr, nullptr, in_child);
  (void)watched;
  generation_ = forks.load(std::memory_order_relaxed);
}

bool Birth::inherited() const { return forks.load(std::memory_order_relaxed) != generation_; }

}  // namespace tcpx
