#pragma once
#include "core/quant_fragments.h"
#include "core/tensor.h"

namespace pyllm::cuda {

// How the work is divided, whatever the number of activation rows: a tile is 128 rows of the
// weight, a step 64 k of it. The steps of all tiles, one tile after the other, are cut into as many
// equal ranges as there are blocks; with groups of 128 steps come in pairs, of one group.
struct QuantMatmulPlan {
  static constexpr int kTileRows = 128, kStepDepth = 64, kMaxTiles = 1 << 16;
  static constexpr int kMinSteps = 4;  // for a block

  int64_t tiles, steps;  // steps of a tile
  int blocks;

  // Whether the kernel can count them.
  bool fits() const { return tiles <= kMaxTiles && tiles * steps < int64_t{1} << 31; }

  static QuantMatmulPlan of(const QuantFragments& w, int multiprocessors) {
    QuantMatmulPlan p{(w.n + kTileRows - 1) / kTileRows, (w.k + kStepDepth - 1) / kStepDepth, 1};
    if (w.span_cells() == 4) p.steps = 2 * w.spans();
    const int64_t most = p.tiles * p.steps / kMinSteps;
    p.blocks = static_cast<int>(most < 1 ? 1 : most < multiprocessors ? most : multiprocessors);
    return p;
  }
  // A launch multiplies 8, 16, 32, 64 or 128 rows of activations; with groups of 16, which are
  // rare (Q6_K), 8 or 64. More rows are more launches.
  static int most_rows(const QuantFragments& w) { return w.span_groups() == 2 ? 64 : 128; }
  static int padded_rows(int64_t rows, const QuantFragments& w) {
    int padded = 8;
    while (padded < rows && padded < most_rows(w)) padded *= w.span_groups() == 2 ? 8 : 2;
    return padded;
  }
  // Floats of scratch: a block leaves at most two tiles to be added up with those of others.
  int64_t partial_size(int64_t rows, const QuantFragments& w) const {
    return int64_t{2} * blocks * kTileRows * padded_rows(rows, w);
  }
};

// y = x w^T + bias: x [T, K] of f16 or bf16, rows aligned to 16 bytes; y [T, N] of x's dtype or
// f32; w in fragment order, bias f32 [N] or undefined. partial: f32 scratch of partial_size(T);
// arrived: u32 [at least tiles], zero before, and zero again afterwards.
struct QuantMatmulArgs {
  Tensor x, bias, y, partial, arrived;
  const uint8_t* weight;
  QuantFragments format;
  QuantMatmulPlan plan;
};

// out: the fragments of `weight`, on the device.
struct PackFragmentsArgs {
  QuantMatrix weight;
  QuantFragments format;
  Tensor out;
};

}  // namespace pyllm::cuda
