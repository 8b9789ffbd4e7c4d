// The state of the emulated machine: lanes in warps in a block, one block at a time on each thread
// of the host.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/global.h"
#include "emulator/traffic.h"

namespace emu {

inline constexpr int kMaxLanes = 1024;  // of a block
inline constexpr int kMaxWarps = kMaxLanes / 32;
inline constexpr size_t kStackBytes = 128 << 10;
inline constexpr size_t kMaxShared = 227 << 10;
inline constexpr size_t kStatics = 256 << 10;   // where static shared memory begins, by offset
inline constexpr unsigned char kPoison = 0xff;  // NaN in every float format

using Pc = uintptr_t;

// Vector clocks: `at[i]` is how much of lane i's past is ordered before the holder's next access.
// Shared between the lanes that left the same barrier.
struct Clocks {
  int holders = 0;
  std::array<uint32_t, kMaxLanes> at;
};

enum class State : uint8_t { Running, WarpOp, Barrier, Spinning, LogFull, Done };

// The arguments and the result of a warp-wide operation, as lanes bring and take them.
struct WarpArgs {
  union {
    uint32_t u32[16];
    uint64_t u64[8];
    float f32[16];
    const void* pointer;
  };
};

struct Copy {  // an asynchronous one
  unsigned char* shared;
  const unsigned char* global;
  int bytes, source_bytes;
  int group;  // -1 until committed
  int lane;
  uint32_t clock;
  Pc pc;
  bool counted = false;  // its bytes are what an mbarrier expects
};

struct Block;

struct Lane {
  void* sp = nullptr;
  Block* block = nullptr;
  int index = 0;  // in the block
  Index3 thread{};
  State state = State::Done;
  Pc pc = 0;  // of the operation it waits at
  uint32_t mask = 0;
  const char* what = "";  // that operation's name
  WarpArgs args;
  uint32_t clock = 0;
  Clocks* clocks = nullptr;
  std::vector<Copy> copies;
  int groups = 0;  // of copies, committed
  std::vector<Access> log;

  int warp() const { return index / 32; }
  uint32_t bit() const { return 1u << (index % 32); }
};

// Runs it for the lanes of `mask`; false if they go on waiting.
using WarpFunction = bool (*)(Block&, Lane* lanes, uint32_t mask);

struct WarpGroup {  // the lanes that wait for one warp-wide operation
  WarpFunction run;
  uint32_t mask, arrived;
};

struct Warp {
  uint32_t runnable = 0, alive = 0;
  std::vector<WarpGroup> groups;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  Clocks* joined = nullptr;
  std::vector<Lane*> waiting;
  int votes = 0;
};

struct MBarrier {
  uint64_t* address;
  int arrivals, pending;  // of a phase, and still missing in this one
  int64_t bytes = 0;      // expected and not yet copied
  int phase = 0;
  std::vector<Copy> copies;    // land when somebody waits
  Clocks* joined = nullptr;    // of those who arrived in this phase,
  Clocks* released = nullptr;  // and in the one before
};

inline constexpr uint8_t kGuard = 2;
// What one access did last to a word of shared memory.
struct Epoch {
  uint32_t clock = 0;
  uint16_t lane = 0;
  uint8_t bytes = 0;      // mask within the word
  uint8_t in_flight = 0;  // 1: a copy has not landed; kGuard: between two variables
  uint32_t pc = 0;        // from the start of the kernel's library
};
struct Cell {
  Epoch write, reads[2];
};

struct Span {
  uintptr_t base;
  size_t bytes;
  std::string name;
};

struct Failure {
  std::string message;
  int64_t block = -1;
};

struct Launch {
  LaunchConfig config;
  void (*lane)(const void*);
  const void* arguments;
  size_t argument_bytes;
  uint64_t seed;
  std::vector<Span> spans;
  std::string library;
  uintptr_t base, end;     // of the kernel's library in memory
  std::atomic<int>* busy;  // host threads whose block does not only poll
  GlobalMemory* global;
};

struct Block {
  explicit Block(int slot);
  ~Block();

  void run(const Launch& launch, int64_t linear);

