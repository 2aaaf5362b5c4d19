// SPDX-License-Identifier: Apache-2.0

#include "backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "transfer.h"

namespace tcpx {

namespace {

/// Parameters that set environment variables of the engine.
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

/// What the program asks of UCX, once carried out as far as it holds for the process, and said.
FromUcx ask_ucx(const nixl_b_params_t &parameters) {
  static std::mutex lock;
  static std::string said;
  const std::lock_guard<std::mutex> guard(lock);
  FromUcx asked = from_ucx(parameters, default_parameters(), environment(), NetDevices::of_this_host());
  // The network plugin takes it from the environment alone.
  if (!asked.nics.empty()) ::setenv(kDataNics, asked.nics.c_str(), 1);
  // Programs create many agents alike.
  if (asked.line != said) log_line("info", said = asked.line);
  return asked;
}

/// NULL when the parameters or the environment do not make sense; the reason is logged.
uccl_engine_t *create_engine(const nixl_b_params_t &parameters, Name name_of_backend) {
  const FromUcx asked = name_of_backend == Name::kUcx ? ask_ucx(parameters) : FromUcx{};
  std::vector<uccl_option_t> settings;
  for (const auto &[variable, value] : asked.settings) settings.push_back({variable.c_str(), value.c_str()});
  for (const auto &[name, value] : parameters) {
    if (value.empty()) continue;
    const char *variable = nullptr;
    for (const auto &entry : kVariables) {
      if (name == entry.parameter) variable = entry.variable;
    }
    if (variable) {
      settings.push_back({variable, value.c_str()});
    } else if (name == kNumCpus) {
      char *end = nullptr;
      const long number = std::strtol(value.c_str(), &end, 10);
      if (*end != '\0' || number < 0 || number > 4096) {
        log_line("error", "parameter num_cpus=" + value + " is not a number from 0 to 4096");
        return nullptr;
      }
    } else if (name_of_backend != Name::kUcx) {
      log_line("warning", "parameter '" + name + "' is not known and has no effect");
    }
  }
  uccl_engine_t *engine = nullptr;
  if (uccl_engine_create_with(settings.data(), settings.size(), &engine) == UCCL_OK) return engine;
  log_line("error", std::string("cannot create an engine: ") + uccl_engine_last_error());
  return nullptr;
}

}  // namespace

nixl_b_params_t default_parameters() {
  nixl_b_params_t parameters{{kNumCpus, "0"}};
  for (const auto &entry : kVariables) parameters.emplace(entry.parameter, "");
  return parameters;
}

// ---- Life -----------------------------------------------------------------------------------------------------------------------

/// What one agent has of the engine: the engine, the peers, the connections that others made, and the threads that look after them.
struct Backend::Core {
  Core(const std::string &agent, uccl_engine_t *engine) : engine(engine), local_agent(agent) {}
  ~Core();
  Core(const Core &) = delete;
  void operator=(const Core &) = delete;

  /// Registers what distinguishes this engine from others.
  int identify();
  void start();
  void accept_loop();
  void tend_loop();
  void reap();

  /// Host memory that is registered already, with one use more; NULL when it is not.
  LocalMemory *again(const LocalMemory::Range &range);
  /// What was just registered, or what another thread registered meanwhile.
  LocalMemory *keep(std::unique_ptr<LocalMemory> fresh);
  /// The memory when this was its last use; NULL otherwise.
  std::unique_ptr<LocalMemory> give_back(LocalMemory *used);

  uccl_engine_t *const engine;
  const std::string local_agent;
  std::shared_ptr<Identity> identity = std::make_shared<Identity>();
  std::shared_ptr<Peers> peers;

  std::mutex memory_lock;
  /// Host memory that is registered.
  std::map<LocalMemory::Range, LocalMemory *> memory;

