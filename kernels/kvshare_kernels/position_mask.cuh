// FlashInfer attention variant: a row sees the keys at positions up to its own, wherever it stands in the batch.
// The mask is a comparison with one number a row; nothing of the size rows x keys is stored.
//
// Parameters beside FlashInfer's own: row_positions int32 [rows of the batch], sm_scale, soft_cap (read if kCapped).
template <bool kCapped>
struct PositionMask : public flashinfer::AttentionVariantBase {
  uint32_t qo_len, kv_len, window_left;  // read by FlashInfer's kernels; the window is everything
  float sm_scale_log2;                   // what the kernels multiply transformed scores by, in base 2
  float into_tanh;
  const int32_t* last_seen;  // of this sequence's rows

  template <typename Params>
  __device__ __host__ PositionMask(const Params& params, uint32_t sequence, uint8_t*) {
    constexpr float kLog2e = 1.44269504088896340736f;
    qo_len = params.get_qo_len(sequence);
    kv_len = window_left = params.get_kv_len(sequence);
    last_seen = params.row_positions + params.q_indptr[sequence];
    const float scale = static_cast<float>(params.sm_scale), cap = static_cast<float>(params.soft_cap);
    sm_scale_log2 = (kCapped ? cap : scale) * kLog2e;
    into_tanh = kCapped ? scale / cap : 0.f;
  }

  REGISTER_LOGITS_TRANSFORM(params, score, sequence, row, key, head, kv_head, {
    if constexpr (kCapped) return tanhf(static_cast<float>(score) * into_tanh);
    return score;
  })

  // Tiles reach beyond the last row of a sequence; there is no position to read there.
  REGISTER_LOGITS_MASK(params, sequence, row, key, head, kv_head, {
    return row < qo_len && static_cast<int32_t>(key) <= last_seen[row];
  })
};
