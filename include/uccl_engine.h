/* uccl_engine.h - the C ABI of libuccl_p2p, and from C++ also the upstream UCCL engine API over it.
 *
 * GENERATED from src/ffi by cbindgen; do not edit. `UPDATE_HEADER=1 cargo test --release --test lints` renews it.
 *
 * Conventions
 *  - Any thread may call any function at any time. The owner of an object destroys it once.
 *  - Functions that return int return UCCL_OK (0), UCCL_IN_PROGRESS (1) or a negative UCCL_ERR_*. uccl_engine_last_error() returns the
 *    cause as text, per thread. On failure outputs are unchanged.
 *  - A misaligned pointer to a number or structure is UCCL_ERR_INVALID_ARGUMENT.
 *  - Handles are never dereferenced and never reused: a stale, foreign or NULL handle is an error, not undefined behaviour.
 *  - After fork the child may create its own engines. Inherited handles belong to the parent: destroying one does nothing, any other
 *    use is an error, and the parent's connections are unaffected. CUDA does not work in the child of a process that used it; such a
 *    child can register host memory only.
 *  - Functions may be called from destructors of static objects and of thread-specific data; nothing here throws or unwinds.
 *    Cancellation (pthread_cancel) is deferred: it takes effect at the first cancellation point after the call returns. A thread with
 *    asynchronous cancellation (PTHREAD_CANCEL_ASYNCHRONOUS) must not be cancelled inside a call: the process would end.
 *  - Lengths are bytes. Deadlines come from the environment: docs/configuration.md.
 *  - C11 or newer; C++11 or newer for the C++ API.
 *  - GPU memory: synchronise with the kernels that write a source before you start the transfer. Kernels that are launched after a
 *    transfer completed see its data, on any stream.
 *  - docs/glossary.md defines the terms.
 *
 * Sections: types and constants, status numbers, engines, metadata, connections, memory, transfers, lists, notifications, log,
 * statistics, errors and version.
 *
 * SPDX-License-Identifier: Apache-2.0
 */

#pragma once


#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/** Version of this header. uccl_engine_version() returns the library's. */
#define UCCL_P2P_VERSION_MAJOR 0
#define UCCL_P2P_VERSION_MINOR 1
#define UCCL_P2P_VERSION_PATCH 0
/** One number for comparisons, such as `#if UCCL_P2P_VERSION_NUMBER >= UCCL_P2P_MAKE_VERSION(0, 2, 0)`. */
#define UCCL_P2P_MAKE_VERSION(major, minor, patch) ((major) * 1000000 + (minor) * 1000 + (patch))
#define UCCL_P2P_VERSION_NUMBER UCCL_P2P_MAKE_VERSION(UCCL_P2P_VERSION_MAJOR, UCCL_P2P_VERSION_MINOR, UCCL_P2P_VERSION_PATCH)

/* Upstream's names of UCCL_MSG_SIZE, UCCL_FIFO_SIZE and UCCL_IPC_INFO_SIZE. Define UCCL_P2P_NO_SHORT_NAMES before including this file
 * if they clash with names of the program. */
#ifndef UCCL_P2P_NO_SHORT_NAMES
#define MSG_SIZE UCCL_MSG_SIZE
#define FIFO_SIZE UCCL_FIFO_SIZE
#define IPC_INFO_SIZE UCCL_IPC_INFO_SIZE
#endif

/** Opaque. An engine: a listening port, registered memory, connections, and the threads that move data. */
typedef struct uccl_engine uccl_engine_t;
/** Opaque. A connection to a peer engine: one control connection and one or more channels. */
typedef struct uccl_conn uccl_conn_t;
/** Opaque. A received notification of any length. */
typedef struct uccl_notif uccl_notif_t;
/** Opaque. The segments of a transfer that is started several times. */
typedef struct uccl_list uccl_list_t;

/* ==== Types and constants ==== */

/** Bytes of a serialised FIFO item. */
#define UCCL_FIFO_SIZE 64

/** Bytes of an IPC descriptor. */
#define UCCL_IPC_INFO_SIZE 128

/** Peers may read a region. */
#define UCCL_ACCESS_REMOTE_READ 1

/** Peers may write a region. */
#define UCCL_ACCESS_REMOTE_WRITE 2

/** Bytes of the name and msg fields of notify_msg_t. */
#define UCCL_MSG_SIZE 256

/** Log level: a failure. */
#define UCCL_LOG_ERROR 1

/** Log level: degraded, but continuing. */
#define UCCL_LOG_WARN 2

/** Log level: main events. */
#define UCCL_LOG_INFO 3

/** Log level: details for debugging. */
#define UCCL_LOG_DEBUG 4

/** Log level: every transfer and frame. */
#define UCCL_LOG_TRACE 5

/** A setting of an engine: the name of an environment variable, and the value that overrides it. */
typedef struct uccl_option_t {
  /** Name of a variable of docs/configuration.md, NUL-terminated, such as "UCCL_TCPX_NUM_CHANNELS". */
  const char *name;
  /** Its value, NUL-terminated. NULL or "" means that the variable is not set. */
  const char *value;
} uccl_option_t;

/** A registered memory region. 0 is never valid. */
typedef uint64_t uccl_mr_t;

/** Access to a range of a peer's region. Exchanged between hosts of the same byte order (little-endian: x86-64, aarch64). */
typedef struct FifoItem {
  /** First byte, in the address space of the region's owner. */
  uint64_t addr;
  /** Bytes; informative: transfers take their length from their own argument. */
  uint32_t size;
  /** Where the region lies: 1 host memory, 2 + n memory of the owner's GPU n. Set by uccl_engine_prepare_fifo. */
  uint32_t rkey;
  /** For users of the structure; not read by this library. */
  uint32_t nmsgs;
  /** Layout version of the opaque bytes. */
  uint32_t rid;
  /** Id of the region at its owner. */
  uint64_t idx;
  /** Opaque: the region's token and the id of the owning engine. */
  char padding[32];
} FifoItem;

/** State of a transfer. */
typedef struct uccl_xfer_info_t {
  /** UCCL_OK, UCCL_IN_PROGRESS or the error, as uccl_engine_poll returns it. */
  int32_t status;
  /** 0; reserved. */
  uint32_t reserved;
  /**
   * Bytes of the whole transfer. For a receive: the length of the message, 0 until it is known. 0 for a failed transfer, and for a
   * completed one after 16,384 later transfers of its connection have ended.
   */
  uint64_t bytes_total;
  /** Bytes sent (write, send) or received (read, receive) so far; bytes_total when complete. */
  uint64_t bytes_done;
} uccl_xfer_info_t;

/** A fixed-size notification. */
typedef struct notify_msg {
  /** Name that the sender gave, NUL-terminated. */
  char name[UCCL_MSG_SIZE];
  /** The message: 256 bytes, padded with zeros. */
  char msg[UCCL_MSG_SIZE];
} notify_msg_t;