  std::mutex lock;
  std::condition_variable wake;
  bool stopping = false;
  std::vector<uccl_conn_t *> accepted;
  std::thread acceptor, tender;
};

int Backend::Core::identify() {
  const auto address = [](const char *bytes) { return reinterpret_cast<size_t>(bytes); };
  int status = uccl_engine_reg(engine, address(identity->own), sizeof identity->own, &identity->own_region);
  if (status == UCCL_OK) status = uccl_engine_reg(engine, address(identity->read), sizeof identity->read, &identity->read_region);
  if (status != UCCL_OK) return status;
  static_assert(sizeof(FifoItem) == FIFO_SIZE);
  return uccl_engine_prepare_fifo(engine, identity->own_region, identity->own, 1, reinterpret_cast<char *>(&identity->item));
}

void Backend::Core::start() {
  peers = std::make_shared<Peers>(local_agent, engine, identity);
  const NoSignals here;
  acceptor = std::thread(&Core::accept_loop, this);
  tender = std::thread(&Core::tend_loop, this);
}

Backend::Core::~Core() {
  {
    const std::lock_guard<std::mutex> guard(lock);
    stopping = true;
  }
  wake.notify_all();
  uccl_engine_stop_accept(engine);
  if (tender.joinable()) tender.join();
  if (acceptor.joinable()) acceptor.join();
  if (peers) peers->stop();
  for (uccl_conn_t *conn : accepted) uccl_engine_conn_destroy(conn);
  uccl_engine_destroy(engine);
  // A connect to a host that is silent may go on for a while; it holds what it needs.
  if (peers) peers->wait(std::chrono::milliseconds(1000));
}

void Backend::Core::accept_loop() {
  for (;;) {
    char address[64];
    int gpu = -1;
    uccl_conn_t *conn = uccl_engine_accept(engine, address, sizeof address, &gpu);
    std::unique_lock<std::mutex> guard(lock);
    if (conn) {
      accepted.push_back(conn);
      continue;
    }
    if (stopping) return;
    // Not asked to stop: the engine has logged why. A pause keeps a lasting cause from turning this into a busy loop.
    wake.wait_for(guard, std::chrono::milliseconds(200), [this] { return stopping; });
    if (stopping) return;
  }
}

void Backend::Core::tend_loop() {
  std::unique_lock<std::mutex> guard(lock);
  while (!stopping) {
    guard.unlock();
    reap();
    const auto pause = peers->tend();
    guard.lock();
    wake.wait_for(guard, pause, [this] { return stopping; });
  }
}

/// Destroys accepted connections whose peers have disconnected. No other code does.
void Backend::Core::reap() {
  std::vector<uccl_conn_t *> gone;
  {
    const std::lock_guard<std::mutex> guard(lock);
    const auto lost = std::stable_partition(accepted.begin(), accepted.end(), alive);
    gone.assign(lost, accepted.end());
    accepted.erase(lost, accepted.end());
  }
  for (uccl_conn_t *conn : gone) uccl_engine_conn_destroy(conn);
}

LocalMemory *Backend::Core::again(const LocalMemory::Range &range) {
  const std::lock_guard<std::mutex> guard(memory_lock);
  const auto found = memory.find(range);
  if (found == memory.end()) return nullptr;
  ++found->second->uses;
  return found->second;
}

LocalMemory *Backend::Core::keep(std::unique_ptr<LocalMemory> fresh) {
  // An address of a GPU may have become that of another allocation: each registration takes what lies there now.
  if (std::get<nixl_mem_t>(fresh->range) != DRAM_SEG) return fresh.release();
  LocalMemory *kept = nullptr;
  {
    const std::lock_guard<std::mutex> guard(memory_lock);
    const auto [at, first] = memory.emplace(fresh->range, fresh.get());
    if (first) return fresh.release();
    kept = at->second;
    ++kept->uses;
  }
  uccl_engine_mr_destroy(engine, fresh->region);
  return kept;
}

std::unique_ptr<LocalMemory> Backend::Core::give_back(LocalMemory *used) {
  const std::lock_guard<std::mutex> guard(memory_lock);
  if (--used->uses > 0) return nullptr;
  memory.erase(used->range);
  return std::unique_ptr<LocalMemory>(used);
}

Backend::Backend(const nixlBackendInitParams *init, Name name) : nixlBackendEngine(init), name_(name) {
  initErr = true;
  uccl_engine_t *engine = create_engine(*init->customParams, name);
  if (!engine) return;
  core_ = std::make_unique<Core>(init->localAgent, engine);
  if (core_->identify() != UCCL_OK) {
    log_line("error", std::string("cannot register memory: ") + uccl_engine_last_error());
    core_.reset();
    return;
  }
  core_->start();
  initErr = false;
}

Backend::~Backend() {
  if (birth_.inherited()) (void)core_.release();
}

bool Backend::unusable() const {
  if (!birth_.inherited()) return !core_;
  static std::atomic<bool> said{false};
  if (!said.exchange(true)) log_line("error", "agent '" + localAgent + "' was made before this process was forked; make a new one here");
  return true;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::registerMem(const nixlBlobDesc &mem, const nixl_mem_t &kind, nixlBackendMD *&out) {
  if (kind != DRAM_SEG && kind != VRAM_SEG) return NIXL_ERR_NOT_SUPPORTED;
  if (unusable()) return NIXL_ERR_BACKEND;
  // Peers refuse metadata in which the same bytes have two descriptions, and one that differs from what they have.
  const LocalMemory::Range range(kind, mem.addr, mem.len);
  if (LocalMemory *known = core_->again(range)) {
    out = known;
    return NIXL_SUCCESS;
  }
  auto memory = std::make_unique<LocalMemory>(range);
  if (const int status = uccl_engine_reg(core_->engine, mem.addr, mem.len, &memory->region); status != UCCL_OK) return to_nixl(status);
  const int status = uccl_engine_prepare_fifo(core_->engine, memory->region, reinterpret_cast<const void *>(mem.addr), mem.len,
                                              reinterpret_cast<char *>(&memory->item));
  if (status != UCCL_OK) {
    uccl_engine_mr_destroy(core_->engine, memory->region);
    return to_nixl(status);
  }
  out = core_->keep(std::move(memory));
  return NIXL_SUCCESS;
}

nixl_status_t Backend::deregisterMem(nixlBackendMD *meta) {
  if (!meta) return NIXL_ERR_INVALID_PARAM;
  if (unusable()) return NIXL_SUCCESS;
  const auto memory = core_->give_back(static_cast<LocalMemory *>(meta));
  if (memory) uccl_engine_mr_destroy(core_->engine, memory->region);
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
  const nixl_status_t status = own_info(out);
  if (status == NIXL_SUCCESS && name_ == Name::kUcx) out = as_ucx_address(out);
  return status;
}

nixl_status_t Backend::own_info(std::string &out) const {
  if (unusable()) return NIXL_ERR_BACKEND;
  size_t needed = 0;
  int status = uccl_engine_metadata_into(core_->engine, nullptr, 0, &needed);
  if (status != UCCL_OK && status != UCCL_ERR_RESOURCE) return to_nixl(status);
  std::string text(needed, '\0');
  status = uccl_engine_metadata_into(core_->engine, text.data(), text.size(), &needed);
  if (status != UCCL_OK) return to_nixl(status);
  out = ConnInfo::text(text.c_str(), core_->identity->item);
  return NIXL_SUCCESS;
}

nixl_status_t Backend::loadRemoteConnInfo(const std::string &agent, const std::string &info) {
  if (unusable()) return NIXL_ERR_BACKEND;
  const bool known = core_->peers->lookup(agent) != nullptr;
  if (const nixl_status_t status = core_->peers->remember(agent, behind_ucx_address(info)); status != NIXL_SUCCESS) return status;
  // Connecting here and not at the first transfer: the caller expects to learn here that a peer cannot be reached.
  const nixl_status_t status = core_->peers->connect(agent);
  if (status != NIXL_SUCCESS && !known) core_->peers->forget(agent);
  return status;
}

nixl_status_t Backend::connect(const std::string &agent) {
  if (unusable()) return NIXL_ERR_BACKEND;
  if (agent != localAgent) return core_->peers->connect(agent);
  // NIXL asks every backend for this at its creation. The channels to oneself are made when the first transfer needs them.
  std::string info;
  const nixl_status_t status = own_info(info);
  return status == NIXL_SUCCESS ? core_->peers->remember(agent, info) : status;
}

nixl_status_t Backend::disconnect(const std::string &agent) {
  if (unusable()) return NIXL_ERR_BACKEND;
  return agent == localAgent ? core_->peers->rest(agent) : core_->peers->forget(agent);
}

nixl_status_t Backend::peer_of(const std::string &agent, std::shared_ptr<Peer> &out) const {
  if (unusable()) return NIXL_ERR_BACKEND;
  out = core_->peers->lookup(agent);
  return out ? NIXL_SUCCESS : NIXL_ERR_NOT_FOUND;
}

// ---- Transfers ------------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::prepXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                                const std::string &agent, nixlBackendReqH *&handle, const nixl_opt_b_args_t *) const {
  if (operation != NIXL_READ && operation != NIXL_WRITE) return NIXL_ERR_INVALID_PARAM;
  std::shared_ptr<Peer> peer;
  if (const nixl_status_t status = peer_of(agent, peer); status != NIXL_SUCCESS) return status;
  auto transfer = std::make_unique<Transfer>(operation, std::move(peer));
  if (const nixl_status_t status = transfer->describe(local, remote); status != NIXL_SUCCESS) return status;
  handle = transfer.release();
  return NIXL_SUCCESS;
}

nixl_status_t Backend::postXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                                const std::string &agent, nixlBackendReqH *&handle, const nixl_opt_b_args_t *args) const {
  if (unusable()) return NIXL_ERR_BACKEND;
  if (!handle) {
    if (const nixl_status_t status = prepXfer(operation, local, remote, agent, handle, args); status != NIXL_SUCCESS) return status;
  }
  auto *transfer = static_cast<Transfer *>(handle);
  const nixl_status_t status = transfer->post(*core_->peers, args);
  if (status != NIXL_ERR_NOT_FOUND) return status;
  // The agent was removed since, and perhaps added again under this name.
  std::shared_ptr<Peer> peer;
  if (const nixl_status_t found = peer_of(agent, peer); found != NIXL_SUCCESS || !transfer->use(std::move(peer))) return status;
  return transfer->post(*core_->peers, args);
}

