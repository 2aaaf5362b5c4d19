/* Stand-ins for the types of UCCL's engine, under its names and in the global namespace as there, and the part of TcpxEndpoint's traits
 * that names them. A test adds how notifications are delivered. */
#pragma once

#include <cstdint>
#include <string>

struct FifoItem {
  uint64_t addr;
  uint32_t size;
  uint32_t rkey;
  uint32_t nmsgs;
  uint32_t rid;
  uint64_t idx;
  char padding[32];
};
struct ConnID {
  void* context;
  int sock_fd;
  int dev;
  uint64_t peer_id;
};
enum ReqType { ReqRead, ReqWrite };
struct UcclRequest {
  enum ReqType type;
  uint32_t peer_id;
  uint32_t engine_idx;
};
struct NotifyMsg {
  uint32_t msg_type = 0;
  std::string name;
  std::string msg;
};
class EpollClient;

struct EngineTypes {
  using ConnID = ::ConnID;
  using FifoItem = ::FifoItem;
  using UcclRequest = ::UcclRequest;
  using NotifyMsg = ::NotifyMsg;
  using EpollClient = ::EpollClient;
  static constexpr auto kReqRead = ReqType::ReqRead;
  static constexpr auto kReqWrite = ReqType::ReqWrite;
};
