// Every load and store of a kernel: is it in bounds, aligned, ordered after what others did there?
//
// Shared memory has a cell per word that remembers who wrote it last and two that read it. An
// access is a race unless a barrier orders it after those (vector clocks, as in FastTrack, Flanagan
// and Freund 2009).
#include <atomic>

#include "emulator/machine.h"

namespace emu {

int64_t Block::shared_offset(uintptr_t address) const {
  const uintptr_t d = address - reinterpret_cast<uintptr_t>(dynamic);
  if (d < kStatics) return static_cast<int64_t>(d);
  const uintptr_t s = address - reinterpret_cast<uintptr_t>(statics);
  if (s < static_bytes) return static_cast<int64_t>(kStatics + s);
  return -1;
}

Cell& Block::cell_at(int64_t offset) {
  const auto o = static_cast<size_t>(offset);
  return cells[(o < kStatics ? o : o - kStatics + (dynamic_bytes + 3) / 4 * 4) / 4];
}

const Span* Block::span_of(uintptr_t address, int bytes) const {
  for (const Span& span : launch->spans)
    if (address - span.base < span.bytes && address - span.base + bytes <= span.bytes) return &span;
  return nullptr;
}

namespace {
const char* verb(bool write) { return write ? "write" : "read"; }

std::string out_of_bounds(const Block& b, uintptr_t address, int bytes, bool write) {
  const Span* nearest = nullptr;
  int64_t distance = 0;
  for (const Span& s : b.launch->spans) {
    const int64_t past = static_cast<int64_t>(address - s.base);
    const int64_t away = past < 0 ? -past : past - static_cast<int64_t>(s.bytes);
    if (!nearest || std::abs(away) < distance) nearest = &s, distance = std::abs(away);
  }
  std::string message = format("out-of-bounds %s of %d bytes at %p", verb(write), bytes,
                               reinterpret_cast<void*>(address));
  if (nearest)
    message += format(", at byte %lld of %s, which has %zu",
                      static_cast<long long>(address - nearest->base), nearest->name.c_str(),
                      nearest->bytes);
  return message;
}
}  // namespace

void Block::access(Lane* me, const void* pointer, int bytes, bool write, Pc pc, Kind kind) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const int64_t offset = shared_offset(address);
  int16_t span_index = -1;
  if (offset < 0) {
    const Span* span = span_of(address, bytes);
    if (!span) {
      // The kernel's parameters, and tables of constants.
      if (address - reinterpret_cast<uintptr_t>(launch->arguments) < launch->argument_bytes) return;
      if (!write && address - launch->base < launch->end - launch->base) return;
      fail(me, pc, out_of_bounds(*this, address, bytes, write));
    }
    span_index = static_cast<int16_t>(span - launch->spans.data());
  }
  if (bytes <= 16 && (address & (std::bit_ceil(static_cast<unsigned>(bytes)) - 1)) &&
      std::has_single_bit(static_cast<unsigned>(bytes)))
    fail(me, pc,
         format("misaligned %s of %d bytes at %p, which is %d bytes past a multiple of %d",
                verb(write), bytes, pointer, static_cast<int>(address % bytes), bytes));
  if (offset >= 0) {
    shared_access(me, static_cast<size_t>(offset), bytes, write, pc, false);
  } else if (kind == Kind::Plain) {
    global_access(me, address, bytes, write, pc);
  } else if (kind == Kind::Volatile) {
    if (write)
      release(me, address);
    else if (std::find(volatile_reads.begin(), volatile_reads.end(), address) ==
             volatile_reads.end())
      volatile_reads.push_back(address);
  }
  me->log.push_back({address, pc, span_index, static_cast<uint16_t>(bytes), write});
  if (me->log.size() >= 256) {
    me->pc = pc;
    me->what = "memory access";
    me->state = State::LogFull;
    block_and_switch(me);
  }
}

std::string Block::shared_place(size_t offset) const {
  return offset < kStatics ? format("byte %zu of dynamic shared memory", offset)
                           : format("byte %zu of static shared memory", offset - kStatics);
}

// Makes nothing of this memory accessible: cuda.h leaves such a gap before each __shared__
// variable.
void Block::guard(Lane* me, const volatile void* begin, int bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const int64_t offset = shared_offset(address);
  if (offset < 0) return;  // a variable of a function that runs on the host
  for (int i = 0; i < bytes; i += 4) {
    Epoch& write = cell_at(offset + i).write;
    if (write.in_flight == kGuard) return;
    write = {me->clock, static_cast<uint16_t>(me->index), 0xf, kGuard, 0};
  }
}

