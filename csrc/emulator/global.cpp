// Races in global memory, between blocks of a launch and within one: each word remembers who wrote
// it last and two that read it. Barriers order the lanes of a block (scheduler.cpp). Blocks are
// ordered by what they pass through atomics, acquire and release accesses, and volatile ones:
// whatever a lane has fenced, and knows to be done, belongs to the variable that it then writes;
// who reads the variable knows it too.
#include "emulator/global.h"

#include "emulator/machine.h"

namespace emu {
namespace {

// Adds what is known of a block.
void add(Knowledge& to, int64_t block, const Snapshot& clocks) {
  Snapshot& own = to[block];
  if (!own) own = clocks;
  if (own == clocks) return;
  bool newer = false;
  for (size_t i = 0; i < clocks->size(); ++i) newer |= (*clocks)[i] > (*own)[i];
  if (!newer) return;
  auto both = std::make_shared<std::vector<uint32_t>>(*own);
  for (size_t i = 0; i < clocks->size(); ++i) (*both)[i] = std::max((*both)[i], (*clocks)[i]);
  own = both;
}

bool is_before(const Block& block, const Lane* me, const GlobalEpoch& e) {
  if (e.block == block.linear) return e.lane == me->index || me->clocks->at[e.lane] >= e.clock;
  const auto found = block.known.find(e.block);
  return found != block.known.end() && (*found->second)[e.lane] >= e.clock;
}

}  // namespace

GlobalPage* GlobalMemory::page(uintptr_t address) {
  std::lock_guard lock(mutex_);
  std::unique_ptr<GlobalPage>& page = pages_[address / GlobalPage::kBytes];
  if (!page) page = std::make_unique<GlobalPage>();
  return page.get();
}

void GlobalMemory::publish(uintptr_t address, int64_t block, const Snapshot& own,
                           const Knowledge& known) {
  std::lock_guard lock(mutex_);
  SyncVariable& variable = variables_[address];
  for (const auto& [other, clocks] : known) add(variable.known, other, clocks);
  if (own) add(variable.known, block, own);
  ++variable.version;
}

void GlobalMemory::learn(uintptr_t address, Knowledge& known, uint64_t& version) {
  std::lock_guard lock(mutex_);
  const auto found = variables_.find(address);
  if (found == variables_.end() || found->second.version == version) return;
  version = found->second.version;
  for (const auto& [other, clocks] : found->second.known) add(known, other, clocks);
}

void Block::fence(Lane* me) {
  if (fenced.empty()) fenced.assign(static_cast<size_t>(n_lanes), 0);
  for (int i = 0; i < n_lanes; ++i) fenced[i] = std::max(fenced[i], me->clocks->at[i]);
  fenced[me->index] = me->clock++;
}

void Block::release(const Lane* me, uintptr_t address) {
  if (fenced.empty() && known.empty()) return;
  std::shared_ptr<std::vector<uint32_t>> own;
  if (!fenced.empty()) {
    own = std::make_shared<std::vector<uint32_t>>(fenced);
    for (int i = 0; i < n_lanes; ++i)
      if (i != me->index) (*own)[i] = std::min((*own)[i], me->clocks->at[i]);
  }
  launch->global->publish(address, linear, own, known);
}

void Block::acquire(uintptr_t address) {
  launch->global->learn(address, known, learned[address]);
  known.erase(linear);
}

void Block::global_access(Lane* me, uintptr_t address, int bytes, bool write, Pc pc) {
  const auto place = static_cast<uint32_t>(pc - launch->base);
  GlobalPage* page = nullptr;
  for (uintptr_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    const uintptr_t begin = std::max(address, word * 4),
                    end = std::min(address + bytes, word * 4 + 4);
    const auto mask = static_cast<uint8_t>(((1u << (end - begin)) - 1) << (begin - word * 4));
    const uintptr_t number = word * 4 / GlobalPage::kBytes;
    auto& [cached, cached_page] = page_cache[number % page_cache.size()];
    if (!cached_page || cached != number) {
      cached = number;
      cached_page = launch->global->page(word * 4);
    }
    page = cached_page;
    page->lock();
    GlobalCell& cell = page->cells[word % GlobalPage::kWords];
    const GlobalEpoch *raced = nullptr, *const w = &cell.write;
    const auto races = [&](const GlobalEpoch& e) {
      return e.bytes & mask && !is_before(*this, me, e);
    };
    if (races(*w)) raced = w;
    if (write)
      for (const GlobalEpoch& r : cell.reads)
        if (!raced && races(r)) raced = &r;
    if (raced) {
      // A volatile read is announced before it happens: what it saw may have come since.
      for (const uintptr_t polled : volatile_reads) acquire(polled);
      if (!races(*raced)) raced = nullptr;
    }
    if (raced) {
      const GlobalEpoch other = *raced;
      const bool other_write = raced == w;
      page->unlock();
      global_race(me, begin, write, pc, other, other_write);
    }
    const GlobalEpoch now{linear, me->clock, place, static_cast<uint16_t>(me->index), mask};
    const auto merge = [&](GlobalEpoch& slot) {
      const bool same = slot.block == linear && slot.lane == me->index && slot.clock == me->clock;
      const uint8_t before = same ? slot.bytes : 0;
      slot = now;
      slot.bytes |= before;
    };
    if (write) {
      merge(cell.write);
    } else {
      // Keep two reads that this one does not follow, of different lanes if there are.
      GlobalEpoch& a = cell.reads[0];
      merge(!a.bytes || is_before(*this, me, a) ? a : cell.reads[1]);
    }
    page->unlock();
  }
}

void Block::global_race(Lane* me, uintptr_t address, bool write, Pc pc, const GlobalEpoch& other,
                        bool other_write) {
  const Span* span = span_of(address, 1);
  const Index3 grid = launch->config.grid;
  const bool own = other.block == linear;
  std::string who = format("warp %d, lane %d", other.lane / 32, other.lane % 32);
  if (!own)
    who = format("block (%u, %u, %u), ", static_cast<unsigned>(other.block % grid.x),
                 static_cast<unsigned>(other.block / grid.x % grid.y),
                 static_cast<unsigned>(other.block / grid.x / grid.y)) +
          who;
  fail(me, pc,
       format("race at byte %lld of %s in global memory: this %s is not ordered by %s after the %s "
              "by %s at %s",
              static_cast<long long>(address - span->base), span->name.c_str(),
              write ? "write" : "read", own ? "a barrier" : "a fence and an atomic",
              other_write ? "write" : "read", who.c_str(),
              source_line(launch->base + other.pc, *launch).c_str()));
}

}  // namespace emu
