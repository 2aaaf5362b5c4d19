// SPDX-License-Identifier: Apache-2.0

#include "backend.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "transfer.h"

namespace tcpx {

namespace {

/// Parameters that are environment variables of the engine.
constexpr struct {
  const char *parameter;
  const char *variable;
} kVariables[] = {
    {"num_channels", "UCCL_TCPX_NUM_CHANNELS"},
    {"chunk_bytes", "UCCL_TCPX_CHUNK_BYTES"},
    {"plugin", "UCCL_TCPX_PLUGIN"},
    {"port", "UCCL_TCPX_OOB_PORT"},
};
constexpr char kNumCpus[] = "num_cpus";

/// Sets a variable for as long as the object lives.
class ScopedVariable {
 public:
  ScopedVariable(const char *name, const std::string &value) : name_(name) {
    if (const char *old = std::getenv(name)) before_ = old;
    ::setenv(name, value.c_str(), 1);
  }
  ~ScopedVariable() {
    if (before_) {
      ::setenv(name_, before_->c_str(), 1);
    } else {
      ::unsetenv(name_);
    }
  }
  ScopedVariable(const ScopedVariable &) = delete;
  void operator=(const ScopedVariable &) = delete;

 private:
  const char *name_;
  std::optional<std::string> before_;
};

/// NULL when the parameters or the environment do not make sense; the reason is logged.
uccl_engine_t *create_engine(const nixl_b_params_t &parameters) {
  // The engine reads its settings from the environment when it is created, and the environment belongs to the process: agents that
  // are created at the same time must not see each other's.
  static std::mutex environment;
  const std::lock_guard<std::mutex> guard(environment);
  std::vector<std::unique_ptr<ScopedVariable>> set;
  int num_cpus = 0;
  for (const auto &[name, value] : parameters) {
    if (value.empty()) continue;
    const char *variable = nullptr;
    for (const auto &entry : kVariables) {
      if (name == entry.parameter) variable = entry.variable;
    }
    if (variable) {
      set.push_back(std::make_unique<ScopedVariable>(variable, value));
    } else if (name == kNumCpus) {
      char *end = nullptr;
      const long number = std::strtol(value.c_str(), &end, 10);
      if (*end != '\0' || number < 0 || number > 4096) {
        log_line("error", "parameter num_cpus=" + value + " is not a number from 0 to 4096");
        return nullptr;
      }
      num_cpus = static_cast<int>(number);
    } else {
      log_line("warning", "parameter '" + name + "' is not known and has no effect");
    }
  }
  uccl_engine_t *engine = uccl_engine_create(num_cpus, false);
  if (!engine) log_line("error", std::string("cannot create an engine: ") + uccl_engine_last_error());
  return engine;
}

}  // namespace

nixl_b_params_t default_parameters() {
  nixl_b_params_t parameters{{kNumCpus, "0"}};
  for (const auto &entry : kVariables) parameters.emplace(entry.parameter, "");
  return parameters;
}

// ---- Life -----------------------------------------------------------------------------------------------------------------------

Backend::Backend(const nixlBackendInitParams *init) : nixlBackendEngine(init), peers_(init->localAgent) {
  engine_ = create_engine(*init->customParams);
  if (!engine_) {
    initErr = true;
    return;
  }
  peers_.set_engine(engine_);
  acceptor_ = std::thread(&Backend::accept_loop, this);
}

Backend::~Backend() {
  if (!engine_) return;
  {
    const std::lock_guard<std::mutex> guard(accepted_lock_);
    stopping_ = true;
  }
  accepted_wake_.notify_all();
  uccl_engine_stop_accept(engine_);
  acceptor_.join();
  peers_.close_all();
  for (uccl_conn_t *conn : accepted_) uccl_engine_conn_destroy(conn);
  uccl_engine_destroy(engine_);
}

void Backend::accept_loop() {
  for (;;) {
    char address[64];
    int gpu = -1;
    uccl_conn_t *conn = uccl_engine_accept(engine_, address, sizeof address, &gpu);
    std::unique_lock<std::mutex> guard(accepted_lock_);
    if (conn) {
      // Nobody else looks after incoming connections: those whose peer has gone are let go when the next one comes.
      const auto gone = std::stable_partition(accepted_.begin(), accepted_.end(), alive);
      for (auto lost = gone; lost != accepted_.end(); ++lost) uccl_engine_conn_destroy(*lost);
      accepted_.erase(gone, accepted_.end());
      accepted_.push_back(conn);
      continue;
    }
    if (stopping_) return;
    // Not asked to stop: the engine has logged why. A pause keeps a lasting cause from turning this into a busy loop.
    accepted_wake_.wait_for(guard, std::chrono::milliseconds(200), [this] { return stopping_; });
    if (stopping_) return;
  }
}

// ---- Memory ---------------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::registerMem(const nixlBlobDesc &mem, const nixl_mem_t &kind, nixlBackendMD *&out) {
  if (kind != DRAM_SEG && kind != VRAM_SEG) return NIXL_ERR_NOT_SUPPORTED;
  auto memory = std::make_unique<LocalMemory>();
  if (const int status = uccl_engine_reg(engine_, mem.addr, mem.len, &memory->region); status != UCCL_OK) return to_nixl(status);
  static_assert(sizeof(FifoItem) == FIFO_SIZE);
  const int status = uccl_engine_prepare_fifo(engine_, memory->region, reinterpret_cast<const void *>(mem.addr), mem.len,
                                              reinterpret_cast<char *>(&memory->item));
  if (status != UCCL_OK) {
    uccl_engine_mr_destroy(engine_, memory->region);
    return to_nixl(status);
  }
  out = memory.release();
  return NIXL_SUCCESS;
}