void Block::shared_access(Lane* me, size_t offset, int bytes, bool write, Pc pc, bool async) {
  if (offset < kStatics && offset + bytes > dynamic_bytes)
    fail(me, pc,
         format("out-of-bounds %s of %d bytes at byte %zu of the block's %zu bytes of "
                "dynamic shared memory",
                verb(write), bytes, offset, dynamic_bytes));
  const auto place = static_cast<uint32_t>(pc - launch->base);
  Cell* const first = &cell_at(static_cast<int64_t>(offset)) - offset / 4;
  for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    const size_t begin = std::max(offset, word * 4), end = std::min(offset + bytes, word * 4 + 4);
    const auto mask = static_cast<uint8_t>(((1u << (end - begin)) - 1) << (begin - word * 4));
    Cell& cell = first[word];
    auto race = [&](const Epoch& e, bool other_write) {
      const Lane& other = lanes[e.lane];
      if (e.in_flight == kGuard)
        fail(me, pc,
             format("out-of-bounds %s of %d bytes at %s, outside of every __shared__ variable",
                    verb(write), bytes, shared_place(offset).c_str()));
      if (e.in_flight)
        fail(me, pc,
             format("%s of %s that an asynchronous copy by warp %d, lane %d at %s has not "
                    "delivered: it was not waited for",
                    verb(write), shared_place(offset).c_str(), other.warp(), other.index % 32,
                    source_line(launch->base + e.pc, *launch).c_str()));
      fail(
          me, pc,
          format("race at %s: this %s is not ordered by a barrier after the %s by warp %d, lane %d "
                 "at %s",
                 shared_place(offset).c_str(), verb(write), verb(other_write), other.warp(),
                 other.index % 32, source_line(launch->base + e.pc, *launch).c_str()));
    };
    const Epoch& w = cell.write;
    if (w.bytes & mask && (w.in_flight || !ordered(w, me))) race(w, true);
    if (write) {
      for (const Epoch& r : cell.reads)
        if (r.bytes & mask && !ordered(r, me)) race(r, false);
      const bool same = w.lane == me->index && w.clock == me->clock && w.in_flight == async;
      cell.write = {me->clock, static_cast<uint16_t>(me->index),
                    static_cast<uint8_t>(same ? w.bytes | mask : mask), async, place};
    } else {
      // Keep two reads that this one does not follow, of different warps if there are.
      Epoch& a = cell.reads[0];
      Epoch& b = cell.reads[1];
      Epoch& slot = !a.bytes || ordered(a, me) ? a : b;
      const bool same = slot.lane == me->index && slot.clock == me->clock;
      slot = {me->clock, static_cast<uint16_t>(me->index),
              static_cast<uint8_t>(same ? slot.bytes | mask : mask), 0, place};
    }
  }
}

// Puts the accesses that the lanes of a warp made at the same place together to the requests that
// the hardware would see. Where lanes have parted, the one furthest behind in the code goes first.
void Block::flush(int warp) {
  Lane* first = lanes + warp * 32;
  const int n = std::min(32, n_lanes - warp * 32);
  size_t at[32] = {};
  while (true) {
    const Access* next = nullptr;
    for (int i = 0; i < n; ++i)
      if (at[i] < first[i].log.size()) {
        const Access& a = first[i].log[at[i]];
        if (!next || a.pc < next->pc) next = &a;
      }
    if (!next) break;
    const Access* together[32];
    int count = 0;
    for (int i = 0; i < n; ++i)
      if (at[i] < first[i].log.size()) {
        const Access& a = first[i].log[at[i]];
        if (a.pc == next->pc && a.write == next->write && a.span == next->span &&
            a.bytes == next->bytes) {
          together[count++] = &a;
          ++at[i];
        }
      }
    traffic.request(together, count, next->span < 0 ? 0 : launch->spans[next->span].base);
  }
  for (int i = 0; i < n; ++i) first[i].log.clear();
}

namespace {
using Kind = Block::Kind;
inline void hook(const void* address, int bytes, bool write, Pc pc, Kind kind = Kind::Plain) {
  Lane* me = current_lane();
  if (!me) return;  // a thread of the host
  if (on_a_stack(address)) return;
  // What is larger than an instruction can move is moved by several.
  const char* at = static_cast<const char*>(address);
  for (; bytes > 16; bytes -= 16, at += 16) me->block->access(me, at, 16, write, pc, kind);
  me->block->access(me, at, bytes, write, pc, kind);
}
}  // namespace

void load(void* registers, const void* memory, int bytes) {
  hook(memory, bytes, false, EMU_PC);
  std::memcpy(registers, memory, bytes);
}
void store(void* memory, const void* registers, int bytes) {
  hook(memory, bytes, true, EMU_PC);
  std::memcpy(memory, registers, bytes);
}

