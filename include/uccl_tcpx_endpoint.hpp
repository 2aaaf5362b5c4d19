/* uccl_tcpx_endpoint.hpp - an endpoint for UCCL's C++ engine, beside its RDMA, NCCL and CXI endpoints, over the C ABI of libuccl_p2p.
 *
 * It knows neither the engine's headers nor uccl_engine.h: the engine declares functions and structures of the same names, so the
 * functions used here are declared in their own namespace, and the engine's types come in through a traits parameter.
 *
 *   struct TcpxTraits {
 *     using ConnID = ::ConnID;            // members context (void*), sock_fd, dev (int), peer_id (uint64_t)
 *     using FifoItem = ::FifoItem;        // 64 bytes, trivially copyable
 *     using UcclRequest = ::UcclRequest;  // members type, peer_id, engine_idx (uint32_t or wider)
 *     using NotifyMsg = ::NotifyMsg;      // members name, msg (std::string)
 *     using EpollClient = ::EpollClient;  // may be incomplete
 *     static constexpr auto kReqRead = ReqType::ReqRead;
 *     static constexpr auto kReqWrite = ReqType::ReqWrite;
 *     // Optional. Takes a notification that arrived; called by recv_routine, one at a time, in order of arrival.
 *     static void deliver_notification(NotifyMsg&& message);
 *     // Optional. Called by every check of a failed request, instead of throwing; may throw, abort or return.
 *     static void transfer_failed(uint64_t peer_id, int64_t request_id, int status, char const* cause);
 *   };
 *   using TcpxEndpoint = uccl_tcpx::TcpxEndpoint<TcpxTraits>;
 *
 * Threads: every member function may be called from any thread at any time between construction and destruction; only
 * uccl_connect and uccl_accept block. Configuration comes from the environment (docs/configuration.md), read at construction.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

/* The tags of uccl_engine.h. Never dereferenced, so other uses of these names in a program do not matter. */
struct uccl_engine;
struct uccl_conn;
struct uccl_notif;
struct uccl_xfer_info_t;
struct uccl_option_t;
struct FifoItem;

