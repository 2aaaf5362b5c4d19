// SPDX-License-Identifier: Apache-2.0

#include "peers.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "reach.h"

namespace tcpx {

namespace {

using std::chrono::milliseconds;

/// Longest wait of a caller's thread for a connect.
constexpr milliseconds kConnectWait{900};
/// Between attempts: the first pause, doubled with each failure, up to the longest. Work that waits shortens it to the first.
constexpr milliseconds kFirstPause{100}, kLongestPause{10'000};
/// How long an address that was right before may take to answer.
constexpr milliseconds kReach{1500};
/// How long the peer may take to show that it is the right instance.
constexpr int64_t kIdentityMs = 5000;
/// A connection that lived shorter than this counts as one more failure.
constexpr milliseconds kStable{5000};
constexpr milliseconds kTend{500};
/// Lines about one peer are at least this far apart.
constexpr milliseconds kLines{5000};
/// Bytes of a text that is not understood.
constexpr size_t kShown = 64;
constexpr size_t kOutboxBytes = 64 << 20, kOutboxCount = 4096;
/// Name and message of a notification together, as the engine takes them.
constexpr size_t kNotification = 64 << 20;
/// Between two looks whether a busy connection takes what waits.
constexpr milliseconds kBusy{20};

/// Work waits for a connection as long as a transfer may stand still. The number may have a suffix, as the engine reads it; what the engine
/// does not take keeps it from being made.
Clock::duration patience_of_environment() {
  constexpr milliseconds standard{10'000}, day{86'400'000};
  const char *text = std::getenv("UCCL_TCPX_TRANSFER_TIMEOUT_MS");
  if (!text) return standard;
  char *end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (value <= 0 || value > day.count()) return standard;
  const int shift = *end == 'k' || *end == 'K' ? 10 : *end == 'm' || *end == 'M' ? 20 : *end == 'g' || *end == 'G' ? 30 : 0;
  return std::min(milliseconds(value << shift), day);
}

Clock::duration pause_after(unsigned failures) { return std::min(kFirstPause * (1u << std::min(failures, 10u)), kLongestPause); }

/// What a failed connect means. The peer may end while it is set up, and how that shows depends on the moment.
nixl_status_t connect_failure(int status) {
  switch (status) {
    case UCCL_ERR_AUTH:
    case UCCL_ERR_INVALID_ARGUMENT:
    case UCCL_ERR_UNSUPPORTED:
    case UCCL_ERR_RESOURCE:
    case UCCL_ERR_PROTOCOL: return to_nixl(status);
    default: return NIXL_ERR_REMOTE_DISCONNECT;
  }
}

/// One line about a peer, unless there was one a moment ago: how often a peer comes and goes is its own choice. Whether it was said.
bool say_locked(Peer &peer, const char *level, const std::string &text) {
  const auto now = Clock::now();
  if (peer.last_line.time_since_epoch().count() != 0 && now - peer.last_line < kLines) return false;
  peer.last_line = now;
  log_line(level, "agent '" + peer.name + "' at " + peer.text.substr(0, peer.text.find('#')) + ": " + text);
  return true;
}

}  // namespace

Peers::Peers(const std::string &local_agent, uccl_engine_t *engine, std::shared_ptr<Identity> identity)
    : local_agent_(local_agent), engine_(engine), identity_(std::move(identity)), patience_(patience_of_environment()) {}

// ---- Which peers there are ------------------------------------------------------------------------------------------------------

std::shared_ptr<Peer> Peers::lookup(const std::string &agent) const {
  const std::lock_guard<std::mutex> guard(lock_);
  const auto found = peers_.find(agent);
  return found == peers_.end() ? nullptr : found->second;
}

nixl_status_t Peers::remember(const std::string &agent, const std::string &text) {
  auto info = ConnInfo::parse(text);
  if (!info) {
    log_line("error", "agent '" + agent + "' has another plugin under the name of this backend: its connection info is not host:port?gpu#identity: '" +
                          text.substr(0, kShown) + "'");
    return NIXL_ERR_MISMATCH;
  }
  std::shared_ptr<Peer> peer;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    auto &entry = peers_[agent];
    if (!entry) entry = std::make_shared<Peer>(agent);
    peer = entry;
  }
  const std::lock_guard<std::mutex> guard(peer->lock);
  if (peer->text == text) return NIXL_SUCCESS;
  if (!peer->text.empty()) drop_outbox_locked(*peer, "it is another instance now");
  close_locked(*peer, Peer::State::kIdle);
  peer->info = std::move(*info);
  peer->text = text;
  peer->met = peer->hopeless = false;
  peer->failures = 0;
  peer->failure_text.clear();
  return NIXL_SUCCESS;
}

nixl_status_t Peers::forget(const std::string &agent) {
  std::shared_ptr<Peer> peer;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = peers_.find(agent);
    if (found == peers_.end()) return NIXL_ERR_NOT_FOUND;
    peer = found->second;
    peers_.erase(found);
  }
  const std::lock_guard<std::mutex> guard(peer->lock);
  drop_outbox_locked(*peer, "it was removed");
  close_locked(*peer, Peer::State::kForgotten);
  return NIXL_SUCCESS;
}

nixl_status_t Peers::rest(const std::string &agent) {
  const std::shared_ptr<Peer> peer = lookup(agent);
  if (!peer) return NIXL_ERR_NOT_FOUND;
  const std::lock_guard<std::mutex> guard(peer->lock);
  close_locked(*peer, Peer::State::kIdle);
  return NIXL_SUCCESS;
}

/// Ends what there is: attempts under way come to nothing, transfers in flight are cancelled.
void Peers::close_locked(Peer &peer, Peer::State state) {
  ++peer.epoch;
  peer.attempting = false;
  peer.state = state;
  if (peer.connection) {
    auto connection = std::move(peer.connection);
    // Closing says goodbye first, which may take a while.
    if (!jobs_.run([connection] { connection->close(); })) connection->close();
  }
  peer.changed.notify_all();
}

void Peers::stop() {
  stopped_.store(true);
  std::vector<std::shared_ptr<Peer>> all;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    for (auto &entry : peers_) all.push_back(entry.second);
    peers_.clear();
  }
  for (auto &peer : all) {
    const std::lock_guard<std::mutex> guard(peer->lock);
    if (!peer->outbox.empty()) drop_outbox_locked(*peer, "this agent ends");
    close_locked(*peer, Peer::State::kForgotten);
  }
}

