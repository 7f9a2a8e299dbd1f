// Ours, for machines without FlashInfer: the few names of its variant_helper.cuh that position_mask.cuh uses, with the
// shapes its kernels call them in (version 0.7.2).
#pragma once
#include <cstdint>

namespace flashinfer {
struct AttentionVariantBase {
  static constexpr bool use_softmax = true;
};
}  // namespace flashinfer

#define REGISTER_LOGITS_TRANSFORM(params, score, sequence, row, key, head, kv_head, ...)                  \
  template <typename Params, typename T>                                                                  \
  __device__ T LogitsTransform(const Params& params, T score, uint32_t sequence, uint32_t row, uint32_t key, \
                               uint32_t head, uint32_t kv_head) {                                          \
    __VA_ARGS__                                                                                            \
  }

#define REGISTER_LOGITS_MASK(params, sequence, row, key, head, kv_head, ...)                                      \
  template <typename Params>                                                                                      \
  __device__ bool LogitsMask(const Params& params, uint32_t sequence, uint32_t row, uint32_t key, uint32_t head,  \
                             uint32_t kv_head) {                                                                  \
    __VA_ARGS__                                                                                                   \
  }
