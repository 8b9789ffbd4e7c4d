// The grid: blocks spread over threads of the host, the memory they may touch, what they did.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "emulator/machine.h"

extern "C" void* __tls_get_addr(unsigned long* module_and_offset);

namespace emu {
namespace {

std::mutex g_mutex;  // one launch at a time, and the state below
uint64_t g_seed = 1;
int g_threads = 2;
std::vector<Span> g_spans;
std::string g_report;  // of the launches so far, JSON
std::string g_error;
std::vector<std::unique_ptr<Block>> g_blocks;  // one a thread, kept: their stacks are warm

// The library that holds the kernel, and where its thread-local variables, which are the static
// shared memory, lie for this thread.
struct Library {
  uintptr_t code;
  uintptr_t base = 0, end = 0;
  unsigned char* statics = nullptr;
  size_t static_bytes = 0;
};
int visit(dl_phdr_info* info, size_t, void* data) {
  auto* library = static_cast<Library*>(data);
  uintptr_t end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_LOAD)
      end = std::max<uintptr_t>(
          end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
  if (library->code < info->dlpi_addr || library->code >= end) return 0;
  library->base = info->dlpi_addr;
  library->end = end;
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS) {
      unsigned long variable[2] = {info->dlpi_tls_modid, 0};
      library->statics = static_cast<unsigned char*>(__tls_get_addr(variable));
      library->static_bytes = info->dlpi_phdr[i].p_memsz;
    }
  return 1;
}
Library library_of(const void* code) {
  Library library{reinterpret_cast<uintptr_t>(code)};
  dl_iterate_phdr(visit, &library);
  return library;
}

std::string json_launch(const Launch& launch, const Traffic& traffic) {
  const LaunchConfig& c = launch.config;
  std::string s = format(
      R"({"kernel": "%s", "grid": [%u, %u, %u], "block": [%u, %u, %u], "shared_bytes": %zu, )",
      c.name, c.grid.x, c.grid.y, c.grid.z, c.block.x, c.block.y, c.block.z, c.shared_bytes);
  s += R"("buffers": {)";
  for (size_t i = 0; i < traffic.spans.size(); ++i) {
    const SpanTraffic& t = traffic.spans[i];
    const auto touched = [](const std::vector<bool>& bits) {
      return static_cast<unsigned long long>(std::count(bits.begin(), bits.end(), true)) * 32;
    };
    s += format(R"(%s"%s": {"bytes": %zu, "read": %llu, "written": %llu, "read_sectors": %llu, )"
                R"("written_sectors": %llu, "distinct_read": %llu, "distinct_written": %llu})",
                i ? ", " : "", launch.spans[i].name.c_str(), launch.spans[i].bytes,
                static_cast<unsigned long long>(t.read_bytes),
                static_cast<unsigned long long>(t.written_bytes),
                static_cast<unsigned long long>(t.read_sectors),
                static_cast<unsigned long long>(t.written_sectors), touched(t.read),
                touched(t.written));
  }
  s += R"(}, "instructions": {)";
  bool comma = false;
  for (const auto& [name, n] : traffic.instructions) {
    s += format(R"(%s"%s": %llu)", comma ? ", " : "", name.c_str(),
                static_cast<unsigned long long>(n));
    comma = true;
  }
  s += R"(}, "library": ")" + launch.library + R"(", "sites": [)";
  comma = false;
  for (const auto& [key, t] : traffic.sites) {
    s += format(
        R"(%s{"pc": %zu, "space": "%s", "write": %s, "requests": %llu, "bytes": %llu, )"
        R"("transactions": %llu, "ideal": %llu})",
        comma ? ", " : "", static_cast<size_t>(key / 2 - launch.base),
        t.shared ? "shared" : "global", t.write ? "true" : "false",
        static_cast<unsigned long long>(t.requests), static_cast<unsigned long long>(t.bytes),
        static_cast<unsigned long long>(t.transactions), static_cast<unsigned long long>(t.ideal));
    comma = true;
  }
  return s + "]}";
}

const char* check(const LaunchConfig& c) {
  const uint64_t threads = uint64_t{c.block.x} * c.block.y * c.block.z;
  if (threads == 0 || threads > kMaxLanes)
    g_error = format("a block of %u x %u x %u threads; expected 1 to %d", c.block.x, c.block.y,
                     c.block.z, kMaxLanes);
  else if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0 || c.grid.x > 0x7fffffffu ||
           c.grid.y > 65535 || c.grid.z > 65535)
    g_error = format("a grid of %u x %u x %u blocks; expected 1 to 2^31 - 1, 65535 and 65535",
                     c.grid.x, c.grid.y, c.grid.z);
  else if (c.shared_bytes > kMaxShared)
    g_error = format("%zu bytes of shared memory; a block has %zu", c.shared_bytes, kMaxShared);
  else
    return nullptr;
  g_error = std::string(c.name) + ": " + g_error;
  return g_error.c_str();
}

}  // namespace

