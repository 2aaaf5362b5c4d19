/* uccl_engine.hpp - the upstream UCCL engine API for C++ clients, as inline functions over the C ABI of uccl_engine.h.
 *
 * Included by uccl_engine.h in C++; a client written for upstream's header includes uccl_engine.h and compiles unchanged.
 *
 * Conventions
 *  - No function here throws: each is noexcept, and running out of memory gives a status or a shorter result. The caller copies the
 *    vectors that it passes by value, outside these functions. Compiles without exceptions too; the program's allocator then
 *    decides what happens when memory runs out.
 *  - C++11 or newer.
 *  - No state: everything lives behind the C ABI, so programs built by different compilers may share one library.
 *  - Unless a function says otherwise, the documentation of the C function of the same name in uccl_engine.h applies.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#pragma once

#ifndef __cplusplus
#error "uccl_engine.hpp is for C++; include uccl_engine.h"
#endif
#if __cplusplus < 201103L && !defined(_MSC_VER)
#error "uccl_engine.h needs C++11 or newer"
#endif

#include "uccl_engine.h"

/* Programs without exceptions (-fno-exceptions) have no handlers. */
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define UCCL_P2P_TRY try
#define UCCL_P2P_CATCH catch (std::exception const&)
#else
#define UCCL_P2P_TRY if (true)
#define UCCL_P2P_CATCH else
#endif

