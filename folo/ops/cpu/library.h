// What the sources that make torch operators of the kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "kernels.h"

namespace folo {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// Of the instruction set in use; null: the reference. Chosen on import; tests choose again.
extern const Kernels* kernels;

// An op that folo/ops/library.py registers: the reference, for one.
template <typename R, typename... Args>
R reference(const char* name, const Args&... args) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<R(const Args&...)>();
  return op.call(args...);
}

}  // namespace folo
