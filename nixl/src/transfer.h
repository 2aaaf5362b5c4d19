// A transfer request: what moves where, and how far it is. Owned by NIXL between prepXfer and releaseReqH. Any number of threads may ask how
// it stands; no thread may use it while it goes. It may go while the transfer is in flight: the engine has copies of all it needs, and the
// regions are in use until it is over.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "backend/backend_plugin.h"
#include "connection.h"
#include "peers.h"
#include "uccl_engine.h"

namespace tcpx {

/// Local memory of this agent, registered: host memory once for all registrations of the same bytes.
struct LocalMemory final : nixlBackendMD {
  using Range = std::tuple<nixl_mem_t, uintptr_t, size_t>;

  explicit LocalMemory(const Range &range) : nixlBackendMD(true), range(range) {}

  const Range range;
  uccl_mr_t region = 0;
  FifoItem item{};
  /// Guarded by its owner.
  size_t uses = 1;
};

/// Memory that a transfer reads or writes remotely: another agent's, or this agent's own for a transfer to itself.
struct RemoteMemory final : nixlBackendMD {
  RemoteMemory() : nixlBackendMD(false) {}
  FifoItem item{};
};

struct FreeList {
  void operator()(uccl_list_t *list) const { uccl_engine_list_free(list); }
};

class Transfer final : public nixlBackendReqH {
 public:
  Transfer(nixl_xfer_op_t operation, std::shared_ptr<Peer> peer) : operation_(operation), peer_(std::move(peer)) {}

  /// Takes over the descriptors. Descriptors that are contiguous in both memories become one segment.
  nixl_status_t describe(const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote);

  /// Works with `peer` from now on; false when it did so already.
  bool use(std::shared_ptr<Peer> peer);

  /// Starts it, or starts it again after it ended. Without a connection it waits for one, for as long as the peers' patience.
  nixl_status_t post(Peers &peers, const nixl_opt_b_args_t *args);
  /// Where it stands. Its notification is sent once, when it is complete.
  nixl_status_t check(Peers &peers);

 private:
  enum class Phase { kOver, kWaiting, kRunning };

  nixl_status_t begin(Peers &peers);
  nixl_status_t ended(Peers &peers, Clock::time_point asked);
  nixl_status_t over(nixl_status_t result);
  bool refusal_stands(Clock::time_point now);

  const nixl_xfer_op_t operation_;
  /// Agents need not keep threads from each other here, and two that see the end at once would both send the notification.
  std::mutex lock_;
  std::shared_ptr<Peer> peer_;
  /// That of the last start. It stays when it is lost: how the transfer ended is its to say.
  std::shared_ptr<Connection> connection_;
  /// What moves, as the engine keeps it: a start has nothing left to convert.
  std::unique_ptr<uccl_list_t, FreeList> list_;
  size_t bytes_ = 0;

  Phase phase_ = Phase::kOver;
  uint64_t id_ = 0;
  nixl_status_t result_ = NIXL_ERR_NOT_POSTED;
  bool has_message_ = false;
  std::string message_;
  Clock::time_point started_, last_seen_running_, wait_until_;
  /// When the peer's refusal was first seen; zero: it was not.
  Clock::time_point refused_;
};

}  // namespace tcpx
