// A transfer request: what moves where, and how far it is. Owned by NIXL between prepXfer and releaseReqH; one thread at a time.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend_plugin.h"
#include "connection.h"
#include "uccl_engine.h"

namespace tcpx {

/// Local memory of this agent, registered.
struct LocalMemory final : nixlBackendMD {
  LocalMemory() : nixlBackendMD(true) {}
  uccl_mr_t region = 0;
  FifoItem item{};
};

/// Memory as the other side of a transfer sees it: another agent's, or this agent's own for a transfer to itself.
struct RemoteMemory final : nixlBackendMD {
  RemoteMemory() : nixlBackendMD(false) {}
  FifoItem item{};
};

class Transfer final : public nixlBackendReqH {
 public:
  using Clock = std::chrono::steady_clock;

  Transfer(nixl_xfer_op_t operation, std::shared_ptr<Connection> connection) : operation_(operation), connection_(std::move(connection)) {}
  ~Transfer() override { finish(); }

  /// Takes over the descriptors. Neighbours that continue each other on both sides become one segment.
  nixl_status_t describe(const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote);

  Connection &connection() const { return *connection_; }
  void use(std::shared_ptr<Connection> connection) { connection_ = std::move(connection); }

  /// Starts it, or starts it again after it ended.
  nixl_status_t post(const nixl_opt_b_args_t *args);
  /// Where it stands. `notify` is called once, when the transfer is complete and carries a notification.
  template <class Notify>
  nixl_status_t check(Notify &&notify);
  /// Blocks until the memory is touched no more.
  void finish();

 private:
  const nixl_xfer_op_t operation_;
  std::shared_ptr<Connection> connection_;
  std::vector<uccl_mr_t> regions_;
  std::vector<void *> addresses_;
  std::vector<size_t> sizes_;
  std::vector<FifoItem> items_;
  size_t bytes_ = 0;

  bool active_ = false;
  uint64_t id_ = 0;
  nixl_status_t result_ = NIXL_ERR_NOT_POSTED;
  bool has_message_ = false;
  std::string message_;
  Clock::time_point started_, last_seen_running_;
};

template <class Notify>
nixl_status_t Transfer::check(Notify &&notify) {
  if (!active_) return result_;
  const nixl_status_t status = connection_->outcome(uccl_engine_poll(connection_->get(), id_, nullptr));
  const auto now = Clock::now();
  if (status == NIXL_IN_PROG) {
    last_seen_running_ = now;
    return status;
  }
  active_ = false;
  result_ = status;
  if (status != NIXL_SUCCESS) return status;
  // It ended somewhere between the last look and this one.
  const double gap = std::chrono::duration<double>(now - last_seen_running_).count();
  connection_->measured(operation_, bytes_, std::chrono::duration<double>(now - started_).count() - gap / 2, gap / 2);
  if (has_message_) result_ = notify(*connection_, message_);
  return result_;
}

}  // namespace tcpx
