/* uccl_engine.h - the C ABI of libuccl_p2p, and from C++ also the upstream UCCL engine API over it.
 *
 * GENERATED from src/ffi by cbindgen; do not edit. `UPDATE_HEADER=1 cargo test --release --test lints` renews it.
 *
 * Conventions
 *  - Every function may be called from any thread at any time; where an object has an owner, its destroy call is made once.
 *  - Functions that return int return UCCL_OK (0), UCCL_IN_PROGRESS (1) or a negative UCCL_ERR_*; uccl_engine_last_error() has the
 *    cause in words, per thread. On failure outputs are untouched.
 *  - Pointers to numbers and structures must be aligned for them; one that is not is UCCL_ERR_INVALID_ARGUMENT.
 *  - Handles are never dereferenced and never reused: a stale, foreign or NULL handle is an error, not undefined behaviour.
 *  - After fork the child may create engines of its own. Handles that it inherited belong to the parent: the destroy functions do
 *    nothing with them, every other use is an error, and the parent's connections are not touched. Where the parent used CUDA, which
 *    then does not work in the child, the child registers host memory only.
 *  - Functions may be called from destructors of static objects and of thread-specific data; nothing here throws or unwinds.
 *    A thread that is cancelled (pthread_cancel) inside of a function is so at its next cancellation point after that has returned.
 *    One whose cancelability is asynchronous (PTHREAD_CANCEL_ASYNCHRONOUS) must not be in a function when it is cancelled: it ends the
 *    process, as in most functions of the C library.
 *  - Lengths are bytes. Deadlines come from the environment: docs/configuration.md.
 *  - C11 or newer; C++11 or newer for the C++ API.
 *  - Device memory: kernels that write a source must have finished (synchronise their stream or event) before the transfer is
 *    started; once a status is not UCCL_IN_PROGRESS, kernels launched afterwards on any stream see the data.
 *
 * SPDX-License-Identifier: Apache-2.0
 */

#pragma once


#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/** Version of this header. uccl_engine_version() is that of the library. */
#define UCCL_P2P_VERSION_MAJOR 0
#define UCCL_P2P_VERSION_MINOR 1
#define UCCL_P2P_VERSION_PATCH 0
/** One number for comparisons, such as `#if UCCL_P2P_VERSION_NUMBER >= UCCL_P2P_MAKE_VERSION(0, 2, 0)`. */
#define UCCL_P2P_MAKE_VERSION(major, minor, patch) ((major) * 1000000 + (minor) * 1000 + (patch))
#define UCCL_P2P_VERSION_NUMBER UCCL_P2P_MAKE_VERSION(UCCL_P2P_VERSION_MAJOR, UCCL_P2P_VERSION_MINOR, UCCL_P2P_VERSION_PATCH)

/* Upstream's names of UCCL_MSG_SIZE, UCCL_FIFO_SIZE and UCCL_IPC_INFO_SIZE. Define UCCL_P2P_NO_SHORT_NAMES before including this file
 * where they meet names of the program. */
#ifndef UCCL_P2P_NO_SHORT_NAMES
#define MSG_SIZE UCCL_MSG_SIZE
#define FIFO_SIZE UCCL_FIFO_SIZE
#define IPC_INFO_SIZE UCCL_IPC_INFO_SIZE
#endif

/** Opaque. An engine: a listening port, a registry of memory, connections, and the threads that move data. */
typedef struct uccl_engine uccl_engine_t;
/** Opaque. A connection to a peer engine: one control connection and several data channels. */
typedef struct uccl_conn uccl_conn_t;
/** Opaque. A received notification of any length. */
typedef struct uccl_notif uccl_notif_t;
/** Opaque. Segments of a transfer, kept for several. */
typedef struct uccl_list uccl_list_t;

/**
 * Bytes of a serialised FIFO item.
 */
#define UCCL_FIFO_SIZE 64

/**
 * Bytes of an IPC descriptor.
 */
#define UCCL_IPC_INFO_SIZE 128

/**
 * Peers may read a region.
 */
#define UCCL_ACCESS_REMOTE_READ 1

/**
 * Peers may write a region.
 */
#define UCCL_ACCESS_REMOTE_WRITE 2

/**
 * Bytes of the name and msg fields of notify_msg_t.
 */
#define UCCL_MSG_SIZE 256

/**
 * Level of a log line: something failed.
 */
#define UCCL_LOG_ERROR 1

/**
 * Level of a log line: something is not as it should be, and the library goes on.
 */
#define UCCL_LOG_WARN 2

/**
 * Level of a log line: what happens, in large steps.
 */
#define UCCL_LOG_INFO 3

/**
 * Level of a log line: what happens, in small steps.
 */
#define UCCL_LOG_DEBUG 4

/**
 * Level of a log line: everything.
 */
#define UCCL_LOG_TRACE 5

/**
 * A setting of an engine: an environment variable, by its name, and the text that stands for it.
 */
typedef struct uccl_option_t {
  /**
   * Name of a variable of docs/configuration.md, NUL-terminated, such as "UCCL_TCPX_NUM_CHANNELS".
   */
  const char *name;
  /**
   * What the variable would hold, NUL-terminated. NULL or "": as if the variable were not set.
   */
  const char *value;
} uccl_option_t;

/**
 * A registered memory region. 0 is never valid.
 */
typedef uint64_t uccl_mr_t;

/**
 * Access to a range of a peer's region. Exchanged between hosts of the same byte order (x86-64, little-endian).
 */
typedef struct FifoItem {
  /**
   * First byte, in the address space of the region's owner.
   */
  uint64_t addr;
  /**
   * Bytes; informative: transfers take their length from their own argument.
   */
  uint32_t size;
  /**
   * Where the region lies: 1 host memory, 2 + n memory of the owner's GPU n. Set by uccl_engine_prepare_fifo.
   */
  uint32_t rkey;
  /**
   * For users of the structure; not read by this library.
   */
  uint32_t nmsgs;
  /**
   * Layout version of the opaque bytes.
   */
  uint32_t rid;
  /**
   * Id of the region at its owner.
   */
  uint64_t idx;
  /**
   * Opaque: the region's token and the id of the owning engine.
   */
  char padding[32];
} FifoItem;

/**
 * State of a transfer.
 */
