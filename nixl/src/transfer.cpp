// SPDX-License-Identifier: Apache-2.0

#include "transfer.h"

#include <climits>
#include <cstdint>
#include <vector>

namespace tcpx {

nixl_status_t Transfer::describe(const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote) {
  const size_t count = static_cast<size_t>(local.descCount());
  if (count != static_cast<size_t>(remote.descCount())) return NIXL_ERR_INVALID_PARAM;
  std::vector<uccl_mr_t> regions;
  std::vector<void *> addresses;
  std::vector<size_t> sizes;
  std::vector<FifoItem> items;
  regions.reserve(count);
  addresses.reserve(count);
  sizes.reserve(count);
  items.reserve(count);
  const RemoteMemory *previous = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const nixlMetaDesc &from = local[i], &to = remote[i];
    if (from.len != to.len || !from.metadataP || !to.metadataP) return NIXL_ERR_INVALID_PARAM;
    const auto *mine = static_cast<const LocalMemory *>(from.metadataP);
    const auto *theirs = static_cast<const RemoteMemory *>(to.metadataP);
    bytes_ += from.len;
    if (!sizes.empty() && regions.back() == mine->region && previous == theirs && from.len <= SIZE_MAX - sizes.back() &&
        reinterpret_cast<uintptr_t>(addresses.back()) + sizes.back() == from.addr && items.back().addr + sizes.back() == to.addr) {
      sizes.back() += from.len;
      continue;
    }
    regions.push_back(mine->region);
    addresses.push_back(reinterpret_cast<void *>(from.addr));
    sizes.push_back(from.len);
    items.push_back(theirs->item);
    // The item's size is informative: the engine takes lengths from its own argument.
    items.back().addr = to.addr;
    previous = theirs;
  }
  if (sizes.size() > INT_MAX) return NIXL_ERR_INVALID_PARAM;
  uccl_list_t *list = nullptr;
  const int status =
      uccl_engine_list_create(regions.data(), addresses.data(), sizes.data(), items.data(), static_cast<int>(sizes.size()), &list);
  list_.reset(list);
  return to_nixl(status);
}

bool Transfer::use(std::shared_ptr<Peer> peer) {
  const std::lock_guard<std::mutex> guard(lock_);
  if (peer == peer_) return false;
  peer_ = std::move(peer);
  connection_.reset();
  return true;
}

nixl_status_t Transfer::post(Peers &peers, const nixl_opt_b_args_t *args) {
  const std::lock_guard<std::mutex> guard(lock_);
  if (phase_ != Phase::kOver) return NIXL_ERR_REPOST_ACTIVE;
  has_message_ = args && args->hasNotif;
  if (has_message_) message_ = args->notifMsg;
  started_ = last_seen_running_ = Clock::now();
  wait_until_ = started_ + peers.patience();
  refused_ = {};
  return begin(peers);
}

nixl_status_t Transfer::begin(Peers &peers) {
  // The second round is for a connection whose loss shows only now: nothing has moved, so this repeats nothing.
  for (int round = 0; round < 2; ++round) {
    if (!connection_ || !connection_->usable()) {
      const nixl_status_t status = peers.acquire(*peer_, connection_);
      if (status == NIXL_IN_PROG) break;
      if (status != NIXL_SUCCESS) return over(status);
    }
    uccl_conn_t *const conn = connection_->get();
    const int status =
        operation_ == NIXL_READ ? uccl_engine_list_read(conn, list_.get(), &id_) : uccl_engine_list_write(conn, list_.get(), &id_);
    if (status == UCCL_OK) {
      phase_ = Phase::kRunning;
      return NIXL_IN_PROG;
    }
    const nixl_status_t result = connection_->outcome(status);
    if (connection_->usable()) return over(result);
  }
  phase_ = Phase::kWaiting;
  return NIXL_IN_PROG;
}

nixl_status_t Transfer::check(Peers &peers) {
  const std::lock_guard<std::mutex> guard(lock_);
  if (phase_ == Phase::kOver) return result_;
  const auto now = Clock::now();
  if (phase_ == Phase::kWaiting) {
    if (now >= wait_until_) return over(NIXL_ERR_REMOTE_DISCONNECT);
    // The time it waited is not the transfer's.
    started_ = last_seen_running_ = now;
    return begin(peers);
  }
  const int status = uccl_engine_poll(connection_->get(), id_, nullptr);
  if (status == UCCL_OK) return ended(peers, now);
  if (status > 0) {
    last_seen_running_ = Clock::now();
    return NIXL_IN_PROG;
  }
  const nixl_status_t result = connection_->outcome(status);
  if (status != UCCL_ERR_REMOTE_ACCESS) return over(result);
  if (!connection_->check_alive()) return over(NIXL_ERR_REMOTE_DISCONNECT);
  return refusal_stands(now) ? over(result) : NIXL_IN_PROG;
}

/// An agent that ends in good order deregisters its memory before it says goodbye: a refusal is one only if no goodbye follows.
bool Transfer::refusal_stands(Clock::time_point now) {
  constexpr std::chrono::milliseconds goodbye{500};
  if (refused_.time_since_epoch().count() == 0) refused_ = now;
  return now - refused_ >= goodbye;
}

nixl_status_t Transfer::ended(Peers &peers, Clock::time_point asked) {
  // It ended somewhere between the last look and this one, or by this one, which may have moved bytes itself.
  const auto seconds = [](Clock::duration time) { return std::chrono::duration<double>(time).count(); };
  const double gap = seconds(asked - last_seen_running_);
  connection_->measured(operation_, bytes_, seconds(Clock::now() - started_) - gap / 2, gap / 2);
  return over(has_message_ ? peers.notify(*peer_, message_) : NIXL_SUCCESS);
}

nixl_status_t Transfer::over(nixl_status_t result) {
  phase_ = Phase::kOver;
  result_ = result;
  return result;
}

}  // namespace tcpx
