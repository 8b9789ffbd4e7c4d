// Who runs next, and who waits for whom. A lane runs until it has to wait; then another, chosen at
// random, goes on. There is no central loop: lanes switch to each other directly, and to the thread
// of the host only when the block ends, fails or is stuck.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "emulator/fiber.h"
#include "emulator/machine.h"

namespace emu {
namespace {

constexpr int kMaxSlots = 16;
constexpr int kSyncThreads = 16;  // the barrier of __syncthreads
constexpr int64_t kMaxIdleRounds = 200000;

char* stacks() {
  // Reserved, not used: a page of it costs memory once a lane has touched it.
  static char* const base = [] {
    void* p = mmap(nullptr, kMaxSlots * kMaxLanes * kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
  }();
  return base;
}
char* g_stacks = nullptr;
Lane* g_lanes = nullptr;

void lane_entry() {
  Lane* me = current_lane();
  Block& block = *me->block;
  block.launch->lane(block.launch->arguments);
  me->state = State::Done;
  Warp& warp = block.warps[me->warp()];
  warp.alive &= ~me->bit();
  ++block.n_done;
  if (!warp.alive) block.flush(me->warp());
  block.block_and_switch(me);
  __builtin_unreachable();
}

}  // namespace

std::string format(const char* pattern, ...) {
  va_list args;
  va_start(args, pattern);
  char text[1024];
  vsnprintf(text, sizeof(text), pattern, args);
  va_end(args);
  return text;
}

Lane* current_lane() {
  const size_t offset =
      static_cast<char*>(__builtin_frame_address(0)) - g_stacks;  // huge outside of the stacks
  if (!g_stacks || offset >= kMaxSlots * kMaxLanes * kStackBytes) return nullptr;
  return g_lanes + offset / kStackBytes;
}

Block::Block(int slot) : slot(slot) {
  if (!g_stacks) {
    g_stacks = stacks();
    if (!g_stacks) std::abort();
    g_lanes = new Lane[kMaxSlots * kMaxLanes];
  }
  lanes = g_lanes + static_cast<size_t>(slot) * kMaxLanes;
  dynamic = static_cast<unsigned char*>(aligned_alloc(1024, kStatics));
}

Block::~Block() {
  free(dynamic);
  for (int i = 0; i < kMaxLanes; ++i) {
    if (lanes[i].clocks) release(lanes[i].clocks);
    lanes[i].clocks = nullptr;
  }
  for (Clocks* c : free_clocks) delete c;
}

Clocks* Block::fresh_clocks() {
  if (free_clocks.empty()) return new Clocks;
  Clocks* c = free_clocks.back();
  free_clocks.pop_back();
  c->holders = 0;
  return c;
}

void Block::release(Clocks* clocks) {
  if (--clocks->holders <= 0) free_clocks.push_back(clocks);
}

void Block::hold(Lane* lane, Clocks* clocks) {
  ++clocks->holders;
  if (lane->clocks) release(lane->clocks);
  lane->clocks = clocks;
}

void Block::join(Clocks* into, const Lane* lane) {
  const auto& from = lane->clocks->at;
  for (int i = 0; i < n_lanes; ++i) into->at[i] = std::max(into->at[i], from[i]);
  into->at[lane->index] = lane->clock;
}

void Block::run(const Launch& l, int64_t block_index) {
  launch = &l;
  linear = block_index;
  const Index3 grid = l.config.grid, dim = l.config.block;
  index = {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
           static_cast<unsigned>(linear / grid.x / grid.y)};
  n_lanes = static_cast<int>(dim.x * dim.y * dim.z);
  n_done = 0;
  failed = false;
  idle_rounds = 0;
  rng =
      (l.seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(linear) + 1) * 0xbf58476d1ce4e5b9u | 1;
  for (int i = 0; i < 4; ++i) random();
  dynamic_bytes = l.config.shared_bytes;
  std::memset(dynamic, kPoison, dynamic_bytes);
  if (statics) std::memset(statics, kPoison, static_bytes);
  cells.resize((dynamic_bytes + static_bytes + 3) / 4 + 1);
  mbarriers.clear();
  for (NamedBarrier& b : barriers) b = {};
  for (Warp& w : warps) w = {};

  Clocks* start = fresh_clocks();
  char* const first_stack = g_stacks + static_cast<size_t>(slot) * kMaxLanes * kStackBytes;
  for (int i = 0; i < n_lanes; ++i) {
    Lane& lane = lanes[i];
    start->at[i] = lane.clock;  // whatever was before this block is ordered before it
    ++lane.clock;
    hold(&lane, start);
    lane.block = this;
    lane.index = i;
    lane.thread = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    lane.state = State::Running;
    lane.copies.clear();
    lane.groups = 0;
    lane.log.clear();
    // Stacks begin at different lines of the cache, or they would push each other out of it.
    char* top = first_stack + (i + 1) * kStackBytes - 64 - (i % 32) * 704;
    lane.sp = fresh_stack(top, lane_entry);
    Warp& warp = warps[lane.warp()];
    warp.runnable |= lane.bit();
    warp.alive |= lane.bit();
    runnable_warps |= 1u << lane.warp();
  }
  const uint32_t all = (n_lanes + 31) / 32 == 32 ? ~0u : (1u << (n_lanes + 31) / 32) - 1;
  runnable_warps = all;
  current_warp = static_cast<int>(random() % ((n_lanes + 31) / 32));
  while (true) {
    Lane* next = pick();
    if (next) emu_switch(&main_sp, next->sp);
    if (failed || n_done == n_lanes) break;
    if (!revive()) {
      stuck();
      break;
    }
  }
  for (NamedBarrier& b : barriers)
    if (b.joined) release(b.joined);
  for (MBarrier& b : mbarriers)
    for (Clocks* c : {b.joined, b.released})
      if (c) release(c);
}

// A random lane that can run: of the warp at hand mostly, so that its lanes meet soon.
Lane* Block::pick() {
  if (!runnable_warps) return nullptr;
  const uint32_t r = random();
  if (!(runnable_warps >> current_warp & 1) || (r & 0xf00) == 0) {
    const int by = r >> 27;
    current_warp = (std::countr_zero(std::rotr(runnable_warps, by)) + by) & 31;
  }
  const int by = r & 31;
  const int lane = (std::countr_zero(std::rotr(warps[current_warp].runnable, by)) + by) & 31;
  return lanes + current_warp * 32 + lane;
}

// When nobody can run: lanes with a full log and lanes that poll go on. False if there are none.
bool Block::revive() {
  bool any = false, polled = false;
  for (int w = 0; w * 32 < n_lanes; ++w) flush(w);
  for (int i = 0; i < n_lanes; ++i) {
    if (lanes[i].state != State::LogFull && lanes[i].state != State::Spinning) continue;
    polled |= lanes[i].state == State::Spinning;
    any |= lanes[i].state == State::LogFull;
    make_runnable(lanes + i);
  }
  if (any)
    idle_rounds = 0;
  else if (polled)
    any = ++idle_rounds < kMaxIdleRounds;
  return any;
}

void Block::make_runnable(Lane* lane) {
  lane->state = State::Running;
  warps[lane->warp()].runnable |= lane->bit();
  runnable_warps |= 1u << lane->warp();
}

void Block::block_and_switch(Lane* me) {
  if (me->state != State::Running) {
    Warp& warp = warps[me->warp()];
    warp.runnable &= ~me->bit();
    if (!warp.runnable) runnable_warps &= ~(1u << me->warp());
  }
  Lane* next = pick();
  if (next == me) return;
  emu_switch(&me->sp, next ? next->sp : main_sp);
}

void Block::fail(const Lane* lane, Pc pc, const std::string& message) {
  failed = true;
  failure = {where(lane, pc) + ": " + message, linear};
  void* dead;
  emu_switch(&dead, main_sp);
  __builtin_unreachable();
}

std::string Block::where(const Lane* lane, Pc pc) const {
  return format("%s: block (%u, %u, %u), warp %d, lane %d, thread (%u, %u, %u)",
                source_line(pc, *launch).c_str(), index.x, index.y, index.z, lane->warp(),
                lane->index % 32, lane->thread.x, lane->thread.y, lane->thread.z);
}

// Nobody can run and not all are done: says who waits where.
void Block::stuck() {
  std::string message;
  const Lane* culprit = nullptr;
  for (int i = 0; i < n_lanes; ++i) {
    const Lane& lane = lanes[i];
    if (lane.state != State::WarpOp) continue;
    // The first lane of the mask that will not come.
    for (int j = 0; j < 32; ++j) {
      const Lane& other = lanes[lane.warp() * 32 + j];
      if (!(lane.mask >> j & 1)) continue;
      const bool exists = lane.warp() * 32 + j < n_lanes;
      if (exists && other.state == State::WarpOp && other.mask == lane.mask) continue;
      culprit = &lane;
      message = format("%s with mask 0x%08x waits for lane %d, which ", lane.what, lane.mask, j);
      if (!exists)
        message += "does not exist";
      else if (other.state == State::Done)
        message += "has returned (inactive lane)";
      else
        message += format("waits at %s (%s)", source_line(other.pc, *launch).c_str(), other.what);
      break;
    }
    if (culprit) break;
  }
  if (!culprit) {
    int waiting = 0, returned = 0;
    const Lane* done = nullptr;
    for (int i = 0; i < n_lanes; ++i) {
      if (lanes[i].state == State::Done) {
        ++returned;
        done = done ? done : lanes + i;
      } else {
        ++waiting;
        culprit = culprit ? culprit : lanes + i;
      }
    }
    message = format("deadlock: %d of %d threads wait here and elsewhere, %d have returned",
                     waiting, n_lanes, returned);
    for (int i = 0, shown = 0; i < n_lanes && shown < 6; ++i) {
      const Lane& lane = lanes[i];
      if (lane.state == State::Done) continue;
      if (i > 0 && lanes[i - 1].state == lane.state && lanes[i - 1].pc == lane.pc) continue;
      message += format("; warp %d, lane %d waits at %s (%s)", lane.warp(), i % 32,
                        source_line(lane.pc, *launch).c_str(), lane.what);
      ++shown;
    }
    if (done) message += format("; thread %d has returned", done->index);
  }
  failed = true;
  failure = {where(culprit, culprit->pc) + ": " + message, linear};
}

void Block::warp_op(const char* what, Pc pc, uint32_t mask, WarpFunction run) {
  Lane* me = current_lane();
  Warp& warp = warps[me->warp()];
  if (!(mask & me->bit()))
    fail(me, pc, format("%s with mask 0x%08x, which does not have this lane", what, mask));
  me->pc = pc;
  me->mask = mask;
  me->what = what;
  WarpGroup* group = nullptr;
  for (WarpGroup& g : warp.groups) {
    if (g.mask == mask && g.run == run) {
      group = &g;
    } else if (g.mask & me->bit() && mask & g.arrived) {
      const Lane& other = lanes[me->warp() * 32 + std::countr_zero(mask & g.arrived)];
      fail(
          me, pc,
          format("%s with mask 0x%08x, but lane %d waits at %s for %s with mask 0x%08x", what, mask,
                 other.index % 32, source_line(other.pc, *launch).c_str(), other.what, g.mask));
    }
  }
  if (!group) group = &warp.groups.emplace_back(WarpGroup{run, mask, 0});
  group->arrived |= me->bit();
  if (group->arrived != mask) {
    me->state = State::WarpOp;
    return block_and_switch(me);
  }
  warp.groups.erase(warp.groups.begin() + (group - warp.groups.data()));
  idle_rounds = 0;
  ++traffic.instructions[what];
  run(*this, lanes + me->warp() * 32, mask);
  if (mask == warp.alive) flush(me->warp());
  for (uint32_t m = mask & ~me->bit(); m; m &= m - 1)
    make_runnable(lanes + me->warp() * 32 + std::countr_zero(m));
  block_and_switch(me);
}

int Block::barrier(const char* what, Pc pc, int id, int threads, bool wait, Vote vote,
                   int predicate) {
  Lane* me = current_lane();
  if (threads <= 0) threads = n_lanes;
  if (threads % 32 && threads != n_lanes)
    fail(me, pc, format("%s of %d threads; expected a multiple of 32", what, threads));
  if (id < 0 || id > kSyncThreads) fail(me, pc, format("%s: no barrier has the id %d", what, id));
  NamedBarrier& b = barriers[id];
  if (b.arrived && b.expected != threads)
    fail(me, pc, format("%s of %d threads, but others said %d", what, threads, b.expected));
  // All lanes of a warp arrive at the same barrier at the same place: the instruction is aligned.
  const int first = me->warp() * 32;
  for (int j = 0; j < 32 && first + j < n_lanes; ++j) {
    const Lane& other = lanes[first + j];
    const bool waits_elsewhere =
        other.state == State::Barrier && (other.pc != pc || other.barrier_id != id);
    if (waits_elsewhere)
      fail(me, pc,
           format("divergent barrier: lane %d waits at %s", j,
                  source_line(other.pc, *launch).c_str()));
    if (other.state == State::Done)
      fail(me, pc, format("divergent barrier: lane %d of this warp has returned", j));
  }
  b.expected = threads;
  if (!b.joined) {
    b.joined = fresh_clocks();
    b.joined->holders = 1;
    b.joined->at = me->clocks->at;
  }
  join(b.joined, me);
  ++me->clock;
  ++b.arrived;
  b.votes += predicate != 0;
  if (first == me->index) ++traffic.instructions[what];
  me->pc = pc;
  me->what = what;
  me->barrier_id = id;
  if (wait) b.waiting.push_back(me);
  if (b.arrived < threads) {
    if (!wait) return 0;
    me->state = State::Barrier;
    block_and_switch(me);
  } else {
    idle_rounds = 0;
    for (Lane* lane : b.waiting) {
      hold(lane, b.joined);
      lane->args.u32[0] = vote == Vote::Count ? b.votes
                          : vote == Vote::And ? b.votes == threads
                                              : b.votes > 0;
      if (lane != me) make_runnable(lane);
    }
    release(b.joined);
    b = {};
    for (int w = 0; w * 32 < n_lanes; ++w)
      if (threads == n_lanes || w == me->warp()) flush(w);
    if (!wait) return 0;
    block_and_switch(me);
  }
  return static_cast<int>(me->args.u32[0]);
}

// --- the kernel's side --------------------------------------------------------------------------
Index3 thread_idx() {
  Lane* me = current_lane();
  return me ? me->thread : Index3{};
}
Index3 block_idx() {
  Lane* me = current_lane();
  return me ? me->block->index : Index3{};
}
Index3 block_dim() {
  Lane* me = current_lane();
  return me ? me->block->launch->config.block : Index3{};
}
Index3 grid_dim() {
  Lane* me = current_lane();
  return me ? me->block->launch->config.grid : Index3{};
}
void* dynamic_shared() { return current_lane()->block->dynamic; }
uint32_t active_mask() {
  Lane* me = current_lane();
  return me->block->warps[me->warp()].alive;
}

int sync_threads(Vote vote, int predicate) {
  return current_lane()->block->barrier("__syncthreads", EMU_PC, kSyncThreads, 0, true, vote,
                                        predicate);
}
void barrier_sync(int id, int threads) {
  current_lane()->block->barrier("bar.sync", EMU_PC, id, threads, true, Vote::None, 0);
}
void barrier_arrive(int id, int threads) {
  current_lane()->block->barrier("bar.arrive", EMU_PC, id, threads, false, Vote::None, 0);
}

void nanosleep() {
  Lane* me = current_lane();
  me->pc = EMU_PC;
  me->what = "polling";
  me->state = State::Spinning;
  me->block->block_and_switch(me);
}
void count(const char* instruction) {
  Lane* me = current_lane();
  if (me->index % 32 == 0) ++me->block->traffic.instructions[instruction];
}
void trap(const char* message) {
  Lane* me = current_lane();
  me->block->fail(me, EMU_PC, message);
}

}  // namespace emu
