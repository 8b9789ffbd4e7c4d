// Operations of a whole warp: run once, when the last lane of the mask has come. A lane leaves its
// arguments in `args` and finds its result there.
#include <bit>

#include "emulator/machine.h"

namespace emu {
namespace {

constexpr uint32_t kAll = 0xffffffffu;

bool order(Block& block, Lane* lanes, uint32_t mask) {
  Clocks* joined = block.copy(lanes[std::countr_zero(mask)].clocks);
  block.join(joined, lanes, mask);
  for_lanes(mask, [&](int i) { block.hold(lanes + i, joined); });
  return true;
}

// args: value, argument, width << 8 | mode
bool do_shuffle(Block& block, Lane* lanes, uint32_t mask) {
  uint64_t result[32];
  for_lanes(mask, [&](int i) {
    const int argument = static_cast<int>(lanes[i].args.u64[1]);
    const int width = static_cast<int>(lanes[i].args.u64[2] >> 8);
    const int base = i & ~(width - 1);
    int from = i;
    switch (static_cast<Shuffle>(lanes[i].args.u64[2] & 0xff)) {
      case Shuffle::Index: from = base + (argument & (width - 1)); break;
      case Shuffle::Up: from = i - argument < base ? i : i - argument; break;
      case Shuffle::Down: from = i + argument >= base + width ? i : i + argument; break;
      case Shuffle::Xor: from = (i ^ argument) >= base + width ? i : i ^ argument; break;
    }
    if (!(mask >> from & 1))
      block.fail(lanes + i, lanes[i].pc,
                 format("shuffle reads lane %d, an inactive lane: it is not in the mask 0x%08x",
                        from, mask));
    result[i] = lanes[from].args.u64[0];
  });
  for_lanes(mask, [&](int i) { lanes[i].args.u64[0] = result[i]; });
  return true;
}

bool do_ballot(Block&, Lane* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for_lanes(mask, [&](int i) { votes |= lanes[i].args.u32[0] ? 1u << i : 0; });
  for_lanes(mask, [&](int i) { lanes[i].args.u32[0] = votes; });
  return true;
}

bool do_match(Block&, Lane* lanes, uint32_t mask) {
  uint32_t result[32];
  for_lanes(mask, [&](int i) {
    result[i] = 0;
    for_lanes(mask, [&](int j) {
      result[i] |= lanes[i].args.u64[0] == lanes[j].args.u64[0] ? 1u << j : 0;
    });
  });
  for_lanes(mask, [&](int i) { lanes[i].args.u32[0] = result[i]; });
  return true;
}

uint32_t combine(Reduce op, uint32_t a, uint32_t b) {
  const auto sa = static_cast<int32_t>(a), sb = static_cast<int32_t>(b);
  switch (op) {
    case Reduce::Add: return a + b;
    case Reduce::Min: return std::min(a, b);
    case Reduce::Max: return std::max(a, b);
    case Reduce::MinSigned: return static_cast<uint32_t>(std::min(sa, sb));
    case Reduce::MaxSigned: return static_cast<uint32_t>(std::max(sa, sb));
    case Reduce::And: return a & b;
    case Reduce::Or: return a | b;
    case Reduce::Xor: return a ^ b;
  }
  return 0;
}

bool do_reduce(Block&, Lane* lanes, uint32_t mask) {
  const int first = std::countr_zero(mask);
  uint32_t value = lanes[first].args.u32[0];
  for_lanes(mask & (mask - 1), [&](int i) {
    value = combine(static_cast<Reduce>(lanes[i].args.u32[1]), value, lanes[i].args.u32[0]);
  });
  for_lanes(mask, [&](int i) { lanes[i].args.u32[0] = value; });
  return true;
}

// args: row address, matrices, transposed. Lanes 8 m to 8 m + 7 bring the rows of matrix m; lane l
// takes row l / 4, columns 2 (l % 4) and the next, or with .trans the same of the transpose.
template <int kMatrices>
bool do_ldmatrix(Block& block, Lane* lanes, uint32_t) {
  same_place(block, lanes, kAll);
  uint16_t matrix[kMatrices][8][8];
  for (int l = 0; l < 8 * kMatrices; ++l) {
    Lane& lane = lanes[l];
    const auto address = reinterpret_cast<uintptr_t>(lane.args.pointer);
    const int64_t offset = block.shared_offset(address);
    if (offset < 0)
      block.fail(&lane, lane.pc,
                 format("ldmatrix: row address %p is not in shared memory", lane.args.pointer));
    if (address % 16)
      block.fail(
          &lane, lane.pc,
          format("misaligned ldmatrix: row address %p is not a multiple of 16", lane.args.pointer));
    block.shared_access(&lane, static_cast<size_t>(offset), 16, false, lane.pc, false);
    lane.log.push_back({address, lane.pc, -1, 16, false});
    std::memcpy(matrix[l / 8][l % 8], lane.args.pointer, 16);
  }
  const bool transposed = lanes[0].args.u32[2];
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < kMatrices; ++m) {
      const int r = l / 4, c = l % 4 * 2;
      const uint32_t lo = transposed ? matrix[m][c][r] : matrix[m][r][c];
      const uint32_t hi = transposed ? matrix[m][c + 1][r] : matrix[m][r][c + 1];
      lanes[l].args.u32[m] = lo | hi << 16;
    }
  return true;
}

// All at once and without branches, so that the compiler vectorizes it. Exact, as to_float.
template <Half kType, size_t N>
void widen(const uint16_t (&halves)[N], float (&out)[N]) {
  for (size_t i = 0; i < N; ++i) {
    const uint32_t bits = halves[i], sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if constexpr (kType == Half::BF16) {
      out[i] = std::bit_cast<float>(bits << 16);
    } else {
      const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f);
      const uint32_t special = 0x7f800000u | rest << 13;
      out[i] = std::bit_cast<float>((rest >= 0x7c00u ? special : finite) | sign);
    }
  }
}

