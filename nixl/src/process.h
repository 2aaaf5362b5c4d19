// Signals, and whether this process was forked since an object was made. Threads do not survive a fork and locks may be held by ones that did not,
// so what a child inherits can only be left alone. Knows nothing of backends.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <csignal>

namespace tcpx {

/// Blocks signals in the calling thread while it lives, and so for good in the threads that are started meanwhile: handlers are the
/// application's, and what it waits for in its own threads is not to end up in the plugin's.
class NoSignals {
 public:
  NoSignals();
  ~NoSignals();
  NoSignals(const NoSignals &) = delete;
  void operator=(const NoSignals &) = delete;

 private:
  sigset_t before_;
};

/// A mark of the process that made it.
class Birth {
 public:
  Birth();
  /// The object that holds this mark came into this process by fork.
  bool inherited() const;

 private:
  unsigned generation_;
};

}  // namespace tcpx
