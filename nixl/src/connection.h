// Connections of one engine to peer agents, by agent name. Knows the engine's C API and nothing of transfers or NIXL's lists.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "backend/backend_plugin.h"
#include "cost_model.h"
#include "uccl_engine.h"

namespace tcpx {

/// NIXL's status for an engine status. Everything that means "this peer cannot be worked with any more" is a lost peer.
nixl_status_t to_nixl(int status);

/// Whether the peer is still there, as far as the engine knows. Costs no message.
bool alive(uccl_conn_t *conn);

/// One line on standard error. The engine logs what it knows itself; this is for what only the plugin knows.
void log_line(const char *level, const std::string &text);

/// A connection. Request handles share it; whoever closes it first closes it for all, after which transfers end and memory is left
/// alone.
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
  bool usable() const { return !lost_.load() && !closed_.load(); }

  void measured(nixl_xfer_op_t operation, size_t bytes, double seconds, double uncertainty);
  std::optional<CostModel::Estimate> estimate(nixl_xfer_op_t operation, size_t bytes) const;

 private:
  uccl_conn_t *const conn_;
  std::atomic<bool> lost_{false};
  std::atomic<bool> closed_{false};
  mutable std::mutex cost_lock_;
  CostModel read_cost_, write_cost_;
};

/// Peers by name. All functions from any thread; a slow connect to one peer delays only users of that peer.
class Peers {
 public:
  explicit Peers(const std::string &local_agent) : local_agent_(local_agent) {}

  void set_engine(uccl_engine_t *engine) { engine_ = engine; }

  /// Remembers where `agent` can be reached. When that changed, what was connected is closed.
  nixl_status_t remember(const std::string &agent, const std::string &info);
  /// Makes the connection unless there is a good one.
  nixl_status_t connect(const std::string &agent, std::shared_ptr<Connection> &out);
  /// The connection for new work. One that was never made, or was closed, is made now; one that was lost is an error, since trying
  /// a dead host again with every request would block each of them for the connect timeout.
  nixl_status_t open(const std::string &agent, std::shared_ptr<Connection> &out);
  /// The connection as it is, nothing is made.
  nixl_status_t find(const std::string &agent, std::shared_ptr<Connection> &out) const;
  /// Fresh metadata of the agent has arrived: a lost connection may be made again.
  void refreshed(const std::string &agent);
  /// Closes; where the peer can be reached stays known, so that connect works again.
  nixl_status_t disconnect(const std::string &agent);
  void close_all();

 private:
  struct Peer {
    std::mutex lock;
    std::string info;
    std::shared_ptr<Connection> connection;
    bool retry = false;
  };

  nixl_status_t make(const std::string &agent, Peer &peer, std::shared_ptr<Connection> &out);
  std::shared_ptr<Peer> lookup(const std::string &agent) const;

  const std::string local_agent_;
  uccl_engine_t *engine_ = nullptr;
  mutable std::mutex lock_;
  std::unordered_map<std::string, std::shared_ptr<Peer>> peers_;
};

}  // namespace tcpx