namespace uccl_tcpx {

/* The part of uccl_engine.h that the endpoint calls; documented there. */
namespace abi {
extern "C" {
void uccl_engine_destroy(::uccl_engine* engine);
::uccl_conn* uccl_engine_connect(::uccl_engine* engine, const char* ip_addr, const char* remote_gpu, int remote_port,
                                 bool same_process);
::uccl_conn* uccl_engine_accept(::uccl_engine* engine, char* ip_addr_buf, size_t ip_addr_buf_len, int* remote_gpu_idx);
int uccl_engine_create_with(const ::uccl_option_t* options, size_t num_options, ::uccl_engine** engine);
void uccl_engine_stop_accept(::uccl_engine* engine);
void uccl_engine_conn_destroy(::uccl_conn* conn);
int uccl_engine_reg(::uccl_engine* engine, size_t data, size_t size, uint64_t* mr);
void uccl_engine_mr_destroy(::uccl_engine* engine, uint64_t mr);
int uccl_engine_metadata_into(::uccl_engine* engine, char* buf, size_t len, size_t* needed);
int uccl_engine_prepare_fifo(::uccl_engine* engine, uint64_t mr, const void* data, size_t size, char* fifo_buf);
int uccl_engine_read_vector(::uccl_conn* conn, const uint64_t* mr_ids, void* const* dst_v, const size_t* size_v,
                            const ::FifoItem* fifo_items, int num_iovs, uint64_t* transfer_id);
int uccl_engine_write_vector(::uccl_conn* conn, const uint64_t* mr_ids, void* const* src_v, const size_t* size_v,
                             const ::FifoItem* fifo_items, int num_iovs, uint64_t* transfer_id);
int uccl_engine_send_async(::uccl_conn* conn, uint64_t mr, const void* data, size_t size, uint64_t* transfer_id);
int uccl_engine_recv_async(::uccl_conn* conn, uint64_t mr, void* data, size_t max_size, uint64_t* transfer_id);
int uccl_engine_poll(::uccl_conn* conn, uint64_t transfer_id, ::uccl_xfer_info_t* info);
int uccl_engine_wait(::uccl_conn* conn, uint64_t transfer_id, int64_t timeout_ms);
int uccl_engine_send_notif_bytes(::uccl_conn* conn, const void* name, size_t name_len, const void* msg, size_t msg_len);
int uccl_engine_notif_next(::uccl_engine* engine, ::uccl_notif** notif);
const char* uccl_engine_notif_name(const ::uccl_notif* notif, size_t* len);
const void* uccl_engine_notif_msg(const ::uccl_notif* notif, size_t* len);
void uccl_engine_notif_free(::uccl_notif* notif);
const char* uccl_engine_strerror(int32_t status);
const char* uccl_engine_last_error(void);
}
}  // namespace abi

/* Statuses of the C ABI under names that the macros of uccl_engine.h do not replace. */
inline constexpr int kStatusOk = 0;
inline constexpr int kStatusInProgress = 1;
inline constexpr int kStatusNotFound = -2;
inline constexpr int kStatusResource = -3;
inline constexpr int kStatusCanceled = -5;

/** How long an idle thread spins after its last activity. */
inline constexpr std::chrono::milliseconds kStayAwake{1};
/** Then it sleeps between polls: an eighth of its idle time, within these limits. */
inline constexpr std::chrono::microseconds kIdleNap{50};
inline constexpr std::chrono::microseconds kLongestNap{1000};
/** How long a thread that waits for a request spins before it sleeps until the request ends. */
inline constexpr std::chrono::microseconds kLookHard{500};
/** How long it sleeps at a time. */
inline constexpr int64_t kWaitMs = 1;
/** For an application thread that wakes when a request ends: how long it spins, and how long it sleeps at a time. */
inline constexpr std::chrono::microseconds kLookBriefly{40};
inline constexpr std::chrono::microseconds kWaitForEnd{200};
/** Threads that check requests look for notifications once in this many calls of recv_routine. */
inline constexpr uint32_t kLookEvery = 64;
/** Returned instead of a request id when nothing was started, but the same call may succeed later: too many transfers in flight. */
inline constexpr int kPostTransient = -2;
/** Returned instead of a request id when nothing was started and trying again is pointless. */
inline constexpr int kPostFailed = -1;
/** Failed requests that an endpoint remembers one by one; see TcpxEndpoint::request_status. */
inline constexpr size_t kFailuresKept = 4096;
/** peer_id of a connection that could not be made. */
inline constexpr uint64_t kNoPeer = UINT64_MAX;

/** A registered region. The engine keeps it in its memory handle; it is registered until uccl_deregmr or the end of the endpoint. */
struct TcpxMemoryRegion {
  /** First byte. */
  void* addr = nullptr;
  /** Bytes. */
  size_t len = 0;
  /** Handle of the C ABI; 0 when deregistered. */
  std::atomic<uint64_t> mr{0};
};

namespace detail {

template <typename Traits, typename = void>
struct delivers : std::false_type {};
template <typename Traits>
struct delivers<Traits, std::void_t<decltype(Traits::deliver_notification(std::declval<typename Traits::NotifyMsg>()))>>
    : std::true_type {};

template <typename Traits, typename = void>
struct handles_failure : std::false_type {};
template <typename Traits>
struct handles_failure<Traits, std::void_t<decltype(Traits::transfer_failed(uint64_t{}, int64_t{}, int{},
                                                                            static_cast<char const*>(nullptr)))>>
    : std::true_type {};

}  // namespace detail

/** See the head of this file. */
template <typename Traits>
class TcpxEndpoint {
 public:
  using ConnID = typename Traits::ConnID;
  using FifoItem = typename Traits::FifoItem;
  using UcclRequest = typename Traits::UcclRequest;
  using NotifyMsg = typename Traits::NotifyMsg;
  using EpollClient = typename Traits::EpollClient;

  static_assert(sizeof(FifoItem) == 64, "FIFO items are 64 bytes on the wire");
  static_assert(std::is_trivially_copyable<FifoItem>::value, "FIFO items are copied as bytes");

  /**
   * Creates an engine of the C ABI: it listens, and peers can connect. Ignores UCCL_P2P_TRANSPORT, which chose this endpoint;
   * UCCL_TCPX_PLUGIN chooses the network plugin.
   *
   * @param gpu_index  CUDA index of the GPU, or a negative number when it is not known yet. Reported by gpu_index() and in ConnID::dev.
   * @param port       Port to listen on; 0: that of UCCL_TCPX_OOB_PORT, or any.
   * @throws std::runtime_error when the engine cannot be created, for example because the port is taken; the text has the cause.
   */
  explicit TcpxEndpoint(int gpu_index = -1, uint64_t port = 0) : gpu_index_(gpu_index) {
    std::string const wanted = std::to_string(port);
    Option const options[] = {{"UCCL_P2P_TRANSPORT", ""}, {"UCCL_TCPX_OOB_PORT", wanted.c_str()}};
    ::uccl_engine* engine = nullptr;
    if (abi::uccl_engine_create_with(reinterpret_cast<::uccl_option_t const*>(options), port == 0 ? 1 : 2, &engine) != kStatusOk) {
      throw std::runtime_error(std::string("TCPX engine: ") + abi::uccl_engine_last_error());
    }
    engine_.reset(engine);
    port_ = listen_port_of(metadata());
  }

  /**
   * Stops accepting, closes all connections (requests in flight fail here and at the peers), deregisters all memory and ends the engine.
   * Returns within the deadline of uccl_engine_destroy. No other call may be running except a uccl_accept that
   * stop_accept() has been called for.
   */
  ~TcpxEndpoint() {
    abi::uccl_engine_stop_accept(engine_.get());
    for (auto const& peer : peers_) abi::uccl_engine_conn_destroy(peer.second);
  }