// --- atomics: their own lock serves for all blocks
// ------------------------------------------------
namespace {
std::atomic_flag g_atomics = ATOMIC_FLAG_INIT;
struct AtomicSection {
  AtomicSection() {
    while (g_atomics.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~AtomicSection() { g_atomics.clear(std::memory_order_release); }
};

template <class T>
T combine(Atomic op, T old, T value, T compare) {
  switch (op) {
    case Atomic::Add: return static_cast<T>(old + value);
    case Atomic::Min: return std::min(old, value);
    case Atomic::Max: return std::max(old, value);
    case Atomic::Exchange: return value;
    case Atomic::CompareExchange: return old == compare ? value : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == Atomic::And) return old & value;
    if (op == Atomic::Or) return old | value;
    if (op == Atomic::Xor) return old ^ value;
  }
  return old;
}
template <class T>
uint64_t update(Atomic op, void* at, uint64_t value, uint64_t compare) {
  T old, v, c;
  std::memcpy(&v, &value, sizeof(T));
  std::memcpy(&c, &compare, sizeof(T));
  AtomicSection section;
  std::memcpy(&old, at, sizeof(T));
  const T result = combine(op, old, v, c);
  std::memcpy(at, &result, sizeof(T));
  uint64_t bits = 0;
  std::memcpy(&bits, &old, sizeof(T));
  return bits;
}
}  // namespace

namespace {
uint64_t update(Atomic op, Number type, void* at, uint64_t value, uint64_t compare) {
  switch (type) {
    case Number::S32: return update<int32_t>(op, at, value, compare);
    case Number::U32: return update<uint32_t>(op, at, value, compare);
    case Number::U64: return update<uint64_t>(op, at, value, compare);
    case Number::F32: return update<float>(op, at, value, compare);
    case Number::F64: return update<double>(op, at, value, compare);
  }
  return 0;
}
}  // namespace

uint64_t atomic(Atomic op, Number type, void* at, uint64_t value, uint64_t compare, int order) {
  Lane* me = current_lane();
  const int bytes = type == Number::U64 || type == Number::F64 ? 8 : 4;
  const auto address = reinterpret_cast<uintptr_t>(at);
  const Pc pc = EMU_PC;
  if (address % bytes) me->block->fail(me, pc, format("misaligned atomic at %p", at));
  if (const int64_t offset = me->block->shared_offset(address); offset < 0) {
    if (!me->block->span_of(address, bytes))
      me->block->fail(me, pc, out_of_bounds(*me->block, address, bytes, true));
  } else if (static_cast<size_t>(offset) < kStatics &&
             offset + bytes > static_cast<int64_t>(me->block->dynamic_bytes)) {
    me->block->fail(me, pc, "out-of-bounds atomic in shared memory");
  }
  ++me->block->traffic.instructions["atomic"];
  // Whoever sees the new value knows what came before, so that is published first.
  if (order & kRelease) me->block->fence(me);
  me->block->release(me, address);
  const uint64_t before = update(op, type, at, value, compare);
  me->block->acquire(address);
  return before;
}

uint32_t load_acquire(const uint32_t* at) {
  hook(at, 4, false, EMU_PC, Kind::Atomic);
  uint32_t value;
  {
    AtomicSection section;
    std::memcpy(&value, at, 4);
  }
  current_lane()->block->acquire(reinterpret_cast<uintptr_t>(at));
  nanosleep();  // whoever polls lets others run
  return value;
}
void store_release(uint32_t* at, uint32_t value) {
  Lane* me = current_lane();
  hook(at, 4, true, EMU_PC, Kind::Atomic);
  me->block->fence(me);
  me->block->release(me, reinterpret_cast<uintptr_t>(at));
  AtomicSection section;
  std::memcpy(at, &value, 4);
}
void fence() {
  Lane* me = current_lane();
  me->block->fence(me);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}
void guard(const volatile void* begin, int bytes) {
  if (Lane* me = current_lane()) me->block->guard(me, begin, bytes);
}

}  // namespace emu

// --- what the compiler inserts with -fsanitize=thread
// ---------------------------------------------
#define HOOK(bytes)                                                                          \
  EMU_API void __tsan_read##bytes(void* p) { emu::hook(p, bytes, false, EMU_PC); }           \
  EMU_API void __tsan_write##bytes(void* p) { emu::hook(p, bytes, true, EMU_PC); }           \
  EMU_API void __tsan_unaligned_read##bytes(void* p) { emu::hook(p, bytes, false, EMU_PC); } \
  EMU_API void __tsan_unaligned_write##bytes(void* p) { emu::hook(p, bytes, true, EMU_PC); } \
  EMU_API void __tsan_volatile_read##bytes(void* p) {                                        \
    emu::hook(p, bytes, false, EMU_PC, emu::Kind::Volatile);                                 \
  }                                                                                          \
  EMU_API void __tsan_volatile_write##bytes(void* p) {                                       \
    emu::hook(p, bytes, true, EMU_PC, emu::Kind::Volatile);                                  \
  }
extern "C" {
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
EMU_API void __tsan_read_range(void* p, size_t n) {
  emu::hook(p, static_cast<int>(n), false, EMU_PC);
}
EMU_API void __tsan_write_range(void* p, size_t n) {
  emu::hook(p, static_cast<int>(n), true, EMU_PC);
}
EMU_API void __tsan_init() {}
EMU_API void __tsan_func_entry(void*) {}
EMU_API void __tsan_func_exit() {}
EMU_API void __tsan_vptr_update(void**, void*) {}
EMU_API void __tsan_vptr_read(void**) {}
}