nixl_status_t Backend::deregisterMem(nixlBackendMD *meta) {
  const std::unique_ptr<LocalMemory> memory(static_cast<LocalMemory *>(meta));
  if (!memory) return NIXL_ERR_INVALID_PARAM;
  uccl_engine_mr_destroy(engine_, memory->region);
  return NIXL_SUCCESS;
}

nixl_status_t Backend::getPublicData(const nixlBackendMD *meta, std::string &out) const {
  out.assign(reinterpret_cast<const char *>(&static_cast<const LocalMemory *>(meta)->item), FIFO_SIZE);
  return NIXL_SUCCESS;
}

nixl_status_t Backend::loadRemoteMD(const nixlBlobDesc &input, const nixl_mem_t &, const std::string &agent, nixlBackendMD *&out) {
  if (input.metaInfo.size() != FIFO_SIZE) {
    log_line("error", "memory description of agent '" + agent + "' has " + std::to_string(input.metaInfo.size()) + " bytes, expected " +
                          std::to_string(FIFO_SIZE));
    return NIXL_ERR_MISMATCH;
  }
  peers_.refreshed(agent);
  auto memory = std::make_unique<RemoteMemory>();
  std::memcpy(&memory->item, input.metaInfo.data(), FIFO_SIZE);
  out = memory.release();
  return NIXL_SUCCESS;
}

nixl_status_t Backend::loadLocalMD(nixlBackendMD *input, nixlBackendMD *&out) {
  auto memory = std::make_unique<RemoteMemory>();
  memory->item = static_cast<const LocalMemory *>(input)->item;
  out = memory.release();
  return NIXL_SUCCESS;
}

nixl_status_t Backend::unloadMD(nixlBackendMD *input) {
  delete static_cast<RemoteMemory *>(input);
  return NIXL_SUCCESS;
}

// ---- Connections ----------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::getConnInfo(std::string &out) const {
  size_t needed = 0;
  int status = uccl_engine_metadata_into(engine_, nullptr, 0, &needed);
  if (status != UCCL_OK && status != UCCL_ERR_RESOURCE) return to_nixl(status);
  std::string text(needed, '\0');
  status = uccl_engine_metadata_into(engine_, text.data(), text.size(), &needed);
  if (status != UCCL_OK) return to_nixl(status);
  text.resize(std::strlen(text.c_str()));
  out = std::move(text);
  return NIXL_SUCCESS;
}

nixl_status_t Backend::loadRemoteConnInfo(const std::string &agent, const std::string &info) {
  if (const nixl_status_t status = peers_.remember(agent, info); status != NIXL_SUCCESS) return status;
  // Connecting here and not at the first transfer: the caller expects to learn here that a peer cannot be reached.
  std::shared_ptr<Connection> connection;
  return peers_.connect(agent, connection);
}

nixl_status_t Backend::connect(const std::string &agent) {
  if (agent == localAgent) {
    // NIXL asks every backend for this at its creation. The channels to oneself are made when the first transfer needs them.
    std::string info;
    const nixl_status_t status = getConnInfo(info);
    return status == NIXL_SUCCESS ? peers_.remember(agent, info) : status;
  }
  std::shared_ptr<Connection> connection;
  return peers_.connect(agent, connection);
}