  TcpxEndpoint(TcpxEndpoint const&) = delete;
  TcpxEndpoint& operator=(TcpxEndpoint const&) = delete;

  /**
   * Sets the GPU of the endpoint. Construction has already initialised the network.
   *
   * @param gpu_index   CUDA index.
   * @param device_ids  Network devices; ignored: the library uses those nearest to the memory (UCCL_TCPX_* choose others).
   * @return true.
   */
  bool initialize_rdma_ctx_for_gpu(int gpu_index, std::vector<size_t> const& device_ids = std::vector<size_t>()) {
    static_cast<void>(device_ids);
    gpu_index_.store(gpu_index, std::memory_order_relaxed);
    return true;
  }

  /** Does nothing: the listening socket is open since construction. */
  void create_unified_p2p_socket() {}

  /** @return The CUDA index given last; negative when none was. */
  int gpu_index() const { return gpu_index_.load(std::memory_order_relaxed); }

  /** @return The port that peers connect to. */
  uint16_t get_p2p_listen_port() const { return port_; }

  /** @return -1: the listening socket belongs to the library. uccl_accept blocks until there is a connection. */
  int get_p2p_listen_fd() const { return -1; }

  /** @return Empty: there is no out-of-band client; send_notification carries notifications. */
  std::shared_ptr<EpollClient> get_oob_client() const { return nullptr; }

  /**
   * @param peer_id  Any.
   * @return Empty: there is no out-of-band client.
   */
  std::string get_oob_conn_key(uint64_t peer_id) const {
    static_cast<void>(peer_id);
    return std::string();
  }

  /** @return The engine's metadata, "ip:port?gpu". @throws std::runtime_error if the engine has ended. */
  std::string metadata() const {
    size_t len = 0;
    abi::uccl_engine_metadata_into(engine_.get(), nullptr, 0, &len);
    std::string text(len, '\0');
    if (len == 0 || abi::uccl_engine_metadata_into(engine_.get(), &text[0], len, nullptr) != kStatusOk) {
      throw std::runtime_error(std::string("TCPX engine: ") + abi::uccl_engine_last_error());
    }
    text.resize(len - 1);
    return text;
  }

  /**
   * Connects to a peer engine. Blocks until all channels are up or the connect deadline (UCCL_TCPX_CONNECT_TIMEOUT_MS) has passed;
   * the peer's application need not call accept.
   *
   * @param remote_gpuidx  CUDA index of the peer's GPU; negative: not given.
   * @param remote_ip      The peer's address or host name.
   * @param remote_port    The peer's port.
   * @return The connection, which the endpoint keeps until disconnect or its own end; its sock_fd is not a file descriptor. On failure
   *         peer_id is UINT64_MAX, context NULL and sock_fd -1, and last_error() of this thread has the cause.
   */
  ConnID uccl_connect(int remote_gpuidx, std::string remote_ip, uint16_t remote_port) {
    std::string const gpu = remote_gpuidx < 0 ? std::string() : std::to_string(remote_gpuidx);
    return adopt(abi::uccl_engine_connect(engine_.get(), remote_ip.c_str(), gpu.c_str(), remote_port, false));
  }

  /**
   * Takes the next connection that a peer opened. Blocks until there is one or stop_accept is called.
   *
   * @param remote_ip      [out] The peer's address as text.
   * @param remote_gpuidx  [out] CUDA index of the peer's GPU in the peer's process, -1 if it has none; may be NULL.
   * @return The connection, which the endpoint keeps until disconnect or its own end; after stop_accept and on failure peer_id is
   *         UINT64_MAX, context NULL and sock_fd -1, and the outputs are unchanged.
   */
  ConnID uccl_accept(std::string& remote_ip, int* remote_gpuidx) {
    char ip[64];
    int gpu = -1;
    ::uccl_conn* conn = abi::uccl_engine_accept(engine_.get(), ip, sizeof(ip), &gpu);
    if (conn != nullptr) {
      try {
        remote_ip = ip;
      } catch (...) {
        abi::uccl_engine_conn_destroy(conn);
        throw;
      }
      if (remote_gpuidx != nullptr) *remote_gpuidx = gpu;
    }
    return adopt(conn);
  }

  /** Wakes every uccl_accept; these and later ones return no connection. Open connections stay open. */
  void stop_accept() { abi::uccl_engine_stop_accept(engine_.get()); }

  /**
   * Closes a connection: requests in flight on it fail here and at the peer. The endpoint closes the remaining connections at its end.
   *
   * @param peer_id  ConnID::peer_id; an unknown one is ignored.
   */
  void disconnect(uint64_t peer_id) {
    ::uccl_conn* conn = nullptr;
    {
      std::unique_lock<std::shared_mutex> lock(peers_mutex_);
      auto const it = peers_.find(peer_id);
      if (it == peers_.end()) return;
      conn = it->second;
      peers_.erase(it);
    }
    end_requests(conn);
    abi::uccl_engine_conn_destroy(conn);
  }