/**
 * Receives a log line: its level (UCCL_LOG_*), its text (NUL-terminated, without a newline, valid during the call only) and the pointer
 * that was given to uccl_engine_set_log_callback.
 *
 * One thread of the library calls it, one line at a time and without holding locks. It may block, and it may call any function of this
 * library except uccl_engine_set_log_callback; lines that its own calls log go to standard error. The library queues up to 4,096 lines
 * or 1 MiB for it, drops the rest, and logs how many it dropped. The callback must return: an exception or a longjmp out of it ends the
 * process.
 */
typedef void (*uccl_log_callback_t)(int level, const char *text, void *user);

/**
 * What an engine or a connection has counted. Each counter starts at 0 and never decreases. This structure never changes: later versions
 * append new counters to the structures that contain it.
 */
typedef struct uccl_totals_t {
  /** Bytes that channels have sent. */
  uint64_t sent_bytes;
  /** Chunks that channels have sent. */
  uint64_t sent_chunks;
  /** Bytes that channels have received. */
  uint64_t received_bytes;
  /** Chunks that channels have received. */
  uint64_t received_chunks;
  /** Bytes of small transfers sent inside control frames. */
  uint64_t eager_sent_bytes;
  /** Bytes of small transfers received inside control frames. */
  uint64_t eager_received_bytes;
  /** Transfers that this engine started. */
  uint64_t transfers_started;
  /** Transfers of this engine that succeeded. */
  uint64_t transfers_completed;
  /** Transfers of this engine that failed. */
  uint64_t transfers_failed;
  /** Transfers that peers started. */
  uint64_t peer_transfers;
  /** Transfers of peers that this engine refused. */
  uint64_t refused;
  /** Transfers of this engine that peers refused. */
  uint64_t refused_by_peer;
  /** Bytes sent on control connections. */
  uint64_t control_sent_bytes;
  /** Bytes received on control connections. */
  uint64_t control_received_bytes;
  /** Notifications sent. */
  uint64_t notifications_sent;
  /** Notifications received. */
  uint64_t notifications_received;
  /** Seconds in which a channel had chunks in flight and moved none. */
  uint64_t stalls;
  /** Times that a peer was silent, or a transfer moved nothing, for half of its timeout. */
  uint64_t slow_answers;
  /** Channels that were lost, and whose undelivered chunks were sent again on others. */
  uint64_t lost_channels;
  /** Lost channels that came back. */
  uint64_t restored_channels;
  /** Chunks sent again after their channel was lost. */
  uint64_t resent_chunks;
  /** Times that a control connection was made again over another socket. */
  uint64_t control_moves;
  /** Chunks packed from GPU memory. */
  uint64_t packed_chunks;
  /** Chunks unpacked into GPU memory. */
  uint64_t unpacked_chunks;
  /** Time from submitting a chunk until it was packed, summed over all chunks, microseconds. */
  uint64_t pack_us;
  /** Time from submitting a chunk until it was unpacked, summed over all chunks, microseconds. */
  uint64_t unpack_us;
} uccl_totals_t;

/**
 * Statistics of an engine. Set `size` to sizeof(uccl_stats_t) before the call; the library fills no more than that. Later versions only
 * append members. The library copies numbers into the structure and keeps no pointer to it. Counters start when the engine is created and
 * include connections that have ended.
 */
typedef struct uccl_stats_t {
  /** In: size of the caller's structure, bytes. Out: bytes filled. */
  size_t size;
  /** Milliseconds since the engine was created. */
  uint64_t uptime_ms;
  /** Open connections. */
  uint64_t connections;
  /** Connections opened so far. */
  uint64_t connections_opened;
  /** Connections closed by either engine. */
  uint64_t connections_closed;
  /** Connections that failed. */
  uint64_t connections_lost;
  /** Incoming set-ups that succeeded. */
  uint64_t setups_in;
  /** Incoming set-ups that failed. */
  uint64_t setups_in_failed;
  /** Incoming set-ups refused, because the peer was not authorised or a limit was reached. */
  uint64_t setups_in_refused;
  /** Outgoing set-ups that succeeded. */
  uint64_t setups_out;
  /** Outgoing set-ups that failed. */
  uint64_t setups_out_failed;
  /** Times that a limit was reached: on set-ups, file descriptors, transfers or notifications. */
  uint64_t limits_hit;
  /** Connections that failed at a deadline. */
  uint64_t timeouts;
  /** Notifications that the application has not taken yet. */
  uint64_t notifications_waiting;
  /** Sums over all connections. */
  struct uccl_totals_t totals;
} uccl_stats_t;

/** Statistics of a connection. `size`: as in uccl_stats_t. */
typedef struct uccl_conn_stats_t {
  /** In: size of the caller's structure, bytes. Out: bytes filled. */
  size_t size;
  /** Number of the connection in its engine, from 1. */
  uint64_t id;
  /** 1 while the connection is open, 0 once it has ended. */
  uint64_t up;
  /** Milliseconds since it was opened. */
  uint64_t age_ms;
  /** Milliseconds since the last frame of the peer, heartbeats included. */
  uint64_t silent_ms;
  /** Channels; 0 once it has ended. */
  uint64_t channels;
  /** Transfers of this engine in flight. */
  uint64_t transfers_in_flight;
  /** Bytes queued on the control connection. */
  uint64_t backlog_bytes;
  /** Counters of the connection. */
  struct uccl_totals_t totals;
} uccl_conn_stats_t;

/** Statistics of a channel. `size`: as in uccl_stats_t. */
typedef struct uccl_channel_stats_t {
  /** In: size of the caller's structure, bytes. Out: bytes filled. */
  size_t size;
  /** Bytes sent. */
  uint64_t sent_bytes;
  /** Chunks sent. */
  uint64_t sent_chunks;
  /** Bytes received. */
  uint64_t received_bytes;
  /** Chunks received. */
  uint64_t received_chunks;
  /** Bytes sent per second, averaged over about one second. */
  uint64_t sent_bytes_per_second;
  /** Bytes received per second, averaged over about one second. */
  uint64_t received_bytes_per_second;
  /** Bytes per second while the channel is busy sending; 0 if unknown. */
  uint64_t speed_bytes_per_second;
  /** Bytes queued on the channel and not sent yet. */
  uint64_t queued_bytes;
  /** Chunks in the send window. */
  uint64_t window_out;
  /** Chunks in the receive window. */
  uint64_t window_in;
  /** Size of each window, chunks. */
  uint64_t window;
  /** Seconds in which the channel had chunks in flight and moved none. */
  uint64_t stalls;
  /** Chunks packed from GPU memory. */
  uint64_t packed_chunks;
  /** Chunks unpacked into GPU memory. */
  uint64_t unpacked_chunks;
  /** 1 while the NIC of the channel is much slower than the others. */
  uint64_t slow;
  /** TCP segments sent. 0 if the plugin does not report it; the same holds for the next three. */
  uint64_t segments;
  /** TCP segments retransmitted. */
  uint64_t retransmits;
  /** Smoothed round-trip time, microseconds. */
  uint64_t rtt_us;
  /** Smallest round-trip time, microseconds. */
  uint64_t min_rtt_us;
  /** Name of the channel's NIC, NUL-terminated, cut to 31 bytes. */
  char nic[32];
  /** Time from submitting a chunk until it was packed, summed over all chunks, microseconds. */
  uint64_t pack_us;
  /** Time from submitting a chunk until it was unpacked, summed over all chunks, microseconds. */
  uint64_t unpack_us;
  /** 1 while the channel is lost: it failed, or the peer lost it, and it has not come back. */
  uint64_t lost;
  /** Of the bytes of direct transfers: those that were copied over NVLink. Reads of the peer count at the peer alone. */
  uint64_t nvlink_bytes;
  /**
   * Name of the plugin that carries the channel, or "direct" for direct transfers between two processes on one host; NUL-terminated,
   * cut to 31 bytes.
   */
  char plugin[32];
  /**
   * The word for what carries the channel, as in UCCL_TCPX_REQUIRE: "tcp", "devmem", "tcpx", "tcpxo" or "direct", else the plugin's name;
   * NUL-terminated, cut to 15 bytes. Of "direct", nvlink_bytes are "nvlink".
   */
  char carrier[16];
} uccl_channel_stats_t;

