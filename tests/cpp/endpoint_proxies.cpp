/* TcpxEndpoint under threads like those of UCCL's engine: a send proxy and a receive proxy that take tasks and spin, and an application
 * thread that polls; with a peer in its own process that is killed before, during and after the posts. A failed transfer is never
 * reported as done, every transfer ends, nothing terminates, and nothing is kept per failed request.
 *
 * The proxies follow docs/uccl-engine.md: they catch, they mark a failed transfer, and polling says so. */
#include "check.hpp"
#include "engine_types.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "uccl_tcpx_endpoint.hpp"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <thread>

namespace {

std::atomic<int> delivered{0};
struct Traits : EngineTypes {
  static void deliver_notification(NotifyMsg&&) { ++delivered; }
};
using Endpoint = uccl_tcpx::TcpxEndpoint<Traits>;
using Region = std::shared_ptr<uccl_tcpx::TcpxMemoryRegion>;
using Clock = std::chrono::steady_clock;

/* A transfer as started by the engine's asynchronous calls. */
struct Task {
  ReqType type = ReqWrite;
  ConnID conn{};
  char* local = nullptr;
  size_t size = 0;
  FifoItem item{};
  std::atomic<bool> done{false}, failed{false};
};

/* The threads of an engine around one endpoint. */
class Engine {
 public:
  explicit Engine(Endpoint& endpoint) : endpoint_(endpoint) {
    send_ = std::thread([this] { proxy(writes_, false); });
    recv_ = std::thread([this] { proxy(reads_, true); });
    // The third one watches GPU events, of which there are none here.
    third_ = std::thread([this] {
      while (!stop_.load(std::memory_order_acquire)) endpoint_.idle_routine();
    });
  }
  ~Engine() {
    stop_ = true;
    send_.join();
    recv_.join();
    third_.join();
  }

  std::shared_ptr<Task> post(ReqType type, ConnID const& conn, Region const& region, char* local, size_t size, FifoItem item) {
    auto task = std::make_shared<Task>();
    task->type = type;
    task->conn = conn;
    task->local = local;
    task->size = size;
    task->item = item;
    std::lock_guard<std::mutex> lock(mutex_);
    region_ = region;
    (type == ReqWrite ? writes_ : reads_).push_back(task);
    return task;
  }

  /* poll_async: false for a failed transfer. */
  static bool poll(Task const& task, bool* is_done) {
    bool const ended = task.done.load(std::memory_order_acquire);
    *is_done = ended && !task.failed;
    return !(ended && task.failed);
  }

 private:
  std::shared_ptr<Task> take(std::deque<std::shared_ptr<Task>>& ring) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ring.empty()) return nullptr;
    auto task = ring.front();
    ring.pop_front();
    return task;
  }

  void proxy(std::deque<std::shared_ptr<Task>>& ring, bool receives) {
    while (!stop_.load(std::memory_order_acquire)) {
      auto const task = take(ring);
      if (task == nullptr) {
        if (receives) {
          endpoint_.recv_routine();
        } else {
          endpoint_.idle_routine();
        }
        continue;
      }
      bool ok = false;
      try {
        ok = run(*task, receives);
      } catch (std::exception const&) {
      }
      if (!ok) task->failed.store(true, std::memory_order_release);
      task->done.store(true, std::memory_order_release);
    }
  }

  /* Endpoint::write and Endpoint::read. */
  bool run(Task const& task, bool receives) {
    UcclRequest request{task.type, 0, 0};
    Region region;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      region = region_;
    }
    int rc;
    do {
      rc = task.type == ReqWrite ? endpoint_.uccl_write_async(task.conn, region, task.local, task.size, task.item, &request)
                                 : endpoint_.uccl_read_async(task.conn, region, task.local, task.size, task.item, &request);
    } while (rc == uccl_tcpx::kPostTransient);
    if (rc < 0) return false;
    for (;;) {
      if (receives) endpoint_.recv_routine();
      endpoint_.send_routine();
      if (endpoint_.check_send_complete_once(request.peer_id, request.engine_idx)) return true;
    }
  }

  Endpoint& endpoint_;
  std::mutex mutex_;
  Region region_;
  std::deque<std::shared_ptr<Task>> writes_, reads_;
  std::atomic<bool> stop_{false};
  std::thread send_, recv_, third_;
};

constexpr size_t kSize = 8 << 20;

struct Hello {
  uint16_t port;
  FifoItem item;
  char ip[64];
};

/* The peer: an endpoint with a region, until it is killed. */
[[noreturn]] void be_peer(int link) {
  static std::vector<char> memory(2 * kSize, 'p');
  Endpoint endpoint;
  Region region;
  CHECK(endpoint.uccl_regmr(memory.data(), memory.size(), region) == 0);
  Hello hello{};
  hello.port = endpoint.get_p2p_listen_port();
  char bytes[64];
  CHECK(endpoint.prepare_fifo_metadata(region, memory.data(), memory.size(), bytes) == 0);
  std::memcpy(&hello.item, bytes, sizeof(bytes));
  std::string const metadata = endpoint.metadata();
  std::snprintf(hello.ip, sizeof(hello.ip), "%s", metadata.substr(0, metadata.find(':')).c_str());
  CHECK(send(link, &hello, sizeof(hello), 0) == sizeof(hello));
  for (;;) pause();
}

