// AMX tiles of bfloat16 products. With FOLO_EMULATE_AMX, what the instructions do, for CPUs without them.
//
// Tile registers are named in the instruction, so they are macro arguments: 0 to 3 are sums [rows][16], 4 and 5
// rows of x [rows][16 pairs], 6 and 7 weights [16 pairs][16].
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef FOLO_EMULATE_AMX
#include <cmath>
#else
#include <immintrin.h>
#endif

namespace folo::amx {

constexpr int kTileRows = 16;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  // `upper` rows in tiles 0, 1 and 4, `lower` rows in 2, 3 and 5.
  TileConfig(int upper, int lower) {
    const int each[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i) rows[i] = uint8_t(each[i]);
  }
};

#ifdef FOLO_EMULATE_AMX

struct Tiles {
  uint8_t rows[8];
  uint32_t data[8][16][16];
};
inline thread_local Tiles tiles;

inline void configure(const TileConfig& config) {
  for (int i = 0; i < 8; ++i) tiles.rows[i] = config.rows[i];
  std::memset(tiles.data, 0, sizeof tiles.data);
}
inline void zero_tile(int t) { std::memset(tiles.data[t], 0, sizeof tiles.data[t]); }
inline void load_tile(int t, const void* from, int64_t stride) {
  zero_tile(t);
  for (int row = 0; row < tiles.rows[t]; ++row)
    std::memcpy(tiles.data[t][row], static_cast<const char*>(from) + row * stride, 64);
}
inline void store_tile(int t, void* to, int64_t stride) {
  for (int row = 0; row < tiles.rows[t]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[t][row], 64);
}
inline float half_of(uint32_t pair, int odd) {
  uint32_t bits = odd ? pair & 0xFFFF0000u : pair << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void multiply(int c, int a, int b) {  // Intel's manual, TDPBF16PS
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {0, 0}, total;
      for (int k = 0; k < 16; ++k)
        for (int odd = 0; odd < 2; ++odd)
          sums[odd] = std::fma(half_of(tiles.data[a][m][k], odd), half_of(tiles.data[b][k][n], odd), sums[odd]);
      std::memcpy(&total, &tiles.data[c][m][n], 4);
      total += sums[0] + sums[1];
      std::memcpy(&tiles.data[c][m][n], &total, 4);
    }
  }
}
inline void release() {}
#define FOLO_ZERO_TILE(t) zero_tile(t)
#define FOLO_LOAD_TILE(t, from, stride) load_tile(t, from, stride)
#define FOLO_STORE_TILE(t, to, stride) store_tile(t, to, stride)
#define FOLO_MULTIPLY(c, a, b) multiply(c, a, b)

#else

inline void configure(const TileConfig& config) {
  // gcc before 14 takes the instruction to read 8 bytes, and would not write the others.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}
inline void release() { _tile_release(); }
#define FOLO_ZERO_TILE(t) _tile_zero(t)
#define FOLO_LOAD_TILE(t, from, stride) _tile_loadd(t, from, stride)
#define FOLO_STORE_TILE(t, to, stride) _tile_stored(t, to, stride)
#define FOLO_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

// A thread's tile registers, set up for the rows of the blocks that follow, and given back at the end.
class Registers {
 public:
  Registers() = default;
  Registers(const Registers&) = delete;
  ~Registers() { release(); }
  void hold(int count) {
    if (count == count_) return;  // to set them up takes hundreds of cycles
    count_ = count;
    configure(TileConfig(std::min(count, kTileRows), std::max(count - kTileRows, 1)));
  }

 private:
  int count_ = 0;
};

// out[r][c] = the sum over `depth` pairs (a multiple of 16) of rows[r][...] times columns[...][c]: up to 32
// rows, 16 columns from `left`, and 16 from `right`.
template <bool kTwoRows, bool kTwoColumns>
inline void block(const uint32_t* rows, int64_t row_stride, const uint32_t* left, const uint32_t* right,
                  int64_t column_stride, int64_t depth, float* out, int64_t out_stride) {
  const uint32_t* lower = rows + kTileRows * row_stride;
  const int64_t row_bytes = row_stride * 4, column_bytes = column_stride * 4, out_bytes = out_stride * 4;
  FOLO_ZERO_TILE(0);
  if constexpr (kTwoColumns) FOLO_ZERO_TILE(1);
  if constexpr (kTwoRows) FOLO_ZERO_TILE(2);
  if constexpr (kTwoRows && kTwoColumns) FOLO_ZERO_TILE(3);
  for (int64_t k = 0; k < depth; k += 16) {
    FOLO_LOAD_TILE(6, left + k * column_stride, column_bytes);
    FOLO_LOAD_TILE(4, rows + k, row_bytes);
    FOLO_MULTIPLY(0, 4, 6);
    if constexpr (kTwoColumns) {
      FOLO_LOAD_TILE(7, right + k * column_stride, column_bytes);
      FOLO_MULTIPLY(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      FOLO_LOAD_TILE(5, lower + k, row_bytes);
      FOLO_MULTIPLY(2, 5, 6);
      if constexpr (kTwoColumns) FOLO_MULTIPLY(3, 5, 7);
    }
  }
  FOLO_STORE_TILE(0, out, out_bytes);
  if constexpr (kTwoColumns) FOLO_STORE_TILE(1, out + 16, out_bytes);
  if constexpr (kTwoRows) FOLO_STORE_TILE(2, out + kTileRows * out_stride, out_bytes);
  if constexpr (kTwoRows && kTwoColumns) FOLO_STORE_TILE(3, out + kTileRows * out_stride + 16, out_bytes);
}

// `block` of `count` rows, and of one half of columns if `right` is null.
inline void block_of(Registers& registers, int count, const uint32_t* rows, int64_t row_stride, const uint32_t* left,
                     const uint32_t* right, int64_t column_stride, int64_t depth, float* out, int64_t out_stride) {
  registers.hold(count);
  const auto chosen = count > kTileRows ? (right ? block<true, true> : block<true, false>)
                                        : (right ? block<false, true> : block<false, false>);
  chosen(rows, row_stride, left, right, column_stride, depth, out, out_stride);
}

}  // namespace folo::amx