/** What carried the bytes of a transfer. All empty before the first byte has moved. */
typedef struct uccl_xfer_path_t {
  /** Size of this structure. Set it to sizeof(uccl_xfer_path_t) before the call; the call sets it to the bytes that it filled. */
  size_t size;
  /**
   * Channels that moved bytes of it: bit n stands for channel n of uccl_engine_channel_stats. Channels after the 61st share its bit. A
   * channel that was lost counts if it had sent bytes.
   */
  uint64_t channels;
  /**
   * The words for what carried its bytes, as in UCCL_TCPX_REQUIRE, each once, separated by commas: "eager" (in frames of the control
   * connection: small transfers), "direct", "nvlink", and the carriers of the channels, such as "tcpx". NUL-terminated, cut to 63 bytes.
   */
  char carriers[64];
  /** This host's NICs of the channels that moved bytes, each once, separated by commas; NUL-terminated, cut to 127 bytes. */
  char nics[128];
} uccl_xfer_path_t;

/** Unused; kept for compatibility with code that names it. */
typedef struct md {
  /** The notification. */
  struct notify_msg notify_data;
} md_t;

/* ==== Status numbers ==== */

/** Success; for a transfer: complete, with every byte in place at the destination. */
#define UCCL_OK 0

/** Not finished yet; not an error. */
#define UCCL_IN_PROGRESS 1

/** An argument is null, out of range, outside its region, or malformed. */
#define UCCL_ERR_INVALID_ARGUMENT -1

/** No such engine, connection, region or transfer; it never existed or was destroyed. */
#define UCCL_ERR_NOT_FOUND -2

/** Memory, file descriptors or another resource ran out, or a limit of the library was reached. */
#define UCCL_ERR_RESOURCE -3

/** The operation is not supported in this configuration. */
#define UCCL_ERR_UNSUPPORTED -4

/** The application closed the object while the operation was waiting or in flight. */
#define UCCL_ERR_CANCELED -5

/** A deadline passed (see the UCCL_TCPX_*_TIMEOUT_MS variables). */
#define UCCL_ERR_TIMED_OUT -10

/** The peer cannot be reached. */
#define UCCL_ERR_UNREACHABLE -11

/** The connection is lost: the peer died, closed it, or the network failed. */
#define UCCL_ERR_REMOTE_DISCONNECT -12

/** The peer does not have the pre-shared key. */
#define UCCL_ERR_AUTH -13

/** The peer does not speak this protocol, or violated it. */
#define UCCL_ERR_PROTOCOL -14

/** The peer refused the access: unknown or deregistered region, wrong token, or out of bounds. */
#define UCCL_ERR_REMOTE_ACCESS -20

/** The message is larger than the posted receive; both engines get this status. */
#define UCCL_ERR_TRUNCATED -21

/** The NCCL net plugin cannot be found or loaded. */
#define UCCL_ERR_PLUGIN_LOAD -30

/** The NCCL net plugin returned an error. */
#define UCCL_ERR_PLUGIN -31

/** A CUDA call failed, or no usable GPU was found. */
#define UCCL_ERR_GPU -32

/** A system call failed. */
#define UCCL_ERR_SYSTEM -33

/** A bug in the library. Please report it. */
#define UCCL_ERR_INTERNAL -99



#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/* ==== Engines ==== */

/**
 * Creates an engine: loads the network plugin, finds the NICs, opens the listening port and starts the progress thread.
 *
 * @param num_cpus   Ignored; accepted for compatibility. The library counts the cores itself (UCCL_TCPX_SOFT_THREADS overrides).
 * @param in_python  Ignored; accepted for compatibility. The library never installs signal handlers.
 * @return The engine; the caller owns it and ends it with uccl_engine_destroy. NULL on failure; uccl_engine_last_error has the cause,
 *         such as a plugin that cannot be loaded, a port in use or an invalid environment variable.
 *
 * Threads: any. This call reads the configuration from the environment (docs/configuration.md).
 */
uccl_engine_t *uccl_engine_create(int num_cpus,
                                  bool in_python);

/**
 * Creates an engine like uccl_engine_create, with settings that override the environment. The environment itself does not change, so
 * the engines of one process may have different settings.
 *
 * @param options      [in]  num_options settings; the last one of a name counts. Copied. May be NULL if num_options is 0.
 * @param num_options  [in]  Number of settings.
 * @param engine       [out] The engine; the caller owns it and ends it with uccl_engine_destroy.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for an unknown name, an invalid value, or a variable that applies to the whole process
 *         (the log's, and those that only the network plugin reads); another negative status if the engine cannot be created.
 *
 * Threads: any.
 */
int uccl_engine_create_with(const struct uccl_option_t *options,
                            size_t num_options,
                            uccl_engine_t **engine);

/**
 * Ends an engine: wakes blocked accepts, fails transfers in flight with UCCL_ERR_CANCELED, closes its connections, and joins its
 * threads. Its connection handles stay valid until uccl_engine_conn_destroy, but every call on them fails.
 *
 * @param engine  The engine. NULL and an engine of the parent process after a fork are no-ops. A handle already destroyed only logs an
 *                error.
 *
 * Threads: any, once. Returns within the close deadline (UCCL_TCPX_CLOSE_TIMEOUT_MS, but at most one second), except that it also waits
 * for connections that are inside a call of the CUDA driver or of the network plugin; these have their own deadline. On return the
 * library no longer touches registered memory.
 */
void uccl_engine_destroy(uccl_engine_t *engine);

/**
 * Returns a descriptor with which an event loop (poll, epoll, asyncio) waits for an engine. It becomes readable when a notification has
 * come, a transfer has ended, a connection has come or ended, and at uccl_engine_stop_accept and uccl_engine_destroy.
 *
 * @param engine  [in]  The engine.
 * @param fd      [out] The descriptor, an eventfd, non-blocking and closed on exec. The caller owns it and closes it; it stays open when
 *                      the engine is destroyed. It is readable at first, because it does not show what happened before.
 * @return UCCL_OK; UCCL_ERR_RESOURCE without a free descriptor; another negative status.
 *
 * When it is readable, first read its 8 bytes, which resets it, then look: uccl_engine_poll for each transfer in flight,
 * uccl_engine_notif_next until there is none, uccl_engine_accept_for with timeout 0. An event between the read and the look makes it
 * readable again. All descriptors of an engine are duplicates of one: a read resets them all, so one thread reads and wakes the others.
 * Each event costs a system call from the first call of this function on. A thread that waits for one transfer needs no descriptor
 * (uccl_engine_wait), nor does one that waits for notifications (uccl_engine_notif_wait).
 *
 * Threads: any.
 */