  /**
   * Registers memory for transfers of this endpoint, and for reads and writes of peers that hold a FIFO item of the region.
   *
   * @param data    [in]  First byte, in host or GPU memory. The caller keeps it mapped until uccl_deregmr.
   * @param len     [in]  Bytes, at least 1.
   * @param region  [out] The region; unchanged on failure.
   * @return 0, or a negative status of the C ABI.
   */
  int uccl_regmr(void* data, size_t len, std::shared_ptr<TcpxMemoryRegion>& region) {
    auto fresh = std::make_shared<TcpxMemoryRegion>();
    uint64_t mr = 0;
    int const status = abi::uccl_engine_reg(engine_.get(), reinterpret_cast<uintptr_t>(data), len, &mr);
    if (status != kStatusOk) return status;
    fresh->addr = data;
    fresh->len = len;
    fresh->mr.store(mr, std::memory_order_release);
    region = std::move(fresh);
    return 0;
  }

  /**
   * Deregisters a region. Waits for transfers that use it, within the close deadline. Afterwards the memory may be freed.
   *
   * @param region  The region; empty or deregistered is a no-op.
   */
  void uccl_deregmr(std::shared_ptr<TcpxMemoryRegion> const& region) {
    uint64_t const mr = region ? region->mr.exchange(0, std::memory_order_acq_rel) : 0;
    if (mr != 0) abi::uccl_engine_mr_destroy(engine_.get(), mr);
  }

  /**
   * Writes a FIFO item, with which a peer can read or write [data, data + size).
   *
   * @param region   [in]  The region.
   * @param data     [in]  First byte, inside the region.
   * @param size     [in]  Bytes, inside the region.
   * @param out_buf  [out] 64 bytes; unchanged on failure.
   * @return 0, or a negative number.
   */
  int prepare_fifo_metadata(std::shared_ptr<TcpxMemoryRegion> const& region, void const* data, size_t size, char* out_buf) const {
    uint64_t const mr = region ? region->mr.load(std::memory_order_acquire) : 0;
    if (mr == 0 || out_buf == nullptr) return kPostFailed;
    return abi::uccl_engine_prepare_fifo(engine_.get(), mr, data, size, out_buf);
  }

  /**
   * Starts a read, from the peer's memory into local memory.
   *
   * @param conn       [in]  The connection.
   * @param local_mr   [in]  Region that contains [dst, dst + size).
   * @param dst        [in]  Destination; undefined until the request is complete, and after a failure.
   * @param size       [in]  Bytes.
   * @param fifo_item  [in]  The peer's item; addr is the source, its size is ignored.
   * @param ureq       [out] The request: type, peer_id and engine_idx; unchanged on failure.
   * @return The request's id, 0 or more, also in engine_idx; kPostTransient or kPostFailed.
   */
  int uccl_read_async(ConnID const& conn, std::shared_ptr<TcpxMemoryRegion> const& local_mr, void* dst, size_t size,
                      FifoItem const& fifo_item, UcclRequest* ureq) {
    int const id = one_sided(abi::uccl_engine_read_vector, conn, local_mr, dst, size, fifo_item, ureq);
    if (id >= 0) ureq->type = Traits::kReqRead;
    return id;
  }

  /**
   * Starts a write, from local memory into the peer's memory. It is complete when every byte is in place at the peer.
   *
   * @param conn       [in]  The connection.
   * @param local_mr   [in]  Region that contains [src, src + size).
   * @param src        [in]  Source; must not change until the request ends.
   * @param size       [in]  Bytes.
   * @param fifo_item  [in]  The peer's item; addr is the destination, its size is ignored.
   * @param ureq       [out] The request: type, peer_id and engine_idx; unchanged on failure.
   * @return As uccl_read_async.
   */
  int uccl_write_async(ConnID const& conn, std::shared_ptr<TcpxMemoryRegion> const& local_mr, void* src, size_t size,
                       FifoItem const& fifo_item, UcclRequest* ureq) {
    int const id = one_sided(abi::uccl_engine_write_vector, conn, local_mr, src, size, fifo_item, ureq);
    if (id >= 0) ureq->type = Traits::kReqWrite;
    return id;
  }

  /**
   * Starts a two-sided send, matched with the peer's receives in order of the calls.
   *
   * @param conn      [in]  The connection.
   * @param local_mr  [in]  Region that contains [src, src + size).
   * @param src       [in]  Source; must not change until the request ends.
   * @param size      [in]  Bytes.
   * @param ureq      [out] peer_id and engine_idx; type does not change; unchanged on failure.
   * @return As uccl_read_async.
   */
  int uccl_send_async(ConnID const& conn, std::shared_ptr<TcpxMemoryRegion> const& local_mr, void const* src, size_t size,
                      UcclRequest* ureq) {
    return start(conn, local_mr, ureq, [&](::uccl_conn* to, uint64_t mr, uint64_t* transfer) {
      return abi::uccl_engine_send_async(to, mr, src, size, transfer);
    });
  }