typedef struct uccl_xfer_info_t {
  /**
   * UCCL_OK, UCCL_IN_PROGRESS or the error, as uccl_engine_poll returns it.
   */
  int32_t status;
  /**
   * 0; for later use.
   */
  uint32_t reserved;
  /**
   * Bytes of the whole transfer; for a receive the length of the message once it is known, before that 0. 0 for a transfer that failed,
   * and for one that is complete after 16,384 others of its connection have begun and ended.
   */
  uint64_t bytes_total;
  /**
   * Bytes that have left (write, send) or arrived (read, receive) so far; bytes_total when complete.
   */
  uint64_t bytes_done;
} uccl_xfer_info_t;

/**
 * A fixed-size notification.
 */
typedef struct notify_msg {
  /**
   * Name of the sender as the sender gave it; NUL-terminated.
   */
  char name[UCCL_MSG_SIZE];
  /**
   * Bytes; always 256, filled up with zeros.
   */
  char msg[UCCL_MSG_SIZE];
} notify_msg_t;

/**
 * Takes a log line: its level (UCCL_LOG_*), its text (NUL-terminated, without a newline, valid during the call only) and the pointer
 * that was given with the callback.
 *
 * It is called by one thread of the library's, a line after the other, and outside of all locks: it may take its time, and call any
 * function of this library but uccl_engine_set_log_callback; lines that come of its own calls go to standard error. Up to 4,096
 * lines, or 1 MiB of them, wait for it; what comes beyond is left out, and a line says how many these were. It must return: an
 * exception or a longjmp out of it ends the process.
 */
typedef void (*uccl_log_callback_t)(int level, const char *text, void *user);

/**
 * What an engine counts. Set `size` to sizeof(uccl_stats_t) before the call: that is how the library knows what the caller has room for.
 * Later versions only append members. Counters begin at 0 with the engine and never fall; those of connections include the
 * connections that have ended.
 */
typedef struct uccl_stats_t {
  /**
   * In: bytes of the caller's structure. Out: bytes that were filled.
   */
  size_t size;
  /**
   * Milliseconds since the engine was created.
   */
  uint64_t uptime_ms;
  /**
   * Connections that are there.
   */
  uint64_t connections;
  /**
   * Connections that came up.
   */
  uint64_t connections_opened;
  /**
   * Connections that one of the sides closed.
   */
  uint64_t connections_closed;
  /**
   * Connections that failed.
   */
  uint64_t connections_lost;
  /**
   * Incoming set-ups that succeeded.
   */
  uint64_t setups_in;
  /**
   * Incoming set-ups that failed.
   */
  uint64_t setups_in_failed;
  /**
   * Incoming set-ups refused for lack of a permission or of room.
   */
  uint64_t setups_in_refused;
  /**
   * Outgoing set-ups that succeeded.
   */
  uint64_t setups_out;
  /**
   * Outgoing set-ups that failed.
   */
  uint64_t setups_out_failed;
  /**
   * Times that a limit was hit: of set-ups, descriptors, transfers, notifications.
   */
  uint64_t limits_hit;
  /**
   * Connections that ended at a deadline.
   */
  uint64_t timeouts;
  /**
   * Notifications that the application has not taken.
   */
  uint64_t notifications_waiting;
  /**
   * Bytes that channels have sent.
   */
  uint64_t sent_bytes;
  /**
   * Chunks that channels have sent.
   */
  uint64_t sent_chunks;
  /**
   * Bytes that channels have received.
   */
  uint64_t received_bytes;
  /**
   * Chunks that channels have received.
   */
  uint64_t received_chunks;
  /**
   * Bytes of small transfers sent inside control frames.
   */
  uint64_t inline_sent_bytes;
  /**
   * Bytes of small transfers received inside control frames.
   */
  uint64_t inline_received_bytes;
  /**
   * Transfers that this side started.
   */
  uint64_t transfers_started;
  /**
   * Transfers of this side that succeeded.
   */
  uint64_t transfers_completed;
  /**
   * Transfers of this side that failed.
   */
  uint64_t transfers_failed;
  /**
   * Transfers that the peer announced.
   */
  uint64_t peer_transfers;
  /**
   * Transfers of the peer that this side refused.
   */
  uint64_t refused;
  /**
   * Transfers of this side that the peer refused.
   */
  uint64_t refused_by_peer;
  /**
   * Bytes sent on the control stream.
   */
  uint64_t control_sent_bytes;
  /**
   * Bytes received on the control stream.
   */
  uint64_t control_received_bytes;
  /**
   * Notifications sent.
   */
  uint64_t notifications_sent;
  /**
   * Notifications received.
   */
  uint64_t notifications_received;
  /**
   * Seconds in which a channel with chunks under way moved none.
   */
  uint64_t stalls;
  /**
   * Times that the peer, or a transfer, kept silent for half of its timeout.
   */
  uint64_t slow_answers;
  /**
   * Chunks gathered from device memory.
   */
  uint64_t packed_chunks;
  /**
   * Chunks scattered to device memory.
   */
  uint64_t unpacked_chunks;
  /**
   * Microseconds from handing a chunk over for gathering until it was gathered, of all chunks together.
   */
  uint64_t pack_us;
  /**
   * Microseconds from handing a chunk over for scattering until it was in place, of all chunks together.
   */
  uint64_t unpack_us;
} uccl_stats_t;

/**
 * What a connection counts. `size`: as in uccl_stats_t.
 */