/* Some programs include every C header inside extern "C", where templates and overloads are not allowed. */
extern "C++" {

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

static_assert(sizeof(FifoItem) == UCCL_FIFO_SIZE, "a serialised FIFO item is the structure itself");
static_assert(std::is_trivially_copyable<FifoItem>::value, "FIFO items are copied as bytes");
static_assert(sizeof(notify_msg_t) == 2 * UCCL_MSG_SIZE, "fixed-size notifications have no padding");

/** A notification of any length up to 64 MiB, name and message together. */
typedef struct notify_msg_v {
  /** Name that the sender gave. */
  std::string name;
  /** Bytes of the message; may contain zeros. */
  std::string msg;
} notify_msg_v_t;

namespace uccl_engine_detail {

/* An integer given as the older `int remote_gpu_idx`. NULL is an integer to some compilers and means "no GPU given", so its type is
 * left to the overload that takes text. */
template <typename T>
using gpu_index = typename std::enable_if<
    (std::is_integral<T>::value || std::is_enum<T>::value) && std::is_convertible<T, int>::value &&
        !std::is_same<typename std::remove_cv<T>::type, typename std::remove_cv<decltype(NULL)>::type>::value,
    int>::type;

/* Whether every vector has the segments that the caller counts. */
inline bool holds(int num_iovs) noexcept { return num_iovs >= 0; }
template <typename Vector, typename... Vectors>
inline bool holds(int num_iovs, Vector const& first, Vectors const&... rest) noexcept {
  return holds(num_iovs, rest...) && first.size() >= static_cast<std::size_t>(num_iovs);
}

}  // namespace uccl_engine_detail

/* The C function again, for its default argument: same_process is false unless given. */
extern "C" uccl_conn_t* uccl_engine_connect(uccl_engine_t* engine, const char* ip_addr, const char* remote_gpu, int remote_port,
                                            bool same_process = false);

/**
 * Connects to a peer engine whose GPU is given as a CUDA index.
 *
 * @param engine          [in] The engine.
 * @param ip_addr         [in] The peer's address.
 * @param remote_gpu_idx  [in] CUDA index of the peer's GPU, -1 for none. Any integer type but that of NULL.
 * @param remote_port     [in] The peer's port, 1 to 65535.
 * @param same_process    [in] The peer is an engine of this process.
 * @return As the C function.
 */
template <typename Index, uccl_engine_detail::gpu_index<Index> = 0>
inline uccl_conn_t* uccl_engine_connect(uccl_engine_t* engine, char const* ip_addr, Index remote_gpu_idx, int remote_port,
                                        bool same_process = false) noexcept {
  char text[16];
  std::snprintf(text, sizeof(text), "%d", static_cast<int>(remote_gpu_idx));
  return uccl_engine_connect(engine, ip_addr, static_cast<char const*>(text), remote_port, same_process);
}

/**
 * Registers memory.
 *
 * @param engine  [in]  The engine.
 * @param data    [in]  Address of the first byte, in host or GPU memory.
 * @param size    [in]  Bytes, at least 1.
 * @param mr_id   [out] The region; unchanged on failure.
 * @return As the C function.
 */
inline int uccl_engine_reg(uccl_engine_t* engine, uintptr_t data, size_t size, uccl_mr_t& mr_id) noexcept {
  return uccl_engine_reg(engine, static_cast<size_t>(data), size, &mr_id);
}

/**
 * The C function for a destination that upstream's declaration calls const, although it is written.
 *
 * @param data  [in] Local destination.
 * @return As the C function, whose other parameters these are.
 */
template <typename T>
inline int uccl_engine_read(uccl_conn_t* conn, uccl_mr_t mr, T const* data, size_t size, FifoItem fifo_item,
                            uint64_t* transfer_id) noexcept {
  return uccl_engine_read(conn, mr, const_cast<void*>(static_cast<void const*>(data)), size, fifo_item, transfer_id);
}

/**
 * Starts a read of several segments as one transfer.
 *
 * @param conn         [in]  The connection.
 * @param mr_ids       [in]  Local regions.
 * @param dst_v        [in]  Local destinations, each inside its region.
 * @param size_v       [in]  Lengths in bytes.
 * @param fifo_items   [in]  Remote sources.
 * @param num_iovs     [in]  Segments, 1 to 1,048,576; no vector but ipc_bufs may hold fewer elements, more are ignored.
 * @param transfer_id  [out] Id of the transfer; unchanged on failure.
 * @param ipc_bufs     [in]  IPC descriptors; ignored, because direct transfers on one host do not need them.
 * @return As the C function; UCCL_ERR_INVALID_ARGUMENT if a vector is too short. Nothing moves then, and
 *         uccl_engine_last_error is unchanged.
 */
inline int uccl_engine_read_vector(uccl_conn_t* conn, std::vector<uccl_mr_t> mr_ids, std::vector<void*> dst_v,
                                   std::vector<size_t> size_v, std::vector<FifoItem> fifo_items, int num_iovs,
                                   uint64_t* transfer_id, std::vector<char*> ipc_bufs = {}) noexcept {
  static_cast<void>(ipc_bufs);
  if (!uccl_engine_detail::holds(num_iovs, mr_ids, dst_v, size_v, fifo_items)) return UCCL_ERR_INVALID_ARGUMENT;
  return uccl_engine_read_vector(conn, mr_ids.data(), dst_v.data(), size_v.data(), fifo_items.data(), num_iovs, transfer_id);
}

/**
 * Starts a write of several segments as one transfer.
 *
 * @param conn         [in]  The connection.
 * @param mr_ids       [in]  Local regions.
 * @param src_v        [in]  Local sources, each inside its region; the memory must not change until the transfer ends.
 * @param size_v       [in]  Lengths in bytes.
 * @param fifo_items   [in]  Remote destinations.
 * @param num_iovs     [in]  Segments, 1 to 1,048,576; no vector but ipc_bufs may hold fewer elements, more are ignored.
 * @param transfer_id  [out] Id of the transfer; unchanged on failure.
 * @param ipc_bufs     [in]  IPC descriptors; ignored, because direct transfers on one host do not need them.
 * @return As the C function; UCCL_ERR_INVALID_ARGUMENT if a vector is too short. Nothing moves then, and
 *         uccl_engine_last_error is unchanged.
 */
inline int uccl_engine_write_vector(uccl_conn_t* conn, std::vector<uccl_mr_t> mr_ids, std::vector<void*> src_v,
                                    std::vector<size_t> size_v, std::vector<FifoItem> fifo_items, int num_iovs,
                                    uint64_t* transfer_id, std::vector<char*> ipc_bufs = {}) noexcept {
  static_cast<void>(ipc_bufs);
  if (!uccl_engine_detail::holds(num_iovs, mr_ids, src_v, size_v, fifo_items)) return UCCL_ERR_INVALID_ARGUMENT;
  return uccl_engine_write_vector(conn, mr_ids.data(), src_v.data(), size_v.data(), fifo_items.data(), num_iovs, transfer_id);
}

/**
 * Starts a two-sided send of one message gathered from several segments.
 *
 * @param conn         [in]  The connection.
 * @param mr_ids       [in]  Local regions.
 * @param src_v        [in]  Sources, each inside its region; the memory must not change until the transfer ends.
 * @param size_v       [in]  Lengths in bytes.
 * @param num_iovs     [in]  Segments, 0 to 1,048,576; no vector may hold fewer elements, more are ignored.
 * @param transfer_id  [out] Id of the transfer; unchanged on failure.
 * @return As the C function; UCCL_ERR_INVALID_ARGUMENT if a vector is too short. Nothing moves then, and
 *         uccl_engine_last_error is unchanged.
 */
inline int uccl_engine_send_vector(uccl_conn_t* conn, std::vector<uccl_mr_t> mr_ids, std::vector<void const*> src_v,
                                   std::vector<size_t> size_v, int num_iovs, uint64_t* transfer_id) noexcept {
  if (!uccl_engine_detail::holds(num_iovs, mr_ids, src_v, size_v)) return UCCL_ERR_INVALID_ARGUMENT;
  return uccl_engine_send_vector(conn, mr_ids.data(), src_v.data(), size_v.data(), num_iovs, transfer_id);
}

/**
 * Returns the engine's metadata, "ip:port?gpu".
 *
 * @param engine        [in]  The engine.
 * @param metadata_str  [out] NUL-terminated text; the caller owns it and frees it with delete[] (or with the
 *                      C++ uccl_engine_free_metadata, which does that); unchanged on failure.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for NULL; UCCL_ERR_RESOURCE when memory runs out; the status of
 *         uccl_engine_metadata_into.
 */
inline int uccl_engine_get_metadata(uccl_engine_t* engine, char** metadata_str) noexcept {
  if (metadata_str == nullptr) return UCCL_ERR_INVALID_ARGUMENT;
  size_t len = 0;
  int status = uccl_engine_metadata_into(engine, nullptr, 0, &len);
  if (status != UCCL_OK && (status != UCCL_ERR_RESOURCE || len == 0)) return status;
  char* text = new (std::nothrow) char[len];
  if (text == nullptr) return UCCL_ERR_RESOURCE;
  status = uccl_engine_metadata_into(engine, text, len, nullptr);
  if (status != UCCL_OK) {
    delete[] text;
    return status;
  }
  *metadata_str = text;
  return UCCL_OK;
}

/**
 * Frees the text that the C++ uccl_engine_get_metadata returned.
 *
 * @param metadata  The text; NULL is a no-op. Do not pass text that C code got from the library.
 */
inline void uccl_engine_free_metadata(char* metadata) noexcept { delete[] metadata; }

/**
 * Takes all notifications of any engine of this process, oldest first, cut to the fixed size.
 *
 * @return The notifications; empty if there are none. If memory runs out, those that fit; the rest stays for the next call.
 *
 * Threads: any; each notification is handed out once.
 */
inline std::vector<notify_msg_t> uccl_engine_get_notifs() noexcept {
  std::vector<notify_msg_t> taken;
  size_t used = 0;
  for (;;) {
    size_t const room = used == 0 ? 8 : used;
    UCCL_P2P_TRY {
      taken.resize(used + room);
    } UCCL_P2P_CATCH {
      break;
    }
    size_t count = 0;
    if (uccl_engine_get_notifs(taken.data() + used, room, &count) != UCCL_OK) break;
    used += count;
    if (count < room) break;
  }
  taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(used), taken.end());
  return taken;
}