  /**
   * Starts a receive of one message.
   *
   * @param conn      [in]  The connection.
   * @param local_mr  [in]  Region that contains [dst, dst + max_size).
   * @param dst       [in]  Destination.
   * @param max_size  [in]  Largest message to take, bytes; a larger one fails the request here and at the peer.
   * @param ureq      [out] peer_id and engine_idx; type does not change; unchanged on failure.
   * @return As uccl_read_async.
   */
  int uccl_recv_async(ConnID const& conn, std::shared_ptr<TcpxMemoryRegion> const& local_mr, void* dst, size_t max_size,
                      UcclRequest* ureq) {
    return start(conn, local_mr, ureq, [&](::uccl_conn* from, uint64_t mr, uint64_t* transfer) {
      return abi::uccl_engine_recv_async(from, mr, dst, max_size, transfer);
    });
  }

  /**
   * Returns whether a request is complete, and drives the connection. Does not block, except in threads of the engine, which call
   * recv_routine or idle_routine: such a thread sleeps after it has checked this request alone for kLookHard, until the request ends or
   * for kWaitMs.
   *
   * @param peer_id     The request's peer_id; named in the report of a failure.
   * @param request_id  The request's id.
   * @return true once it is complete, also in later calls; false while it runs. A failed request is never
   *         true: Traits::transfer_failed is called, and false returned if that returns.
   * @throws std::runtime_error for a failed request, when Traits has no transfer_failed. The text has the cause.
   */
  bool check_send_complete_once(uint64_t peer_id, int64_t request_id) {
    int const status = look(request_id, caller_state().waits_for(request_id));
    if (status == kStatusOk) return true;
    if (status == kStatusInProgress) return false;
    char const* const cause = abi::uccl_engine_strerror(status);
    if constexpr (detail::handles_failure<Traits>::value) {
      Traits::transfer_failed(peer_id, request_id, status, cause);
      return false;
    } else {
      throw std::runtime_error("TCPX request " + std::to_string(request_id) + " of peer " + std::to_string(peer_id) +
                               " failed: " + cause);
    }
  }

  /**
   * The same, under the name that older engines call.
   *
   * @param ureq  The request.
   * @return As check_send_complete_once.
   */
  bool uccl_poll_ureq_once(UcclRequest* ureq) {
    return check_send_complete_once(static_cast<uint64_t>(ureq->peer_id), static_cast<int64_t>(ureq->engine_idx));
  }

  /**
   * Returns the status of a request as a number of the C ABI, and drives the connection. Does not block and does not throw for failures.
   *
   * @param request_id  The request's id.
   * @return 0 complete, 1 in progress, negative the error it ended with. The answer for an ended request stays the same; but once
   *         kFailuresKept later requests have failed, the answer for an earlier id may become -2 (not found), complete or not. A
   *         failed one never becomes complete. A negative number, as a start that failed returns it, is not found.
   */
  int request_status(int64_t request_id) { return look(request_id, false); }

  /** @return Entries that the endpoint holds for requests: those in flight, ended ones never asked for, and failures; for tests. */
  size_t requests_kept() {
    std::lock_guard<std::mutex> lock(requests_mutex_);
    return requests_.size() + failed_.size();
  }

  /** Does nothing: the library sends on its own. */
  void send_routine() {}

  /**
   * Passes received notifications to Traits::deliver_notification, if Traits has one. Data does not need this call.
   *
   * The engine calls this in a loop, which would take a core from the threads that move the data. A thread that does nothing else
   * therefore yields as in idle_routine.
   */
  void recv_routine() {
    Caller& caller = caller_of_engine();
    bool const only_here = !std::exchange(caller.busy, false);
    // Threads that look at their own requests leave this to the receive thread, and look only now and then in case there is none; those
    // that sleep in between look each time.
    bool const looks = only_here || caller.waits_for(caller.running) || ++skipped_ % kLookEvery == 0;
    auto const now = std::chrono::steady_clock::now();
    if ((looks && deliver_notifications()) || !only_here) {
      caller.active = now;
    } else {
      give_way(caller, now);
    }
  }

  /**
   * For idle threads of the engine, in each of their rounds: yields, and after kStayAwake without a request started
   * or checked by this thread sleeps, longer the longer it lasts, kLongestNap at most.
   */
  void idle_routine() {
    Caller& caller = caller_of_engine();
    auto const now = std::chrono::steady_clock::now();
    if (std::exchange(caller.busy, false)) {
      caller.active = now;
    } else {
      give_way(caller, now);
    }
  }