int uccl_engine_event_fd(uccl_engine_t *engine,
                         int *fd);

/* ==== Metadata: how peers find an engine ==== */

#ifndef __cplusplus
/**
 * Returns the engine's metadata, "ip:port?gpu". gpu is the PCI address of the engine's GPU, or "-1" without one. Where peers find the engine at
 * other addresses too, they follow, each behind a comma; all behind the question mark is the remote_gpu of uccl_engine_connect.
 *
 * @param engine    [in]  The engine.
 * @param metadata  [out] NUL-terminated text; the caller owns it and frees it with uccl_engine_free_metadata.
 * @return UCCL_OK or a negative status; on failure *metadata is unchanged.
 *
 * Threads: any. C++: the overload of the same name allocates with new[]; free it with delete[].
 */
int uccl_engine_get_metadata(uccl_engine_t *engine,
                             char **metadata);
#endif

#ifndef __cplusplus
/**
 * Frees the text that uccl_engine_get_metadata returned to C.
 *
 * @param metadata  The text; NULL is a no-op.
 *
 * Threads: any, once per text.
 */
void uccl_engine_free_metadata(char *metadata);
#endif

/**
 * Writes the engine's metadata into the caller's buffer.
 *
 * @param engine  [in]  The engine.
 * @param buf     [out] NUL-terminated text. May be NULL if len is 0.
 * @param len     [in]  Size of buf in bytes.
 * @param needed  [out] Bytes needed with the NUL, also written if buf is too small. May be NULL.
 * @return UCCL_OK; UCCL_ERR_RESOURCE if buf is too small (buf is unchanged); another negative status.
 *
 * Threads: any.
 */
int uccl_engine_metadata_into(uccl_engine_t *engine, char *buf, size_t len, size_t *needed);

/**
 * Splits metadata into the arguments of uccl_engine_connect.
 *
 * @param metadata  [in]  Text of uccl_engine_get_metadata, NUL-terminated: "ip:port?gpu". An IPv6 address before the port is in brackets.
 * @param ip_buf    [out] The address, NUL-terminated, without brackets. May be NULL.
 * @param ip_len    [in]  Size of ip_buf in bytes; 64 holds every address.
 * @param port      [out] The port, 1 to 65535. May be NULL.
 * @param gpu_buf   [out] The GPU and the other addresses, NUL-terminated, as uccl_engine_connect takes them. May be NULL.
 * @param gpu_len   [in]  Size of gpu_buf in bytes; 512 holds all that this library writes.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for text that is not metadata; UCCL_ERR_RESOURCE if a buffer is too small. On failure
 *         the outputs are unchanged.
 *
 * Threads: any; needs no engine.
 */
int uccl_engine_parse_metadata(const char *metadata,
                               char *ip_buf,
                               size_t ip_len,
                               int *port,
                               char *gpu_buf,
                               size_t gpu_len);

/* ==== Connections ==== */

/**
 * Connects to a peer engine. Blocks until all channels are up. The peer's application does not need to call accept.
 *
 * @param engine        [in] The engine.
 * @param ip_addr       [in] The peer's IPv4 or IPv6 address or host name, NUL-terminated.
 * @param remote_gpu    [in] The peer's GPU as its metadata names it: a PCI address ("0000:4a:00.0", any case, 4- or 8-digit domain),
 *                      a CUDA index ("0"), or "-1" for a host without a GPU. NULL or "": not given. Behind it may follow what the
 *                      metadata has there: other addresses of the peer, which are tried if it does not answer at the first.
 * @param remote_port   [in] The peer's port, 1 to 65535.
 * @param same_process  [in] Ignored; accepted for compatibility.
 * @return The connection; the caller owns it and ends it with uccl_engine_conn_destroy. NULL on failure (uccl_engine_last_error).
 *
 * Threads: any; several connects may run in parallel. Deadline: UCCL_TCPX_CONNECT_TIMEOUT_MS.
 */
uccl_conn_t *uccl_engine_connect(uccl_engine_t *engine,
                                 const char *ip_addr,
                                 const char *remote_gpu,
                                 int remote_port,
                                 bool same_process);

/**
 * Returns the next connection that a peer opened. Blocks until there is one or uccl_engine_stop_accept is called.
 *
 * @param engine          [in]  The engine.
 * @param ip_addr_buf     [out] The peer's address as text, always NUL-terminated, cut to fit.
 * @param ip_addr_buf_len [in]  Size of ip_addr_buf in bytes, at least 1; 46 holds every address.
 * @param remote_gpu_idx  [out] CUDA index of the peer's GPU in the peer's process, -1 if it has none.
 * @return The connection; the caller owns it and ends it with uccl_engine_conn_destroy. NULL after uccl_engine_stop_accept or on
 *         failure; ip_addr_buf then contains an empty string and remote_gpu_idx is unchanged.
 *
 * Threads: any. The peer can transfer data as soon as its connect returned, before this call.
 */
uccl_conn_t *uccl_engine_accept(uccl_engine_t *engine, char *ip_addr_buf, size_t ip_addr_buf_len, int *remote_gpu_idx);

/**
 * Returns the next connection that a peer opened, like uccl_engine_accept, waiting for it at most for the given time.
 *
 * @param engine          [in]  The engine.
 * @param timeout_ms      [in]  Longest wait in milliseconds; 0: does not block; negative: until there is one.
 * @param ip_addr_buf     [out] The peer's address as text, always NUL-terminated, cut to fit.
 * @param ip_addr_buf_len [in]  Size of ip_addr_buf in bytes, at least 1; 46 holds every address.
 * @param remote_gpu_idx  [out] CUDA index of the peer's GPU in the peer's process, -1 if it has none.
 * @param conn            [out] The connection; the caller owns it and ends it with uccl_engine_conn_destroy.
 * @return UCCL_OK; UCCL_IN_PROGRESS if timeout_ms passed first; UCCL_ERR_CANCELED after uccl_engine_stop_accept or
 *         uccl_engine_destroy; another negative status. Unless it is UCCL_OK, all outputs are unchanged.
 *
 * Threads: any; each connection is handed out once, by this call or by uccl_engine_accept.
 */
int uccl_engine_accept_for(uccl_engine_t *engine,
                           int64_t timeout_ms,
                           char *ip_addr_buf,
                           size_t ip_addr_buf_len,
                           int *remote_gpu_idx,
                           uccl_conn_t **conn);

/**
 * Wakes every blocked uccl_engine_accept of the engine; these and later ones return NULL. Open connections stay open.
 *
 * @param engine  The engine. NULL and an engine of the parent process after a fork are no-ops.
 *
 * Threads: any.
 */
void uccl_engine_stop_accept(uccl_engine_t *engine);