typedef struct uccl_conn_stats_t {
  /**
   * In: bytes of the caller's structure. Out: bytes that were filled.
   */
  size_t size;
  /**
   * Number of the connection within the engine, from 1.
   */
  uint64_t id;
  /**
   * 1 while the connection is up, 0 once it has ended.
   */
  uint64_t up;
  /**
   * Milliseconds since it came up.
   */
  uint64_t age_ms;
  /**
   * Milliseconds since anything was heard of the peer; heartbeats count.
   */
  uint64_t silent_ms;
  /**
   * Data channels; 0 once it has ended.
   */
  uint64_t channels;
  /**
   * Transfers of this side that are under way.
   */
  uint64_t transfers_in_flight;
  /**
   * Bytes of the control stream that wait to leave.
   */
  uint64_t backlog_bytes;
  /**
   * Bytes that channels have sent.
   */
  uint64_t sent_bytes;
  /**
   * Chunks that channels have sent.
   */
  uint64_t sent_chunks;
  /**
   * Bytes that channels have received.
   */
  uint64_t received_bytes;
  /**
   * Chunks that channels have received.
   */
  uint64_t received_chunks;
  /**
   * Bytes of small transfers sent inside control frames.
   */
  uint64_t inline_sent_bytes;
  /**
   * Bytes of small transfers received inside control frames.
   */
  uint64_t inline_received_bytes;
  /**
   * Transfers that this side started.
   */
  uint64_t transfers_started;
  /**
   * Transfers of this side that succeeded.
   */
  uint64_t transfers_completed;
  /**
   * Transfers of this side that failed.
   */
  uint64_t transfers_failed;
  /**
   * Transfers that the peer announced.
   */
  uint64_t peer_transfers;
  /**
   * Transfers of the peer that this side refused.
   */
  uint64_t refused;
  /**
   * Transfers of this side that the peer refused.
   */
  uint64_t refused_by_peer;
  /**
   * Bytes sent on the control stream.
   */
  uint64_t control_sent_bytes;
  /**
   * Bytes received on the control stream.
   */
  uint64_t control_received_bytes;
  /**
   * Notifications sent.
   */
  uint64_t notifications_sent;
  /**
   * Notifications received.
   */
  uint64_t notifications_received;
  /**
   * Seconds in which a channel with chunks under way moved none.
   */
  uint64_t stalls;
  /**
   * Times that the peer, or a transfer, kept silent for half of its timeout.
   */
  uint64_t slow_answers;
  /**
   * Chunks gathered from device memory.
   */
  uint64_t packed_chunks;
  /**
   * Chunks scattered to device memory.
   */
  uint64_t unpacked_chunks;
  /**
   * Microseconds from handing a chunk over for gathering until it was gathered, of all chunks together.
   */
  uint64_t pack_us;
  /**
   * Microseconds from handing a chunk over for scattering until it was in place, of all chunks together.
   */
  uint64_t unpack_us;
} uccl_conn_stats_t;

/**
 * What a data channel counts. `size`: as in uccl_stats_t.
 */
typedef struct uccl_channel_stats_t {
  /**
   * In: bytes of the caller's structure. Out: bytes that were filled.
   */
  size_t size;
  /**
   * Bytes sent.
   */
  uint64_t sent_bytes;
  /**
   * Chunks sent.
   */
  uint64_t sent_chunks;
  /**
   * Bytes received.
   */
  uint64_t received_bytes;
  /**
   * Chunks received.
   */
  uint64_t received_chunks;
  /**
   * Bytes sent per second, over the last second or so.
   */
  uint64_t sent_bytes_per_second;
  /**
   * Bytes received per second, over the last second or so.
   */
  uint64_t received_bytes_per_second;
  /**
   * Bytes per second while the channel was busy sending; 0 while unknown.
   */
  uint64_t speed_bytes_per_second;
  /**
   * Bytes handed to the channel and not sent.
   */
  uint64_t queued_bytes;
  /**
   * Places of the window in use for sending.
   */
  uint64_t window_out;
  /**
   * Places of the window in use for receiving.
   */
  uint64_t window_in;
  /**
   * Places of the window.
   */
  uint64_t window;
  /**
   * Seconds in which the channel had chunks under way and moved none.
   */
  uint64_t stalls;
  /**
   * Chunks gathered from device memory.
   */
  uint64_t packed_chunks;
  /**
   * Chunks scattered to device memory.
   */
  uint64_t unpacked_chunks;
  /**
   * 1 while the channel runs far below the others.
   */
  uint64_t slow;
  /**
   * TCP segments sent; 0 where the plugin does not tell, as the following.
   */
  uint64_t segments;
  /**
   * TCP segments sent again.
   */
  uint64_t retransmits;
  /**
   * Smoothed round trip, microseconds.
   */
  uint64_t rtt_us;
  /**
   * Smallest round trip, microseconds.
   */
  uint64_t min_rtt_us;
  /**
   * Name of the channel's NIC, NUL-terminated, cut to 31 bytes.
   */
  char nic[32];
  /**
   * Microseconds from handing a chunk over for gathering until it was gathered, of all chunks together.
   */
  uint64_t pack_us;
  /**
   * Microseconds from handing a chunk over for scattering until it was in place, of all chunks together.
   */
  uint64_t unpack_us;
} uccl_channel_stats_t;

/**
 * Kept for compatibility with code that names it; the library itself never makes one.
 */
typedef struct md {
  /**
   * The notification.
   */
  struct notify_msg notify_data;
} md_t;

/**
 * Success; for a transfer: complete, every byte in place at the remote side (write, send) or here (read, receive).
 */
#define UCCL_OK 0

/**
 * Not finished yet; not an error.
 */
#define UCCL_IN_PROGRESS 1

/**
 * An argument is null, out of range, outside its region, or malformed.
 */
#define UCCL_ERR_INVALID_ARGUMENT -1

/**
 * No such engine, connection, region or transfer: never existed, or already destroyed.
 */
#define UCCL_ERR_NOT_FOUND -2

/**
 * Memory, file descriptors or another resource ran out, or a limit of the library was reached.
 */
#define UCCL_ERR_RESOURCE -3

/**
 * The operation is not supported in this configuration.
 */
#define UCCL_ERR_UNSUPPORTED -4

/**
 * The object was closed on this side while the operation was waiting or in flight.
 */
#define UCCL_ERR_CANCELED -5

/**
 * A deadline passed (see the UCCL_TCPX_*_TIMEOUT_MS variables).
 */
#define UCCL_ERR_TIMED_OUT -10

/**
 * The peer cannot be reached.
 */
#define UCCL_ERR_UNREACHABLE -11

/**
 * The connection is lost: the peer died, closed it, or the network failed.
 */
#define UCCL_ERR_REMOTE_DISCONNECT -12

/**
 * The pre-shared keys of the two sides differ.
 */
#define UCCL_ERR_AUTH -13

/**
 * The peer does not speak this protocol, or broke it.
 */
#define UCCL_ERR_PROTOCOL -14

/**
 * The remote side refused the access: unknown or deregistered region, wrong token, or out of bounds.
 */
#define UCCL_ERR_REMOTE_ACCESS -20

/**
 * The message is larger than the posted receive; both sides get this.
 */
