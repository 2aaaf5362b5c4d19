// One connection of the engine to a peer, and what its statuses mean to NIXL. Knows the engine's C API and nothing of agents' names,
// transfers or NIXL's lists.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "backend/backend_plugin.h"
#include "cost_model.h"
#include "uccl_engine.h"

namespace tcpx {

/// NIXL's status for an engine status. Everything that means "this peer can no longer be used" is a lost peer.
nixl_status_t to_nixl(int status);

/// Whether the peer is still there, as far as the engine knows. Costs no message.
bool alive(uccl_conn_t *conn);

/// One line on standard error, cut where it is long, and printable whatever a peer's words are. The engine logs what it knows itself; this is
/// for what only the plugin knows.
void log_line(const char *level, const std::string &text);

/// A connection. Request handles share it; the first to close it closes it for all, after which transfers end and memory is left
/// alone. Once lost it stays lost: a new one takes its place, and what was in flight here has failed.
class Connection {
 public:
  explicit Connection(uccl_conn_t *conn) : conn_(conn) {}
  ~Connection() { close(); }
  Connection(const Connection &) = delete;
  void operator=(const Connection &) = delete;

  uccl_conn_t *get() const { return conn_; }
  void close();

  /// Turns an engine status into NIXL's and remembers a loss.
  nixl_status_t outcome(int status);
  bool usable() const { return !lost_.load(std::memory_order_relaxed) && !closed_.load(std::memory_order_relaxed); }
  /// Asks the engine, too.
  bool check_alive();

  /// Whether a notification of so many bytes is taken at once, and takes the room for it: where too much waits to leave, the engine would
  /// keep the caller.
  bool has_room(size_t bytes);

  void measured(nixl_xfer_op_t operation, size_t bytes, double seconds, double uncertainty);
  std::optional<CostModel::Estimate> estimate(nixl_xfer_op_t operation, size_t bytes) const;

 private:
  uccl_conn_t *const conn_;
  std::atomic<bool> lost_{false};
  std::atomic<bool> closed_{false};
  std::mutex room_lock_;
  /// Bytes of notifications that may wait to leave, at most.
  size_t leaving_ = 0;
  mutable std::mutex cost_lock_;
  CostModel read_cost_, write_cost_;
};

}  // namespace tcpx