using Row = float __attribute__((vector_size(32)));

// args: a[4], b[2], c[4]. Lane l holds, with g = l / 4 and t = l % 4: of A (16 x 16) rows g and
// g + 8, columns 2 t, 2 t + 1 and those + 8; of B (16 x 8) rows 2 t, 2 t + 1 and those + 8 of
// column g; of C (16 x 8) rows g and g + 8, columns 2 t and 2 t + 1.
template <Half kType>
bool do_mma16(Block& block, Lane* lanes, uint32_t) {
  same_place(block, lanes, kAll);
  uint16_t ha[16 * 16], hb[16 * 8];
  float a[16 * 16], b[16 * 8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4 * 2;
    const auto& u = lanes[l].args.u32;
    for (int i = 0; i < 4; ++i) std::memcpy(ha + (g + i % 2 * 8) * 16 + t + i / 2 * 8, u + i, 4);
    for (int i = 0; i < 4; ++i)
      hb[(t + i / 2 * 8 + i % 2) * 8 + g] = static_cast<uint16_t>(u[4 + i / 2] >> i % 2 * 16);
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][t + i % 2] = lanes[l].args.f32[6 + i];
  }
  widen<kType>(ha, a);
  widen<kType>(hb, b);
  for (int i = 0; i < 16; ++i) {
    Row sum, row;
    std::memcpy(&sum, c[i], sizeof(sum));
    for (int k = 0; k < 16; ++k) {
      std::memcpy(&row, b + k * 8, sizeof(row));
      sum += a[i * 16 + k] * row;
    }
    std::memcpy(c[i], &sum, sizeof(sum));
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) lanes[l].args.f32[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  return true;
}

// args: a[4], b[2], c[4]. As above with four bytes where there are two halves: A (16 x 32) columns
// 4 t to 4 t + 3 and those + 16, B (32 x 8) rows the same.
template <class A, class B>
bool do_mma32(Block& block, Lane* lanes, uint32_t) {
  same_place(block, lanes, kAll);
  int a[16][32], b[32][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    const auto& u = lanes[l].args.u32;
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < 4; ++r)
        a[g + r % 2 * 8][4 * t + r / 2 * 16 + i] = static_cast<A>(u[r] >> 8 * i);
      for (int r = 0; r < 2; ++r) b[4 * t + 16 * r + i][g] = static_cast<B>(u[4 + r] >> 8 * i);
      c[g + i / 2 * 8][2 * t + i % 2] = static_cast<int>(u[6 + i]);
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 32; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i)
      lanes[l].args.u32[i] = static_cast<uint32_t>(c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
  return true;
}

}  // namespace

