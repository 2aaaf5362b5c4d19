// The C++ functions: two engines in one process, each with its own settings; one transfer that gathers blocks from one region and scatters
// them over another; and notifications as strings. A client that was written for UCCL's header compiles against this one.
//
//   c++ -std=c++17 vectors.cpp -luccl_p2p -o vectors && ./vectors
#include <uccl_engine.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

void need(bool holds, char const* what) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s\n", what, uccl_engine_last_error());
  std::exit(1);
}

uccl_engine_t* engine_with(char const* channels) {
  // Takes precedence over the environment, which does not change.
  uccl_option_t const options[] = {{"UCCL_TCPX_NUM_CHANNELS", channels}};
  uccl_engine_t* engine = nullptr;
  need(uccl_engine_create_with(options, 1, &engine) == UCCL_OK, "create_with");
  return engine;
}

uccl_conn_t* connect(uccl_engine_t* from, uccl_engine_t* to) {
  char* metadata = nullptr;
  need(uccl_engine_get_metadata(to, &metadata) == UCCL_OK, "get_metadata");
  char ip[64], gpu[512];
  int port = 0;
  need(uccl_engine_parse_metadata(metadata, ip, sizeof(ip), &port, gpu, sizeof(gpu)) == UCCL_OK, "parse_metadata");
  delete[] metadata;
  uccl_conn_t* conn = uccl_engine_connect(from, ip, gpu, port, true);
  need(conn != nullptr, "connect");
  return conn;
}

}  // namespace

int main() {
  constexpr size_t kBlock = 64 * 1024;
  constexpr int kBlocks = 32;
  uccl_engine_t* prefill = engine_with("4");
  uccl_engine_t* decode = engine_with("2");

  std::vector<char> source(kBlock * kBlocks), target(kBlock * kBlocks, 0);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<char>('a' + i / kBlock);
  uccl_mr_t source_mr, target_mr;
  need(uccl_engine_reg(prefill, reinterpret_cast<uintptr_t>(source.data()), source.size(), source_mr) == UCCL_OK, "reg");
  need(uccl_engine_reg(decode, reinterpret_cast<uintptr_t>(target.data()), target.size(), target_mr) == UCCL_OK, "reg");
  char item_bytes[UCCL_FIFO_SIZE];
  need(uccl_engine_prepare_fifo(decode, target_mr, target.data(), target.size(), item_bytes) == UCCL_OK, "prepare_fifo");
  uccl_conn_t* conn = connect(prefill, decode);

  // Block i goes to the position of block kBlocks - 1 - i.
  std::vector<uccl_mr_t> regions(kBlocks, source_mr);
  std::vector<void*> addresses;
  std::vector<size_t> sizes(kBlocks, kBlock);
  std::vector<FifoItem> items(kBlocks);
  for (int i = 0; i < kBlocks; ++i) {
    addresses.push_back(source.data() + static_cast<size_t>(i) * kBlock);
    auto const place = reinterpret_cast<uintptr_t>(target.data()) + static_cast<size_t>(kBlocks - 1 - i) * kBlock;
    deserialize_fifo_item(item_bytes, &items[static_cast<size_t>(i)]);
    need(uccl_engine_update_fifo(items[static_cast<size_t>(i)], place, kBlock) == UCCL_OK, "update_fifo");
  }
  uint64_t id = 0;
  need(uccl_engine_write_vector(conn, regions, addresses, sizes, items, kBlocks, &id) == UCCL_OK, "write_vector");
  while (!uccl_engine_xfer_status(conn, id)) need(uccl_engine_poll(conn, id, nullptr) >= 0, "the write");

  notify_msg_v_t note;
  note.name = "prefill";
  note.msg = "layer 0 is there";
  need(uccl_engine_send_notif_v(conn, &note) == UCCL_OK, "send_notif_v");
  std::vector<notify_msg_v_t> arrived;
  while (arrived.empty()) arrived = uccl_engine_get_notifs_v();
  need(arrived[0].msg == note.msg, "the notification");
  for (int i = 0; i < kBlocks; ++i) {
    size_t const from = static_cast<size_t>(i) * kBlock, to = static_cast<size_t>(kBlocks - 1 - i) * kBlock;
    need(std::memcmp(target.data() + to, source.data() + from, kBlock) == 0, "comparing");
  }

  uccl_engine_conn_destroy(conn);
  uccl_engine_mr_destroy(prefill, source_mr);
  uccl_engine_mr_destroy(decode, target_mr);
  uccl_engine_destroy(prefill);
  uccl_engine_destroy(decode);
  std::printf("%d blocks of %zu bytes moved in one transfer\n", kBlocks, kBlock);
  return 0;
}