/**
 * Marks the connection as listened to. Kept for compatibility: notifications and data arrive without it.
 *
 * @param conn  The connection.
 * @return UCCL_OK; -1 if it was already started; another negative status for a bad handle or a lost connection.
 *
 * Threads: any.
 */
int uccl_engine_start_listener(uccl_conn_t *conn);

/**
 * Undoes uccl_engine_start_listener. Stopping a listener that was not started is not an error.
 *
 * @param conn  The connection.
 * @return UCCL_OK, or a negative status for a bad handle or a lost connection.
 *
 * Threads: any.
 */
int uccl_engine_stop_listener(uccl_conn_t *conn);

/**
 * Closes a connection. Transfers in flight end with UCCL_ERR_CANCELED here and UCCL_ERR_REMOTE_DISCONNECT at the peer.
 *
 * @param conn  The connection. NULL and a connection of the parent process after a fork are no-ops; the latter stays open in the parent.
 *              A handle already destroyed only logs an error.
 *
 * Threads: any, once, before or after its engine and regions. On return this connection no longer touches registered memory.
 */
void uccl_engine_conn_destroy(uccl_conn_t *conn);

/**
 * Returns whether a connection is open.
 *
 * @param conn  [in] The connection.
 * @return UCCL_OK while it is open; the cause once it is lost or closed: UCCL_ERR_REMOTE_DISCONNECT, UCCL_ERR_TIMED_OUT,
 *         UCCL_ERR_CANCELED, UCCL_ERR_PROTOCOL and so on; UCCL_ERR_NOT_FOUND or UCCL_ERR_INVALID_ARGUMENT for a bad handle. A lost
 *         connection does not recover: destroy it and connect again. Until it is destroyed it keeps a file descriptor, and an incoming
 *         one counts towards UCCL_TCPX_MAX_CONNECTIONS.
 *
 * Threads: any.
 */
int uccl_engine_conn_status(uccl_conn_t *conn);

/**
 * Returns the name of the pre-shared key that the peer proved, as this engine's key file names it (docs/security.md).
 *
 * @param conn  [in]  The connection.
 * @param buf   [out] The name, NUL-terminated, cut to fit; empty if the peer has no key or the key has no name.
 * @param len   [in]  Bytes of buf, at least 1; 33 hold every name.
 * @return UCCL_OK, also for a lost connection; UCCL_ERR_NOT_FOUND or UCCL_ERR_INVALID_ARGUMENT, and then buf is unchanged.
 *
 * Threads: any.
 */
int uccl_engine_conn_peer_name(uccl_conn_t *conn, char *buf, size_t len);

/**
 * Returns whether the peer runs on this host, which means that its address is one of this host's.
 *
 * @param conn  The connection.
 * @return true if it does; false otherwise, for a bad handle, and once the connection is lost or closed.
 *
 * Threads: any.
 */
bool uccl_engine_conn_is_local(uccl_conn_t *conn);

/* ==== Memory and FIFO items ==== */

/**
 * Registers memory for transfers of this engine, and for reads and writes of peers that hold a FIFO item of the region.
 *
 * @param engine  [in]  The engine.
 * @param data    [in]  First byte, in host or GPU memory, any alignment.
 * @param size    [in]  Bytes, at least 1.
 * @param mr      [out] The region. Regions may overlap and repeat; each registration is a region of its own.
 * @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT (null, empty, wraps around), UCCL_ERR_GPU, UCCL_ERR_RESOURCE.
 *
 * The caller keeps the memory mapped until uccl_engine_mr_destroy returns. Threads: any.
 */
int uccl_engine_reg(uccl_engine_t *engine, size_t data, size_t size, uccl_mr_t *mr);

/**
 * Registers memory with the access that the flags give to peers.
 *
 * @param engine  [in]  The engine.
 * @param data    [in]  First byte, in host or GPU memory, any alignment.
 * @param size    [in]  Bytes, at least 1.
 * @param access  [in]  UCCL_ACCESS_REMOTE_READ, UCCL_ACCESS_REMOTE_WRITE, or both; 0: peers have no access.
 * @param mr      [out] The region. uccl_engine_reg gives peers both rights.
 * @return As uccl_engine_reg; UCCL_ERR_INVALID_ARGUMENT for unknown flags.
 *
 * Any other access by a peer fails with UCCL_ERR_REMOTE_ACCESS and moves nothing. The flags do not limit this engine's own transfers,
 * receives included.
 *
 * The caller keeps the memory mapped until uccl_engine_mr_destroy returns. Threads: any.
 */
int uccl_engine_reg_with(uccl_engine_t *engine,
                         size_t data,
                         size_t size,
                         uint32_t access,
                         uccl_mr_t *mr);

/**
 * Deregisters a region. Waits for transfers that use it; after UCCL_TCPX_CLOSE_TIMEOUT_MS it fails those left and their connections.
 * Peers that use the region afterwards get UCCL_ERR_REMOTE_ACCESS.
 *
 * @param engine  The engine. NULL, an engine of the parent process after a fork and a destroyed engine are no-ops. An engine that
 *                another thread is destroying still has its regions.
 * @param mr      The region; an unknown one only logs an error.
 *
 * Threads: any. On return the library no longer touches this memory, and the caller may free it. The exception is a GPU that does not
 * end its copies: the library then logs an error, uccl_engine_last_status() is UCCL_ERR_RESOURCE, and the caller must keep the memory
 * until the process ends.
 */
void uccl_engine_mr_destroy(uccl_engine_t *engine,
                            uccl_mr_t mr);

/**
 * Writes a FIFO item for [data, data + size) of a region. A peer that has it can read or write the region.
 *
 * @param engine    [in]  The engine.
 * @param mr        [in]  The region.
 * @param data      [in]  First byte, inside the region.
 * @param size      [in]  Bytes; the range must lie inside the region. A size over 4 GiB - 1 is stored as 4 GiB - 1: the field has 32
 *                  bits, and transfers take their length from their own argument.
 * @param fifo_buf  [out] UCCL_FIFO_SIZE (64) bytes: a FifoItem in memory order. It contains the region's secret token: every holder
 *                  can access the whole region, within its access rights, until the region is deregistered.
 * @return UCCL_OK, UCCL_ERR_NOT_FOUND, UCCL_ERR_INVALID_ARGUMENT.
 *
 * Threads: any.
 */
int uccl_engine_prepare_fifo(uccl_engine_t *engine,
                             uccl_mr_t mr,
                             const void *data,
                             size_t size,
                             char *fifo_buf);

/**
 * Points a FIFO item at another range of its region. Changes addr and size only; needs no engine and no connection.
 *
 * @param fifo_item    [in,out] The item.
 * @param remote_addr  [in] New address in the peer's address space; the peer checks it when it is used.
 * @param size         [in] New size in bytes.
 * @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT for an item that is NULL or not aligned to 8 bytes.
 *
 * Threads: any, one at a time per item.
 */
int uccl_engine_update_fifo(struct FifoItem *fifo_item, uint64_t remote_addr, uint32_t size);

