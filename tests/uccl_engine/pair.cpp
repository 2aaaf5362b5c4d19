/* Two processes over UCCL's engine, through its own uccl_engine.h: the speed of a transfer, and the error when the peer dies.
 *
 *   pair server               prints the engine's metadata, then serves until its input ends
 *   pair client META SECONDS  writes and reads of 64 KiB to 64 MiB, one at a time; a line of JSON each, the bytes compared
 *   pair orphan META          says "ready"; when a line is read, the peer is dead: posts of all sizes must fail, never be done
 */
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "uccl_engine.h"

/* The engine's library expects an interpreter around it, and asks it for signals only when it was created by Python. */
extern "C" {
int PyGILState_Ensure() { return 0; }
void PyGILState_Release(int) {}
int PyErr_CheckSignals() { return 0; }
}

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kBytes = 64 << 20;
constexpr size_t kSizes[] = {64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, kBytes};
constexpr char kServer = 'S', kClient = 'C';

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "FAILED: %s\n", text.c_str());
  std::_Exit(1);
}

struct Side {
  uccl_engine_t* engine = uccl_engine_create(1, false);
  char* memory = static_cast<char*>(std::aligned_alloc(4096, kBytes));
  uccl_mr_t region = 0;
  char item[64] = {};

  explicit Side(char byte) {
    if (!engine || !memory) fail("no engine");
    std::memset(memory, byte, kBytes);
    if (uccl_engine_reg(engine, reinterpret_cast<uintptr_t>(memory), kBytes, region) != 0) fail("reg");
    if (uccl_engine_prepare_fifo(engine, region, memory, kBytes, item) != 0) fail("prepare_fifo");
  }
};

notify_msg_v_t next_message() {
  const auto until = Clock::now() + std::chrono::seconds(20);
  while (Clock::now() < until) {
    for (auto& one : uccl_engine_get_notifs_v()) return one;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  fail("no notification");
}

int serve() {
  Side side(kServer);
  char* metadata = nullptr;
  if (uccl_engine_get_metadata(side.engine, &metadata) != 0) fail("get_metadata");
  std::printf("META %s\n", metadata);
  std::fflush(stdout);
  char address[64];
  int gpu = 0;
  uccl_conn_t* conn = uccl_engine_accept(side.engine, address, sizeof address, &gpu);
  if (!conn) fail("accept");
  notify_msg_v_t message{"item", std::string(side.item, sizeof side.item)};
  if (uccl_engine_send_notif_v(conn, &message) != 0) fail("send_notif");
  while (std::getchar() != EOF) {}
  std::fflush(stdout);
  std::_Exit(0);
}

struct Link {
  Side side{kClient};
  uccl_conn_t* conn = nullptr;
  FifoItem theirs{};

  explicit Link(const std::string& metadata) {
    const size_t question = metadata.find('?'), colon = metadata.rfind(':', question);
    const int port = std::atoi(metadata.c_str() + colon + 1);
    conn = uccl_engine_connect(side.engine, metadata.substr(0, colon).c_str(), metadata.substr(question + 1).c_str(), port);
    if (!conn) fail("connect");
    deserialize_fifo_item(next_message().msg.data(), &theirs);
  }

  bool post(bool write, size_t size, uint64_t* id) {
    FifoItem item = theirs;
    uccl_engine_update_fifo(item, theirs.addr, static_cast<uint32_t>(size));
    return (write ? uccl_engine_write(conn, side.region, side.memory, size, item, id)
                  : uccl_engine_read(conn, side.region, side.memory, size, item, id)) == 0;
  }

  void move(bool write, size_t size) {
    uint64_t id = 0;
    if (!post(write, size, &id)) fail("post");
    while (!uccl_engine_xfer_status(conn, id)) {}
  }
};

int measure(const std::string& metadata, double seconds) {
  Link link(metadata);
  for (const bool write : {false, true}) {
    for (const size_t size : kSizes) {
      std::memset(link.side.memory, kClient, size);
      std::vector<double> times;
      double total = 0;
      for (int i = 0; i < 10 || (total < seconds && i < 20000); ++i) {
        const auto begin = Clock::now();
        link.move(write, size);
        const double took = std::chrono::duration<double>(Clock::now() - begin).count();
        if (i < 3) continue;
        times.push_back(took);
        total += took;
      }
      const char wanted = write ? kClient : kServer;
      if (write) {
        std::memset(link.side.memory, 0, size);
        link.move(false, size);
      }
      if (std::count(link.side.memory, link.side.memory + size, wanted) != static_cast<long>(size)) fail("wrong bytes");
      // The expected bytes of the next write of this size.
      if (write && size != kBytes) std::memset(link.side.memory, kClient, size);
      std::sort(times.begin(), times.end());
      const double median = times[times.size() / 2];
      std::printf("{\"op\": \"%s\", \"total_bytes\": %zu, \"iters\": %zu, \"p50_us\": %.1f, \"gbytes_per_s\": %.3f}\n", write ? "write" : "read",
                  size, times.size(), median * 1e6, static_cast<double>(size) / median / 1e9);
      std::fflush(stdout);
    }
  }
  std::_Exit(0);
}

int orphaned(const std::string& metadata) {
  Link link(metadata);
  link.move(true, kBytes);
  std::puts("ready");
  std::fflush(stdout);
  // One in flight while the peer dies.
  uint64_t flying[2] = {};
  const bool posted[2] = {link.post(true, kBytes, &flying[0]), link.post(false, 64 << 10, &flying[1])};
  bool ended[2] = {};
  (void)std::getchar();
  int done = 0;
  const auto until = Clock::now() + std::chrono::seconds(6);
  while (Clock::now() < until) {
    for (int i = 0; i < 2; ++i) {
      if (posted[i] && !ended[i] && uccl_engine_xfer_status(link.conn, flying[i])) ended[i] = true;
    }
    for (const bool write : {true, false}) {
      for (const size_t size : kSizes) {
        uint64_t id = 0;
        if (!link.post(write, size, &id)) continue;
        const auto patience = Clock::now() + std::chrono::milliseconds(50);
        while (Clock::now() < patience) {
          if (!uccl_engine_xfer_status(link.conn, id)) continue;
          ++done;
          break;
        }
      }
    }
  }
  if (done > 0) fail(std::to_string(done) + " transfers to a dead peer were reported done");
  uccl_engine_conn_destroy(link.conn);
  std::puts("ok");
  std::fflush(stdout);
  std::_Exit(0);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc >= 2 && std::strcmp(argv[1], "server") == 0) return serve();
  if (argc >= 4 && std::strcmp(argv[1], "client") == 0) return measure(argv[2], std::atof(argv[3]));
  if (argc >= 3 && std::strcmp(argv[1], "orphan") == 0) return orphaned(argv[2]);
  std::fprintf(stderr, "usage: pair server | client META SECONDS | orphan META\n");
  return 2;
}
