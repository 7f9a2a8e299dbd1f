// The variant as ordinary C++: what its mask and its scores are, for every row and key, printed line by line.
#include <cmath>
#include <cstdint>
#include <cstdio>

#define __device__
#define __host__
#include "flashinfer_stub/variant_helper.cuh"
#include "position_mask.cuh"

struct Params {
  const int32_t* row_positions;
  const int32_t* q_indptr;
  const int32_t* kv_indptr;
  double sm_scale, soft_cap;
  uint32_t get_qo_len(uint32_t i) const { return q_indptr[i + 1] - q_indptr[i]; }
  uint32_t get_kv_len(uint32_t i) const { return kv_indptr[i + 1] - kv_indptr[i]; }
};

template <bool kCapped>
void print(const Params& params) {
  for (uint32_t sequence = 0; sequence < 2; ++sequence) {
    PositionMask<kCapped> variant(params, sequence, nullptr);
    for (uint32_t row = 0; row < variant.qo_len + 2; ++row) {  // tiles reach beyond the last row
      for (uint32_t key = 0; key < variant.kv_len; ++key) {
        const float dot = 0.25f * static_cast<float>(static_cast<int>(key) - 3);
        const float score = variant.LogitsTransform(params, dot, sequence, row, key, 0u, 0u) * variant.sm_scale_log2;
        const bool seen = variant.LogitsMask(params, sequence, row, key, 0u, 0u);
        std::printf("%u %u %u %d %.6f\n", sequence, row, key, static_cast<int>(seen), score);
      }
    }
  }
}

int main() {
  const int32_t positions[] = {1, 4, 5, 0, 2}, q_indptr[] = {0, 3, 5}, kv_indptr[] = {0, 7, 10};
  const Params params{positions, q_indptr, kv_indptr, 0.5, 2.0};
  print<false>(params);
  print<true>(params);
}