#define UCCL_ERR_TRUNCATED -21

/**
 * The NCCL net plugin cannot be found or loaded.
 */
#define UCCL_ERR_PLUGIN_LOAD -30

/**
 * The NCCL net plugin returned an error.
 */
#define UCCL_ERR_PLUGIN -31

/**
 * A CUDA call failed, or a GPU is needed and none can be used.
 */
#define UCCL_ERR_GPU -32

/**
 * A system call failed.
 */
#define UCCL_ERR_SYSTEM -33

/**
 * A defect of the library (a panic was caught, an invariant is broken). Please report it.
 */
#define UCCL_ERR_INTERNAL -99



#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Creates an engine: loads the network plugin, finds the NICs, opens the listening port and starts the progress thread.
 *
 * @param num_cpus   Accepted for compatibility, as upstream; the library decides by the machine (UCCL_TCPX_SOFT_THREADS overrides).
 * @param in_python  The caller is a Python process. Accepted for compatibility; the library installs no signal handlers either way.
 * @return The engine, owned by the caller, to be ended with uccl_engine_destroy; NULL on failure (uccl_engine_last_error tells why:
 *         the plugin cannot be loaded, the port is taken, an environment variable cannot be understood).
 *
 * Threads: any. Configuration comes from the environment (docs/configuration.md), read at this call.
 */
uccl_engine_t *uccl_engine_create(int num_cpus,
                                  bool in_python);

/**
 * Creates an engine as uccl_engine_create does, with settings that override the environment. The environment itself is not changed,
 * so engines of one process may have different settings.
 *
 * @param options      [in]  num_options settings; the last one of a name counts. Copied. May be NULL when num_options is 0.
 * @param num_options  [in]  Number of settings.
 * @param engine       [out] The engine, owned by the caller, to be ended with uccl_engine_destroy.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a name that no variable has, a variable of the process (the log's, and what only the
 *         network plugin reads: these cannot differ between engines) or a value that cannot be understood; another negative status
 *         when the engine cannot be created.
 *
 * Threads: any.
 */
int uccl_engine_create_with(const struct uccl_option_t *options,
                            size_t num_options,
                            uccl_engine_t **engine);

/**
 * Ends an engine: wakes blocked accepts, fails transfers in flight with UCCL_ERR_CANCELED, closes its connections, and joins its
 * threads. Connection handles of this engine stay valid (every call on them fails) until uccl_engine_conn_destroy.
 *
 * @param engine  The engine; NULL is a no-op, and so is an engine of the parent process after a fork; a handle already destroyed is an
 *                error that is logged, nothing else.
 *
 * Threads: any, once. Returns within the close deadline (UCCL_TCPX_CLOSE_TIMEOUT_MS, one second at most). Connections that a call of the
 * CUDA driver or of the network plugin keeps are waited for, and have a deadline of their own then. On return nothing touches
 * registered memory.
 */
void uccl_engine_destroy(uccl_engine_t *engine);

#ifndef __cplusplus
/**
 * Describes the engine to peers as "ip:port?gpu": gpu is the PCI address of the engine's GPU, or "-1" without one.
 *
 * @param engine    [in]  The engine.
 * @param metadata  [out] NUL-terminated text, owned by the caller, to be freed with uccl_engine_free_metadata.
 * @return UCCL_OK or a negative status; on failure *metadata is untouched.
 *
 * Threads: any. C++: the overload of the same name allocates with new[], to be freed with delete[].
 */
int uccl_engine_get_metadata(uccl_engine_t *engine, char **metadata);
#endif

#ifndef __cplusplus
/**
 * Frees what uccl_engine_get_metadata of the C face returned.
 *
 * @param metadata  The text; NULL is a no-op.
 *
 * Threads: any, once per text.
 */
void uccl_engine_free_metadata(char *metadata);
#endif

/**
 * The text of uccl_engine_get_metadata, written into the caller's buffer.
 *
 * @param engine  [in]  The engine.
 * @param buf     [out] NUL-terminated text. May be NULL when len is 0.
 * @param len     [in]  Size of buf in bytes.
 * @param needed  [out] Bytes needed with the NUL, written on success and when buf is too small. May be NULL.
 * @return UCCL_OK; UCCL_ERR_RESOURCE when buf is too small (nothing is written to it); another negative status.
 *
 * Threads: any.
 */
int uccl_engine_metadata_into(uccl_engine_t *engine, char *buf, size_t len, size_t *needed);

/**
 * Takes metadata apart: what uccl_engine_connect wants.
 *
 * @param metadata  [in]  Text of uccl_engine_get_metadata, NUL-terminated: "ip:port?gpu". An IPv6 address stands in brackets.
 * @param ip_buf    [out] The address, NUL-terminated, without brackets. May be NULL: not wanted.
 * @param ip_len    [in]  Size of ip_buf in bytes; 64 holds every address.
 * @param port      [out] The port, 1 to 65535. May be NULL: not wanted.
 * @param gpu_buf   [out] The GPU, NUL-terminated. May be NULL: not wanted.
 * @param gpu_len   [in]  Size of gpu_buf in bytes; 64 holds every GPU of this library.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for text that is not metadata; UCCL_ERR_RESOURCE when a buffer is too small. On failure
 *         the outputs are untouched.
 *
 * Threads: any; needs no engine.
 */
int uccl_engine_parse_metadata(const char *metadata,
                               char *ip_buf,
                               size_t ip_len,
                               int *port,
                               char *gpu_buf,
                               size_t gpu_len);

/**
 * Connects to a peer engine. Blocks until all channels are up; needs no call of the peer's application.
 *
 * @param engine        [in] The engine.
 * @param ip_addr       [in] The peer's IPv4 or IPv6 address or host name, NUL-terminated.
 * @param remote_gpu    [in] The peer's GPU as its metadata names it: a PCI address ("0000:4a:00.0", any case, 4- or 8-digit domain),
 *                      a CUDA index ("0"), or "-1" for a host without a GPU. NULL or "": not given.
 * @param remote_port   [in] The peer's port, 1 to 65535.
 * @param same_process  [in] The peer is an engine of this process; accepted for compatibility, data takes the same path.
 * @return The connection, owned by the caller, to be ended with uccl_engine_conn_destroy; NULL on failure (uccl_engine_last_error).
 *
 * Threads: any; several connects may run at once. Deadline: UCCL_TCPX_CONNECT_TIMEOUT_MS.
 */