/**
 * Returns an empty IPC descriptor, for compatibility. No descriptor is needed: between engines on one host, ordinary reads and writes are
 * direct transfers where the memory allows it (see UCCL_P2P_DISABLE_IPC).
 *
 * @param engine   [in]  The engine.
 * @param addr     [in]  Address inside a registered region.
 * @param ipc_buf  [out] UCCL_IPC_INFO_SIZE (128) bytes, zeroed.
 * @param has_ipc  [out] false.
 * @return UCCL_OK, UCCL_ERR_NOT_FOUND if no region contains addr, UCCL_ERR_INVALID_ARGUMENT.
 *
 * Threads: any.
 */
int uccl_engine_get_ipc_info(uccl_engine_t *engine,
                             size_t addr,
                             char *ipc_buf,
                             bool *has_ipc);

/**
 * Checks a sub-range for an IPC descriptor. Descriptors of this library are empty, so the buffer does not change.
 *
 * @param ipc_buf    [in,out] UCCL_IPC_INFO_SIZE (128) bytes.
 * @param addr       [in] Address inside the registered buffer.
 * @param base_addr  [in] Base address of the registered buffer, not above addr.
 * @param size       [in] Bytes.
 * @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT.
 *
 * Threads: any.
 */
int uccl_engine_update_ipc_info(char *ipc_buf, size_t addr, size_t base_addr, size_t size);

/* ==== Transfers ==== */

/**
 * Starts a read, from the peer's memory into local memory.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that contains [data, data + size).
 * @param data         [in]  Local destination.
 * @param size         [in]  Bytes; 0 completes at once.
 * @param fifo_item    [in]  Remote source: addr and the region's token. Its size field is ignored.
 * @param transfer_id  [out] Id for uccl_engine_poll, uccl_engine_wait and uccl_engine_xfer_status.
 * @return UCCL_OK when it has started; UCCL_ERR_INVALID_ARGUMENT, UCCL_ERR_NOT_FOUND (region), UCCL_ERR_RESOURCE (too many
 *         transfers in flight), UCCL_ERR_UNSUPPORTED (no channel carries such memory), or the status of a lost connection
 *         (uccl_engine_conn_status). On failure *transfer_id is unchanged and nothing moves.
 *
 * The destination is undefined until the transfer is complete, and after a failure. Keep the region registered until it has ended.
 * Threads: any.
 */
int uccl_engine_read(uccl_conn_t *conn,
                     uccl_mr_t mr,
                     void *data,
                     size_t size,
                     struct FifoItem fifo_item,
                     uint64_t *transfer_id);

/**
 * Starts a read of several segments as one transfer.
 *
 * @param conn         [in]  The connection.
 * @param mr_ids       [in]  num_iovs local regions.
 * @param dst_v        [in]  num_iovs local destinations, each inside its region.
 * @param size_v       [in]  num_iovs lengths in bytes; zero lengths are skipped.
 * @param fifo_items   [in]  num_iovs remote sources.
 * @param num_iovs     [in]  Segments, 1 to 1,048,576 in at most 65,536 remote regions. A segment above 1 GiB counts once for each GiB or
 *                     part of one. 0 is UCCL_ERR_INVALID_ARGUMENT; for an empty transfer give a segment of length 0.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_read. The arrays are copied. Where destinations overlap, the bytes are undefined.
 *
 * Threads: any.
 */
int uccl_engine_read_vector(uccl_conn_t *conn,
                            const uccl_mr_t *mr_ids,
                            void *const *dst_v,
                            const size_t *size_v,
                            const struct FifoItem *fifo_items,
                            int num_iovs,
                            uint64_t *transfer_id);

/**
 * Starts a write, from local memory into the peer's memory. It is complete when every byte is in place at the peer.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that contains [data, data + size).
 * @param data         [in]  Local source; must not change until the transfer ends.
 * @param size         [in]  Bytes; 0 completes at once.
 * @param fifo_item    [in]  Remote destination: addr and the region's token. Its size field is ignored.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_read.
 *
 * Threads: any.
 */
int uccl_engine_write(uccl_conn_t *conn,
                      uccl_mr_t mr,
                      const void *data,
                      size_t size,
                      struct FifoItem fifo_item,
                      uint64_t *transfer_id);

/**
 * Starts a write of several segments as one transfer.
 *
 * @param conn         [in]  The connection.
 * @param mr_ids       [in]  num_iovs local regions.
 * @param src_v        [in]  num_iovs local sources, each inside its region.
 * @param size_v       [in]  num_iovs lengths in bytes; zero lengths are skipped.
 * @param fifo_items   [in]  num_iovs remote destinations.
 * @param num_iovs     [in]  Segments, 1 to 1,048,576 in at most 65,536 remote regions. A segment above 1 GiB counts once for each GiB or
 *                     part of one. 0 is UCCL_ERR_INVALID_ARGUMENT; for an empty transfer give a segment of length 0.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_read. The arrays are copied. Where destinations overlap, the bytes are undefined.
 *
 * Threads: any.
 */
int uccl_engine_write_vector(uccl_conn_t *conn,
                             const uccl_mr_t *mr_ids,
                             void *const *src_v,
                             const size_t *size_v,
                             const struct FifoItem *fifo_items,
                             int num_iovs,
                             uint64_t *transfer_id);

/**
 * Starts a two-sided send. Sends and the peer's receives match one to one, in the order of the calls. The send is complete when the peer
 * has every byte.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that contains [data, data + size).
 * @param data         [in]  Source; must not change until the transfer ends.
 * @param size         [in]  Bytes; 0 sends an empty message.
 * @param transfer_id  [out] Id of the transfer. Ends with UCCL_ERR_TRUNCATED if the peer's receive is smaller, and with
 *                     UCCL_ERR_TIMED_OUT if no receive is posted within UCCL_TCPX_MATCH_TIMEOUT_MS.
 * @return As uccl_engine_read.
 *
 * Threads: any; the order is that of the calls.
 */
int uccl_engine_send(uccl_conn_t *conn,
                     uccl_mr_t mr,
                     const void *data,
                     size_t size,
                     uint64_t *transfer_id);

/**
 * The same as uccl_engine_send.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region.
 * @param data         [in]  Source.
 * @param size         [in]  Bytes.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_send.
 *
 * Threads: any.
 */
int uccl_engine_send_async(uccl_conn_t *conn, uccl_mr_t mr, const void *data, size_t size, uint64_t *transfer_id);

/**
 * Starts a two-sided send of one message gathered from several segments.
 *
 * @param conn         [in]  The connection.
 * @param mr_ids       [in]  num_iovs local regions.
 * @param src_v        [in]  num_iovs sources, each inside its region.
 * @param size_v       [in]  num_iovs lengths in bytes.
 * @param num_iovs     [in]  Segments, 0 to 1,048,576; 0 sends an empty message.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_send. The arrays are copied.
 *
 * Threads: any.
 */
int uccl_engine_send_vector(uccl_conn_t *conn,
                            const uccl_mr_t *mr_ids,
                            const void *const *src_v,
                            const size_t *size_v,
                            int num_iovs,
                            uint64_t *transfer_id);

