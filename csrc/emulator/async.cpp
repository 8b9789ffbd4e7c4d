// Asynchronous copies and the barriers that tell when they are done. A copy lands as late as it
// may: when somebody waits for it. Until then its destination is poisoned, and touching it is an
// error.
#include "emulator/machine.h"

namespace emu {
namespace {

// Checks a copy and takes it in: the destination counts as written from here on, in any order.
Copy issue(Lane* me, void* shared, const void* global, int bytes, int source_bytes, Pc pc,
           const char* what) {
  Block& block = *me->block;
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  const int64_t offset = block.shared_offset(to);
  if (offset < 0)
    block.fail(me, pc, format("%s: destination %p is not in shared memory", what, shared));
  const auto unit = static_cast<uintptr_t>(bytes > 16 ? 16 : bytes);
  if (to % unit || from % unit)
    block.fail(me, pc,
               format("misaligned %s of %d bytes from %p to %p", what, bytes, global, shared));
  if (source_bytes > 0) {
    const Span* span = block.span_of(from, source_bytes);
    if (!span)
      block.fail(me, pc,
                 format("%s: out-of-bounds read of %d bytes at %p", what, source_bytes, global));
    for (int i = 0; i < source_bytes; i += 16)
      block.global_access(me, from + i, std::min(16, source_bytes - i), false, pc);
    me->log.push_back({from, pc, static_cast<int16_t>(span - block.launch->spans.data()),
                       static_cast<uint16_t>(source_bytes), false});
  }
  block.shared_access(me, static_cast<size_t>(offset), bytes, true, pc, true);
  me->log.push_back({to, pc, -1, static_cast<uint16_t>(bytes), true});
  std::memset(shared, kPoison, static_cast<size_t>(bytes));
  return {static_cast<unsigned char*>(shared),
          static_cast<const unsigned char*>(global),
          bytes,
          source_bytes,
          -1,
          me->index,
          me->clock,
          pc};
}

MBarrier& find(Lane* me, const uint64_t* barrier, Pc pc) {
  for (MBarrier& b : me->block->mbarriers)
    if (b.address == barrier) return b;
  me->block->fail(me, pc,
                  format("mbarrier at %p was not initialized", static_cast<const void*>(barrier)));
}

// Everybody has arrived and all bytes are there: the next phase begins.
void complete(Block& block, MBarrier& b) {
  if (b.pending > 0) return;
  for (const Copy& copy : b.copies) {
    b.joined->at[copy.lane] = std::max(b.joined->at[copy.lane], copy.clock);
    block.land(copy, copy.clock);
    if (copy.counted) b.bytes -= copy.bytes;
  }
  b.copies.clear();
  if (b.bytes > 0) return;
  if (b.released) block.release(b.released);
  b.released = b.joined;
  b.joined = nullptr;
  b.pending = b.arrivals;
  ++b.phase;
  block.idle_rounds = 0;
}

void arrive(Lane* me, MBarrier& b, Pc pc) {
  Block& block = *me->block;
  if (b.pending <= 0)
    block.fail(me, pc,
               format("mbarrier: more arrivals than the %d it was initialized for", b.arrivals));
  if (!b.joined) {
    b.joined = block.copy(me->clocks);
    b.joined->holders = 1;
  }
  block.join(b.joined, me - me->index % 32, me->bit());
  --b.pending;
}

}  // namespace

void Block::land(const Copy& copy, uint32_t clock) {
  std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.source_bytes));
  std::memset(copy.shared + copy.source_bytes, 0,
              static_cast<size_t>(copy.bytes - copy.source_bytes));
  for (int i = 0; i < copy.bytes; i += 4) {
    Epoch& write = cell_at(shared_offset(reinterpret_cast<uintptr_t>(copy.shared + i))).write;
    write.in_flight = 0;
    write.clock = clock;
  }
}

void Block::check_copies() {
  const Copy* left = nullptr;
  for (int i = 0; i < n_lanes && !left; ++i)
    if (!lanes[i].copies.empty()) left = &lanes[i].copies.front();
  for (const MBarrier& b : mbarriers)
    if (!left && !b.copies.empty()) left = &b.copies.front();
  if (!left) return;
  failed = true;
  failure = {where(lanes + left->lane, left->pc) +
                 ": the block ended while this asynchronous copy was on its way: nobody waited",
             linear};
}

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  Lane* me = current_lane();
  me->copies.push_back(issue(me, shared, global, bytes, source_bytes, EMU_PC, "cp.async"));
}

void cp_async_commit() {
  Lane* me = current_lane();
  for (Copy& copy : me->copies)
    if (copy.group < 0) copy.group = me->groups;
  ++me->groups;
}

void cp_async_wait(int groups_left) {
  Lane* me = current_lane();
  const int landed = me->groups - groups_left;
  std::erase_if(me->copies, [&](const Copy& copy) {
    if (copy.group < 0 || copy.group >= landed) return false;
    me->block->land(copy, me->clock);
    return true;
  });
}

void mbarrier_init(uint64_t* barrier, int arrivals) {
  Lane* me = current_lane();
  const auto address = reinterpret_cast<uintptr_t>(barrier);
  const int64_t offset = me->block->shared_offset(address);
  if (offset < 0 || address % 8)
    me->block->fail(me, EMU_PC, "mbarrier.init: expected 8 aligned bytes of shared memory");
  me->block->shared_access(me, static_cast<size_t>(offset), 8, true, EMU_PC, false);
  MBarrier fresh;
  fresh.address = barrier;
  fresh.arrivals = fresh.pending = arrivals;
  me->block->mbarriers.push_back(fresh);
}

void mbarrier_arrive(uint64_t* barrier, int expect_bytes) {
  Lane* me = current_lane();
  MBarrier& b = find(me, barrier, EMU_PC);
  b.bytes += expect_bytes;
  arrive(me, b, EMU_PC);
}

bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  Lane* me = current_lane();
  Block& block = *me->block;
  MBarrier& b = find(me, barrier, EMU_PC);
  complete(block, b);
  if ((b.phase & 1) == parity) {
    me->pc = EMU_PC;
    me->what = "mbarrier.try_wait";
    me->state = State::Spinning;
    block.block_and_switch(me);
    return false;
  }
  if (b.released) {
    Clocks* joined = block.copy(b.released);
    block.join(joined, me->clocks);
    block.hold(me, joined);
  }
  return true;
}

void cp_async_mbarrier_arrive(uint64_t* barrier) {
  Lane* me = current_lane();
  MBarrier& b = find(me, barrier, EMU_PC);
  b.copies.insert(b.copies.end(), me->copies.begin(), me->copies.end());
  me->copies.clear();
  arrive(me, b, EMU_PC);
}

void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  Lane* me = current_lane();
  MBarrier& b = find(me, barrier, EMU_PC);
  if (bytes % 16)
    me->block->fail(me, EMU_PC, format("bulk copy of %d bytes; expected a multiple of 16", bytes));
  Copy copy = issue(me, shared, global, bytes, bytes, EMU_PC, "bulk copy");
  copy.counted = true;
  ++me->clock;
  if (!b.joined) {
    b.joined = me->block->copy(me->clocks);
    b.joined->holders = 1;
  }
  b.copies.push_back(copy);
}

}  // namespace emu
