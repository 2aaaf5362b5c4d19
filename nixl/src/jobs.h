// Runs what may block on threads of its own, so that a caller's thread never does. Knows nothing of engines or peers.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>

namespace tcpx {

/// Threads that exist only while there is work. A job must own what it uses: it may outlive this object.
class Jobs {
 public:
  /// At most so many threads; further jobs wait for one another.
  explicit Jobs(size_t most = 64);
  /// Leaves behind what still runs; jobs that have not begun are dropped.
  ~Jobs();
  Jobs(const Jobs &) = delete;
  void operator=(const Jobs &) = delete;

  /// False when no thread can be had; the job is dropped then.
  bool run(std::function<void()> job);
  /// Waits until nothing runs. False when the time was over first.
  bool wait(std::chrono::milliseconds limit);

 private:
  struct Shared;
  static void work(std::shared_ptr<Shared> shared);

  const std::shared_ptr<Shared> shared_;
};

}  // namespace tcpx