  /**
   * For an application's thread that polls a transfer which a thread of the engine carries out, in each of its polls: yields. One that
   * has polled the same transfer for kLookHard sleeps for kIdleNap at a time, or until a request ends. Where one ended during the
   * transfer that it polled before, so that ends can be waited for, it sleeps from kLookBriefly on, or from the first poll on if that
   * transfer took longer, for kWaitForEnd at a time. Several transfers polled in turns never make it sleep.
   *
   * @param transfer  What it polls; nullptr when that has ended.
   */
  static void waiting_routine(void const* transfer) {
    Caller& caller = caller_state();
    bool const another = transfer != std::exchange(caller.polled, transfer);
    uint32_t const seen = ends_.load(std::memory_order_seq_cst);
    bool const ended = seen != std::exchange(caller.ends, seen);
    auto const now = std::chrono::steady_clock::now();
    if (transfer == nullptr) {
      caller.announced = std::exchange(caller.announced_now, false) || ended;
      caller.brief = now - caller.polled_since < 3 * kLookBriefly;
      return;
    }
    if (another) {
      caller.polled_since = now;
      caller.announced_now = false;
    }
    // It may be what it waits for: the next poll shows.
    if (ended) {
      caller.announced_now = true;
      return;
    }
    auto const looks = now - caller.polled_since;
    if (caller.announced) {
      if (!caller.brief || looks >= kLookBriefly) sleep_until_an_end(seen, kWaitForEnd);
    } else if (looks < kLookHard) {
      std::this_thread::yield();
    } else {
      sleep_until_an_end(seen, kIdleNap);
    }
  }

  /** Does nothing: the library does not hold data back. */
  void flush_all_sends() {}

  /**
   * Sends a notification of any length up to 64 MiB. It arrives after the data of every request that was complete before this call.
   *
   * @param peer_id       ConnID::peer_id.
   * @param notification  Its name and msg are sent; copied, may be reused at once.
   * @return 0 once it is queued for the peer; a negative number if the connection is lost or unknown.
   */
  int send_notification(uint64_t peer_id, NotifyMsg const& notification) const {
    ::uccl_conn* const conn = find(peer_id);
    if (conn == nullptr) return kPostFailed;
    return abi::uccl_engine_send_notif_bytes(conn, notification.name.data(), notification.name.size(), notification.msg.data(),
                                             notification.msg.size());
  }

  /**
   * Takes the oldest notification that arrived at this endpoint.
   *
   * @param out  [out] Its name and msg are set; unchanged if there is none.
   * @return Whether there was one; each is handed out once, here or by recv_routine.
   */
  bool next_notification(NotifyMsg& out) {
    ::uccl_notif* taken = nullptr;
    if (abi::uccl_engine_notif_next(engine_.get(), &taken) != kStatusOk || taken == nullptr) return false;
    std::unique_ptr<::uccl_notif, FreeNotification> const notif(taken);
    size_t name_len = 0, msg_len = 0;
    char const* name = abi::uccl_engine_notif_name(taken, &name_len);
    void const* msg = abi::uccl_engine_notif_msg(taken, &msg_len);
    if (name != nullptr) out.name.assign(name, name_len);
    if (msg != nullptr) out.msg.assign(static_cast<char const*>(msg), msg_len);
    return true;
  }

  /** @return The cause of the last failed call of this thread, as text; valid until its next failing call. */
  static char const* last_error() { return abi::uccl_engine_last_error(); }

 private:
  struct DestroyEngine {
    void operator()(::uccl_engine* engine) const { abi::uccl_engine_destroy(engine); }
  };
  struct FreeNotification {
    void operator()(::uccl_notif* notif) const { abi::uccl_engine_notif_free(notif); }
  };
  /* As uccl_option_t. */
  struct Option {
    char const* name;
    char const* value;
  };
  struct Request {
    ::uccl_conn* conn = nullptr;
    uint64_t transfer = 0;
  };

  static uint16_t listen_port_of(std::string const& metadata) {
    // "ip:port?gpu": both ip and gpu may hold colons.
    size_t const end = metadata.find('?');
    size_t const colon = end == std::string::npos ? std::string::npos : metadata.rfind(':', end);
    if (colon == std::string::npos) throw std::runtime_error("TCPX engine: no port in \"" + metadata + "\"");
    return static_cast<uint16_t>(std::strtoul(metadata.c_str() + colon + 1, nullptr, 10));
  }

  /* The state of a thread between its calls of recv_routine. */
  struct Caller {
    /* It calls recv_routine or idle_routine. */
    bool of_engine = false;
    /* It started or checked a request since the last one. */
    bool busy = false;
    /* The request that it found running last, -1: none; and since when it has asked for no other. */
    int64_t running = -1;
    std::chrono::steady_clock::time_point since{};
    std::chrono::steady_clock::time_point active{};
    /* What it polls in waiting_routine, and since when nothing else. */
    void const* polled = nullptr;
    std::chrono::steady_clock::time_point polled_since{};
    /* Requests that had ended when it last polled; whether one ended while it polled this transfer, and the one before. */
    uint32_t ends = 0;
    bool announced_now = false;
    bool announced = false;
    /* The one before was over soon. */
    bool brief = false;
    /* It has found a request ended, and has not woken the sleeping threads yet. */
    bool owes = false;