struct Peer {
  pid_t pid;
  Hello hello;
};

/* This program starts itself again as the peer, so that no peer is forked from a process with threads. */
Peer start_peer(char const* program) {
  int ends[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
  Peer peer{};
  peer.pid = fork();
  CHECK(peer.pid >= 0);
  if (peer.pid == 0) {
    close(ends[0]);
    // Peers must not outlive a test that fails.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    execl(program, program, "--peer", std::to_string(ends[1]).c_str(), static_cast<char*>(nullptr));
    _exit(1);
  }
  close(ends[1]);
  CHECK(recv(ends[0], &peer.hello, sizeof(peer.hello), MSG_WAITALL) == sizeof(peer.hello));
  close(ends[0]);
  return peer;
}

void kill_peer(Peer const& peer) {
  CHECK(kill(peer.pid, SIGKILL) == 0 && waitpid(peer.pid, nullptr, 0) == peer.pid);
}

using Tasks = std::vector<std::shared_ptr<Task>>;

/* Waits for all; returns the number that failed. Completed ones have the right bytes. */
size_t finish(Tasks const& tasks) {
  auto const deadline = Clock::now() + std::chrono::seconds(40);
  size_t failed = 0;
  for (auto const& task : tasks) {
    bool is_done = false;
    while (Engine::poll(*task, &is_done) && !is_done) CHECK(Clock::now() < deadline);
    bool again = is_done;
    CHECK(Engine::poll(*task, &again) == is_done && again == is_done);
    failed += !is_done;
    if (is_done && task->type == ReqRead) CHECK(task->local[0] == 'p' && task->local[task->size - 1] == 'p');
  }
  return failed;
}

/* How often this thread yielded its core voluntarily. */
long pauses() {
  rusage use{};
  CHECK(getrusage(RUSAGE_THREAD, &use) == 0);
  return use.ru_nvcsw;
}

/* How often a thread gets through a call in half a second. */
template <typename Call>
long rounds(Call const& call) {
  auto const start = Clock::now();
  long count = 0;
  for (; Clock::now() - start < std::chrono::milliseconds(500); ++count) call();
  return count;
}

/* A thread that waits for a request sleeps meanwhile, however often it asks; `request` runs and does not end. */
void check_that_waiting_sleeps(Endpoint& endpoint, UcclRequest const& request) {
  std::thread([&] {
    long const asked = rounds([&] {
      endpoint.recv_routine();
      CHECK(!endpoint.check_send_complete_once(request.peer_id, request.engine_idx));
    });
    CHECK(asked < 5000);
  }).join();
}

/* A thread that does nothing but recv_routine, or idle_routine, sleeps between its calls, longer and longer: naps cost time too, and an engine
 * has three such threads. One that finds requests ended in between does not sleep. */
void check_that_idle_threads_give_way(Endpoint& endpoint) {
  for (bool const receives : {true, false}) {
    std::thread([&] {
      long const before = pauses();
      static_cast<void>(rounds([&] { receives ? endpoint.recv_routine() : endpoint.idle_routine(); }));
      long const naps = pauses() - before;
      CHECK(naps > 10 && naps < 2000);
    }).join();
  }
  std::thread([&] {
    long const before = pauses();
    for (int i = 0; i < 20000; ++i) {
      static_cast<void>(endpoint.request_status(INT32_MAX));
      endpoint.recv_routine();
    }
    CHECK(pauses() - before < 10000);
  }).join();
}

/* An application's thread that polls one transfer of a proxy sleeps in between; one that polls several never does, whatever they are. */
void check_that_waiting_for_a_proxy_gives_way() {
  std::thread([] {
    char transfers[2];
    long const before = pauses();
    CHECK(rounds([&] { Endpoint::waiting_routine(transfers); }) < 20000);
    CHECK(pauses() - before > 100);
    long const between = pauses();
    static_cast<void>(rounds([&] {
      for (char& one : transfers) Endpoint::waiting_routine(&one);
    }));
    static_cast<void>(rounds([&] {
      Endpoint::waiting_routine(transfers);
      Endpoint::waiting_routine(nullptr);
    }));
    CHECK(pauses() - between < 100);
  }).join();
}

/* One that has seen a request end while it polled sleeps until the next one does, longer at a time than before. `end_one` has one end. */
template <typename Call>
void check_that_ends_are_waited_for(Call const& end_one) {
  std::thread([&] {
    char transfer;
    auto const naps = [&] {
      long const before = pauses();
      static_cast<void>(rounds([&] { Endpoint::waiting_routine(&transfer); }));
      return pauses() - before;
    };
    // On a busy machine other threads may stretch naps of any length.
    bool fewer = false;
    for (int i = 0; i < 8 && !fewer; ++i) {
      Endpoint::waiting_routine(nullptr);
      Endpoint::waiting_routine(nullptr);
      long const many = naps();
      end_one();
      Endpoint::waiting_routine(nullptr);
      long const few = naps();
      fewer = few > 10 && few < many * 3 / 4;
    }
    CHECK(fewer);
  }).join();
}

}  // namespace