uccl_conn_t *uccl_engine_connect(uccl_engine_t *engine,
                                 const char *ip_addr,
                                 const char *remote_gpu,
                                 int remote_port,
                                 bool same_process);

/**
 * Takes the next connection that a peer opened. Blocks until there is one or uccl_engine_stop_accept is called.
 *
 * @param engine          [in]  The engine.
 * @param ip_addr_buf     [out] The peer's address as text, always NUL-terminated, cut to fit.
 * @param ip_addr_buf_len [in]  Size of ip_addr_buf in bytes, at least 1; 46 holds every address.
 * @param remote_gpu_idx  [out] CUDA index of the peer's GPU as the peer counts, -1 when it has none.
 * @return The connection, owned by the caller, to be ended with uccl_engine_conn_destroy; NULL after uccl_engine_stop_accept or on
 *         failure, and then the outputs are untouched except that ip_addr_buf holds an empty string.
 *
 * Threads: any. Data moves over a connection from the moment the peer's connect returned, accepted or not.
 */
uccl_conn_t *uccl_engine_accept(uccl_engine_t *engine,
                                char *ip_addr_buf,
                                size_t ip_addr_buf_len,
                                int *remote_gpu_idx);

/**
 * Wakes every blocked uccl_engine_accept of the engine; these and later ones return NULL. Connections that exist stay.
 *
 * @param engine  The engine; NULL is a no-op, and so is an engine of the parent process after a fork.
 *
 * Threads: any.
 */
void uccl_engine_stop_accept(uccl_engine_t *engine);

/**
 * Marks the connection as listened to. Kept for compatibility: notifications and data arrive without it.
 *
 * @param conn  The connection.
 * @return UCCL_OK; -1 when it was started already; another negative status for a bad handle or a lost connection.
 *
 * Threads: any.
 */
int uccl_engine_start_listener(uccl_conn_t *conn);

/**
 * Undoes uccl_engine_start_listener. Stopping what was not started is not an error.
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
 * @param conn  The connection; NULL is a no-op, and so is a connection of the parent process after a fork, which stays as it is; a
 *              handle already destroyed is an error that is logged, nothing else.
 *
 * Threads: any, once, in any order with engine and regions. On return nothing of this connection touches registered memory.
 */
void uccl_engine_conn_destroy(uccl_conn_t *conn);

/**
 * Tells whether a connection is up.
 *
 * @param conn  [in] The connection.
 * @return UCCL_OK while it is; why not once it is lost or closed: UCCL_ERR_REMOTE_DISCONNECT, UCCL_ERR_TIMED_OUT, UCCL_ERR_CANCELED,
 *         UCCL_ERR_PROTOCOL and so on; UCCL_ERR_NOT_FOUND or UCCL_ERR_INVALID_ARGUMENT for a bad handle. A lost connection stays lost:
 *         destroy it and connect anew. Until then it keeps a descriptor and, where the peer had opened it, its place among
 *         UCCL_TCPX_MAX_CONNECTIONS.
 *
 * Threads: any.
 */
int uccl_engine_conn_status(uccl_conn_t *conn);

/**
 * Names the key that the peer has proved: the word of this side's key file for it (docs/security.md), never the peer's own.
 *
 * @param conn  [in]  The connection.
 * @param buf   [out] The name, NUL-terminated, cut to fit; an empty string for a peer without a key, or with a key that has no name.
 * @param len   [in]  Bytes of buf, at least 1; 33 hold every name.
 * @return UCCL_OK, also for a connection that is lost; UCCL_ERR_NOT_FOUND or UCCL_ERR_INVALID_ARGUMENT, and then buf is untouched.
 *
 * Threads: any.
 */
int uccl_engine_conn_peer_name(uccl_conn_t *conn,
                               char *buf,
                               size_t len);

/**
 * Tells whether the peer runs on this host (its address is one of this host's).
 *
 * @param conn  The connection.
 * @return true when it does; false otherwise, for a bad handle, and once the connection is lost or closed.
 *
 * Threads: any.
 */
bool uccl_engine_conn_is_local(uccl_conn_t *conn);

/**
 * Registers memory for transfers, both as local side and as target of the peers that get its FIFO item.
 *
 * @param engine  [in]  The engine.
 * @param data    [in]  First byte, host or CUDA device memory, any alignment.
 * @param size    [in]  Bytes, at least 1.
 * @param mr      [out] The region. Regions may overlap and repeat; each registration is a region of its own.
 * @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT (null, empty, wraps around), UCCL_ERR_GPU, UCCL_ERR_RESOURCE.
 *
 * The memory stays the caller's and must stay mapped until uccl_engine_mr_destroy returns. Threads: any.
 */
int uccl_engine_reg(uccl_engine_t *engine, size_t data, size_t size, uccl_mr_t *mr);

/**
 * Registers memory that peers may use only so far as the flags say.
 *
 * @param engine  [in]  The engine.
 * @param data    [in]  First byte, host or CUDA device memory, any alignment.
 * @param size    [in]  Bytes, at least 1.
 * @param access  [in]  Or of UCCL_ACCESS_REMOTE_READ and UCCL_ACCESS_REMOTE_WRITE; 0: the region is only a local side of transfers.
 * @param mr      [out] The region, as of uccl_engine_reg, which allows peers both.
 * @return As uccl_engine_reg; UCCL_ERR_INVALID_ARGUMENT for unknown flags.
 *
 * A peer that does more gets UCCL_ERR_REMOTE_ACCESS, whatever FIFO item it has, and nothing moves. What this side does itself, receives
 * into the region among it, is not limited.
 *
 * The memory stays the caller's and must stay mapped until uccl_engine_mr_destroy returns. Threads: any.
 */
int uccl_engine_reg_with(uccl_engine_t *engine,
                         size_t data,
                         size_t size,
                         uint32_t access,
                         uccl_mr_t *mr);

