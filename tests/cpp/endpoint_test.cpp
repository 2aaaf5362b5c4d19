/* Drives TcpxEndpoint the way UCCL's engine drives its endpoints, with stand-ins for the engine's types. Like the engine's own source,
 * this file declares functions and structures of the names that uccl_engine.h uses, and so shows that they do not meet. */
#include "check.hpp"
#include "engine_types.hpp"

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

struct uccl_engine {
  int of_the_engine;
};
typedef struct uccl_engine uccl_engine_t;
typedef uint64_t uccl_mr_t;
uccl_engine_t* uccl_engine_create(int num_cpus, bool in_python);
int uccl_engine_reg(uccl_engine_t* engine, uintptr_t data, size_t size, uccl_mr_t& mr_id);

#include "uccl_tcpx_endpoint.hpp"

#include <atomic>
#include <chrono>
#include <future>
#include <mutex>
#include <thread>
#include <variant>

uccl_engine_t* uccl_engine_create(int, bool) { return nullptr; }
int uccl_engine_reg(uccl_engine_t*, uintptr_t, size_t, uccl_mr_t&) { return 77; }

namespace {

std::mutex notify_mutex;
std::vector<NotifyMsg> notify_list;

struct Traits : EngineTypes {
  static void deliver_notification(NotifyMsg&& message) {
    std::lock_guard<std::mutex> lock(notify_mutex);
    notify_list.push_back(std::move(message));
  }
};

std::atomic<int> failures{0};
std::atomic<int> failure_status{0};
struct TraitsWithFailure : Traits {
  static void transfer_failed(uint64_t, int64_t, int status, char const* cause) {
    CHECK(cause != nullptr && *cause != '\0');
    failure_status = status;
    ++failures;
  }
};

using Endpoint = uccl_tcpx::TcpxEndpoint<Traits>;
using EndpointWithFailure = uccl_tcpx::TcpxEndpoint<TraitsWithFailure>;
using Region = std::shared_ptr<uccl_tcpx::TcpxMemoryRegion>;
/* The engine holds endpoints this way. */
using GenericEndpoint = std::variant<std::shared_ptr<Endpoint>, std::shared_ptr<EndpointWithFailure>>;

std::chrono::steady_clock::time_point soon() { return std::chrono::steady_clock::now() + std::chrono::seconds(30); }

template <typename E>
void finish(E& endpoint, UcclRequest const& request) {
  auto const deadline = soon();
  while (!endpoint.check_send_complete_once(request.peer_id, request.engine_idx)) {
    endpoint.send_routine();
    endpoint.recv_routine();
    CHECK(std::chrono::steady_clock::now() < deadline);
  }
  CHECK(endpoint.check_send_complete_once(request.peer_id, request.engine_idx));
}

void fill(std::vector<char>& bytes, unsigned seed) {
  for (char& byte : bytes) byte = static_cast<char>((seed = seed * 1664525u + 1013904223u) >> 24);
}

}  // namespace

static char const* check_last_error() { return Endpoint::last_error(); }

