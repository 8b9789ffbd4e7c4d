// Who runs next, and who waits for whom. A lane runs until it has to wait; then another, chosen at
// random, goes on. There is no central loop: lanes switch to each other directly, and to the thread
// of the host only when the block ends, fails or is stuck.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>

#include "emulator/fiber.h"
#include "emulator/machine.h"

namespace emu {
namespace {

constexpr int kMaxSlots = 16;
constexpr int kSyncThreads = 16;  // the barrier of __syncthreads
constexpr int64_t kMaxIdleRounds = 20000;

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

namespace {
constexpr size_t kAllStacks = kMaxSlots * kMaxLanes * kStackBytes;
size_t stack_offset(const void* address) {  // huge outside of the stacks
  return static_cast<size_t>(static_cast<const char*>(address) - g_stacks);
}
}  // namespace

bool on_a_stack(const void* address) { return stack_offset(address) < kAllStacks; }

Lane* current_lane() {
  const size_t offset = stack_offset(__builtin_frame_address(0));
  return g_stacks && offset < kAllStacks ? g_lanes + offset / kStackBytes : nullptr;
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

Clocks* Block::copy(const Clocks* from) {
  Clocks* c = fresh_clocks();
  std::copy_n(from->at.begin(), n_lanes, c->at.begin());
  return c;
}

void Block::join(Clocks* into, const Clocks* from) {
  for (int i = 0; i < n_lanes; ++i) into->at[i] = std::max(into->at[i], from->at[i]);
}

void Block::join(Clocks* into, Lane* warp, uint32_t mask) {
  const Clocks* last = nullptr;  // lanes that left the same barrier hold the same clocks
  for_lanes(mask, [&](int i) {
    if (warp[i].clocks != last) join(into, warp[i].clocks);
    last = warp[i].clocks;
  });
  for_lanes(mask, [&](int i) { into->at[warp[i].index] = warp[i].clock++; });
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
  fenced.clear();
  known.clear();
  learned.clear();
  volatile_reads.clear();
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
  if (!failed) check_copies();
  if (std::exchange(idle, false)) ++*l.busy;
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
  if (any || !polled || ++idle_rounds < kMaxIdleRounds) {
    if (std::exchange(idle, false)) ++*launch->busy;
    return any || polled;
  }
  // Perhaps a block on another thread of the host has what this one waits for.
  if (!std::exchange(idle, true)) {
    --*launch->busy;
    last_polls = 100;  // for what others did before they too began to wait
  }
  std::this_thread::yield();
  return *launch->busy > 0 || --last_polls > 0;
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
      message = format("divergent %s with mask 0x%08x waits for lane %d, which ", lane.what,
                       lane.mask, j);
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
  Lane* const first = lanes + me->warp() * 32;
  if (run(*this, first, mask)) {
    if (mask == warp.alive) flush(me->warp());
    for_lanes(mask, [&](int i) { make_runnable(first + i); });
  }
  block_and_switch(me);
}

void same_place(Block& block, Lane* lanes, uint32_t mask) {
  const Lane& first = lanes[std::countr_zero(mask)];
  for_lanes(mask, [&](int i) {
    if (lanes[i].pc != first.pc)
      block.fail(lanes + i, lanes[i].pc,
                 format("divergent %s: lane %d executes another one, at %s", lanes[i].what,
                        first.index % 32, source_line(first.pc, *block.launch).c_str()));
  });
}

// A whole warp arrives at a barrier. Each lane brings the barrier's id, its size, whether it waits,
// and its vote.
bool Block::arrive(Lane* warp, uint32_t mask) {
  same_place(*this, warp, mask);
  Lane* me = current_lane();
  const auto [id, threads, waits, vote] =
      std::array{me->args.u32[0], me->args.u32[1], me->args.u32[2], me->args.u32[3]};
  if (id > kSyncThreads)
    fail(me, me->pc, format("%s: no barrier has the id %d", me->what, int(id)));
  NamedBarrier& b = barriers[id];
  if (threads == 0 || (threads % 32 && threads != static_cast<uint32_t>(n_lanes)))
    fail(me, me->pc, format("%s of %u threads; expected a multiple of 32", me->what, threads));
  if (b.arrived && b.expected != static_cast<int>(threads))
    fail(me, me->pc, format("%s of %u threads, but others said %d", me->what, threads, b.expected));
  b.expected = static_cast<int>(threads);
  if (!b.joined) {
    b.joined = copy(me->clocks);
    b.joined->holders = 1;
  }
  join(b.joined, warp, mask);
  for_lanes(mask, [&](int i) {
    Lane& lane = warp[i];
    ++b.arrived;
    b.votes += lane.args.u32[4] != 0;
    if (waits) {
      b.waiting.push_back(&lane);
      lane.state = State::Barrier;
    }
  });
  if (b.arrived > b.expected)
    fail(me, me->pc,
         format("%s: %d threads came, %d were expected", me->what, b.arrived, b.expected));
  flush(me->warp());
  if (b.arrived < b.expected) return !waits;
  for (Lane* lane : b.waiting) {
    hold(lane, b.joined);
    switch (static_cast<Vote>(vote)) {
      case Vote::None: break;
      case Vote::Count: lane->args.u32[0] = static_cast<uint32_t>(b.votes); break;
      case Vote::And: lane->args.u32[0] = b.votes == b.expected; break;
      case Vote::Or: lane->args.u32[0] = b.votes > 0; break;
    }
    make_runnable(lane);
  }
  release(b.joined);
  b = {};
  return true;
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

namespace {
bool do_barrier(Block& block, Lane* lanes, uint32_t mask) { return block.arrive(lanes, mask); }

int barrier(const char* what, Pc pc, int id, int threads, bool waits, Vote vote, int predicate) {
  Lane* me = current_lane();
  const int first = me->warp() * 32, left = me->block->n_lanes - first;
  me->args.u32[0] = static_cast<uint32_t>(id);
  me->args.u32[1] = static_cast<uint32_t>(threads);
  me->args.u32[2] = waits;
  me->args.u32[3] = static_cast<uint32_t>(vote);
  me->args.u32[4] = predicate != 0;
  me->block->warp_op(what, pc, left >= 32 ? ~0u : (1u << left) - 1, do_barrier);
  return static_cast<int>(me->args.u32[0]);
}
}  // namespace

int sync_threads(Vote vote, int predicate) {
  const int threads = current_lane()->block->n_lanes;
  return barrier("barrier __syncthreads", EMU_PC, kSyncThreads, threads, true, vote, predicate);
}
void barrier_sync(int id, int threads) {
  barrier("barrier bar.sync", EMU_PC, id, threads, true, Vote::None, 0);
}
void barrier_arrive(int id, int threads) {
  barrier("barrier bar.arrive", EMU_PC, id, threads, false, Vote::None, 0);
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