static char const* check_last_error() { return Endpoint::last_error(); }

int main(int argc, char** argv) {
  if (argc == 3) be_peer(std::atoi(argv[2]));
  Endpoint endpoint;
  std::vector<char> memory(2 * kSize, 'm');
  Region region;
  CHECK(endpoint.uccl_regmr(memory.data(), memory.size(), region) == 0);
  check_that_idle_threads_give_way(endpoint);
  check_that_waiting_for_a_proxy_gives_way();
  char* const out = memory.data();
  char* const in = memory.data() + kSize;
  {
    Engine engine(endpoint);
    enum When { kNever, kBefore, kDuring, kAfter };
    for (int round = 0; round < 3; ++round) {
      for (When when : {kNever, kBefore, kDuring, kAfter}) {
        Peer const peer = start_peer(argv[0]);
        ConnID const conn = endpoint.uccl_connect(-1, peer.hello.ip, peer.hello.port);
        CHECK(conn.peer_id != UINT64_MAX);
        auto post = [&](int count) {
          Tasks tasks;
          for (int i = 0; i < count; ++i) {
            // Writes go to the first half of the peer's region, reads come from the second.
            bool const writes = i % 2 == 0;
            FifoItem item = peer.hello.item;
            if (!writes) item.addr += kSize;
            tasks.push_back(engine.post(writes ? ReqWrite : ReqRead, conn, region, writes ? out : in, kSize, item));
          }
          return tasks;
        };
        if (when == kBefore) {
          kill_peer(peer);
          CHECK(finish(post(8)) == 8);
        } else {
          Tasks tasks = post(when == kDuring ? 64 : 8);
          if (when == kDuring) {
            while (!tasks[0]->done) {
            }
            kill_peer(peer);
            CHECK(finish(tasks) > 0);
          } else {
            CHECK(finish(tasks) == 0);
            kill_peer(peer);
            if (when == kAfter) CHECK(finish(post(4)) == 4);
          }
        }
        endpoint.disconnect(conn.peer_id);
        CHECK(finish(post(2)) == 2);
        CHECK(endpoint.requests_kept() <= uccl_tcpx::kFailuresKept);
      }
    }
  }

  // A failed request stays failed, however many fail after it, and the endpoint does not grow with them.
  Peer const peer = start_peer(argv[0]);
  ConnID const conn = endpoint.uccl_connect(-1, peer.hello.ip, peer.hello.port);
  CHECK(conn.peer_id != UINT64_MAX);
  FifoItem outside = peer.hello.item;
  outside.addr += 2 * kSize;
  UcclRequest good{}, first{}, last{};
  CHECK(endpoint.uccl_write_async(conn, region, out, 64, peer.hello.item, &good) >= 0);
  auto const deadline = Clock::now() + std::chrono::seconds(40);
  auto wait = [&](UcclRequest const& request) {
    int status;
    while ((status = endpoint.request_status(request.engine_idx)) == 1) CHECK(Clock::now() < deadline);
    return status;
  };
  CHECK(wait(good) == 0 && wait(good) == 0);
  auto const end_one = [&] {
    UcclRequest one{};
    CHECK(endpoint.uccl_write_async(conn, region, out, 64, peer.hello.item, &one) >= 0 && wait(one) == 0);
  };
  check_that_ends_are_waited_for(end_one);
  // A thread of the engine marks its transfer as done before it returns.
  for (void (Endpoint::*comes_back)() : {&Endpoint::idle_routine, &Endpoint::recv_routine}) {
    check_that_ends_are_waited_for([&] {
      std::thread([&] {
        (endpoint.*comes_back)();
        end_one();
        (endpoint.*comes_back)();
      }).join();
    });
  }
  for (size_t i = 0; i < uccl_tcpx::kFailuresKept + 500; ++i) {
    CHECK(endpoint.uccl_write_async(conn, region, out, 64, outside, &last) >= 0);
    if (i == 0) first = last;
    CHECK(wait(last) == -20 && wait(last) == -20);
    CHECK(endpoint.requests_kept() <= uccl_tcpx::kFailuresKept + 1);
  }
  CHECK(wait(first) < 0 && wait(last) == -20);
  CHECK(endpoint.uccl_write_async(conn, region, out, 64, peer.hello.item, &good) >= 0);
  CHECK(wait(good) == 0 && wait(good) == 0);

  // Transfers in flight when their connection is closed have failed; completed ones stay complete, polled or not.
  UcclRequest running{};
  CHECK(endpoint.uccl_recv_async(conn, region, in, 64, &running) >= 0);
  CHECK(endpoint.request_status(running.engine_idx) == 1);
  check_that_waiting_sleeps(endpoint, running);
  endpoint.disconnect(conn.peer_id);
  CHECK(wait(running) == -5 && wait(good) == 0);
  kill_peer(peer);
  return 0;
}