  // --- scheduler.cpp
  Lane* pick();
  bool revive();
  void block_and_switch(Lane* me);  // to another lane; away from a runnable one only by chance
  void make_runnable(Lane* lane);
  void warp_op(const char* what, Pc pc, uint32_t mask, WarpFunction run);
  bool arrive(Lane* warp, uint32_t mask);
  [[noreturn]] void fail(const Lane* lane, Pc pc, const std::string& message);
  void stuck();
  std::string where(const Lane* lane, Pc pc) const;

  // --- memory.cpp
  enum class Kind { Plain, Volatile, Atomic };  // only plain accesses race
  void access(Lane* me, const void* address, int bytes, bool write, Pc pc, Kind kind);
  void shared_access(Lane* me, size_t offset, int bytes, bool write, Pc pc, bool async);
  const Span* span_of(uintptr_t address, int bytes) const;
  void flush(int warp);
  // Offset into the block's shared memory, dynamic then static; -1 elsewhere.
  int64_t shared_offset(uintptr_t address) const;
  std::string shared_place(size_t offset) const;
  Cell& cell_at(int64_t offset);
  void guard(Lane* me, const volatile void* begin, int bytes);

  // --- global.cpp
  void global_access(Lane* me, uintptr_t address, int bytes, bool write, Pc pc);
  [[noreturn]] void global_race(Lane* me, uintptr_t address, bool write, Pc pc,
                                const GlobalEpoch& other, bool other_write);
  void fence(Lane* me);                             // orders what the lane knows to be done before
  void release(const Lane* me, uintptr_t address);  // what it then writes,
  void acquire(uintptr_t address);                  // for who reads that

  // --- clocks
  Clocks* fresh_clocks();
  void release(Clocks* clocks);
  void hold(Lane* lane, Clocks* clocks);
  // What is ordered before all lanes of `mask`, and their own clocks; each begins a new one.
  void join(Clocks* into, Lane* warp, uint32_t mask);
  void join(Clocks* into, const Clocks* from);
  Clocks* copy(const Clocks* from);
  bool ordered(const Epoch& e, const Lane* me) const {
    return e.lane == me->index || me->clocks->at[e.lane] >= e.clock;
  }

  // --- async.cpp
  void land(const Copy& copy, uint32_t clock);
  void check_copies();  // none may be on its way when the block ends

  uint32_t random() {
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return static_cast<uint32_t>(rng >> 32);
  }

  int slot;
  const Launch* launch = nullptr;
  Lane* lanes = nullptr;
  int n_lanes = 0, n_done = 0;
  std::array<Warp, kMaxWarps> warps;
  uint32_t runnable_warps = 0;
  int current_warp = 0;
  void* main_sp = nullptr;
  Index3 index{};
  int64_t linear = 0;
  uint64_t rng = 1;
  bool failed = false;
  Failure failure;
  int64_t idle_rounds = 0;  // in which lanes only polled
  bool idle = false;        // too many of them: it waits for other blocks, if there are any
  int last_polls = 0;

  std::array<NamedBarrier, 17> barriers;  // the last is __syncthreads
  std::vector<MBarrier> mbarriers;

  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  unsigned char* statics = nullptr;
  size_t static_bytes = 0;
  std::vector<Cell> cells;

  std::vector<uint32_t> fenced;  // by lane: how much of its past a fence followed; empty: none
  Knowledge known;               // of other blocks' pasts
  std::unordered_map<uintptr_t, uint64_t> learned;  // variables, and which version of each
  std::vector<uintptr_t> volatile_reads;
  std::array<std::pair<uintptr_t, GlobalPage*>, 64> page_cache;

  std::vector<Clocks*> free_clocks;
  Traffic traffic;
};

template <class F>
void for_lanes(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

// For the PTX instructions marked .aligned: the lanes must be at the same place.
void same_place(Block& block, Lane* lanes, uint32_t mask);

// The lane whose stack this is, or null on a thread of the host.
Lane* current_lane();
bool on_a_stack(const void* address);
// "file.cu:12" of a return address.
std::string source_line(Pc pc, const Launch& launch);
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emu

#define EMU_PC reinterpret_cast<::emu::Pc>(__builtin_return_address(0))