// Asks addr2line, which comes with the compiler, for the frames that were inlined there, and names
// the innermost that is not the emulator's own.
std::string source_line(Pc pc, const Launch& launch) {
  const std::string command =
      format("addr2line -i -s -e '%s' 0x%zx 2>/dev/null", launch.library.c_str(),
             static_cast<size_t>(pc - 1 - launch.base));
  std::string found;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[512];
    while (fgets(line, sizeof(line), pipe)) {
      line[strcspn(line, "\n ")] = 0;  // also drops "(discriminator 2)"
      const bool own = !strncmp(line, "cuda.h:", 7) || !strncmp(line, "ptx_", 4);
      if (found.empty() && !own && line[0] != '?') found = line;
    }
    pclose(pipe);
  }
  return found.empty()
             ? format("%s+0x%zx", launch.library.c_str(), static_cast<size_t>(pc - launch.base))
             : found;
}

const char* launch(const LaunchConfig& config, void (*lane)(const void*), const void* arguments,
                   size_t argument_bytes) {
  std::lock_guard lock(g_mutex);
  if (const char* error = check(config)) return error;
  const Library library = library_of(config.code);
  Dl_info info{};
  dladdr(config.code, &info);
  std::atomic<int> busy{0};
  GlobalMemory global;
  const Launch launch{config,
                      lane,
                      arguments,
                      argument_bytes,
                      g_seed,
                      g_spans,
                      info.dli_fname ? info.dli_fname : "",
                      library.base,
                      library.end,
                      &busy,
                      &global};
  const int64_t total = int64_t{config.grid.x} * config.grid.y * config.grid.z;
  const int workers =
      static_cast<int>(std::clamp<int64_t>(g_threads, 1, std::min<int64_t>(total, 16)));
  while (static_cast<int>(g_blocks.size()) < workers)
    g_blocks.push_back(std::make_unique<Block>(static_cast<int>(g_blocks.size())));

  std::atomic<int64_t> next{0}, first_failure{total};
  busy = workers;
  auto work = [&](int w) {
    Block& block = *g_blocks[w];
    block.traffic = {};
    for (const Span& span : launch.spans) {
      SpanTraffic& t = block.traffic.spans.emplace_back();
      t.read.resize((span.base + span.bytes) / 32 - span.base / 32 + 1);
      t.written.resize(t.read.size());
    }
    const Library own = library_of(config.code);
    block.statics = own.statics;
    block.static_bytes = own.static_bytes;
    block.failed = false;
    block.page_cache.fill({});
    block.cells.clear();  // of another launch, whose blocks may have been larger
    // Blocks after one that failed do not matter; those before may still fail first.
    for (int64_t i = next++; i < first_failure; i = next++) {
      block.run(launch, i);
      if (!block.failed) continue;
      for (int64_t seen = first_failure;
           i < seen && !first_failure.compare_exchange_weak(seen, i);) {
      }
      break;
    }
    --busy;
  };
  std::vector<std::thread> threads;
  for (int w = 1; w < workers; ++w) threads.emplace_back(work, w);
  work(0);
  for (std::thread& t : threads) t.join();

  Traffic traffic = std::move(g_blocks[0]->traffic);
  for (int w = 1; w < workers; ++w) traffic.add(g_blocks[w]->traffic);
  g_report += (g_report.empty() ? "" : ", ") + json_launch(launch, traffic);
  for (int w = 0; w < workers; ++w)
    if (g_blocks[w]->failed && g_blocks[w]->failure.block == first_failure) {
      g_error = std::string(config.name) + ": " + g_blocks[w]->failure.message;
      return g_error.c_str();
    }
  return nullptr;
}

}  // namespace emu

extern "C" {
void emulator_configure(uint64_t seed, int threads) {
  std::lock_guard lock(emu::g_mutex);
  emu::g_seed = seed;
  emu::g_threads = threads;
}
void emulator_register(const void* base, size_t bytes, const char* name) {
  std::lock_guard lock(emu::g_mutex);
  emu::g_spans.push_back({reinterpret_cast<uintptr_t>(base), bytes, name});
}
void emulator_unregister_all() {
  std::lock_guard lock(emu::g_mutex);
  emu::g_spans.clear();
}
const char* emulator_report() {
  std::lock_guard lock(emu::g_mutex);
  static std::string last;
  last = "[" + emu::g_report + "]";
  emu::g_report.clear();
  return last.c_str();
}
}