    bool waits_for(int64_t request_id) const {
      return of_engine && request_id >= 0 && request_id == running && std::chrono::steady_clock::now() - since > kLookHard;
    }
    void found_running(int64_t request_id) {
      if (request_id == running) return;
      running = request_id;
      since = std::chrono::steady_clock::now();
    }
  };
  static Caller& caller_state() {
    static thread_local Caller caller;
    return caller;
  }

  /* A thread of the engine returns from its other work. */
  static Caller& caller_of_engine() {
    Caller& caller = caller_state();
    caller.of_engine = true;
    announce_ends(caller);
    return caller;
  }

  /* Requests that have ended in this process, and threads that sleep until one does. */
  inline static std::atomic<uint32_t> ends_{0};
  inline static std::atomic<uint32_t> sleepers_{0};

  /* Unless more have ended than the caller has seen. A futex, because a condition variable would not survive a fork. */
  static void sleep_until_an_end(uint32_t seen, std::chrono::microseconds most) {
    timespec const limit{0, static_cast<long>(most.count()) * 1000};
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &ends_, FUTEX_WAIT_PRIVATE, seen, &limit, nullptr, 0);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

  static void announce_ends(Caller& caller) {
    if (!std::exchange(caller.owes, false)) return;
    ends_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    syscall(SYS_futex, &ends_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }

  static void give_way(Caller& caller, std::chrono::steady_clock::time_point now) {
    using std::chrono::microseconds;
    if (caller.active == std::chrono::steady_clock::time_point{}) caller.active = now;
    auto const idle = std::chrono::duration_cast<microseconds>(now - caller.active);
    if (idle < kStayAwake) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::clamp<microseconds>(idle / 8, kIdleNap, kLongestNap));
    }
  }

  int look(int64_t request_id, bool wait) {
    // What a start that failed returned.
    if (request_id < 0) return kStatusNotFound;
    Caller& caller = caller_state();
    caller.busy = true;
    Request request;
    {
      std::lock_guard<std::mutex> lock(requests_mutex_);
      auto const it = requests_.find(request_id);
      if (it == requests_.end()) return status_of_ended(request_id);
      request = it->second;
    }
    int const status = wait ? abi::uccl_engine_wait(request.conn, request.transfer, kWaitMs)
                            : abi::uccl_engine_poll(request.conn, request.transfer, nullptr);
    if (status == kStatusInProgress) {
      caller.found_running(request_id);
      return status;
    }
    caller.running = -1;
    int verdict;
    {
      std::lock_guard<std::mutex> lock(requests_mutex_);
      // Another thread may have seen the end first; its answer stands.
      verdict = requests_.erase(request_id) != 0 ? end_request(request_id, status) : status_of_ended(request_id);
    }
    // A thread of the engine marks its transfer as done before it comes here again, and sleeping threads check that mark.
    caller.owes = true;
    if (!caller.of_engine) announce_ends(caller);
    return verdict;
  }

  /* Whether there were any. */
  bool deliver_notifications() {
    bool found = false;
    if constexpr (detail::delivers<Traits>::value) {
      // One thread at a time keeps them in order; a second one has nothing to do.
      std::unique_lock<std::mutex> lock(notifications_mutex_, std::try_to_lock);
      if (!lock.owns_lock()) return false;
      NotifyMsg message;
      while (next_notification(message)) {
        found = true;
        Traits::deliver_notification(std::exchange(message, NotifyMsg()));
      }
    }
    return found;
  }

  /* Under requests_mutex_. Ids are given in order, in a circle of 2^31. */
  int status_of_ended(int64_t id) const {
    auto const it = failed_.find(id);
    if (it != failed_.end()) return it->second;
    bool const maybe_forgotten = forgotten_ >= 0 && ((forgotten_ - id) & INT32_MAX) <= INT32_MAX / 2;
    return maybe_forgotten ? kStatusNotFound : kStatusOk;
  }

  /* Under requests_mutex_: keeps the failure of a request that is in no table any more. */
  int end_request(int64_t id, int status) {
    if (status == kStatusOk) return status;
    if (failed_order_.size() == kFailuresKept) {
      int64_t const oldest = failed_order_.front();
      failed_order_.pop_front();
      failed_.erase(oldest);
      if (forgotten_ < 0 || ((oldest - forgotten_) & INT32_MAX) <= INT32_MAX / 2) forgotten_ = oldest;
    }
    failed_order_.push_back(id);
    failed_[id] = status;
    return status;
  }