/**
 * Receives one message. Blocks until it has arrived.
 *
 * @param conn      [in] The connection.
 * @param mr        [in] Local region that contains [data, data + max_size).
 * @param data      [in] Destination.
 * @param max_size  [in] Largest message to take, bytes.
 * @return UCCL_OK; UCCL_ERR_TRUNCATED if the message is larger (the sender gets it too); UCCL_ERR_TIMED_OUT if none arrives within
 *         UCCL_TCPX_MATCH_TIMEOUT_MS; otherwise as uccl_engine_read. A shorter message leaves the rest of the destination unchanged;
 *         use uccl_engine_recv_async to learn its length.
 *
 * Threads: any; receives of one connection match in the order of the calls.
 */
int uccl_engine_recv(uccl_conn_t *conn,
                     uccl_mr_t mr,
                     void *data,
                     size_t max_size);

/**
 * Starts a receive of one message.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that contains [data, data + max_size).
 * @param data         [in]  Destination.
 * @param max_size     [in]  Largest message to take, bytes.
 * @param transfer_id  [out] Id of the transfer; uccl_engine_poll's bytes_total is the length of the message.
 * @return As uccl_engine_read.
 *
 * Threads: any; the order is that of the calls.
 */
int uccl_engine_recv_async(uccl_conn_t *conn, uccl_mr_t mr, void *data, size_t max_size, uint64_t *transfer_id);

/**
 * Returns the state of a transfer, and drives the connection. Does not block.
 *
 * @param conn         [in]  The connection that started it.
 * @param transfer_id  [in]  Its id.
 * @param info         [out] Details; may be NULL.
 * @return UCCL_OK when complete; UCCL_IN_PROGRESS; the error it ended with; UCCL_ERR_NOT_FOUND for an id that this connection never
 *         returned. Repeated calls for an ended transfer return the same.
 *
 * Unless this returns UCCL_IN_PROGRESS, the library no longer touches the transfer's memory. Threads: any.
 */
int uccl_engine_poll(uccl_conn_t *conn,
                     uint64_t transfer_id,
                     struct uccl_xfer_info_t *info);

/**
 * Waits for a transfer to end.
 *
 * @param conn         [in] The connection that started it.
 * @param transfer_id  [in] Its id.
 * @param timeout_ms   [in] Longest wait in milliseconds; negative: until it ends (every transfer has its own deadline).
 * @return As uccl_engine_poll; UCCL_IN_PROGRESS if timeout_ms passed first.
 *
 * Threads: any.
 */
int uccl_engine_wait(uccl_conn_t *conn, uint64_t transfer_id, int64_t timeout_ms);

/**
 * Returns whether a transfer is complete, and drives the connection. Does not block.
 *
 * @param conn         [in] The connection that started it.
 * @param transfer_id  [in] Its id.
 * @return true once it succeeded, also in later calls; false while it runs, after a failure (logged once; uccl_engine_poll returns
 *         the error), and for bad arguments.
 *
 * Threads: any.
 */
bool uccl_engine_xfer_status(uccl_conn_t *conn,
                             uint64_t transfer_id);

/* ==== Lists: segments of a transfer that is started several times ==== */

/**
 * Prepares the segments of a transfer, so that each start takes less time. Use it for segments that are transferred repeatedly, or that
 * are known before the transfer is to start.
 *
 * @param mr_ids      [in]  num_iovs local regions.
 * @param data_v      [in]  num_iovs local addresses, each inside its region.
 * @param size_v      [in]  num_iovs lengths in bytes.
 * @param fifo_items  [in]  num_iovs remote addresses.
 * @param num_iovs    [in]  Segments, 1 to 1,048,576.
 * @param list        [out] The list; the caller owns it and frees it with uccl_engine_list_free.
 * @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT, UCCL_ERR_RESOURCE. The arrays are copied. Regions, ranges and items are checked
 *         when the list is started: a list belongs to no engine and holds no region. After memory is registered again, here or at
 *         the peer, create a new list.
 *
 * Threads: any.
 */
int uccl_engine_list_create(const uccl_mr_t *mr_ids,
                            void *const *data_v,
                            const size_t *size_v,
                            const struct FifoItem *fifo_items,
                            int num_iovs,
                            uccl_list_t **list);

/**
 * Frees a list. Transfers that were started with it continue.
 *
 * @param list  The list. NULL and a list of the parent process after a fork are no-ops. One already freed only logs an error.
 *
 * Threads: any, once per list.
 */
void uccl_engine_list_free(uccl_list_t *list);

/**
 * Starts a read of a list as one transfer, from the peer's memory into local memory.
 *
 * @param conn         [in]  The connection.
 * @param list         [in]  The segments; may be started again at once, on this connection or another.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_read_vector.
 *
 * Threads: any.
 */
int uccl_engine_list_read(uccl_conn_t *conn, const uccl_list_t *list, uint64_t *transfer_id);

/**
 * Starts a write of a list as one transfer, from local memory into the peer's memory.
 *
 * @param conn         [in]  The connection.
 * @param list         [in]  The segments; may be started again at once, on this connection or another.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_write_vector.
 *
 * Threads: any.
 */
int uccl_engine_list_write(uccl_conn_t *conn, const uccl_list_t *list, uint64_t *transfer_id);

/* ==== Notifications ==== */

/**
 * Sends a fixed-size notification. It arrives after the data of every transfer that was complete before this call.
 *
 * @param conn        [in] The connection.
 * @param notify_msg  [in] name up to its first NUL, and all 256 bytes of msg. Copied; may be reused at once.
 * @return UCCL_OK once it is queued for the peer; a negative status if the connection is lost or an argument is bad.
 *
 * Threads: any; the notifications of one thread arrive in order.
 */
int uccl_engine_send_notif(uccl_conn_t *conn, const struct notify_msg *notify_msg);

/**
 * Sends a notification of any length up to 64 MiB (name and message together). Ordering as uccl_engine_send_notif.
 *
 * @param conn      [in] The connection.
 * @param name      [in] Bytes of the name; may be NULL if name_len is 0.
 * @param name_len  [in] Bytes.
 * @param msg       [in] Bytes of the message; may be NULL if msg_len is 0.
 * @param msg_len   [in] Bytes.
 * @return UCCL_OK once it is queued for the peer; -1 (UCCL_ERR_INVALID_ARGUMENT) above 64 MiB; another negative status.
 *
 * The bytes are copied; the caller may reuse them at once. Blocks only while more than 256 MiB of this connection wait to be sent.
 * Threads: any.
 */
int uccl_engine_send_notif_bytes(uccl_conn_t *conn,
                                 const void *name,
                                 size_t name_len,
                                 const void *msg,
                                 size_t msg_len);

/**
 * Takes up to max notifications of any engine of this process, oldest first. Names are cut to 255 bytes and messages to 256;
 * uccl_engine_notif_next returns them whole.
 *
 * @param out    [out] Array of max items. May be NULL if max is 0.
 * @param max    [in]  Items in out.
 * @param count  [out] Items written, 0 to max.
 * @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT. The rest stays for the next call.
 *
 * Threads: any; each notification is handed out once.
 */
int uccl_engine_get_notifs(struct notify_msg *out, size_t max, size_t *count);