nixl_status_t Backend::disconnect(const std::string &agent) { return peers_.disconnect(agent); }

// ---- Transfers ------------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::prepXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                                const std::string &agent, nixlBackendReqH *&handle, const nixl_opt_b_args_t *) const {
  if (operation != NIXL_READ && operation != NIXL_WRITE) return NIXL_ERR_INVALID_PARAM;
  std::shared_ptr<Connection> connection;
  if (const nixl_status_t status = peers_.open(agent, connection); status != NIXL_SUCCESS) return status;
  auto transfer = std::make_unique<Transfer>(operation, std::move(connection));
  if (const nixl_status_t status = transfer->describe(local, remote); status != NIXL_SUCCESS) return status;
  handle = transfer.release();
  return NIXL_SUCCESS;
}

nixl_status_t Backend::postXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                                const std::string &agent, nixlBackendReqH *&handle, const nixl_opt_b_args_t *args) const {
  if (!handle) {
    if (const nixl_status_t status = prepXfer(operation, local, remote, agent, handle, args); status != NIXL_SUCCESS) return status;
  }
  auto *transfer = static_cast<Transfer *>(handle);
  if (!transfer->connection().usable()) {
    // Posting must not wait for a connect: only a connection that somebody else renewed is taken.
    std::shared_ptr<Connection> connection;
    if (peers_.find(agent, connection) != NIXL_SUCCESS || !connection->usable()) return NIXL_ERR_REMOTE_DISCONNECT;
    transfer->use(std::move(connection));
  }
  return transfer->post(args);
}

nixl_status_t Backend::checkXfer(nixlBackendReqH *handle) const {
  if (!handle) return NIXL_ERR_INVALID_PARAM;
  return static_cast<Transfer *>(handle)->check(
      [this](Connection &connection, const std::string &message) { return send_notification(connection, message); });
}

nixl_status_t Backend::releaseReqH(nixlBackendReqH *handle) const {
  delete static_cast<Transfer *>(handle);
  return NIXL_SUCCESS;
}

// ---- Notifications --------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::send_notification(Connection &connection, const std::string &message) const {
  return connection.outcome(
      uccl_engine_send_notif_bytes(connection.get(), localAgent.data(), localAgent.size(), message.data(), message.size()));
}

nixl_status_t Backend::getNotifs(notif_list_t &notifs) {
  for (;;) {
    uccl_notif_t *notification = nullptr;
    if (const int status = uccl_engine_notif_next(engine_, &notification); status != UCCL_OK) return to_nixl(status);
    if (!notification) return NIXL_SUCCESS;
    size_t name_length = 0, length = 0;
    const char *name = uccl_engine_notif_name(notification, &name_length);
    const auto *message = static_cast<const char *>(uccl_engine_notif_msg(notification, &length));
    notifs.emplace_back(std::string(name ? name : "", name ? name_length : 0), std::string(message ? message : "", message ? length : 0));
    uccl_engine_notif_free(notification);
  }
}

nixl_status_t Backend::genNotif(const std::string &agent, const std::string &message) const {
  std::shared_ptr<Connection> connection;
  const nixl_status_t status = peers_.open(agent, connection);
  return status == NIXL_SUCCESS ? send_notification(*connection, message) : status;
}

// ---- Cost -----------------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::estimateXferCost(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &,
                                        const std::string &agent, nixlBackendReqH *const &, std::chrono::microseconds &duration,
                                        std::chrono::microseconds &err_margin, nixl_cost_t &method, const nixl_opt_args_t *) const {
  std::shared_ptr<Connection> connection;
  if (const nixl_status_t status = peers_.find(agent, connection); status != NIXL_SUCCESS) return status;
  size_t bytes = 0;
  for (const nixlMetaDesc &desc : local) bytes += desc.len;
  const auto estimate = connection->estimate(operation, bytes);
  // Before the first transfer nothing is known, and a made-up number would be taken for one.
  if (!estimate) return NIXL_ERR_NOT_SUPPORTED;
  const auto microseconds = [](double seconds) { return std::chrono::microseconds(static_cast<int64_t>(seconds * 1e6 + 0.5)); };
  duration = microseconds(estimate->seconds);
  err_margin = microseconds(estimate->margin);
  method = nixl_cost_t::ANALYTICAL_BACKEND;
  return NIXL_SUCCESS;
}

}  // namespace tcpx
