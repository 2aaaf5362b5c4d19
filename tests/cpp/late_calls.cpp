/* Calls that come when almost everything is over: from destructors of static objects, from atexit, from destructors of thread-specific
 * data (pthread keys) and of thread-local objects. By then the library's own thread locals may be destroyed. A call must still fail with a
 * status, or work, and never end the process. usage: late_calls [static|atexit|key|local|engine]; without a word all, each in a
 * process of its own. */
#include "uccl_engine.h"

#include "check.hpp"

#include <pthread.h>
#include <sys/wait.h>
#include <cstdlib>
#include <string>
#include <thread>

static char const* check_last_error() { return uccl_engine_last_error(); }

namespace {

char const* mode = "";
uccl_engine_t* engine = nullptr;
uccl_conn_t* conn = nullptr;
char memory[4096];
uccl_mr_t mr = 0;

/* Calls that fail, so that the library keeps a text and a status for this thread. */
void fail_calls() {
  static char nobody;
  uint64_t id = 0;
  CHECK(uccl_engine_conn_status(reinterpret_cast<uccl_conn_t*>(&nobody)) == UCCL_ERR_NOT_FOUND);
  CHECK(uccl_engine_last_status() == UCCL_ERR_NOT_FOUND);
  CHECK(std::strstr(uccl_engine_last_error(), "is not a live connection") != nullptr);
  CHECK(uccl_engine_update_fifo(static_cast<FifoItem*>(nullptr), 0, 0) == UCCL_ERR_INVALID_ARGUMENT);
  CHECK(std::strstr(uccl_engine_last_error(), "fifo_item is NULL") != nullptr);
  CHECK(uccl_engine_write(nullptr, 0, memory, 1, FifoItem{}, &id) < 0);
  CHECK(!uccl_engine_xfer_status(nullptr, 1));
  uccl_engine_conn_destroy(reinterpret_cast<uccl_conn_t*>(&nobody));
  uccl_engine_destroy(nullptr);
  CHECK(uccl_engine_get_notifs().empty());
}

/* What a client that cleans up late does. */
void end_engine() {
  uint64_t id = 0;
  char item_bytes[UCCL_FIFO_SIZE];
  FifoItem item;
  CHECK(uccl_engine_prepare_fifo(engine, mr, memory, sizeof(memory), item_bytes) == UCCL_OK);
  deserialize_fifo_item(item_bytes, &item);
  CHECK(uccl_engine_write(conn, mr, memory, sizeof(memory), item, &id) == UCCL_OK);
  CHECK(uccl_engine_wait(conn, id, 30000) == UCCL_OK);
  uccl_engine_stop_accept(engine);
  uccl_engine_conn_destroy(conn);
  uccl_engine_mr_destroy(engine, mr);
  uccl_engine_destroy(engine);
}

void begin_engine() {
  engine = uccl_engine_create(0, false);
  CHECK(engine != nullptr);
  char* metadata = nullptr;
  CHECK(uccl_engine_get_metadata(engine, &metadata) == UCCL_OK);
  char ip[64], gpu[512];
  int port = 0;
  CHECK(uccl_engine_parse_metadata(metadata, ip, sizeof(ip), &port, gpu, sizeof(gpu)) == UCCL_OK);
  delete[] metadata;
  conn = uccl_engine_connect(engine, ip, gpu, port, true);
  CHECK(conn != nullptr);
  CHECK(uccl_engine_reg(engine, reinterpret_cast<uintptr_t>(memory), sizeof(memory), mr) == UCCL_OK);
}

void late(char const* where) {
  if (std::strcmp(mode, where) == 0) {
    fail_calls();
    fail_calls();
  }
}

struct Static {
  ~Static() {
    late("static");
    if (std::strcmp(mode, "engine") == 0) end_engine();
  }
} const at_the_end;

struct Local {
  bool used = false;
  ~Local() { late("local"); }
};
thread_local Local local;

void at_exit() { late("atexit"); }
pthread_key_t key;
void of_the_key(void*) { late("key"); }

void in_a_thread() {
  fail_calls();
  local.used = true;
  CHECK(pthread_setspecific(key, &key) == 0);
}

int run() {
  // Failing calls first: what the library keeps per thread then exists, and is destroyed before the late calls.
  fail_calls();
  local.used = true;
  CHECK(std::atexit(at_exit) == 0);
  CHECK(pthread_key_create(&key, of_the_key) == 0);
  std::thread(in_a_thread).join();
  if (std::strcmp(mode, "engine") == 0) begin_engine();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) {
    mode = argv[1];
    return run();
  }
  int failed = 0;
  for (char const* which : {"static", "atexit", "key", "local", "engine"}) {
    int const status = std::system((std::string(argv[0]) + " " + which).c_str());
    std::printf("%s: %s\n", which, status == 0 ? "ok" : "FAILED");
    failed += status != 0;
  }
  return failed == 0 ? 0 : 1;
}
