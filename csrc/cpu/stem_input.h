// Input rows of the stem. Stride 2 wants even and odd columns apart, so every row is split once,
// channel by channel, into [in][2][ld]: first the odd columns shifted by one (position 0 is column
// -1), then the even ones. Tap dx of output j then is one of odd[j], even[j], odd[j + 1]. Columns
// outside the image hold the padding value, to the end of the last vector.
#pragma once

#include "cpu/ops.h"
#include "cpu/simd.h"

namespace evit::cpu::EVIT_ISA {
namespace {

constexpr int kSplit = 2 * kLanes;  // columns that one step splits

struct Pixels {
  const void* x;
  PixelType type;
  int64_t stride_c, stride_h, stride_w;  // elements
  const float* pad;                      // [in], or null: 0
  int in, W;
  long ld;  // floats of one half row: at least round_up(halved(W), kLanes) + 1
};

EVIT_INLINE float pad_of(const Pixels& p, int ci) { return p.pad ? p.pad[ci] : 0.0f; }

// Columns from `first` on of one channel, one by one, then padding up to a whole step.
template <class T>
EVIT_INLINE void split_columns(const Pixels& p, const T* x, int ci, int first, float* odd,
                               float* even) {
  for (int i = first; i < round_up(p.W, kSplit); i++) {
    const float v = i < p.W ? (float)x[i * p.stride_w] : pad_of(p, ci);
    (i % 2 ? odd + 1 : even)[i / 2] = v;
  }
}

template <class T>
EVIT_NOINLINE void split_row(const Pixels& p, int row, float* out) {
  const T* x = (const T*)p.x + row * p.stride_h;
  const int whole = p.W / kSplit * kSplit;
  const long plane = 2 * p.ld;
  int done = 0;
  if (p.in == 3 && p.stride_w == 3 && p.stride_c == 1) {  // RGB
    for (; done < whole; done += kSplit) {
      f32 e[3], o[3];
      deinterleave_rgb(x + (long)done * 3, e, o);
      EVIT_UNROLL for (int ci = 0; ci < 3; ci++) {
        store(out + ci * plane + 1 + done / 2, o[ci]);
        store(out + ci * plane + p.ld + done / 2, e[ci]);
      }
    }
  }
  for (int ci = 0; ci < p.in; ci++, x += p.stride_c, out += plane) {
    float *odd = out, *even = out + p.ld;
    int i = done;
    if (p.stride_w == 1) {
      for (; i < whole; i += kSplit) {
        f32 e, o;
        deinterleave(x + i, &e, &o);
        store(odd + 1 + i / 2, o);
        store(even + i / 2, e);
      }
    }
    odd[0] = pad_of(p, ci);
    split_columns(p, x, ci, i, odd, even);
  }
}

EVIT_INLINE void input_row(const Pixels& p, int row, float* out) {
  if (p.type == PixelType::kUint8)
    split_row<uint8_t>(p, row, out);
  else
    split_row<float>(p, row, out);
}

// A row outside the image.
EVIT_INLINE void padding_row(const Pixels& p, float* out) {
  for (int ci = 0; ci < p.in; ci++)
    for (long i = 0; i < 2 * p.ld; i++) *out++ = pad_of(p, ci);
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