/**
 * Takes all notifications of any engine of this process, oldest first, whole.
 *
 * @return The notifications; empty if there are none. If memory runs out, those taken so far; the one that did not fit is
 *         lost, and the rest stays for the next call.
 *
 * Threads: any; each notification is handed out once.
 */
inline std::vector<notify_msg_v_t> uccl_engine_get_notifs_v() noexcept {
  std::vector<notify_msg_v_t> taken;
  for (;;) {
    uccl_notif_t* notif = nullptr;
    UCCL_P2P_TRY {
      // The slot comes first, so that there is room for each notification that is taken.
      taken.emplace_back();
      if (uccl_engine_notif_next(nullptr, &notif) != UCCL_OK || notif == nullptr) {
        taken.pop_back();
        break;
      }
      size_t name_len = 0, msg_len = 0;
      char const* name = uccl_engine_notif_name(notif, &name_len);
      void const* msg = uccl_engine_notif_msg(notif, &msg_len);
      if (name != nullptr) taken.back().name.assign(name, name_len);
      if (msg != nullptr) taken.back().msg.assign(static_cast<char const*>(msg), msg_len);
      uccl_engine_notif_free(notif);
    } UCCL_P2P_CATCH {
      if (notif != nullptr) {
        uccl_engine_notif_free(notif);
        taken.pop_back();
      }
      break;
    }
  }
  return taken;
}

