// SPDX-License-Identifier: Apache-2.0

#include "connection.h"

#include <cstdio>

namespace tcpx {

nixl_status_t to_nixl(int status) {
  switch (status) {
    case UCCL_OK: return NIXL_SUCCESS;
    case UCCL_IN_PROGRESS: return NIXL_IN_PROG;
    case UCCL_ERR_INVALID_ARGUMENT: return NIXL_ERR_INVALID_PARAM;
    case UCCL_ERR_NOT_FOUND: return NIXL_ERR_NOT_FOUND;
    case UCCL_ERR_UNSUPPORTED: return NIXL_ERR_NOT_SUPPORTED;
    case UCCL_ERR_CANCELED: return NIXL_ERR_CANCELED;
    // The engine fails the whole connection when a deadline passes, so a late peer and a dead one are the same from here.
    case UCCL_ERR_TIMED_OUT:
    case UCCL_ERR_UNREACHABLE:
    case UCCL_ERR_REMOTE_DISCONNECT: return NIXL_ERR_REMOTE_DISCONNECT;
    case UCCL_ERR_AUTH:
    case UCCL_ERR_REMOTE_ACCESS: return NIXL_ERR_NOT_ALLOWED;
    case UCCL_ERR_PROTOCOL:
    case UCCL_ERR_TRUNCATED: return NIXL_ERR_MISMATCH;
    default: return status > 0 ? NIXL_IN_PROG : NIXL_ERR_BACKEND;
  }
}

bool alive(uccl_conn_t *conn) { return uccl_engine_conn_status(conn) == UCCL_OK; }

void log_line(const char *level, const std::string &text) {
  constexpr size_t most = 1000;
  std::string shown = text.substr(0, most);
  for (char &c : shown) {
    if (static_cast<unsigned char>(c) < ' ' || static_cast<unsigned char>(c) >= 0x7f) c = '?';
  }
  if (text.size() > most) shown += "... (" + std::to_string(text.size()) + " bytes)";
  // One write, so that lines of several threads do not mix.
  const std::string line = std::string("[TCPX backend] ") + level + ": " + shown + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void Connection::close() {
  if (!closed_.exchange(true)) uccl_engine_conn_destroy(conn_);
}

bool Connection::check_alive() {
  if (!usable()) return false;
  if (alive(conn_)) return true;
  lost_.store(true);
  return false;
}

nixl_status_t Connection::outcome(int status) {
  if (status >= 0) return to_nixl(status);
  // After close() the engine no longer knows the handle. Why it was closed says more than that.
  if (closed_.load()) return lost_.load() ? NIXL_ERR_REMOTE_DISCONNECT : NIXL_ERR_CANCELED;
  const nixl_status_t result = to_nixl(status);
  switch (status) {
    // Wrong use, or a refusal: these say nothing about the connection.
    case UCCL_ERR_INVALID_ARGUMENT:
    case UCCL_ERR_REMOTE_ACCESS:
    case UCCL_ERR_TRUNCATED:
    case UCCL_ERR_UNSUPPORTED:
    case UCCL_ERR_RESOURCE: return result;
    default: break;
  }
  if (check_alive()) return result;
  // Plugins report a disconnected peer in different ways. If the connection ended with the error, the peer has disconnected.
  return status == UCCL_ERR_PLUGIN || status == UCCL_ERR_SYSTEM ? NIXL_ERR_REMOTE_DISCONNECT : result;
}

bool Connection::has_room(size_t bytes) {
  // Half of what the engine takes before it keeps a caller; and what a notification has beside its bytes.
  constexpr size_t most = 128 << 20, overhead = 64;
  const std::lock_guard<std::mutex> guard(room_lock_);
  if (leaving_ + bytes + overhead > most) {
    uccl_conn_stats_t stats{};
    stats.size = sizeof stats;
    // The next call reports a lost connection.
    if (uccl_engine_conn_stats(conn_, &stats) != UCCL_OK) return true;
    leaving_ = stats.backlog_bytes;
    if (leaving_ + bytes + overhead > most) return false;
  }
  leaving_ += bytes + overhead;
  return true;
}

void Connection::measured(nixl_xfer_op_t operation, size_t bytes, double seconds, double uncertainty) {
  const std::lock_guard<std::mutex> guard(cost_lock_);
  (operation == NIXL_READ ? read_cost_ : write_cost_).add(static_cast<double>(bytes), seconds, uncertainty);
}

std::optional<CostModel::Estimate> Connection::estimate(nixl_xfer_op_t operation, size_t bytes) const {
  const std::lock_guard<std::mutex> guard(cost_lock_);
  return (operation == NIXL_READ ? read_cost_ : write_cost_).estimate(static_cast<double>(bytes));
}

}  // namespace tcpx
