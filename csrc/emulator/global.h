// What blocks of a launch do to each other through global memory.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emu {

// What one access did last to a word.
struct GlobalEpoch {
  int64_t block = 0;
  uint32_t clock = 0;
  uint32_t pc = 0;  // from the start of the kernel's library
  uint16_t lane = 0;
  uint8_t bytes = 0;  // mask within the word
};
struct GlobalCell {
  GlobalEpoch write, reads[2];
};
struct GlobalPage {
  static constexpr int kWords = 256, kBytes = 4 * kWords;
  std::atomic_flag locked = ATOMIC_FLAG_INIT;
  GlobalCell cells[kWords];

  void lock() {
    while (locked.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() { locked.clear(std::memory_order_release); }
};

// How much of the past of other blocks' lanes is ordered before something, by lane.
using Snapshot = std::shared_ptr<const std::vector<uint32_t>>;
using Knowledge = std::map<int64_t, Snapshot>;

// Of one launch; all blocks use it, from several threads.
class GlobalMemory {
 public:
  GlobalPage* page(uintptr_t address);
  // A block leaves what it has done and what it knows at a variable.
  void publish(uintptr_t address, int64_t block, const Snapshot& own, const Knowledge& known);
  // And another finds it there, unless it has seen this `version`.
  void learn(uintptr_t address, Knowledge& known, uint64_t& version);

 private:
  struct SyncVariable {
    Knowledge known;
    uint64_t version = 0;
  };
  std::mutex mutex_;
  std::unordered_map<uintptr_t, std::unique_ptr<GlobalPage>> pages_;
  std::unordered_map<uintptr_t, SyncVariable> variables_;
};

}  // namespace emu