/**
 * Takes the oldest notification.
 *
 * @param engine  [in]  The engine to take from; NULL: any engine of this process.
 * @param notif   [out] The notification; the caller owns it and frees it with uccl_engine_notif_free. NULL if there is none.
 * @return UCCL_OK (also if there is none), or a negative status; on failure *notif is unchanged.
 *
 * Threads: any; each notification is handed out once, by this call or by uccl_engine_get_notifs.
 */
int uccl_engine_notif_next(uccl_engine_t *engine, uccl_notif_t **notif);

/**
 * Takes the oldest notification of an engine, waiting for one at most for the given time.
 *
 * @param engine      [in]  The engine.
 * @param timeout_ms  [in]  Longest wait in milliseconds; 0: does not block; negative: until there is one.
 * @param notif       [out] The notification; the caller owns it and frees it with uccl_engine_notif_free.
 * @return UCCL_OK; UCCL_IN_PROGRESS if timeout_ms passed first; UCCL_ERR_CANCELED if the engine is destroyed meanwhile; another negative
 *         status. Unless it is UCCL_OK, *notif is unchanged.
 *
 * Threads: any; each notification is handed out once.
 */
int uccl_engine_notif_wait(uccl_engine_t *engine,
                           int64_t timeout_ms,
                           uccl_notif_t **notif);

/**
 * Returns the name of a notification.
 *
 * @param notif  [in]  The notification.
 * @param len    [out] Bytes of the name.
 * @return The bytes, not NUL-terminated, valid until uccl_engine_notif_free; NULL for bad arguments.
 *
 * Threads: any, but not while another thread frees the notification.
 */
const char *uccl_engine_notif_name(const uccl_notif_t *notif, size_t *len);

/**
 * Returns the message of a notification.
 *
 * @param notif  [in]  The notification.
 * @param len    [out] Bytes of the message.
 * @return The bytes, valid until uccl_engine_notif_free; NULL for bad arguments.
 *
 * Threads: any, but not while another thread frees the notification.
 */
const void *uccl_engine_notif_msg(const uccl_notif_t *notif, size_t *len);

/**
 * Frees a notification that uccl_engine_notif_next returned.
 *
 * @param notif  The notification. NULL and a notification of the parent process after a fork are no-ops. One already freed only logs an
 *               error.
 *
 * Threads: any, once per notification.
 */
void uccl_engine_notif_free(uccl_notif_t *notif);

/* ==== Log ==== */

/**
 * Sends the log lines of the whole process to a callback instead of standard error. UCCL_P2P_LOG_LEVEL selects the levels, as without a
 * callback.
 *
 * @param callback  [in] The function; NULL restores standard error.
 * @param user      [in] Passed to every call. Keep it valid until another callback, or NULL, is set.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT inside a callback; UCCL_ERR_UNSUPPORTED in a Rust program that has set a logger of its own,
 *         which then gets the lines.
 *
 * The previous callback first gets the lines that are queued for it, for up to one second; uccl_engine_destroy waits in the same way. On
 * return no call of the previous callback is running, and none will start. A child of fork keeps the callback. Threads: any.
 */
int uccl_engine_set_log_callback(uccl_log_callback_t callback,
                                 void *user);

/* ==== Statistics ==== */

/**
 * Returns the statistics of an engine, summed over its connections.
 *
 * @param engine  [in]     The engine.
 * @param stats   [in,out] The statistics; the caller sets the member size.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
 *
 * Threads: any. The cost grows with the number of channels: each one takes a system call.
 */
int uccl_engine_stats(uccl_engine_t *engine, struct uccl_stats_t *stats);

/**
 * Returns the statistics of a connection, also of one that has ended.
 *
 * @param conn   [in]     The connection.
 * @param stats  [in,out] The statistics; the caller sets the member size.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
 *
 * Threads: any.
 */
int uccl_engine_conn_stats(uccl_conn_t *conn, struct uccl_conn_stats_t *stats);

/**
 * Returns the statistics of a channel, including those that the kernel keeps.
 *
 * @param conn     [in]     The connection.
 * @param channel  [in]     Number of the channel, from 0; uccl_conn_stats_t has the number of channels.
 * @param stats    [in,out] The statistics; the caller sets the member size.
 * @return UCCL_OK; UCCL_ERR_NOT_FOUND if there is no such channel (any more);
 *         UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
 *
 * Threads: any.
 */
int uccl_engine_channel_stats(uccl_conn_t *conn, size_t channel, struct uccl_channel_stats_t *stats);

/**
 * Writes the statistics of an engine, its connections and their channels as text for people.
 *
 * @param engine  [in]  The engine.
 * @param buf     [out] NUL-terminated text. May be NULL if len is 0.
 * @param len     [in]  Size of buf in bytes.
 * @param needed  [out] Bytes needed with the NUL, also written if buf is too small. May be NULL.
 * @return UCCL_OK; UCCL_ERR_RESOURCE if buf is too small (buf is unchanged; the next text may be longer);
 *         another negative status.
 *
 * Threads: any.
 */
int uccl_engine_stats_text(uccl_engine_t *engine, char *buf, size_t len, size_t *needed);

/**
 * Returns what carried the bytes of a transfer, counted while they moved: not what the configuration says.
 *
 * @param conn         [in]     The connection that started it.
 * @param transfer_id  [in]     Its id. It may be in flight, or have ended, unless 16,384 later transfers of its connection have ended too:
 *                              then nothing is known of it.
 * @param path         [in,out] The answer; the caller sets the member size. Once the connection has ended, channels have no names.
 * @return UCCL_OK; UCCL_ERR_NOT_FOUND for an id that this connection never returned;
 *         UCCL_ERR_INVALID_ARGUMENT for a size below 16; another negative status.
 *
 * Threads: any.
 */
int uccl_engine_xfer_path(uccl_conn_t *conn,
                          uint64_t transfer_id,
                          struct uccl_xfer_path_t *path);

/* ==== Errors and version ==== */

/**
 * Returns a text for a status number.
 *
 * @param status  UCCL_OK, UCCL_IN_PROGRESS or UCCL_ERR_*; any other number gives "unknown status".
 * @return Static text, never NULL. Do not free it.
 *
 * Threads: any.
 */
const char *uccl_engine_strerror(int32_t status);

/**
 * Returns the cause of the last failed call of this thread, as text with addresses and names.
 *
 * @return NUL-terminated text, cut to 2047 bytes; empty if no call failed yet. Valid until the next failing call of this thread, or the
 *         thread's end. Do not free it.
 *
 * Threads: each has its own.
 */
const char *uccl_engine_last_error(void);

/**
 * Returns the status of the last failed call of this thread, for functions that return a handle, a bool or nothing.
 *
 * @return UCCL_OK if no call failed yet, else a negative UCCL_ERR_*.
 *
 * Threads: each has its own.
 */
int uccl_engine_last_status(void);

/**
 * Returns the version of the library.
 *
 * @return "major.minor.patch", static text. Do not free it.
 *
 * Threads: any.
 */
const char *uccl_engine_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#ifdef __cplusplus
#include "uccl_engine.hpp"
#endif