bool Peers::wait(milliseconds limit) {
  const auto until = Clock::now() + limit;
  return jobs_.wait(limit) && retries_.wait(std::chrono::duration_cast<milliseconds>(std::max<Clock::duration>(until - Clock::now(), {})));
}

// ---- Work -----------------------------------------------------------------------------------------------------------------------

nixl_status_t Peers::connect(const std::string &agent) {
  const std::shared_ptr<Peer> peer = lookup(agent);
  if (!peer) return NIXL_ERR_NOT_FOUND;
  std::unique_lock<std::mutex> guard(peer->lock);
  if (peer->state == Peer::State::kUp) {
    if (peer->connection->check_alive()) return NIXL_SUCCESS;
    lost_locked(*peer);
  } else if (peer->state == Peer::State::kForgotten) {
    return NIXL_ERR_NOT_FOUND;
  }
  peer->state = Peer::State::kDown;
  peer->hopeless = false;
  attempt_locked(*peer, true);
  peer->changed.wait_for(guard, kConnectWait, [&] { return !peer->attempting; });
  if (peer->attempting || peer->state == Peer::State::kUp) return NIXL_SUCCESS;
  return peer->failure;
}

nixl_status_t Peers::acquire(Peer &peer, std::shared_ptr<Connection> &out) {
  const std::lock_guard<std::mutex> guard(peer.lock);
  switch (peer.state) {
    case Peer::State::kUp:
      if (peer.connection->usable()) {
        out = peer.connection;
        return NIXL_SUCCESS;
      }
      lost_locked(peer);
      break;
    case Peer::State::kReplaced: return NIXL_ERR_REMOTE_DISCONNECT;
    case Peer::State::kForgotten: return NIXL_ERR_NOT_FOUND;
    case Peer::State::kIdle:
      peer.state = Peer::State::kDown;
      peer.hopeless = false;
      break;
    case Peer::State::kDown: break;
  }
  if (Clock::now() >= peer.last_attempt + kFirstPause) attempt_locked(peer);
  return peer.hopeless ? peer.failure : NIXL_IN_PROG;
}