  /* Before a connection is closed: its requests in flight have failed, complete ones stay complete. */
  void end_requests(::uccl_conn* conn) {
    std::vector<std::pair<int64_t, uint64_t>> running;
    {
      std::lock_guard<std::mutex> lock(requests_mutex_);
      for (auto const& one : requests_) {
        if (one.second.conn == conn) running.emplace_back(one.first, one.second.transfer);
      }
    }
    for (auto const& one : running) {
      int const status = abi::uccl_engine_poll(conn, one.second, nullptr);
      std::lock_guard<std::mutex> lock(requests_mutex_);
      if (requests_.erase(one.first) != 0) end_request(one.first, status == kStatusInProgress ? kStatusCanceled : status);
    }
  }

  ConnID adopt(::uccl_conn* conn) {
    ConnID id{};
    id.context = conn;
    id.sock_fd = -1;
    id.dev = -1;
    id.peer_id = kNoPeer;
    if (conn == nullptr) return id;
    uint64_t const peer_id = next_peer_.fetch_add(1, std::memory_order_relaxed);
    try {
      std::unique_lock<std::shared_mutex> lock(peers_mutex_);
      peers_.emplace(peer_id, conn);
    } catch (...) {
      abi::uccl_engine_conn_destroy(conn);
      throw;
    }
    // The engine takes a negative number for no connection, and closes what it finds here: no process has a descriptor of this number.
    id.sock_fd = INT32_MAX;
    id.dev = gpu_index();
    id.peer_id = peer_id;
    return id;
  }

  ::uccl_conn* find(uint64_t peer_id) const {
    std::shared_lock<std::shared_mutex> lock(peers_mutex_);
    auto const it = peers_.find(peer_id);
    return it == peers_.end() ? nullptr : it->second;
  }

  using Vectored = int (*)(::uccl_conn*, uint64_t const*, void* const*, size_t const*, ::FifoItem const*, int, uint64_t*);

  int one_sided(Vectored call, ConnID const& conn, std::shared_ptr<TcpxMemoryRegion> const& local_mr, void* local, size_t size,
                FifoItem const& fifo_item, UcclRequest* ureq) {
    alignas(8) unsigned char item[sizeof(FifoItem)];
    std::memcpy(item, &fifo_item, sizeof(item));
    return start(conn, local_mr, ureq, [&](::uccl_conn* peer, uint64_t mr, uint64_t* transfer) {
      return call(peer, &mr, &local, &size, reinterpret_cast<::FifoItem const*>(item), 1, transfer);
    });
  }

  template <typename Call>
  int start(ConnID const& conn, std::shared_ptr<TcpxMemoryRegion> const& local_mr, UcclRequest* ureq, Call const& call) {
    ::uccl_conn* const peer = find(conn.peer_id);
    uint64_t const mr = local_mr ? local_mr->mr.load(std::memory_order_acquire) : 0;
    if (peer == nullptr || mr == 0 || ureq == nullptr) return kPostFailed;
    Caller& caller = caller_state();
    caller.busy = true;
    announce_ends(caller);
    // The place in the table comes first: a transfer in flight must not lose its id if memory runs out.
    int64_t const id = new_request(peer);
    uint64_t transfer = 0;
    int const status = call(peer, mr, &transfer);
    {
      std::lock_guard<std::mutex> lock(requests_mutex_);
      if (status == kStatusOk) {
        requests_[id].transfer = transfer;
      } else {
        requests_.erase(id);
      }
    }
    if (status != kStatusOk) return status == kStatusResource ? kPostTransient : kPostFailed;
    ureq->peer_id = static_cast<decltype(ureq->peer_id)>(conn.peer_id);
    ureq->engine_idx = static_cast<decltype(ureq->engine_idx)>(id);
    return static_cast<int>(id);
  }

  int64_t new_request(::uccl_conn* conn) {
    std::lock_guard<std::mutex> lock(requests_mutex_);
    for (;;) {
      // Ids are returned as int, where negative numbers are errors.
      int64_t const id = next_request_;
      next_request_ = (next_request_ + 1) & INT32_MAX;
      if (requests_.try_emplace(id, Request{conn, 0}).second) return id;
    }
  }

  std::unique_ptr<::uccl_engine, DestroyEngine> engine_;
  uint16_t port_ = 0;
  std::atomic<int> gpu_index_;
  std::atomic<uint64_t> next_peer_{0};
  mutable std::shared_mutex peers_mutex_;
  std::unordered_map<uint64_t, ::uccl_conn*> peers_;
  std::mutex requests_mutex_;
  /* Requests in flight, and ended ones that have not been checked. */
  std::unordered_map<int64_t, Request> requests_;
  /* The last failures that were seen. */
  std::unordered_map<int64_t, int> failed_;
  std::deque<int64_t> failed_order_;
  /* The newest id among older failures; negative: none. */
  int64_t forgotten_ = -1;
  int64_t next_request_ = 0;
  std::atomic<uint32_t> skipped_{0};
  std::mutex notifications_mutex_;
};

}  // namespace uccl_tcpx