int main() {
  auto server = std::make_shared<Endpoint>(-1, 0);
  auto client = std::make_shared<EndpointWithFailure>();
  GenericEndpoint generic = client;
  CHECK(std::visit([](auto const& s) { return s->initialize_rdma_ctx_for_gpu(3); }, generic));
  CHECK(client->gpu_index() == 3 && server->gpu_index() == -1);
  server->create_unified_p2p_socket();
  CHECK(server->get_p2p_listen_port() != 0);
  CHECK(server->get_p2p_listen_port() != client->get_p2p_listen_port());
  CHECK(server->get_p2p_listen_fd() == -1);
  CHECK(server->get_oob_client() == nullptr);
  CHECK(server->get_oob_conn_key(0).empty());
  std::string const metadata = server->metadata();
  CHECK(metadata.find("?") != std::string::npos && metadata.back() != '\0');
  std::string const ip = metadata.substr(0, metadata.rfind(':', metadata.find('?')));

  // The engine accepts in a future while the peer connects.
  std::string accepted_ip;
  int accepted_gpu = 99;
  std::future<ConnID> accepting =
      std::async(std::launch::async, [&] { return server->uccl_accept(accepted_ip, &accepted_gpu); });
  ConnID const conn = client->uccl_connect(0, ip, server->get_p2p_listen_port());
  CHECK(conn.peer_id != UINT64_MAX && conn.context != nullptr && conn.sock_fd >= 0 && conn.dev == 3);
  ConnID const back = accepting.get();
  CHECK(back.peer_id != UINT64_MAX && back.sock_fd >= 0);
  // The engine closes what it finds there: it must not be an open descriptor.
  CHECK(close(back.sock_fd) == -1 && close(conn.sock_fd) == -1);
  CHECK(accepted_ip == ip && accepted_gpu != 99);
  ConnID const second = client->uccl_connect(-1, ip, server->get_p2p_listen_port());
  CHECK(second.peer_id != UINT64_MAX && second.peer_id != conn.peer_id);
  ConnID const second_back = server->uccl_accept(accepted_ip, nullptr);
  CHECK(second_back.peer_id != back.peer_id);

  // A connection that cannot be made.
  ConnID const none = client->uccl_connect(0, ip, 1);
  CHECK(none.peer_id == UINT64_MAX && none.context == nullptr && none.sock_fd < 0);
  CHECK(*Endpoint::last_error() != '\0');

  constexpr size_t kSize = 5 * 1024 * 1024 + 3;
  std::vector<char> here(kSize), there(kSize);
  fill(here, 1);
  fill(there, 2);
  Region local, remote, bad;
  CHECK(client->uccl_regmr(here.data(), here.size(), local) >= 0);
  CHECK(server->uccl_regmr(there.data(), there.size(), remote) >= 0);
  CHECK(client->uccl_regmr(nullptr, 10, bad) < 0 && !bad);
  char bytes[64];
  CHECK(server->prepare_fifo_metadata(remote, there.data(), there.size(), bytes) == 0);
  CHECK(server->prepare_fifo_metadata(nullptr, there.data(), there.size(), bytes) < 0);
  CHECK(server->prepare_fifo_metadata(remote, there.data() + 1, there.size(), bytes) < 0);
  FifoItem item;
  std::memcpy(&item, bytes, sizeof(item));
  CHECK(item.addr == reinterpret_cast<uintptr_t>(there.data()));

  UcclRequest request{ReqRead, 99, 99};
  int rc = client->uccl_write_async(conn, local, here.data(), kSize, item, &request);
  CHECK(rc >= 0 && request.type == ReqWrite && request.peer_id == conn.peer_id && request.engine_idx == static_cast<uint32_t>(rc));
  finish(*client, request);
  CHECK(here == there);

  fill(there, 3);
  item.addr += 1000;
  rc = client->uccl_read_async(conn, local, here.data() + 500, kSize - 2000, item, &request);
  CHECK(rc >= 0 && request.type == ReqRead);
  auto const deadline = soon();
  while (!client->uccl_poll_ureq_once(&request)) CHECK(std::chrono::steady_clock::now() < deadline);
  CHECK(std::memcmp(here.data() + 500, there.data() + 1000, kSize - 2000) == 0);
  CHECK(client->request_status(request.engine_idx) == 0);
  // What a start that failed returned is no request that is complete.
  CHECK(client->request_status(uccl_tcpx::kPostFailed) < 0 && client->request_status(uccl_tcpx::kPostTransient) < 0);

  // Several threads post and poll at once.
  std::vector<std::thread> threads;
  constexpr size_t kPart = 64 * 1024, kThreads = 4;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (size_t round = 0; round < 20; ++round) {
        size_t const at = (t * 20 + round) % 64 * kPart;
        FifoItem part = item;
        part.addr = reinterpret_cast<uintptr_t>(there.data()) + at;
        UcclRequest mine{};
        int posted;
        while ((posted = client->uccl_write_async(t % 2 == 0 ? conn : second, local, here.data() + at, kPart, part, &mine)) ==
               uccl_tcpx::kPostTransient) {
        }
        CHECK(posted >= 0);
        finish(*client, mine);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(std::memcmp(here.data(), there.data(), 64 * kPart) == 0);

  // Two-sided.
  UcclRequest send{}, recv{};
  CHECK(server->uccl_recv_async(back, remote, there.data(), 100, &recv) >= 0);
  CHECK(client->uccl_send_async(conn, local, here.data() + 7, 100, &send) >= 0);
  finish(*client, send);
  finish(*server, recv);
  CHECK(std::memcmp(there.data(), here.data() + 7, 100) == 0);

  // What cannot be started says so, and leaves the request as it was.
  UcclRequest untouched{ReqRead, 7, 8};
  ConnID unknown = conn;
  unknown.peer_id = 12345;
  CHECK(client->uccl_write_async(unknown, local, here.data(), 10, item, &untouched) == uccl_tcpx::kPostFailed);
  CHECK(client->uccl_write_async(conn, nullptr, here.data(), 10, item, &untouched) == uccl_tcpx::kPostFailed);
  CHECK(client->uccl_write_async(conn, local, here.data() + kSize, 10, item, &untouched) == uccl_tcpx::kPostFailed);
  CHECK(untouched.type == ReqRead && untouched.peer_id == 7 && untouched.engine_idx == 8);

  // A failed request is never complete: the hook is called, or an exception is thrown.
  FifoItem outside = item;
  outside.addr = reinterpret_cast<uintptr_t>(there.data()) + kSize;
  CHECK(client->uccl_write_async(conn, local, here.data(), 10, outside, &request) >= 0);
  auto const hook_deadline = soon();
  while (failures == 0) {
    CHECK(!client->check_send_complete_once(request.peer_id, request.engine_idx));
    CHECK(std::chrono::steady_clock::now() < hook_deadline);
  }
  CHECK(failure_status == -20);
  CHECK(!client->check_send_complete_once(request.peer_id, request.engine_idx) && failures == 2);
  CHECK(client->prepare_fifo_metadata(local, here.data(), here.size(), bytes) == 0);
  std::memcpy(&outside, bytes, sizeof(outside));
  outside.addr += kSize;
  CHECK(server->uccl_read_async(back, remote, there.data(), 10, outside, &request) >= 0);
  bool thrown = false;
  auto const throw_deadline = soon();
  while (!thrown) {
    try {
      CHECK(!server->check_send_complete_once(request.peer_id, request.engine_idx));
    } catch (std::runtime_error const&) {
      thrown = true;
    }
    CHECK(std::chrono::steady_clock::now() < throw_deadline);
  }
  CHECK(server->request_status(request.engine_idx) == -20);

  // Notifications: the engine's receive thread hands them over.
  NotifyMsg note;
  note.name = "client";
  note.msg = std::string("a\0b", 3);
  CHECK(client->send_notification(conn.peer_id, note) == 0);
  note.msg = std::string(100000, 'z');
  CHECK(client->send_notification(conn.peer_id, note) == 0);
  CHECK(client->send_notification(12345, note) < 0);
  auto const note_deadline = soon();
  for (bool done = false; !done;) {
    server->recv_routine();
    std::lock_guard<std::mutex> lock(notify_mutex);
    done = notify_list.size() == 2;
    CHECK(std::chrono::steady_clock::now() < note_deadline);
  }
  CHECK(notify_list[0].name == "client" && notify_list[0].msg == std::string("a\0b", 3));
  CHECK(notify_list[1].msg == note.msg);
  note.name = "server";
  CHECK(server->send_notification(back.peer_id, note) == 0);
  NotifyMsg answer;
  while (!client->next_notification(answer)) CHECK(std::chrono::steady_clock::now() < note_deadline);
  CHECK(answer.name == "server" && answer.msg == note.msg);

  // stop_accept wakes the one that waits, and holds for later ones.
  std::future<ConnID> waiting = std::async(std::launch::async, [&] {
    std::string text = "untouched";
    int gpu = 5;
    ConnID const stopped = server->uccl_accept(text, &gpu);
    CHECK(text == "untouched" && gpu == 5);
    return stopped;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  server->stop_accept();
  CHECK(waiting.wait_for(std::chrono::seconds(10)) == std::future_status::ready);
  CHECK(waiting.get().peer_id == UINT64_MAX);
  CHECK(server->uccl_accept(accepted_ip, &accepted_gpu).peer_id == UINT64_MAX);

  // One connection closed, the other still carries data.
  client->disconnect(second.peer_id);
  client->disconnect(second.peer_id);
  CHECK(client->uccl_write_async(second, local, here.data(), 10, item, &untouched) == uccl_tcpx::kPostFailed);
  CHECK(client->uccl_write_async(conn, local, here.data(), 10, item, &request) >= 0);
  finish(*client, request);

  client->uccl_deregmr(local);
  client->uccl_deregmr(local);
  client->uccl_deregmr(nullptr);
  CHECK(client->uccl_write_async(conn, local, here.data(), 10, item, &untouched) == uccl_tcpx::kPostFailed);
  server->uccl_deregmr(remote);

  // A port that is taken; then a port that is free.
  bool refused = false;
  uint16_t const port = server->get_p2p_listen_port();
  try {
    Endpoint other(-1, port);
  } catch (std::runtime_error const&) {
    refused = true;
  }
  CHECK(refused);
  server.reset();
  Endpoint other(-1, port);
  CHECK(other.get_p2p_listen_port() == port);

  // What chooses this endpoint in the engine says nothing about the plugin under it.
  CHECK(setenv("UCCL_P2P_TRANSPORT", "tcpx", 1) == 0 && unsetenv("UCCL_TCPX_PLUGIN") == 0);
  Endpoint chosen;
  CHECK(chosen.get_p2p_listen_port() != 0);
  return 0;
}
