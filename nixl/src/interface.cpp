// SPDX-License-Identifier: Apache-2.0

#include "interface.h"

#include <dirent.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <type_traits>
#include <vector>

#include "backend/backend_plugin.h"

namespace tcpx {

namespace {

/// The table of virtual functions as the symbol of a shared object: two words, then a word for each function.
constexpr char kTable[] = "_ZTV17nixlBackendEngine";
constexpr size_t kHeader = 2;
/// More than any symbol table of a plugin has.
constexpr uint64_t kMost = uint64_t{256} << 20;

/// Its function stands behind all those of NIXL's class.
struct Next : nixlBackendEngine {
  virtual void next();
};

template <class T>
bool read(std::ifstream &file, uint64_t offset, uint64_t bytes, std::vector<T> &out) {
  static_assert(std::is_trivially_copyable<T>::value);
  if (bytes > kMost) return false;
  out.resize(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(offset));
  return bool(file.read(reinterpret_cast<char *>(out.data()), static_cast<std::streamsize>(out.size() * sizeof(T))));
}

/// The file of NIXL's library in this process; empty if there is none.
std::string loaded_nixl() {
  std::string found;
  const auto look = [](dl_phdr_info *info, size_t, void *out) {
    const char *name = info->dlpi_name ? info->dlpi_name : "";
    const char *slash = std::strrchr(name, '/');
    if (!slash || std::strncmp(slash + 1, "libnixl.so", 10) != 0) return 0;
    *static_cast<std::string *>(out) = name;
    return 1;
  };
  ::dl_iterate_phdr(look, &found);
  return found;
}

std::vector<std::string> plugins_in(const std::string &folder) {
  std::vector<std::string> files;
  DIR *const dir = ::opendir(folder.c_str());
  if (!dir) return files;
  while (const dirent *entry = ::readdir(dir)) {
    if (std::strncmp(entry->d_name, "libplugin_", 10) == 0) files.push_back(folder + "/" + entry->d_name);
  }
  ::closedir(dir);
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

size_t own_slots() {
  // Itanium C++ ABI: a pointer to a virtual member function holds the offset in the table, plus 1 except on aarch64.
  void (Next::*const next)() = &Next::next;
  std::ptrdiff_t halves[2];
  static_assert(sizeof next == sizeof halves);
  std::memcpy(halves, &next, sizeof halves);
#if defined(__aarch64__)
  return static_cast<size_t>(halves[0]) / sizeof(void *);
#else
  return static_cast<size_t>(halves[0] - 1) / sizeof(void *);
#endif
}

size_t slots_of(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<Elf64_Ehdr> header;
  if (!file || !read(file, 0, sizeof(Elf64_Ehdr), header)) return 0;
  const Elf64_Ehdr &elf = header[0];
  if (std::memcmp(elf.e_ident, ELFMAG, SELFMAG) != 0 || elf.e_ident[EI_CLASS] != ELFCLASS64 || elf.e_shentsize != sizeof(Elf64_Shdr)) return 0;
  std::vector<Elf64_Shdr> sections;
  if (!read(file, elf.e_shoff, uint64_t{elf.e_shnum} * sizeof(Elf64_Shdr), sections)) return 0;
  for (const Elf64_Shdr &section : sections) {
    if (section.sh_type != SHT_DYNSYM || section.sh_link >= sections.size()) continue;
    std::vector<Elf64_Sym> symbols;
    std::vector<char> names;
    const Elf64_Shdr &strings = sections[section.sh_link];
    if (!read(file, section.sh_offset, section.sh_size, symbols) || !read(file, strings.sh_offset, strings.sh_size, names)) return 0;
    for (const Elf64_Sym &symbol : symbols) {
      const size_t words = symbol.st_size / sizeof(void *);
      if (symbol.st_shndx == SHN_UNDEF || words <= kHeader || symbol.st_name >= names.size()) continue;
      const size_t room = names.size() - symbol.st_name;
      if (room >= sizeof kTable && std::memcmp(&names[symbol.st_name], kTable, sizeof kTable) == 0) return words - kHeader;
    }
  }
  return 0;
}

std::string mismatch() {
  const std::string library = loaded_nixl();
  if (library.empty()) return {};
  std::string other;
  for (const std::string &file : plugins_in(library.substr(0, library.rfind('/')) + "/plugins")) {
    const size_t slots = slots_of(file);
    if (slots == own_slots()) return {};
    if (slots > 0 && other.empty()) {
      other = library + " calls " + std::to_string(slots) + " virtual functions of a backend (so many has " + file + "), and this plugin has " +
              std::to_string(own_slots()) + ", those of NIXL 1.0 to 1.5: it is left out. A plugin that was built with that NIXL's headers fits";
    }
  }
  return other;
}

}  // namespace tcpx