/**
 * The C function with upstream's parameter, which is not const.
 *
 * @param conn        [in] The connection.
 * @param notify_msg  [in] The notification; not changed.
 * @return As the C function.
 */
template <typename Message, typename std::enable_if<std::is_same<Message, notify_msg_t>::value, int>::type = 0>
inline int uccl_engine_send_notif(uccl_conn_t* conn, Message* notify_msg) noexcept {
  return uccl_engine_send_notif(conn, static_cast<notify_msg_t const*>(notify_msg));
}

/**
 * Sends a notification of any length up to 64 MiB, name and message together.
 *
 * @param conn        [in] The connection.
 * @param notify_msg  [in] The notification. Copied; may be reused at once.
 * @return As uccl_engine_send_notif_bytes; -1 for NULL and above 64 MiB.
 */
inline int uccl_engine_send_notif_v(uccl_conn_t* conn, notify_msg_v_t const* notify_msg) noexcept {
  if (notify_msg == nullptr) return UCCL_ERR_INVALID_ARGUMENT;
  return uccl_engine_send_notif_bytes(conn, notify_msg->name.data(), notify_msg->name.size(), notify_msg->msg.data(),
                                      notify_msg->msg.size());
}

/**
 * Points a FIFO item at another range of its region.
 *
 * @param fifo_item    [in,out] The item; only addr and size change.
 * @param remote_addr  [in] New address in the peer's address space; the peer checks it when it is used.
 * @param size         [in] New size in bytes; informative.
 * @return As the C function.
 */
inline int uccl_engine_update_fifo(FifoItem& fifo_item, uint64_t remote_addr, uint32_t size) noexcept {
  return uccl_engine_update_fifo(&fifo_item, remote_addr, size);
}

/**
 * Writes a FIFO item as bytes.
 *
 * @param item  [in]  The item.
 * @param buf   [out] UCCL_FIFO_SIZE (64) bytes, any alignment.
 */
inline void serialize_fifo_item(FifoItem const& item, char* buf) noexcept { std::memcpy(buf, &item, sizeof(item)); }

/**
 * Reads a FIFO item from bytes.
 *
 * @param buf   [in]  UCCL_FIFO_SIZE (64) bytes, any alignment.
 * @param item  [out] The item.
 */
inline void deserialize_fifo_item(char const* buf, FifoItem* item) noexcept { std::memcpy(item, buf, sizeof(*item)); }

}  // extern "C++"

#undef UCCL_P2P_TRY
#undef UCCL_P2P_CATCH
