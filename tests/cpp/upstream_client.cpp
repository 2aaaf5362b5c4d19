/* A client as one writes it for upstream's header: one include, and every function with the declarations that upstream gives it.
 * Two engines of this process connect and move data. Runs under AddressSanitizer too, which distinguishes memory of new[] and malloc. */
#include "uccl_engine.h"

#include "check.hpp"

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

static char const* check_last_error() { return uccl_engine_last_error(); }

namespace {

/* Upstream's signatures as types: a declaration that differs does not convert. */
using VectorCall = int(uccl_conn_t*, std::vector<uccl_mr_t>, std::vector<void*>, std::vector<size_t>, std::vector<FifoItem>, int,
                       uint64_t*, std::vector<char*>);
[[maybe_unused]] uccl_engine_t* (*const sig_create)(int, bool) = &uccl_engine_create;
[[maybe_unused]] void (*const sig_destroy)(uccl_engine_t*) = &uccl_engine_destroy;
[[maybe_unused]] uccl_conn_t* (*const sig_connect)(uccl_engine_t*, char const*, char const*, int, bool) = &uccl_engine_connect;
[[maybe_unused]] int (*const sig_start)(uccl_conn_t*) = &uccl_engine_start_listener;
[[maybe_unused]] uccl_conn_t* (*const sig_accept)(uccl_engine_t*, char*, size_t, int*) = &uccl_engine_accept;
[[maybe_unused]] int (*const sig_reg)(uccl_engine_t*, uintptr_t, size_t, uccl_mr_t&) = &uccl_engine_reg;
[[maybe_unused]] int (*const sig_read)(uccl_conn_t*, uccl_mr_t, void const*, size_t, FifoItem, uint64_t*) = &uccl_engine_read;
[[maybe_unused]] VectorCall* const sig_read_vector = &uccl_engine_read_vector;
[[maybe_unused]] int (*const sig_send)(uccl_conn_t*, uccl_mr_t, void const*, size_t, uint64_t*) = &uccl_engine_send;
[[maybe_unused]] int (*const sig_send_vector)(uccl_conn_t*, std::vector<uccl_mr_t>, std::vector<void const*>, std::vector<size_t>,
                                              int, uint64_t*) = &uccl_engine_send_vector;
[[maybe_unused]] int (*const sig_write)(uccl_conn_t*, uccl_mr_t, void const*, size_t, FifoItem, uint64_t*) = &uccl_engine_write;
[[maybe_unused]] VectorCall* const sig_write_vector = &uccl_engine_write_vector;
[[maybe_unused]] int (*const sig_recv)(uccl_conn_t*, uccl_mr_t, void*, size_t) = &uccl_engine_recv;
[[maybe_unused]] bool (*const sig_status)(uccl_conn_t*, uint64_t) = &uccl_engine_xfer_status;
[[maybe_unused]] void (*const sig_conn_destroy)(uccl_conn_t*) = &uccl_engine_conn_destroy;
[[maybe_unused]] void (*const sig_mr_destroy)(uccl_engine_t*, uccl_mr_t) = &uccl_engine_mr_destroy;
[[maybe_unused]] int (*const sig_metadata)(uccl_engine_t*, char**) = &uccl_engine_get_metadata;
[[maybe_unused]] std::vector<notify_msg_t> (*const sig_notifs)() = &uccl_engine_get_notifs;
[[maybe_unused]] std::vector<notify_msg_v_t> (*const sig_notifs_v)() = &uccl_engine_get_notifs_v;
[[maybe_unused]] int (*const sig_send_notif)(uccl_conn_t*, notify_msg_t*) = &uccl_engine_send_notif;
[[maybe_unused]] int (*const sig_send_notif_v)(uccl_conn_t*, notify_msg_v_t const*) = &uccl_engine_send_notif_v;
[[maybe_unused]] int (*const sig_prepare)(uccl_engine_t*, uccl_mr_t, void const*, size_t, char*) = &uccl_engine_prepare_fifo;
[[maybe_unused]] int (*const sig_update)(FifoItem&, uint64_t, uint32_t) = &uccl_engine_update_fifo;
[[maybe_unused]] bool (*const sig_local)(uccl_conn_t*) = &uccl_engine_conn_is_local;
[[maybe_unused]] int (*const sig_ipc)(uccl_engine_t*, uintptr_t, char*, bool*) = &uccl_engine_get_ipc_info;
[[maybe_unused]] int (*const sig_update_ipc)(char*, uintptr_t, uintptr_t, size_t) = &uccl_engine_update_ipc_info;
[[maybe_unused]] void (*const sig_stop)(uccl_engine_t*) = &uccl_engine_stop_accept;
[[maybe_unused]] void (*const sig_serialize)(FifoItem const&, char*) = &serialize_fifo_item;
[[maybe_unused]] void (*const sig_deserialize)(char const*, FifoItem*) = &deserialize_fifo_item;

/* Differences from upstream's header: const for memory that is not written. */
[[maybe_unused]] int (*const sig_send_notif_const)(uccl_conn_t*, notify_msg_t const*) = &uccl_engine_send_notif;
[[maybe_unused]] int (*const sig_read_mutable)(uccl_conn_t*, uccl_mr_t, void*, size_t, FifoItem, uint64_t*) = &uccl_engine_read;

/* Upstream's tags, and its constants. */
static_assert(std::is_same<struct notify_msg, notify_msg_t>::value && std::is_same<struct md, md_t>::value, "upstream's tags");
static_assert(MSG_SIZE == 256 && FIFO_SIZE == 64 && IPC_INFO_SIZE == 128, "upstream's constants");
static_assert(MSG_SIZE == UCCL_MSG_SIZE && FIFO_SIZE == UCCL_FIFO_SIZE && IPC_INFO_SIZE == UCCL_IPC_INFO_SIZE, "ours");
#if UCCL_P2P_VERSION_NUMBER < UCCL_P2P_MAKE_VERSION(0, 1, 0) || UCCL_P2P_VERSION_NUMBER >= UCCL_P2P_MAKE_VERSION(1, 0, 0)
#error "UCCL_P2P_VERSION_NUMBER"
#endif

constexpr size_t kSize = 3 * 1024 * 1024 + 17;

struct Address {
  std::string ip, gpu;
  int port;
};

Address describe(uccl_engine_t* engine) {
  char* metadata = nullptr;
  CHECK(uccl_engine_get_metadata(engine, &metadata) == 0);
  CHECK(metadata != nullptr);
  std::string const text(metadata);
  delete[] metadata;
  size_t const colon = text.find(':'), question = text.find('?');
  CHECK(colon != std::string::npos && question != std::string::npos && colon < question);
  // The other way to free it.
  metadata = nullptr;
  CHECK(uccl_engine_get_metadata(engine, &metadata) == 0);
  CHECK(text == metadata);
  uccl_engine_free_metadata(metadata);
  return {text.substr(0, colon), text.substr(question + 1), std::stoi(text.substr(colon + 1, question - colon - 1))};
}

void finish(uccl_conn_t* conn, uint64_t id) {
  auto const deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!uccl_engine_xfer_status(conn, id)) {
    CHECK(uccl_engine_poll(conn, id, nullptr) >= 0);
    CHECK(std::chrono::steady_clock::now() < deadline);
  }
  for (int again = 0; again < 100; ++again) CHECK(uccl_engine_xfer_status(conn, id));
}