nixl_status_t Peers::notify(Peer &peer, const std::string &message) {
  const size_t size = local_agent_.size() + message.size();
  if (size > kNotification) return NIXL_ERR_INVALID_PARAM;
  std::shared_ptr<Connection> connection;
  // The second round is for a connection whose loss shows only now.
  for (int round = 0; round < 2; ++round) {
    nixl_status_t status = acquire(peer, connection);
    if (status == NIXL_IN_PROG) break;
    if (status != NIXL_SUCCESS) return status;
    // Behind what waits already, and not where the engine would keep the caller.
    if (!is_clear(peer) || !connection->has_room(size)) break;
    status = connection->outcome(
        uccl_engine_send_notif_bytes(connection->get(), local_agent_.data(), local_agent_.size(), message.data(), message.size()));
    if (status == NIXL_SUCCESS || connection->usable()) return status;
  }
  const std::lock_guard<std::mutex> guard(peer.lock);
  if (peer.state == Peer::State::kForgotten) return NIXL_ERR_NOT_FOUND;
  if (peer.hopeless || peer.state == Peer::State::kReplaced) return peer.failure;
  if (peer.outbox.size() >= kOutboxCount || peer.outbox_bytes + message.size() > kOutboxBytes) {
    return peer.state == Peer::State::kUp ? NIXL_ERR_BACKEND : NIXL_ERR_REMOTE_DISCONNECT;
  }
  peer.outbox_bytes += message.size();
  peer.outbox.push_back({message, Clock::now() + patience_});
  // It may have come up between the two looks.
  if (peer.state == Peer::State::kUp && !flush_locked(peer)) lost_locked(peer);
  return NIXL_SUCCESS;
}

/// Whether nothing waits for the connection to that peer.
bool Peers::is_clear(Peer &peer) {
  const std::lock_guard<std::mutex> guard(peer.lock);
  return peer.outbox.empty();
}

/// Sends what waits, as far as the connection takes it. False when it is lost again; the rest keeps waiting.
bool Peers::flush_locked(Peer &peer) {
  while (!peer.outbox.empty()) {
    const std::string &message = peer.outbox.front().message;
    if (!peer.connection->has_room(local_agent_.size() + message.size())) return true;
    const int status = uccl_engine_send_notif_bytes(peer.connection->get(), local_agent_.data(), local_agent_.size(), message.data(),
                                                    message.size());
    if (status != UCCL_OK && !peer.connection->check_alive()) return false;
    if (status != UCCL_OK) say_locked(peer, "warning", std::string("a notification is dropped: ") + uccl_engine_last_error());
    peer.outbox_bytes -= message.size();
    peer.outbox.pop_front();
  }
  return true;
}

void Peers::drop_outbox_locked(Peer &peer, const char *why) {
  peer.dropped += peer.outbox.size();
  peer.outbox.clear();
  peer.outbox_bytes = 0;
  say_dropped_locked(peer, why);
}

/// Those whose time is over; each has its own.
void Peers::drop_late_locked(Peer &peer, Clock::time_point now) {
  for (; !peer.outbox.empty() && now >= peer.outbox.front().until; ++peer.dropped) {
    peer.outbox_bytes -= peer.outbox.front().message.size();
    peer.outbox.pop_front();
  }
  say_dropped_locked(peer, "it was not reached in time");
}

/// What could not be said at once is counted and said later.
void Peers::say_dropped_locked(Peer &peer, const char *why) {
  if (peer.dropped == 0) return;
  if (say_locked(peer, "warning", std::to_string(peer.dropped) + " notifications are dropped: " + why)) peer.dropped = 0;
}

// ---- Connecting -----------------------------------------------------------------------------------------------------------------

void Peers::lost_locked(Peer &peer) {
  const auto now = Clock::now();
  if (now - peer.up_since > kStable) peer.failures = 0;
  peer.loss_unsaid = true;
  peer.state = Peer::State::kDown;
  peer.hopeless = false;
  peer.failure = NIXL_ERR_REMOTE_DISCONNECT;
  // Transfers that were in flight still ask this connection how they ended.
  jobs_.run([connection = std::move(peer.connection)]() mutable { connection.reset(); });
  peer.connection.reset();
  peer.next_attempt = peer.failures == 0 ? now : now + pause_after(peer.failures);
  if (peer.failures == 0) attempt_locked(peer);
}

void Peers::attempt_locked(Peer &peer, bool asked) {
  if (peer.attempting || stopped_.load()) return;
  auto self = shared_from_this();
  auto holder = peer.shared_from_this();
  const uint64_t epoch = peer.epoch;
  Jobs &jobs = peer.failures > 0 && !peer.met && !asked ? retries_ : jobs_;
  peer.attempting = jobs.run([self, holder, epoch, info = peer.info, met = peer.met] { self->attempt(*holder, epoch, info, met); });
}

void Peers::attempt(Peer &peer, uint64_t epoch, const ConnInfo &info, bool met) {
  Outcome outcome;
  if (!stopped_.load()) outcome = make(peer.name, info, met);
  {
    const std::lock_guard<std::mutex> guard(peer.lock);
    if (!stopped_.load() && peer.epoch == epoch) {
      arrived_locked(peer, outcome);
      return;
    }
  }
  if (outcome.conn) uccl_engine_conn_destroy(outcome.conn);
}

