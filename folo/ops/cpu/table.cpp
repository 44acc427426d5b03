// The kernels of an instruction set. The build says which namespace each source of them was compiled into.
#include "kernels.h"

extern "C" const folo::Kernels* folo_kernels() {
  using namespace folo;
  static constexpr Kernels kTable = {
      FOLO_BUILD_KEY,
      FOLO_NAME,
      FOLO_LINEAR::linear,
      FOLO_QUANTIZED::quantized,
      FOLO_NORM::norm,
      FOLO_NORM::silu_mul,
      FOLO_ROPE::rope,
      FOLO_ATTENTION::attention,
      FOLO_SAMPLER::philox,
      FOLO_SAMPLER::penalize,
      FOLO_SAMPLER::warp,
      FOLO_SAMPLER::draw,
      FOLO_SAMPLER::logprobs,
  };
  return &kTable;
}
