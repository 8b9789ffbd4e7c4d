// What a launch did, counted: bytes, requests and sectors of global memory, wavefronts of shared
// memory, instructions.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace emu {

struct Access {  // by one lane
  uintptr_t address;
  uintptr_t pc;
  int16_t span;  // of global memory; -1: shared memory
  uint16_t bytes;
  bool write;
};

// One line of the kernel.
struct SiteTraffic {
  bool shared = false, write = false;
  uint64_t requests = 0;  // by warps
  uint64_t bytes = 0;     // that lanes asked for
  // Sectors of 32 bytes for global memory, wavefronts (passes over the banks) for shared; and how
  // few would do for that many distinct bytes.
  uint64_t transactions = 0, ideal = 0;
};

// One registered piece of global memory.
struct SpanTraffic {
  uint64_t read_bytes = 0, written_bytes = 0;
  uint64_t read_sectors = 0, written_sectors = 0;
  std::vector<bool> read, written;  // by sector: touched at all
};

struct Traffic {
  std::vector<SpanTraffic> spans;
  std::unordered_map<uintptr_t, SiteTraffic> sites;
  std::map<std::string, uint64_t> instructions;  // by warps

  void request(const Access* const* lanes, int n, uintptr_t span_base);
  void add(const Traffic& other);
};

}  // namespace emu
