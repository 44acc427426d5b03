// A thread's memory for one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace folo {

// Pieces of one allocation, each aligned to 64 bytes: taken once to add up their sizes, and once for good.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t count) {
    int64_t at = used_;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(memory_.get() + at) : nullptr;
  }
  void allocate() {
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(used_))));
    if (!memory_) throw std::bad_alloc();
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t used_ = 0;
};

}  // namespace folo
