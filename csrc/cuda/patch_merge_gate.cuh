// Squeeze-excite of patch_merge: a matrix times the few vectors of a block's images. A warp takes
// whole rows of the matrix, 16 bytes a lane, all of them asked for before the first is used; the
// lanes' sums are added as a tree. Tensor cores would need 16 images a block.
#pragma once

#include "device.cuh"

namespace evit::cuda {

// The sum over the lanes of value number lane / (32 / N). N is a power of two. A step halves the
// values that a lane still adds: N - 1 + log2(32 / N) shuffles instead of 5 N, and the same tree of
// sums for every N.
template <int N>
EVIT_DEVICE float sum_lanes(float (&value)[N]) {
  static_assert(N <= 32 && (N & (N - 1)) == 0);
  EVIT_UNROLL
  for (int step = 0; step < 5; step++) {
    const int bit = 16 >> step, n = N >> step;
    if (n > 1) {
      const bool upper = lane_id() & bit;
      EVIT_UNROLL
      for (int i = 0; i < N / 2; i++) {
        if (i >= n / 2) continue;
        const float kept = upper ? value[i + n / 2] : value[i];
        const float given = upper ? value[i] : value[i + n / 2];
        value[i] = kept + shuffle_xor(given, bit);
      }
    } else {
      value[0] += shuffle_xor(value[0], bit);
    }
  }
  return value[0];
}

// put(row, image, sum over k of weights[row][k] in[image][k]) for the rows from `first` on, `LINES`
// a warp, every `apart` rows, below `end`. in [IMAGES][K] in shared memory; weights [..][K].
template <int K, int IMAGES, int LINES, typename T, typename Put>
EVIT_DEVICE void multiply_vectors(const float* s_in, const T* EVIT_RESTRICT weights, int first,
                                  int apart, int end, Put put) {
  constexpr int N = IMAGES * LINES, kSame = 32 / N;  // lanes with the same sum
  for (int row = first; row < end; row += apart) {
    float sum[N] = {};
    for (int k = lane_id() * 8; k < K; k += 256) {
      float w[LINES][8];
      EVIT_UNROLL
      for (int line = 0; line < LINES; line++) {
        if (row + line < end) {
          load_numbers<8>(w[line], weights + static_cast<i64>(row + line) * K + k);
        } else {
          EVIT_UNROLL
          for (float& value : w[line]) value = 0.0f;
        }
      }
      EVIT_UNROLL
      for (int i = 0; i < IMAGES; i++) {
        float in[8];
        load_numbers<8>(in, s_in + i * K + k);
        EVIT_UNROLL
        for (int line = 0; line < LINES; line++) {
          EVIT_UNROLL
          for (int j = 0; j < 8; j++) sum[line * IMAGES + i] += w[line][j] * in[j];
        }
      }
    }
    const float total = sum_lanes(sum);
    const int which = lane_id() / kSame, line = which / IMAGES;
    if (lane_id() % kSame == 0 && row + line < end) put(row + line, which % IMAGES, total);
  }
}

EVIT_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + power_of_2(x * -1.4426950408889634f)); }

}  // namespace evit::cuda