/**
 * Ends a registration. Waits for transfers that use the region; what is not finished within UCCL_TCPX_CLOSE_TIMEOUT_MS is failed
 * together with its connection. Peers that use the region afterwards get UCCL_ERR_REMOTE_ACCESS.
 *
 * @param engine  The engine; NULL is a no-op, and so is an engine of the parent process after a fork. One already destroyed
 *                has no regions any more: nothing is done. One that another thread is destroying still has them.
 * @param mr      The region; an unknown one is an error that is logged, nothing else.
 *
 * Threads: any. On return the library touches this memory no more, and the caller may free it. Where a device does not end its copies
 * even then, an error is logged and uccl_engine_last_status() is UCCL_ERR_RESOURCE: such memory must stay until the process ends.
 */
void uccl_engine_mr_destroy(uccl_engine_t *engine,
                            uccl_mr_t mr);

/**
 * Serialises a FIFO item for [data, data + size) of a region: what a peer needs to read or write it.
 *
 * @param engine    [in]  The engine.
 * @param mr        [in]  The region.
 * @param data      [in]  First byte, inside the region.
 * @param size      [in]  Bytes; the range must lie inside the region. A size over 4 GiB - 1 is stored as 4 GiB - 1: the field has 32
 *                  bits, and transfers take their length from their own argument.
 * @param fifo_buf  [out] UCCL_FIFO_SIZE (64) bytes: a FifoItem in memory order. It carries the region's secret token: whoever has it may
 *                  access the whole region until the region is deregistered.
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
 * Points a FIFO item at another range of its region. Changes addr and size, nothing else; needs no engine and no connection.
 *
 * @param fifo_item    [in,out] The item.
 * @param remote_addr  [in] New address in the peer's address space; checked by the peer when it is used.
 * @param size         [in] New size in bytes.
 * @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT for an item that is NULL or does not lie at a multiple of 8.
 *
 * Threads: any, one at a time per item.
 */
int uccl_engine_update_fifo(struct FifoItem *fifo_item, uint64_t remote_addr, uint32_t size);

/**
 * IPC descriptor of a registered buffer. There is none to pass on: engines of one host find out by themselves what each can copy from the
 * other (see UCCL_P2P_DISABLE_IPC), and ordinary reads and writes take that way.
 *
 * @param engine   [in]  The engine.
 * @param addr     [in]  Address inside a registered region.
 * @param ipc_buf  [out] UCCL_IPC_INFO_SIZE (128) bytes, zeroed.
 * @param has_ipc  [out] false.
 * @return UCCL_OK, UCCL_ERR_NOT_FOUND when no region holds addr, UCCL_ERR_INVALID_ARGUMENT.
 *
 * Threads: any.
 */
int uccl_engine_get_ipc_info(uccl_engine_t *engine,
                             size_t addr,
                             char *ipc_buf,
                             bool *has_ipc);

/**
 * Points an IPC descriptor at a sub-range. Descriptors of this library are empty; the range is checked, the buffer stays as it is.
 *
 * @param ipc_buf    [in,out] UCCL_IPC_INFO_SIZE (128) bytes.
 * @param addr       [in] Address inside the registered buffer.
 * @param base_addr  [in] Base address of the registered buffer, not above addr.
 * @param size       [in] Bytes.
 * @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT.
 *
 * Threads: any.
 */
int uccl_engine_update_ipc_info(char *ipc_buf,
                                size_t addr,
                                size_t base_addr,
                                size_t size);

/**
 * Starts a read: remote memory into local memory.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that holds [data, data + size).
 * @param data         [in]  Local destination.
 * @param size         [in]  Bytes; 0 completes at once.
 * @param fifo_item    [in]  Remote source: addr and the region's token. Its size field does not count.
 * @param transfer_id  [out] Id for uccl_engine_poll, uccl_engine_wait and uccl_engine_xfer_status.
 * @return UCCL_OK when it is under way; UCCL_ERR_INVALID_ARGUMENT, UCCL_ERR_NOT_FOUND (region), UCCL_ERR_RESOURCE (too many
 *         transfers in flight), UCCL_ERR_UNSUPPORTED (no channel carries such memory), or what uccl_engine_conn_status says of a
 *         connection that is lost. On failure *transfer_id is untouched and nothing moves.
 *
 * Destination bytes are undefined until the transfer is complete, and after a failure. Threads: any.
 */
int uccl_engine_read(uccl_conn_t *conn, uccl_mr_t mr, void *data, size_t size, struct FifoItem fifo_item, uint64_t *transfer_id);

/**
 * Starts a read of several segments as one transfer.
 *
 * @param conn         [in]  The connection.
 * @param mr_ids       [in]  num_iovs local regions.
 * @param dst_v        [in]  num_iovs local destinations, each inside its region.
 * @param size_v       [in]  num_iovs lengths in bytes; zero lengths are skipped.
 * @param fifo_items   [in]  num_iovs remote sources.
 * @param num_iovs     [in]  Segments, 1 to 1,048,576 of at most 65,536 remote regions; one of more than 1 GiB counts for each GiB begun. 0
 *                     is UCCL_ERR_INVALID_ARGUMENT; a transfer of nothing has segments of length 0.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_read. The arrays are copied. Overlapping destinations give undefined bytes where they overlap.
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
 * Starts a write: local memory into remote memory. Complete only when every byte is in place at the remote side.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that holds [data, data + size).
 * @param data         [in]  Local source; must not change until the transfer has ended.
 * @param size         [in]  Bytes; 0 completes at once.
 * @param fifo_item    [in]  Remote destination: addr and the region's token. Its size field does not count.
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
 * @param num_iovs     [in]  Segments, 1 to 1,048,576 of at most 65,536 remote regions; one of more than 1 GiB counts for each GiB begun. 0
 *                     is UCCL_ERR_INVALID_ARGUMENT; a transfer of nothing has segments of length 0.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_read. The arrays are copied. Overlapping destinations give undefined bytes where they overlap.
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
 * Starts a two-sided send. It is matched with the peer's receives in posting order, one message to one receive, and complete when
 * the peer has every byte.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that holds [data, data + size).
 * @param data         [in]  Source; must not change until the transfer has ended.
 * @param size         [in]  Bytes; 0 is a message too.
 * @param transfer_id  [out] Id of the transfer. Ends with UCCL_ERR_TRUNCATED when the peer's receive is smaller, and with
 *                     UCCL_ERR_TIMED_OUT when no receive is posted within UCCL_TCPX_MATCH_TIMEOUT_MS.
 * @return As uccl_engine_read.
 *
 * Threads: any; order is that of the calls.
 */
