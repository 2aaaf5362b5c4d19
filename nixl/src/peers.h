// Connections of one engine to peer agents, by agent name: makes them in the background, notices when one is lost and makes it again.
// No call waits for a network, but two that say how long. Knows nothing of transfers or NIXL's lists.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "conn_info.h"
#include "connection.h"
#include "jobs.h"

namespace tcpx {

using Clock = std::chrono::steady_clock;

/// Memory that the engine holds to distinguish instances: a peer reads a byte of `item`, which only this engine grants.
struct Identity {
  alignas(64) char own[64] = {};
  alignas(64) char read[64] = {};
  uccl_mr_t own_region = 0, read_region = 0;
  FifoItem item{};
};

/// A peer agent and the state of the connection to it.
class Peer : public std::enable_shared_from_this<Peer> {
 public:
  enum class State {
    kIdle,      ///< Not connected, and not requested.
    kDown,      ///< No connection: one is being made, or will be tried again.
    kUp,        ///< Connected.
    kReplaced,  ///< At its address there is another instance: only new metadata helps.
    kForgotten, ///< Removed. Whoever still holds it looks up the name again.
  };

  explicit Peer(std::string agent) : name(std::move(agent)) {}

  const std::string name;
  std::mutex lock;
  std::condition_variable changed;
  ConnInfo info;
  std::string text;
  State state = State::kIdle;
  std::shared_ptr<Connection> connection;
  /// Counts new metadata and disconnects: what an older attempt brings is thrown away.
  uint64_t epoch = 0;
  bool attempting = false;
  /// The connection was lost. Only the next attempt shows whether that is an outage or the end of the peer.
  bool loss_unsaid = false;
  /// There was a connection to this instance, so its address is known to be right.
  bool met = false;
  /// The last attempt proved that waiting is of no use, and this is the status for it.
  bool hopeless = false;
  nixl_status_t failure = NIXL_ERR_REMOTE_DISCONNECT;
  std::string failure_text;
  unsigned failures = 0;
  Clock::time_point next_attempt, last_attempt, up_since, last_line;
  /// Notifications that wait for the connection, oldest first.
  struct Waiting {
    std::string message;
    Clock::time_point until;
  };
  std::deque<Waiting> outbox;
  size_t outbox_bytes = 0;
  /// Dropped, and not said yet.
  size_t dropped = 0;
};

/// All functions from any thread. Held by a shared pointer: attempts in the background keep it alive.
class Peers : public std::enable_shared_from_this<Peers> {
 public:
  Peers(const std::string &local_agent, uccl_engine_t *engine, std::shared_ptr<Identity> identity);

  /// Remembers where `agent` can be reached and that it is of that instance. When that changed, what was connected is closed.
  nixl_status_t remember(const std::string &agent, const std::string &text);
  /// Connects, and waits for the outcome for a second at most: success also when the attempt then goes on in the background.
  nixl_status_t connect(const std::string &agent);
  /// Closes, and forgets the agent; NIXL_ERR_NOT_FOUND for one that is not known.
  nixl_status_t forget(const std::string &agent);
  /// Closes the connection of this engine to itself; it is made again when it is needed.
  nixl_status_t rest(const std::string &agent);

  std::shared_ptr<Peer> lookup(const std::string &agent) const;
  /// The connection for new work, and NIXL_SUCCESS; NIXL_IN_PROG while it is made, which this call sets going; or why there is none.
  nixl_status_t acquire(Peer &peer, std::shared_ptr<Connection> &out);
  /// Sends a notification, or keeps it for a moment where the connection is being made or has too much to carry.
  nixl_status_t notify(Peer &peer, const std::string &message);
  /// How long work waits for a connection before it fails.
  Clock::duration patience() const { return patience_; }

  /// To be called again and again: notices losses, tries again what is due, lets go of what waited too long. The time until the next call.
  Clock::duration tend();
/// Ends all attempts. Closes everything.
  void stop();
  /// Waits until no attempt is under way; false when the time is over first.
  bool wait(std::chrono::milliseconds limit);

 private:
  struct Outcome {
    uccl_conn_t *conn = nullptr;
    bool replaced = false;
    bool ended = false;
    bool hopeless = false;
    nixl_status_t status = NIXL_ERR_REMOTE_DISCONNECT;
    std::string text;
  };

  // The functions that end in _locked are called with the peer's lock held.
  void lost_locked(Peer &peer);
  void close_locked(Peer &peer, Peer::State state);
  void attempt_locked(Peer &peer, bool asked = false);
  void drop_outbox_locked(Peer &peer, const char *why);
  void drop_late_locked(Peer &peer, Clock::time_point now);
  void say_dropped_locked(Peer &peer, const char *why);
  bool flush_locked(Peer &peer);
  static bool is_clear(Peer &peer);

  void attempt(Peer &peer, uint64_t epoch, const ConnInfo &info, bool met);
  void arrived_locked(Peer &peer, const Outcome &outcome);
  Outcome make(const std::string &name, const ConnInfo &info, bool met);
  /// UCCL_OK when the engine at the other end is the one of the identity, UCCL_ERR_REMOTE_ACCESS when it is another one.
  int ask_identity(uccl_conn_t *conn, const FifoItem &identity);

  const std::string local_agent_;
  uccl_engine_t *const engine_;
  const std::shared_ptr<Identity> identity_;
  const Clock::duration patience_;
  mutable std::mutex lock_;
  std::atomic<bool> stopped_{false};
  std::unordered_map<std::string, std::shared_ptr<Peer>> peers_;
  /// What ends soon, is tried for the first time, or is asked for; and what has failed before with peers that were never met: hosts that are silent
  /// keep a thread for as long as a connect takes, and are not to keep others from theirs.
  Jobs jobs_{256}, retries_{32};
};

}  // namespace tcpx