template <typename Take>
auto wait_for(size_t want, Take take) {
  auto all = take();
  auto const deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (all.size() < want) {
    CHECK(std::chrono::steady_clock::now() < deadline);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    for (auto& one : take()) all.push_back(one);
  }
  CHECK(all.size() == want);
  return all;
}

void fill(std::vector<char>& bytes, unsigned seed) {
  for (char& byte : bytes) byte = static_cast<char>((seed = seed * 1664525u + 1013904223u) >> 24);
}

}  // namespace

int main() {
  uccl_engine_t* server = uccl_engine_create(4, false);
  uccl_engine_t* client = uccl_engine_create(4, false);
  CHECK(server != nullptr && client != nullptr);

  std::vector<char> there(kSize), here(kSize);
  fill(here, 1);
  fill(there, 2);

  // Registration, and the item at once, as clients do it before any connection.
  uccl_mr_t mr_there, mr_here;
  CHECK(uccl_engine_reg(server, reinterpret_cast<uintptr_t>(there.data()), there.size(), mr_there) == 0);
  CHECK(uccl_engine_reg(client, reinterpret_cast<uintptr_t>(here.data()), here.size(), mr_here) == 0);
  char fifo_buf[FIFO_SIZE];
  CHECK(uccl_engine_prepare_fifo(server, mr_there, there.data(), there.size(), fifo_buf) == 0);
  char ipc_buf[IPC_INFO_SIZE];
  bool has_ipc = true;
  CHECK(uccl_engine_get_ipc_info(server, reinterpret_cast<uintptr_t>(there.data()) + 5, ipc_buf, &has_ipc) == 0);
  CHECK(!has_ipc);
  CHECK(uccl_engine_update_ipc_info(ipc_buf, reinterpret_cast<uintptr_t>(there.data()) + 5,
                                    reinterpret_cast<uintptr_t>(there.data()), 10) == 0);

  // As clients do: a thread that accepts until it is stopped.
  std::mutex mutex;
  std::condition_variable arrived;
  std::vector<uccl_conn_t*> accepted;
  std::thread accepting([&] {
    for (;;) {
      char ip_buf[256];
      int remote_gpu_idx = 99;
      uccl_conn_t* one = uccl_engine_accept(server, ip_buf, sizeof(ip_buf), &remote_gpu_idx);
      if (one == nullptr) return;
      CHECK(ip_buf[0] != '\0' && std::strlen(ip_buf) < sizeof(ip_buf));
      CHECK(remote_gpu_idx != 99);
      CHECK(uccl_engine_start_listener(one) == 0);
      std::lock_guard<std::mutex> lock(mutex);
      accepted.push_back(one);
      arrived.notify_all();
    }
  });
  auto accept_of = [&](size_t number) {
    std::unique_lock<std::mutex> lock(mutex);
    CHECK(arrived.wait_for(lock, std::chrono::seconds(30), [&] { return accepted.size() > number; }));
    return accepted[number];
  };

  Address const address = describe(server);
  uccl_conn_t* conn = uccl_engine_connect(client, address.ip.c_str(), address.gpu.c_str(), address.port);
  CHECK(conn != nullptr);
  CHECK(uccl_engine_version() == std::to_string(UCCL_P2P_VERSION_MAJOR) + "." + std::to_string(UCCL_P2P_VERSION_MINOR) + "." +
                                     std::to_string(UCCL_P2P_VERSION_PATCH));
  uccl_conn_t* back = accept_of(0);
  CHECK(uccl_engine_start_listener(conn) == 0);
  CHECK(uccl_engine_start_listener(conn) == -1);
  CHECK(uccl_engine_conn_is_local(conn));

  // The older overload, and the literals that fit more than one parameter.
  int const remote_gpu_idx = 0;
  uccl_conn_t* by_index = uccl_engine_connect(client, address.ip.c_str(), remote_gpu_idx, address.port);
  CHECK(by_index != nullptr);
  uccl_conn_t* by_null = uccl_engine_connect(client, address.ip.c_str(), nullptr, address.port, true);
  CHECK(by_null != nullptr);
  CHECK(uccl_engine_connect(nullptr, address.ip.c_str(), NULL, address.port, false) == nullptr);
  CHECK(uccl_engine_connect(nullptr, address.ip.c_str(), 0, address.port) == nullptr);
  static_cast<void>(accept_of(2));
  uccl_engine_conn_destroy(by_index);
  uccl_engine_conn_destroy(by_null);
  uccl_engine_conn_destroy(accepted[1]);
  uccl_engine_conn_destroy(accepted[2]);

  // One item, moved to another range of the region.
  FifoItem item;
  deserialize_fifo_item(fifo_buf, &item);
  CHECK(item.addr == reinterpret_cast<uintptr_t>(there.data()) && item.size == there.size());
  char again[FIFO_SIZE];
  serialize_fifo_item(item, again);
  CHECK(std::memcmp(again, fifo_buf, FIFO_SIZE) == 0);
  size_t const off = 1000, len = kSize - 3000;
  CHECK(uccl_engine_update_fifo(item, reinterpret_cast<uintptr_t>(there.data()) + off, len) == 0);
  CHECK(item.addr == reinterpret_cast<uintptr_t>(there.data()) + off && item.size == len);

  uint64_t id = 0;
  CHECK(uccl_engine_write(conn, mr_here, here.data() + 2000, len, item, &id) == 0);
  finish(conn, id);
  CHECK(std::memcmp(there.data() + off, here.data() + 2000, len) == 0);

  fill(there, 3);
  CHECK(uccl_engine_read(conn, mr_here, here.data(), len, item, &id) == 0);
  finish(conn, id);
  CHECK(std::memcmp(there.data() + off, here.data(), len) == 0);
  // As upstream declares it, and with nothing.
  fill(there, 7);
  CHECK(uccl_engine_read(conn, mr_here, static_cast<char const*>(here.data()), len, item, &id) == 0);
  finish(conn, id);
  CHECK(std::memcmp(there.data() + off, here.data(), len) == 0);
  CHECK(uccl_engine_read(conn, mr_here, nullptr, len, item, &id) < 0);
  CHECK(uccl_engine_send_notif(conn, nullptr) < 0 && uccl_engine_send_notif(conn, NULL) < 0);

  // Vectors, with and without the last argument; the caller's stay as they are.
  constexpr int kCount = 65;
  constexpr size_t kBlock = 4096;
  std::vector<uccl_mr_t> mr_ids(kCount, mr_here);
  std::vector<void*> addr_v;
  std::vector<size_t> size_v(kCount, kBlock);
  std::vector<FifoItem> fifo_items(kCount);
  for (int i = 0; i < kCount; ++i) {
    addr_v.push_back(here.data() + static_cast<size_t>(i) * 2 * kBlock + 3);
    deserialize_fifo_item(fifo_buf, &fifo_items[static_cast<size_t>(i)]);
    CHECK(uccl_engine_update_fifo(fifo_items[static_cast<size_t>(i)],
                                  reinterpret_cast<uintptr_t>(there.data()) + static_cast<size_t>(kCount - 1 - i) * kBlock,
                                  kBlock) == 0);
  }
  auto same_blocks = [&] {
    for (int i = 0; i < kCount; ++i) {
      if (std::memcmp(there.data() + static_cast<size_t>(kCount - 1 - i) * kBlock, addr_v[static_cast<size_t>(i)], kBlock) != 0) {
        return false;
      }
    }
    return true;
  };
  fill(here, 4);
  CHECK(!same_blocks());
  CHECK(uccl_engine_write_vector(conn, mr_ids, addr_v, size_v, fifo_items, kCount, &id) == 0);
  finish(conn, id);
  CHECK(same_blocks());
  CHECK(addr_v.size() == kCount);
  fill(there, 5);
  CHECK(!same_blocks());
  std::vector<char*> ipc_ptrs(kCount, ipc_buf);
  CHECK(uccl_engine_read_vector(conn, mr_ids, addr_v, size_v, fifo_items, kCount, &id, ipc_ptrs) == 0);
  finish(conn, id);
  CHECK(same_blocks());
  // Temporaries and fewer segments than elements.
  CHECK(uccl_engine_write_vector(conn, {mr_here}, {addr_v[0]}, {kBlock}, {fifo_items[0]}, 1, &id) == 0);
  finish(conn, id);

  // No segments at all: -1, as upstream.
  id = 4711;
  CHECK(uccl_engine_write_vector(conn, mr_ids, addr_v, size_v, fifo_items, 0, &id) == -1);
  CHECK(uccl_engine_read_vector(conn, {}, {}, {}, {}, 0, &id) == -1);
  CHECK(id == 4711);

  // A vector that is shorter than the caller says: an error, the id untouched, nothing moved and nothing read beyond its end.
  std::vector<char> const before = there;
  fill(here, 6);
  id = 4711;
  for (int which = 0; which < 4; ++which) {
    auto short_mr = mr_ids;
    auto short_addr = addr_v;
    auto short_size = size_v;
    auto short_item = fifo_items;
    if (which == 0) short_mr.pop_back();
    if (which == 1) short_addr.clear();
    if (which == 2) short_size.resize(1);
    if (which == 3) short_item.pop_back();
    CHECK(uccl_engine_write_vector(conn, short_mr, short_addr, short_size, short_item, kCount, &id) == UCCL_ERR_INVALID_ARGUMENT);
    CHECK(uccl_engine_read_vector(conn, short_mr, short_addr, short_size, short_item, kCount, &id) == UCCL_ERR_INVALID_ARGUMENT);
  }
  CHECK(uccl_engine_write_vector(conn, mr_ids, addr_v, size_v, fifo_items, -1, &id) < 0);
  CHECK(uccl_engine_send_vector(conn, mr_ids, {}, size_v, kCount, &id) < 0);
  CHECK(id == 4711 && before == there);

  // Two-sided: gathered here, contiguous there. The receive blocks, so it has its own thread.
  std::vector<void const*> src_v(addr_v.begin(), addr_v.end());
  std::vector<char> gathered(kCount * kBlock + 100, 'x');
  uccl_mr_t mr_gathered;
  CHECK(uccl_engine_reg(server, reinterpret_cast<uintptr_t>(gathered.data()), gathered.size(), mr_gathered) == 0);
  std::thread receiving([&] { CHECK(uccl_engine_recv(back, mr_gathered, gathered.data(), gathered.size()) == 0); });
  CHECK(uccl_engine_send_vector(conn, mr_ids, src_v, size_v, kCount, &id) == 0);
  finish(conn, id);
  receiving.join();
  for (size_t i = 0; i < kCount; ++i) CHECK(std::memcmp(gathered.data() + i * kBlock, src_v[i], kBlock) == 0);
  CHECK(gathered[kCount * kBlock] == 'x');
  std::thread receiving_one([&] { CHECK(uccl_engine_recv(back, mr_gathered, gathered.data(), 50) == 0); });
  CHECK(uccl_engine_send(conn, mr_here, here.data() + 10, 50, &id) == 0);
  finish(conn, id);
  receiving_one.join();
  CHECK(std::memcmp(gathered.data(), here.data() + 10, 50) == 0);

  // Notifications belong to the process: both engines' arrive in the same list.
  notify_msg_t hello{};
  std::strncpy(hello.name, "client", sizeof(hello.name) - 1);
  std::memcpy(hello.msg, "hello", 5);
  CHECK(uccl_engine_send_notif(conn, &hello) == 0);
  std::vector<notify_msg_t> const notifs = wait_for(1, [] { return uccl_engine_get_notifs(); });
  CHECK(std::string(notifs[0].name) == "client");
  CHECK(std::memcmp(notifs[0].msg, "hello\0\0", 7) == 0);
  CHECK(uccl_engine_get_notifs().empty());

  // Many, more than one batch takes, in order.
  for (int i = 0; i < 100; ++i) {
    notify_msg_t numbered{};
    std::snprintf(numbered.name, sizeof(numbered.name), "%d", i);
    CHECK(uccl_engine_send_notif(conn, &numbered) == 0);
  }
  std::vector<notify_msg_t> const many = wait_for(100, [] { return uccl_engine_get_notifs(); });
  for (int i = 0; i < 100; ++i) CHECK(std::string(many[static_cast<size_t>(i)].name) == std::to_string(i));

  // Of any length.
  notify_msg_v_t big;
  big.name = std::string(5000, 'n');
  big.msg = std::string(3 << 20, 'm');
  big.msg[7] = '\0';
  CHECK(uccl_engine_send_notif_v(conn, &big) == 0);
  notify_msg_v_t const empty{};
  CHECK(uccl_engine_send_notif_v(conn, &empty) == 0);
  std::vector<notify_msg_v_t> const whole = wait_for(2, [] { return uccl_engine_get_notifs_v(); });
  CHECK(whole[0].name == big.name && whole[0].msg == big.msg);
  CHECK(whole[1].name.empty() && whole[1].msg.empty());
  CHECK(uccl_engine_get_notifs_v().empty());
  notify_msg_v_t huge;
  huge.msg.resize((64u << 20) + 1);
  CHECK(uccl_engine_send_notif_v(conn, &huge) == -1);
  CHECK(uccl_engine_send_notif_v(conn, nullptr) == -1);

  notify_msg_v_t answer;
  answer.name = "server";
  CHECK(uccl_engine_send_notif_v(back, &answer) == 0);
  CHECK(wait_for(1, [] { return uccl_engine_get_notifs_v(); })[0].name == "server");

  uccl_engine_stop_accept(server);
  accepting.join();
  uccl_engine_stop_accept(client);
  uccl_engine_mr_destroy(server, mr_there);
  uccl_engine_mr_destroy(server, mr_gathered);
  uccl_engine_mr_destroy(client, mr_here);
  uccl_engine_conn_destroy(conn);
  uccl_engine_conn_destroy(back);
  uccl_engine_destroy(client);
  uccl_engine_destroy(server);
  return 0;
}
