// SPDX-License-Identifier: Apache-2.0

#include "transfer.h"

#include <climits>
#include <cstring>

namespace tcpx {

nixl_status_t Transfer::describe(const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote) {
  const size_t count = static_cast<size_t>(local.descCount());
  if (count != static_cast<size_t>(remote.descCount())) return NIXL_ERR_INVALID_PARAM;
  regions_.reserve(count);
  addresses_.reserve(count);
  sizes_.reserve(count);
  items_.reserve(count);
  const RemoteMemory *previous = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const nixlMetaDesc &from = local[i], &to = remote[i];
    if (from.len != to.len || !from.metadataP || !to.metadataP) return NIXL_ERR_INVALID_PARAM;
    const auto *mine = static_cast<const LocalMemory *>(from.metadataP);
    const auto *theirs = static_cast<const RemoteMemory *>(to.metadataP);
    bytes_ += from.len;
    if (!sizes_.empty() && regions_.back() == mine->region && previous == theirs &&
        reinterpret_cast<uintptr_t>(addresses_.back()) + sizes_.back() == from.addr && items_.back().addr + sizes_.back() == to.addr) {
      sizes_.back() += from.len;
      continue;
    }
    regions_.push_back(mine->region);
    addresses_.push_back(reinterpret_cast<void *>(from.addr));
    sizes_.push_back(from.len);
    items_.push_back(theirs->item);
    // The size in an item is 32 bits and informative: the engine takes lengths from its own argument.
    const auto size = static_cast<uint32_t>(from.len > UINT32_MAX ? UINT32_MAX : from.len);
    if (const int status = uccl_engine_update_fifo(&items_.back(), to.addr, size); status != UCCL_OK) return to_nixl(status);
    previous = theirs;
  }
  return sizes_.size() > INT_MAX ? NIXL_ERR_INVALID_PARAM : NIXL_SUCCESS;
}

nixl_status_t Transfer::post(const nixl_opt_b_args_t *args) {
  if (active_) return NIXL_ERR_REPOST_ACTIVE;
  has_message_ = args && args->hasNotif;
  if (has_message_) message_ = args->notifMsg;
  started_ = last_seen_running_ = Clock::now();
  uccl_conn_t *const conn = connection_->get();
  const uccl_mr_t *const regions = regions_.data();
  void *const *const addresses = addresses_.data();
  const int count = static_cast<int>(sizes_.size());
  const int status = operation_ == NIXL_READ
                         ? uccl_engine_read_vector(conn, regions, addresses, sizes_.data(), items_.data(), count, &id_)
                         : uccl_engine_write_vector(conn, regions, addresses, sizes_.data(), items_.data(), count, &id_);
  result_ = connection_->outcome(status);
  active_ = result_ == NIXL_SUCCESS;
  return active_ ? NIXL_IN_PROG : result_;
}

void Transfer::finish() {
  // The engine ends every transfer by a deadline of its own, so this returns. A read that is merely forgotten would still write
  // into memory that its owner has given to somebody else.
  if (active_) uccl_engine_wait(connection_->get(), id_, -1);
  active_ = false;
  if (result_ == NIXL_SUCCESS) result_ = NIXL_ERR_CANCELED;
}

}  // namespace tcpx