void Peers::arrived_locked(Peer &peer, const Outcome &outcome) {
  const auto now = Clock::now();
  const bool again = peer.met;
  peer.attempting = false;
  peer.last_attempt = now;
  if (outcome.conn) {
    peer.connection = std::make_shared<Connection>(outcome.conn);
    peer.state = Peer::State::kUp;
    peer.met = true;
    peer.hopeless = false;
    peer.failure_text.clear();
    peer.up_since = now;
    if (std::exchange(peer.loss_unsaid, false)) {
      say_locked(peer, "warning", "the connection was lost, and is up again");
    } else if (again) {
      say_locked(peer, "info", "connected again");
    }
    if (!flush_locked(peer)) lost_locked(peer);
    peer.changed.notify_all();
    return;
  }
  ++peer.failures;
  peer.hopeless = outcome.hopeless || outcome.replaced;
  peer.failure = outcome.status;
  peer.next_attempt = now + pause_after(peer.failures);
  if (outcome.replaced) peer.state = Peer::State::kReplaced;
  const bool lost = std::exchange(peer.loss_unsaid, false);
  if (peer.failure_text != outcome.text) {
    peer.failure_text = outcome.text;
    const std::string before = lost && !outcome.ended ? "the connection is lost and is made again in the background: " : "";
    say_locked(peer, outcome.replaced ? "error" : outcome.ended ? "info" : "warning", before + outcome.text);
  }
  if (peer.hopeless) drop_outbox_locked(peer, outcome.text.c_str());
  peer.changed.notify_all();
}

Peers::Outcome Peers::make(const std::string &name, const ConnInfo &info, bool met) {
  Outcome outcome;
  if (met) {
    // A connect to a host that is silent takes the whole connect timeout, and the link may be back long before.
    const Reach answer = reach(info.host, info.port, kReach);
    outcome.hopeless = outcome.ended = answer == Reach::kRefused;
    if (answer != Reach::kAnswers) {
      outcome.text = outcome.ended ? "it has ended: nothing listens there now" : "the host does not answer";
      return outcome;
    }
  }
  uccl_conn_t *const conn = uccl_engine_connect(engine_, info.host.c_str(), info.gpu.c_str(), info.port, name == local_agent_);
  if (!conn) {
    const int status = uccl_engine_last_status();
    outcome.text = std::string("cannot connect: ") + uccl_engine_last_error();
    outcome.status = connect_failure(status);
    // Waiting helps if no host has answered yet. An answer would be the same again.
    outcome.hopeless = !met || status == UCCL_ERR_AUTH;
    return outcome;
  }
  const int answer = info.identity ? ask_identity(conn, *info.identity) : UCCL_OK;
  if (answer == UCCL_OK) {
    outcome.conn = conn;
    return outcome;
  }
  uccl_engine_conn_destroy(conn);
  outcome.replaced = answer == UCCL_ERR_REMOTE_ACCESS;
  outcome.text = outcome.replaced ? "there is another instance at its address: it was started again, and its new metadata must be loaded"
                                  : "the connection was lost as soon as it was made";
  return outcome;
}

int Peers::ask_identity(uccl_conn_t *conn, const FifoItem &identity) {
  uint64_t id = 0;
  const int status = uccl_engine_read(conn, identity_->read_region, identity_->read, 1, identity, &id);
  return status == UCCL_OK ? uccl_engine_wait(conn, id, kIdentityMs) : status;
}

Clock::duration Peers::tend() {
  std::vector<std::shared_ptr<Peer>> all;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    all.reserve(peers_.size());
    for (auto &entry : peers_) all.push_back(entry.second);
  }
  Clock::duration next = kTend;
  for (const auto &peer : all) {
    std::unique_lock<std::mutex> guard(peer->lock);
    if (peer->state == Peer::State::kUp) {
      const auto connection = peer->connection;
      guard.unlock();
      const bool good = connection->check_alive();
      guard.lock();
      if (!good && peer->connection == connection && peer->state == Peer::State::kUp) lost_locked(*peer);
    }
    const auto now = Clock::now();
    if (peer->state == Peer::State::kDown && !peer->attempting) {
      if (now >= peer->next_attempt) {
        attempt_locked(*peer);
      } else {
        next = std::min<Clock::duration>(next, peer->next_attempt - now);
      }
    }
    if (peer->state != Peer::State::kUp) {
      drop_late_locked(*peer, now);
      continue;
    }
    say_dropped_locked(*peer, "it was not reached in time");
    if (!peer->outbox.empty()) {
      // The engine ends a connection that takes nothing.
      if (!flush_locked(*peer)) lost_locked(*peer);
      next = std::min<Clock::duration>(next, kBusy);
    }
  }
  return std::max<Clock::duration>(next, milliseconds(10));
}

}  // namespace tcpx
