// SPDX-License-Identifier: Apache-2.0

#include "process.h"

#include <pthread.h>

#include <atomic>
#include <initializer_list>

namespace tcpx {

namespace {

// Counted by the handler in each child; a call to getpid for each operation would cost a system call.
std::atomic<unsigned> forks{0};

void in_child() { forks.fetch_add(1, std::memory_order_relaxed); }

}  // namespace

NoSignals::NoSignals() {
  sigset_t all;
  ::sigfillset(&all);
  // What a thread does wrong itself is for handlers of such, wherever it happens.
  for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) ::sigdelset(&all, own);
  ::pthread_sigmask(SIG_BLOCK, &all, &before_);
}

NoSignals::~NoSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

Birth::Birth() {
  static const int watched = ::pthread_atfork(nullptr, nullptr, in_child);
  (void)watched;
  generation_ = forks.load(std::memory_order_relaxed);
}

bool Birth::inherited() const { return forks.load(std::memory_order_relaxed) != generation_; }

}  // namespace tcpx
