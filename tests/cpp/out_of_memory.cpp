/* No exception leaves the overlay: operator new fails at every point in turn, and the functions return errors or partial results. */
#include "uccl_engine.h"

#include "check.hpp"

#include <chrono>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>

static char const* check_last_error() { return uccl_engine_last_error(); }

namespace {
/* Allocations of this thread that still succeed; negative: all. */
thread_local int allowed = -1;

void* allocate(std::size_t size) noexcept {
  if (allowed == 0) return nullptr;
  if (allowed > 0) --allowed;
  return std::malloc(size == 0 ? 1 : size);
}
}  // namespace

void* operator new(std::size_t size) {
  if (void* memory = allocate(size)) return memory;
  throw std::bad_alloc();
}
void* operator new[](std::size_t size) { return operator new(size); }
void* operator new(std::size_t size, std::nothrow_t const&) noexcept { return allocate(size); }
void* operator new[](std::size_t size, std::nothrow_t const&) noexcept { return allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

static_assert(noexcept(uccl_engine_get_notifs()) && noexcept(uccl_engine_get_notifs_v()), "nothing is thrown");

int main() {
  uccl_engine_t* engine = uccl_engine_create(0, false);
  CHECK(engine != nullptr);

  char* metadata = nullptr;
  allowed = 0;
  CHECK(uccl_engine_get_metadata(engine, &metadata) == UCCL_ERR_RESOURCE && metadata == nullptr);
  CHECK(uccl_engine_get_notifs().empty());
  CHECK(uccl_engine_get_notifs_v().empty());
  allowed = -1;
  CHECK(uccl_engine_get_metadata(engine, &metadata) == 0);
  std::string const text(metadata);
  delete[] metadata;

  size_t const colon = text.find(':'), question = text.find('?');
  uccl_conn_t* conn = uccl_engine_connect(engine, text.substr(0, colon).c_str(), text.substr(question + 1).c_str(),
                                          std::stoi(text.substr(colon + 1)), true);
  CHECK(conn != nullptr);

  // Fixed-size ones: none is lost, however often memory runs out.
  constexpr size_t kCount = 50;
  notify_msg_t fixed{};
  for (size_t i = 0; i < kCount; ++i) {
    std::snprintf(fixed.name, sizeof(fixed.name), "%zu", i);
    CHECK(uccl_engine_send_notif(conn, &fixed) == 0);
  }
  auto const deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  size_t taken = 0;
  for (int budget = 0; taken < kCount; budget = (budget + 1) % 4) {
    allowed = budget;
    std::vector<notify_msg_t> some = uccl_engine_get_notifs();
    allowed = -1;
    for (notify_msg_t const& one : some) CHECK(std::to_string(taken++) == one.name);
    CHECK(std::chrono::steady_clock::now() < deadline);
  }
  CHECK(taken == kCount);

  // Of any length: messages arrive whole and in order, and the call after the shortage delivers again.
  notify_msg_v_t note;
  note.msg = std::string(1000, 'm');
  for (size_t i = 0; i < kCount; ++i) {
    note.name = std::string(100, 'n') + std::to_string(100 + i);
    CHECK(uccl_engine_send_notif_v(conn, &note) == 0);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  std::string last;
  size_t whole = 0;
  for (int budget = 0; budget < 40; ++budget) {
    allowed = budget;
    std::vector<notify_msg_v_t> some = uccl_engine_get_notifs_v();
    allowed = -1;
    for (notify_msg_v_t const& one : some) {
      CHECK(one.msg == note.msg && one.name.size() == note.name.size() && one.name > last);
      last = one.name;
      ++whole;
    }
  }
  CHECK(whole > 0);
  note.name = "last";
  CHECK(uccl_engine_send_notif_v(conn, &note) == 0);
  std::vector<notify_msg_v_t> rest;
  while (rest.empty() || rest.back().name != "last") {
    for (notify_msg_v_t& one : uccl_engine_get_notifs_v()) rest.push_back(std::move(one));
    CHECK(std::chrono::steady_clock::now() < deadline);
  }

  uccl_engine_conn_destroy(conn);
  uccl_engine_destroy(engine);
  return 0;
}