nixl_status_t Backend::checkXfer(nixlBackendReqH *handle) const {
  if (!handle) return NIXL_ERR_INVALID_PARAM;
  if (unusable()) return NIXL_ERR_BACKEND;
  return static_cast<Transfer *>(handle)->check(*core_->peers);
}

nixl_status_t Backend::releaseReqH(nixlBackendReqH *handle) const {
  auto *transfer = static_cast<Transfer *>(handle);
  // In a forked child its locks may be held by threads that are not there.
  if (!unusable()) delete transfer;
  return NIXL_SUCCESS;
}

// ---- Notifications --------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::getNotifs(notif_list_t &notifs) {
  if (unusable()) return NIXL_ERR_BACKEND;
  // What one call takes is bounded: a peer that sends without a pause must not keep the caller here.
  constexpr size_t most = 4096, most_bytes = 64 << 20;
  for (size_t taken = 0, bytes = 0; taken < most && bytes < most_bytes; ++taken) {
    uccl_notif_t *notification = nullptr;
    if (const int status = uccl_engine_notif_next(core_->engine, &notification); status != UCCL_OK) return to_nixl(status);
    if (!notification) return NIXL_SUCCESS;
    size_t name_length = 0, length = 0;
    const char *name = uccl_engine_notif_name(notification, &name_length);
    const auto *message = static_cast<const char *>(uccl_engine_notif_msg(notification, &length));
    notifs.emplace_back(std::string(name ? name : "", name ? name_length : 0), std::string(message ? message : "", message ? length : 0));
    bytes += length;
    uccl_engine_notif_free(notification);
  }
  return NIXL_SUCCESS;
}

nixl_status_t Backend::genNotif(const std::string &agent, const std::string &message) const {
  std::shared_ptr<Peer> peer;
  const nixl_status_t status = peer_of(agent, peer);
  return status == NIXL_SUCCESS ? core_->peers->notify(*peer, message) : status;
}

// ---- Cost -----------------------------------------------------------------------------------------------------------------------

nixl_status_t Backend::estimateXferCost(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &,
                                        const std::string &agent, nixlBackendReqH *const &, std::chrono::microseconds &duration,
                                        std::chrono::microseconds &err_margin, nixl_cost_t &method, const nixl_opt_args_t *) const {
  std::shared_ptr<Peer> peer;
  if (const nixl_status_t status = peer_of(agent, peer); status != NIXL_SUCCESS) return status;
  std::shared_ptr<Connection> connection;
  {
    const std::lock_guard<std::mutex> guard(peer->lock);
    connection = peer->connection;
  }
  if (!connection) return NIXL_ERR_NOT_SUPPORTED;
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
