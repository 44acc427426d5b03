// AMX tiles of bfloat16 products.
//
// Tile registers are named in the instruction, so their numbers are constants: 0 to 3 are sums [rows][16], 4 and 5
// rows of x [rows][16 pairs], 6 and 7 weights [16 pairs][16].
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

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

inline void configure(const TileConfig& config) {
  // gcc before 14 takes the instruction to read 8 bytes, and would not write the others.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// A thread's tile registers, set up for the rows of the blocks that follow, and given back at the end.
class Registers {
 public:
  Registers() = default;
  Registers(const Registers&) = delete;
  ~Registers() { _tile_release(); }
  void hold(int count) {
    if (count == count_) return;  // to set them up takes hundreds of cycles
    count_ = count;
    configure(TileConfig(std::min(count, kTileRows), std::max(count - kTileRows, 1)));
  }

 private:
  int count_ = 0;
};

// Blocks of at most 2 * kTileRows rows, all of one height, since to set registers up for another takes hundreds of
// cycles: f(first row, height, first row that no block had before), where the last block may go over rows again.
template <typename F>
inline void in_even_blocks(int64_t first, int64_t end, F&& f) {
  const int64_t blocks = (end - first + 2 * kTileRows - 1) / (2 * kTileRows);
  if (!blocks) return;
  const int64_t height = (end - first + blocks - 1) / blocks;
  for (int64_t fresh = first; fresh < end; fresh += height) f(std::min(fresh, end - height), int(height), fresh);
}

// out[r][c] = the sum over `depth` pairs (a multiple of 16) of rows[r][...] times columns[...][c]: up to 32
// rows, 16 columns from `left`, and 16 from `right`; added to what stands there, if `more`. `meanwhile`(pairs so
// far), before every 16 of them, is work for the rest of the core, which products leave idle.
template <bool kTwoRows, bool kTwoColumns, typename F>
void block(const uint32_t* rows, int64_t row_stride, const uint32_t* left, const uint32_t* right,
           int64_t column_stride, int64_t depth, bool more, float* out, int64_t out_stride, F&& meanwhile) {
  // gcc does not know that loading a tile reads memory, and might write what is read here later, or never.
  asm volatile("" : : "r"(rows), "r"(left), "r"(right) : "memory");
  const uint32_t* lower = rows + kTileRows * row_stride;
  const int64_t row_bytes = row_stride * 4, column_bytes = column_stride * 4, out_bytes = out_stride * 4;
  float* out_lower = out + kTileRows * out_stride;
  if (more) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (kTwoColumns) _tile_loadd(1, out + 16, out_bytes);
    if constexpr (kTwoRows) _tile_loadd(2, out_lower, out_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, out_lower + 16, out_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    meanwhile(k);
    _tile_loadd(6, left + k * column_stride, column_bytes);
    _tile_loadd(4, rows + k, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, right + k * column_stride, column_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, lower + k, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (kTwoColumns) _tile_stored(1, out + 16, out_bytes);
  if constexpr (kTwoRows) _tile_stored(2, out_lower, out_bytes);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, out_lower + 16, out_bytes);
}

// `block` of `count` rows, and of one half of columns if `right` is null.
template <typename F>
inline void block_of(Registers& registers, int count, const uint32_t* rows, int64_t row_stride, const uint32_t* left,
                     const uint32_t* right, int64_t column_stride, int64_t depth, bool more, float* out,
                     int64_t out_stride, F&& meanwhile) {
  registers.hold(count);
  const auto chosen = count > kTileRows ? (right ? block<true, true, F&> : block<true, false, F&>)
                                        : (right ? block<false, true, F&> : block<false, false, F&>);
  chosen(rows, row_stride, left, right, column_stride, depth, more, out, out_stride, meanwhile);
}

}  // namespace folo::amx
