// The NIXL backend "TCPX": implements NIXL's calls with the C API of libuccl_p2p. One object per agent.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <memory>
#include <string>

#include "backend/backend_plugin.h"
#include "from_ucx.h"
#include "peers.h"
#include "process.h"
#include "uccl_engine.h"

namespace tcpx {

/// The name under which an agent asked for this backend.
enum class Name { kTcpx, kUcx };

/// Defaults of the backend's parameters, for NIXL's getPluginParams. An empty value leaves the environment variable in charge.
nixl_b_params_t default_parameters();

class Backend final : public nixlBackendEngine {
 public:
  Backend(const nixlBackendInitParams *init, Name name);
  ~Backend() override;

  bool supportsRemote() const override { return true; }
  bool supportsLocal() const override { return true; }
  bool supportsNotif() const override { return true; }
  nixl_mem_list_t getSupportedMems() const override { return {DRAM_SEG, VRAM_SEG}; }

  nixl_status_t registerMem(const nixlBlobDesc &mem, const nixl_mem_t &kind, nixlBackendMD *&out) override;
  nixl_status_t deregisterMem(nixlBackendMD *meta) override;
  nixl_status_t getPublicData(const nixlBackendMD *meta, std::string &out) const override;
  nixl_status_t loadRemoteMD(const nixlBlobDesc &input, const nixl_mem_t &kind, const std::string &agent, nixlBackendMD *&out) override;
  nixl_status_t loadLocalMD(nixlBackendMD *input, nixlBackendMD *&out) override;
  nixl_status_t unloadMD(nixlBackendMD *input) override;

  nixl_status_t getConnInfo(std::string &out) const override;
  nixl_status_t loadRemoteConnInfo(const std::string &agent, const std::string &info) override;
  nixl_status_t connect(const std::string &agent) override;
  nixl_status_t disconnect(const std::string &agent) override;

  nixl_status_t prepXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                         const std::string &agent, nixlBackendReqH *&handle, const nixl_opt_b_args_t *args) const override;
  nixl_status_t postXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                         const std::string &agent, nixlBackendReqH *&handle, const nixl_opt_b_args_t *args) const override;
  nixl_status_t checkXfer(nixlBackendReqH *handle) const override;
  nixl_status_t releaseReqH(nixlBackendReqH *handle) const override;

  nixl_status_t getNotifs(notif_list_t &notifs) override;
  nixl_status_t genNotif(const std::string &agent, const std::string &message) const override;

  nixl_status_t estimateXferCost(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                                 const std::string &agent, nixlBackendReqH *const &handle, std::chrono::microseconds &duration,
                                 std::chrono::microseconds &err_margin, nixl_cost_t &method,
                                 const nixl_opt_args_t *extra) const override;

 private:
  struct Core;

  /// Whether this object came into a forked child, where it has no threads and its locks may stay locked.
  bool unusable() const;
  nixl_status_t peer_of(const std::string &agent, std::shared_ptr<Peer> &out) const;

  /// The connection info as this library has it.
  nixl_status_t own_info(std::string &out) const;

  const Name name_;
  const Birth birth_;
  /// Left alone, and so leaked, in a forked child.
  std::unique_ptr<Core> core_;
};

}  // namespace tcpx