int uccl_engine_send(uccl_conn_t *conn, uccl_mr_t mr, const void *data, size_t size, uint64_t *transfer_id);

/**
 * The same as uccl_engine_send, under the name that says what it does.
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
 * Receives one message; blocks until it is here.
 *
 * @param conn      [in] The connection.
 * @param mr        [in] Local region that holds [data, data + max_size).
 * @param data      [in] Destination.
 * @param max_size  [in] Largest message to take, bytes.
 * @return UCCL_OK; UCCL_ERR_TRUNCATED when the message is larger (the sender gets it too); UCCL_ERR_TIMED_OUT when none came within
 *         UCCL_TCPX_MATCH_TIMEOUT_MS; otherwise as uccl_engine_read. A shorter message leaves the rest of the destination untouched;
 *         uccl_engine_recv_async tells its length.
 *
 * Threads: any; receives of one connection are served in the order of the calls.
 */
int uccl_engine_recv(uccl_conn_t *conn,
                     uccl_mr_t mr,
                     void *data,
                     size_t max_size);

/**
 * Starts a receive of one message.
 *
 * @param conn         [in]  The connection.
 * @param mr           [in]  Local region that holds [data, data + max_size).
 * @param data         [in]  Destination.
 * @param max_size     [in]  Largest message to take, bytes.
 * @param transfer_id  [out] Id of the transfer; uccl_engine_poll's bytes_total is the length of the message.
 * @return As uccl_engine_read.
 *
 * Threads: any; order is that of the calls.
 */
int uccl_engine_recv_async(uccl_conn_t *conn, uccl_mr_t mr, void *data, size_t max_size, uint64_t *transfer_id);

/**
 * Asks for the state of a transfer and drives progress meanwhile. Does not block.
 *
 * @param conn         [in]  The connection that started it.
 * @param transfer_id  [in]  Its id.
 * @param info         [out] Details; may be NULL.
 * @return UCCL_OK when complete; UCCL_IN_PROGRESS; the error it ended with; UCCL_ERR_NOT_FOUND for an id that this connection never
 *         gave. The answer for an ended transfer stays the same however often it is asked.
 *
 * With any answer but UCCL_IN_PROGRESS the library touches the transfer's memory no more. Threads: any.
 */
int uccl_engine_poll(uccl_conn_t *conn,
                     uint64_t transfer_id,
                     struct uccl_xfer_info_t *info);

/**
 * Waits for a transfer to end.
 *
 * @param conn         [in] The connection that started it.
 * @param transfer_id  [in] Its id.
 * @param timeout_ms   [in] Longest wait in milliseconds; negative: until it ends (every transfer has a deadline of its own).
 * @return As uccl_engine_poll; UCCL_IN_PROGRESS when timeout_ms passed first.
 *
 * Threads: any.
 */
int uccl_engine_wait(uccl_conn_t *conn, uint64_t transfer_id, int64_t timeout_ms);

/**
 * Tells whether a transfer is complete, and drives progress. Does not block.
 *
 * @param conn         [in] The connection that started it.
 * @param transfer_id  [in] Its id.
 * @return true only for success, and true again whenever it is asked later; false while it runs, after a failure (logged once;
 *         uccl_engine_poll tells which), and for bad arguments.
 *
 * Threads: any.
 */
bool uccl_engine_xfer_status(uccl_conn_t *conn, uint64_t transfer_id);

/**
 * Keeps the segments of a transfer, so that starting it takes less time, every time that it is started. For lists that are moved
 * again and again, and for those that are known before they are to be moved.
 *
 * @param mr_ids      [in]  num_iovs local regions.
 * @param data_v      [in]  num_iovs local addresses, each inside its region.
 * @param size_v      [in]  num_iovs lengths in bytes.
 * @param fifo_items  [in]  num_iovs remote addresses.
 * @param num_iovs    [in]  Segments, 1 to 1,048,576.
 * @param list        [out] The list, owned by the caller, to be freed with uccl_engine_list_free.
 * @return UCCL_OK, UCCL_ERR_INVALID_ARGUMENT, UCCL_ERR_RESOURCE. The arrays are copied. What is wrong with a region, a range or an
 *         item shows when the list is started: a list belongs to no engine and keeps no region. Memory that was registered anew
 *         since, here or at the peer, needs a new list.
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
 * Frees a list. Transfers that were started with it go on.
 *
 * @param list  The list; NULL is a no-op, and so is one of the parent process after a fork; one already freed is an error that is
 *              logged, nothing else.
 *
 * Threads: any, once per list.
 */
void uccl_engine_list_free(uccl_list_t *list);

/**
 * Starts a read of a list as one transfer: remote memory into local memory.
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
 * Starts a write of a list as one transfer: local memory into remote memory.
 *
 * @param conn         [in]  The connection.
 * @param list         [in]  The segments; may be started again at once, on this connection or another.
 * @param transfer_id  [out] Id of the transfer.
 * @return As uccl_engine_write_vector.
 *
 * Threads: any.
 */
int uccl_engine_list_write(uccl_conn_t *conn, const uccl_list_t *list, uint64_t *transfer_id);

/**
 * Sends a fixed-size notification. It arrives after the data of every transfer that was complete before this call.
 *
 * @param conn        [in] The connection.
 * @param notify_msg  [in] name up to its first NUL, and all 256 bytes of msg. Copied; may be reused at once.
 * @return UCCL_OK when it is queued for the peer; a negative status when the connection is lost or an argument is bad.
 *
 * Threads: any; notifications of one thread arrive in order.
 */
int uccl_engine_send_notif(uccl_conn_t *conn, const struct notify_msg *notify_msg);

/**
 * Sends a notification of any length up to 64 MiB (name and message together). Ordering as uccl_engine_send_notif.
 *
 * @param conn      [in] The connection.
 * @param name      [in] Bytes of the name; may be NULL when name_len is 0.
 * @param name_len  [in] Bytes.
 * @param msg       [in] Bytes of the message; may be NULL when msg_len is 0.
 * @param msg_len   [in] Bytes.
 * @return UCCL_OK when it is queued for the peer; -1 (UCCL_ERR_INVALID_ARGUMENT) above 64 MiB; another negative status.
 *
 * The bytes are copied and may be reused at once. Threads: any. Blocks only while more than 256 MiB wait to leave on this connection.
 */