void sync_warp(uint32_t mask) { current_lane()->block->warp_op("__syncwarp", EMU_PC, mask, order); }

uint64_t shuffle(Shuffle mode, uint32_t mask, uint64_t value, int argument, int width) {
  Lane* me = current_lane();
  me->args.u64[0] = value;
  me->args.u64[1] = static_cast<uint64_t>(argument);
  me->args.u64[2] = static_cast<uint64_t>(width) << 8 | static_cast<uint64_t>(mode);
  me->block->warp_op("shuffle", EMU_PC, mask, do_shuffle);
  return me->args.u64[0];
}
uint32_t ballot(uint32_t mask, int predicate) {
  Lane* me = current_lane();
  me->args.u32[0] = predicate != 0;
  me->block->warp_op("vote", EMU_PC, mask, do_ballot);
  return me->args.u32[0];
}
uint32_t match_any(uint32_t mask, uint64_t value) {
  Lane* me = current_lane();
  me->args.u64[0] = value;
  me->block->warp_op("match", EMU_PC, mask, do_match);
  return me->args.u32[0];
}
uint32_t match_all(uint32_t mask, uint64_t value, int* predicate) {
  Lane* me = current_lane();
  me->args.u64[0] = value;
  me->block->warp_op("match", EMU_PC, mask, do_match);
  *predicate = me->args.u32[0] == mask;
  return *predicate ? mask : 0;
}
uint32_t reduce(Reduce op, uint32_t mask, uint32_t value) {
  Lane* me = current_lane();
  me->args.u32[0] = value;
  me->args.u32[1] = static_cast<uint32_t>(op);
  me->block->warp_op("redux", EMU_PC, mask, do_reduce);
  return me->args.u32[0];
}

U4 ldmatrix(int matrices, bool transposed, const void* row) {
  Lane* me = current_lane();
  me->args.pointer = row;
  me->args.u32[2] = transposed;
  me->block->warp_op("ldmatrix", EMU_PC, kAll,
                     matrices == 1   ? do_ldmatrix<1>
                     : matrices == 2 ? do_ldmatrix<2>
                                     : do_ldmatrix<4>);
  const auto& r = me->args.u32;
  return {{r[0], r[1], r[2], r[3]}};
}

namespace {
template <class C>
Lane* leave_operands(const U4& a, const U2& b, const C& c) {
  Lane* me = current_lane();
  std::memcpy(me->args.u32, a.v, 16);
  std::memcpy(me->args.u32 + 4, b.v, 8);
  std::memcpy(me->args.u32 + 6, c.v, 16);
  return me;
}
}  // namespace

F4 mma_m16n8k16(Half type, U4 a, U2 b, F4 c) {
  Lane* me = leave_operands(a, b, c);
  me->block->warp_op("mma.m16n8k16", EMU_PC, kAll,
                     type == Half::F16 ? do_mma16<Half::F16> : do_mma16<Half::BF16>);
  const auto& r = me->args.f32;
  return {{r[0], r[1], r[2], r[3]}};
}
S4 mma_m16n8k32(bool a_signed, bool b_signed, U4 a, U2 b, S4 c) {
  Lane* me = leave_operands(a, b, c);
  me->block->warp_op("mma.m16n8k32", EMU_PC, kAll,
                     a_signed
                         ? (b_signed ? do_mma32<int8_t, int8_t> : do_mma32<int8_t, uint8_t>)
                         : (b_signed ? do_mma32<uint8_t, int8_t> : do_mma32<uint8_t, uint8_t>));
  S4 result;
  std::memcpy(result.v, me->args.u32, 16);
  return result;
}

}  // namespace emu
