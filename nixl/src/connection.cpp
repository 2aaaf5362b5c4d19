// SPDX-License-Identifier: Apache-2.0

#include "connection.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

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
  // One write, so that lines of several threads do not mix.
  const std::string line = std::string("[TCPX backend] ") + level + ": " + text + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void Connection::close() {
  if (!closed_.exchange(true)) uccl_engine_conn_destroy(conn_);
}

nixl_status_t Connection::outcome(int status) {
  // After close() the engine no longer knows the handle. Why it was closed says more than that.
  if (status < 0 && closed_.load()) return lost_.load() ? NIXL_ERR_REMOTE_DISCONNECT : NIXL_ERR_CANCELED;
  nixl_status_t result = to_nixl(status);
  switch (status) {
    case UCCL_ERR_PLUGIN:
    case UCCL_ERR_SYSTEM:
      // How a network plugin reports that the peer is gone depends on the plugin. If the connection ended with it, that is what it means.
      if (!alive(conn_)) result = NIXL_ERR_REMOTE_DISCONNECT;
      break;
    case UCCL_ERR_CANCELED:
    case UCCL_ERR_PROTOCOL:
    case UCCL_ERR_GPU:
    case UCCL_ERR_INTERNAL:
      if (!alive(conn_)) lost_.store(true);
      break;
    default: break;
  }
  if (result == NIXL_ERR_REMOTE_DISCONNECT) lost_.store(true);
  return result;
}

void Connection::measured(nixl_xfer_op_t operation, size_t bytes, double seconds, double uncertainty) {
  const std::lock_guard<std::mutex> guard(cost_lock_);
  (operation == NIXL_READ ? read_cost_ : write_cost_).add(static_cast<double>(bytes), seconds, uncertainty);
}

std::optional<CostModel::Estimate> Connection::estimate(nixl_xfer_op_t operation, size_t bytes) const {
  const std::lock_guard<std::mutex> guard(cost_lock_);
  return (operation == NIXL_READ ? read_cost_ : write_cost_).estimate(static_cast<double>(bytes));
}

namespace {

/// "host:port?gpu". The host may be an IPv6 address, bare or in brackets, and the GPU's PCI address has colons too.
bool parse_info(const std::string &info, std::string &host, int &port, std::string &gpu) {
  const size_t question = info.find('?');
  const std::string address = info.substr(0, question);
  gpu = question == std::string::npos ? "" : info.substr(question + 1);
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0) return false;
  host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  const std::string digits = address.substr(colon + 1);
  if (digits.empty() || digits.size() > 5 || digits.find_first_not_of("0123456789") != std::string::npos) return false;
  port = std::atoi(digits.c_str());
  return port >= 1 && port <= 65535 && host.find('\0') == std::string::npos;
}

}  // namespace

std::shared_ptr<Peers::Peer> Peers::lookup(const std::string &agent) const {
  const std::lock_guard<std::mutex> guard(lock_);
  const auto found = peers_.find(agent);
  return found == peers_.end() ? nullptr : found->second;
}

nixl_status_t Peers::remember(const std::string &agent, const std::string &info) {
  std::string host, gpu;
  int port = 0;
  if (!parse_info(info, host, port, gpu)) {
    log_line("error", "connection info of agent '" + agent + "' is not host:port?gpu: '" + info + "'");
    return NIXL_ERR_MISMATCH;
  }
  std::shared_ptr<Peer> peer;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    auto &entry = peers_[agent];
    if (!entry) entry = std::make_shared<Peer>();
    peer = entry;
  }
  std::shared_ptr<Connection> stale;
  {
    const std::lock_guard<std::mutex> guard(peer->lock);
    if (peer->info != info) stale.swap(peer->connection);
    peer->info = info;
  }
  if (stale) stale->close();
  return NIXL_SUCCESS;
}

nixl_status_t Peers::make(const std::string &agent, Peer &peer, std::shared_ptr<Connection> &out) {
  if (peer.connection) {
    peer.connection->close();
    peer.connection.reset();
  }
  std::string host, gpu;
  int port = 0;
  if (!parse_info(peer.info, host, port, gpu)) return NIXL_ERR_MISMATCH;
  uccl_conn_t *conn = uccl_engine_connect(engine_, host.c_str(), gpu.c_str(), port, agent == local_agent_);
  if (!conn) {
    log_line("error", "cannot connect to agent '" + agent + "' at " + peer.info + ": " + uccl_engine_last_error());
    return NIXL_ERR_REMOTE_DISCONNECT;
  }
  peer.connection = std::make_shared<Connection>(conn);
  peer.retry = false;
  out = peer.connection;
  return NIXL_SUCCESS;
}

nixl_status_t Peers::connect(const std::string &agent, std::shared_ptr<Connection> &out) {
  const std::shared_ptr<Peer> peer = lookup(agent);
  if (!peer) return NIXL_ERR_NOT_FOUND;
  const std::lock_guard<std::mutex> guard(peer->lock);
  if (!peer->connection || !peer->connection->usable() || !alive(peer->connection->get())) return make(agent, *peer, out);
  out = peer->connection;
  return NIXL_SUCCESS;
}

nixl_status_t Peers::open(const std::string &agent, std::shared_ptr<Connection> &out) {
  const std::shared_ptr<Peer> peer = lookup(agent);
  if (!peer) return NIXL_ERR_NOT_FOUND;
  const std::lock_guard<std::mutex> guard(peer->lock);
  if (!peer->connection) return make(agent, *peer, out);
  if (!peer->connection->usable() || (peer->retry && !alive(peer->connection->get()))) {
    if (!peer->retry && agent != local_agent_) return NIXL_ERR_REMOTE_DISCONNECT;
    peer->retry = false;
    return make(agent, *peer, out);
  }
  peer->retry = false;
  out = peer->connection;
  return NIXL_SUCCESS;
}

void Peers::refreshed(const std::string &agent) {
  const std::shared_ptr<Peer> peer = lookup(agent);
  if (!peer) return;
  const std::lock_guard<std::mutex> guard(peer->lock);
  peer->retry = true;
}

nixl_status_t Peers::find(const std::string &agent, std::shared_ptr<Connection> &out) const {
  const std::shared_ptr<Peer> peer = lookup(agent);
  if (!peer) return NIXL_ERR_NOT_FOUND;
  const std::lock_guard<std::mutex> guard(peer->lock);
  if (!peer->connection) return NIXL_ERR_NOT_FOUND;
  out = peer->connection;
  return NIXL_SUCCESS;
}

nixl_status_t Peers::disconnect(const std::string &agent) {
  const std::shared_ptr<Peer> peer = lookup(agent);
  if (!peer) return NIXL_ERR_NOT_FOUND;
  std::shared_ptr<Connection> closing;
  {
    const std::lock_guard<std::mutex> guard(peer->lock);
    closing.swap(peer->connection);
  }
  if (!closing) return NIXL_ERR_NOT_FOUND;
  closing->close();
  return NIXL_SUCCESS;
}

void Peers::close_all() {
  std::vector<std::shared_ptr<Peer>> all;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    for (auto &entry : peers_) all.push_back(entry.second);
    peers_.clear();
  }
  for (auto &peer : all) {
    const std::lock_guard<std::mutex> guard(peer->lock);
    if (peer->connection) peer->connection->close();
    peer->connection.reset();
  }
}

}  // namespace tcpx
