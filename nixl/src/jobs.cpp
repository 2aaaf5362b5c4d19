// SPDX-License-Identifier: Apache-2.0

#include "jobs.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "process.h"

namespace tcpx {

struct Jobs::Shared {
  explicit Shared(size_t most) : most(most) {}

  const size_t most;
  std::mutex lock;
  std::condition_variable changed;
  std::deque<std::function<void()>> waiting;
  size_t threads = 0;
};

Jobs::Jobs(size_t most) : shared_(std::make_shared<Shared>(most)) {}

Jobs::~Jobs() {
  std::deque<std::function<void()>> dropped;
  const std::lock_guard<std::mutex> guard(shared_->lock);
  dropped.swap(shared_->waiting);
}

bool Jobs::run(std::function<void()> job) {
  const std::lock_guard<std::mutex> guard(shared_->lock);
  shared_->waiting.push_back(std::move(job));
  if (shared_->threads >= shared_->most) return true;
  const NoSignals here;
  try {
    std::thread(work, shared_).detach();
    ++shared_->threads;
  } catch (const std::system_error &) {
    // A running thread takes it later; without one it would never run.
    if (shared_->threads == 0) {
      shared_->waiting.pop_back();
      return false;
    }
  }
  return true;
}

bool Jobs::wait(std::chrono::milliseconds limit) {
  std::unique_lock<std::mutex> guard(shared_->lock);
  return shared_->changed.wait_for(guard, limit, [this] { return shared_->threads == 0; });
}

void Jobs::work(std::shared_ptr<Shared> shared) {
  std::unique_lock<std::mutex> guard(shared->lock);
  while (!shared->waiting.empty()) {
    std::function<void()> job = std::move(shared->waiting.front());
    shared->waiting.pop_front();
    guard.unlock();
    try {
      job();
    } catch (...) {
      // Out of memory; what the job stood for is tried again by its owner.
    }
    job = nullptr;
    guard.lock();
  }
  --shared->threads;
  shared->changed.notify_all();
}

}  // namespace tcpx