int uccl_engine_send_notif_bytes(uccl_conn_t *conn,
                                 const void *name,
                                 size_t name_len,
                                 const void *msg,
                                 size_t msg_len);

/**
 * Takes up to max notifications that arrived at any engine of this process, oldest first. Longer ones are cut: a name to 255 bytes, a
 * message to 256; use uccl_engine_notif_next to get them whole.
 *
 * @param out    [out] Array of max items. May be NULL when max is 0.
 * @param max    [in]  Items in out.
 * @param count  [out] Items written, 0 to max.
 * @return UCCL_OK, or UCCL_ERR_INVALID_ARGUMENT. What did not fit stays for the next call.
 *
 * Threads: any; each notification is handed out once.
 */
int uccl_engine_get_notifs(struct notify_msg *out,
                           size_t max,
                           size_t *count);

/**
 * Takes the oldest notification, whole.
 *
 * @param engine  [in]  The engine to take from; NULL: any engine of this process.
 * @param notif   [out] The notification, owned by the caller, to be freed with uccl_engine_notif_free; NULL when none waits.
 * @return UCCL_OK (also when none waits), or a negative status; on failure *notif is untouched.
 *
 * Threads: any; each notification is handed out once, by this call or by uccl_engine_get_notifs.
 */
int uccl_engine_notif_next(uccl_engine_t *engine, uccl_notif_t **notif);

/**
 * The name of a notification.
 *
 * @param notif  [in]  The notification.
 * @param len    [out] Bytes of the name.
 * @return The bytes, not NUL-terminated, valid until uccl_engine_notif_free; NULL for bad arguments.
 *
 * Threads: any that holds the notification.
 */
const char *uccl_engine_notif_name(const uccl_notif_t *notif, size_t *len);

/**
 * The bytes of a notification.
 *
 * @param notif  [in]  The notification.
 * @param len    [out] Bytes of the message.
 * @return The bytes, valid until uccl_engine_notif_free; NULL for bad arguments.
 *
 * Threads: any that holds the notification.
 */
const void *uccl_engine_notif_msg(const uccl_notif_t *notif, size_t *len);

/**
 * Frees a notification of uccl_engine_notif_next.
 *
 * @param notif  The notification; NULL is a no-op, and so is one of the parent process after a fork; one already freed is an error that is logged, nothing else.
 *
 * Threads: any, once per notification.
 */
void uccl_engine_notif_free(uccl_notif_t *notif);

/**
 * Hands log lines to the application instead of standard error, for the whole process. Which levels are logged at all is the
 * matter of UCCL_P2P_LOG_LEVEL, as without a callback.
 *
 * @param callback  [in] The function; NULL: back to standard error.
 * @param user      [in] Given to every call. Must stay valid until another callback, or NULL, was set.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT inside a callback; UCCL_ERR_UNSUPPORTED where the program is written in Rust and has a
 *         logger of its own, which then gets the lines.
 *
 * What was logged before is handed to the callback before, as far as that takes it within a second; uccl_engine_destroy waits for as
 * much. On return no call of the callback before is running and none will begin. A child of fork keeps the callback. Threads: any.
 */
int uccl_engine_set_log_callback(uccl_log_callback_t callback,
                                 void *user);

/**
 * What an engine and its connections count.
 *
 * @param engine  [in]     The engine.
 * @param stats   [in,out] The numbers; its member size is set by the caller.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size without room for one number; another negative status.
 *
 * Threads: any. Looks at every connection; the kernel is asked about each channel.
 */
int uccl_engine_stats(uccl_engine_t *engine, struct uccl_stats_t *stats);

/**
 * What a connection counts. One that has ended still tells its totals.
 *
 * @param conn   [in]     The connection.
 * @param stats  [in,out] The numbers; its member size is set by the caller.
 * @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for a size without room for one number; another negative status.
 *
 * Threads: any.
 */
int uccl_engine_conn_stats(uccl_conn_t *conn, struct uccl_conn_stats_t *stats);

/**
 * What a data channel counts, and what the kernel knows of it.
 *
 * @param conn     [in]     The connection.
 * @param channel  [in]     Number of the channel, from 0; uccl_conn_stats_t has how many there are.
 * @param stats    [in,out] The numbers; its member size is set by the caller.
 * @return UCCL_OK; UCCL_ERR_NOT_FOUND for a channel that does not exist, or no longer;
 *         UCCL_ERR_INVALID_ARGUMENT for a size without room for one number; another negative status.
 *
 * Threads: any.
 */
int uccl_engine_channel_stats(uccl_conn_t *conn, size_t channel, struct uccl_channel_stats_t *stats);

/**
 * What an engine, its connections and their channels count, in words for people: a line for each channel.
 *
 * @param engine  [in]  The engine.
 * @param buf     [out] NUL-terminated text. May be NULL when len is 0.
 * @param len     [in]  Size of buf in bytes.
 * @param needed  [out] Bytes needed with the NUL, written on success and when buf is too small. May be NULL.
 * @return UCCL_OK; UCCL_ERR_RESOURCE when buf is too small (nothing is written to it; the text may be longer the next time);
 *         another negative status.
 *
 * Threads: any.
 */
int uccl_engine_stats_text(uccl_engine_t *engine, char *buf, size_t len, size_t *needed);

/**
 * A sentence for a status number.
 *
 * @param status  UCCL_OK, UCCL_IN_PROGRESS or UCCL_ERR_*; any other number gives "unknown status".
 * @return Static text, never NULL, never to be freed.
 *
 * Threads: any.
 */
const char *uccl_engine_strerror(int32_t status);

/**
 * The cause of the last failed call of this thread, in words, with addresses and names.
 *
 * @return NUL-terminated text, empty when no call failed yet, cut to 2047 bytes. Valid until this thread's next failing call or its end; never to be freed.
 *
 * Threads: each has its own.
 */
const char *uccl_engine_last_error(void);

/**
 * The status of the last failed call of this thread: what a function that returns a handle, a bool or nothing could not say.
 *
 * @return UCCL_OK when no call failed yet, else a negative UCCL_ERR_*.
 *
 * Threads: each has its own.
 */
int uccl_engine_last_status(void);

/**
 * Version of the library.
 *
 * @return "major.minor.patch", static text, never to be freed.
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
