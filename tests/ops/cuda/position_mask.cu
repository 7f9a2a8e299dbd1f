// Uses every member of the variant as FlashInfer's kernels do, so that it compiles as a whole.
#ifdef WITH_FLASHINFER
#include <flashinfer/math.cuh>
#include <flashinfer/attention/variant_helper.cuh>
#else
#include "flashinfer_stub/variant_helper.cuh"
#endif
#include "position_mask.cuh"

struct Params {
  const int32_t* row_positions;
  const int32_t* q_indptr;
  const int32_t* kv_indptr;
  double sm_scale, soft_cap;
  __host__ __device__ uint32_t get_qo_len(uint32_t i) const { return q_indptr[i + 1] - q_indptr[i]; }
  __host__ __device__ uint32_t get_kv_len(uint32_t i) const { return kv_indptr[i + 1] - kv_indptr[i]; }
};

template <bool kCapped>
__global__ void scores(Params params, float* logits, uint32_t sequence, uint32_t rows, uint32_t keys) {
  PositionMask<kCapped> variant(params, sequence, nullptr);
  const uint32_t key = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (row >= rows || key >= keys) return;
  float& score = logits[row * keys + key];
  score = variant.LogitsTransform(params, score, sequence, row, key, 0u, 0u) * variant.sm_scale_log2;
  if (!variant.LogitsMask(params, sequence, row, key, 0u, 0u)) score = -INFINITY;
}

template __global__ void scores<false>(Params, float*, uint32_t, uint32_t, uint32_t);
template __global__ void scores<true>(Params, float*, uint32_t, uint32_t, uint32_t);
