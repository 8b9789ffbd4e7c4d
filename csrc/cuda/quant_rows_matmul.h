#pragma once
#include "core/tensor.h"

namespace pyllm::cuda {

// A block's tile: so many rows of the weight by so many of x, and the bytes of k of a step.
struct QuantRowsTile {
  int n, rows, depth;
};

// How the work of `rows` rows of x is divided: see stream_k.cuh. The tiles of the same rows of the
// weight follow each other.
struct QuantRowsPlan {
  static constexpr int kTiles = 6, kMaxTiles = 1 << 16, kMinSteps = 4;
  static constexpr QuantRowsTile kTile[kTiles] = {{128, 8, 128},  {128, 16, 128}, {128, 32, 128},
                                                  {128, 64, 128}, {128, 128, 64}, {256, 128, 64}};

  int kind;
  int64_t tiles_n, tiles_rows, steps;  // steps of a tile
  int blocks;

  static QuantRowsPlan of(int64_t rows, int64_t n, int64_t k, int multiprocessors) {
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    int kind = 0;
    while (kind < kTiles - 2 && kTile[kind].rows < rows) ++kind;
    // Large tiles read less, where there are enough of them.
    if (rows > 128 && up(n, 256) * up(rows, 128) >= multiprocessors) ++kind;
    const QuantRowsTile t = kTile[kind];
    QuantRowsPlan p{kind, up(n, t.n), up(rows, t.rows), up(k, t.depth), 1};
    const int64_t most = p.tiles_n * p.tiles_rows * p.steps / kMinSteps;
    p.blocks = static_cast<int>(most < 1 ? 1 : most < multiprocessors ? most : multiprocessors);
    return p;
  }
  // The rows of a launch: those for which tiles can be counted.
  static int64_t most_rows(int64_t n) { return kMaxTiles / ((n + 127) / 128) * 128; }
  // Words of scratch: a block leaves at most two tiles to be added up with those of others.
  int64_t partial_size() const { return int64_t{2} * blocks * kTile[kind].n * kTile[kind].rows; }
};

// y = (x w^T) * w_scale * x_scale + bias: x and w int8 [T, K] and [N, K], rows aligned to 16 bytes,
// K a multiple of 16 below 2^17; x_scale [T], w_scale [N] and bias [N] (or undefined) f32; y [T, N]
// of any float. partial: i32 scratch; arrived: u32 [kMaxTiles], zero before, and zero again
// afterwards.
struct QuantRowsMatmulArgs {
  Tensor x, x_scale, w, w_scale, bias, y, partial, arrived;
  int multiprocessors;
};

}  // namespace pyllm::cuda
