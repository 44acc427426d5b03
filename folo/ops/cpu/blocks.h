// A count of rows, cut into blocks whose size the compiler knows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace folo {

// f(0), f(1), ... f(Count - 1), each number known to the compiler.
template <int Count, typename F>
inline void each(F&& f) {
  if constexpr (Count > 0) {
    each<Count - 1>(f);
    f(std::integral_constant<int, Count - 1>{});
  }
}

template <int Rows, typename F>
inline void last_block(int64_t left, int64_t at, F&& f) {
  if constexpr (Rows > 0) {
    if (left == Rows) {
      f(std::integral_constant<int, Rows>{}, at);
    } else {
      last_block<Rows - 1>(left, at, f);
    }
  }
}

// f(rows, first row) for blocks of Max rows, and for one of what is left.
template <int Max, typename F>
inline void in_blocks(int64_t first, int64_t end, F&& f) {
  for (; first + Max <= end; first += Max) f(std::integral_constant<int, Max>{}, first);
  last_block<Max - 1>(end - first, first, f);
}

}  // namespace folo
