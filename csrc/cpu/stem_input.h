// Input rows of the stem. Stride 2 wants even and odd columns apart, so every row is split once
// into [in][2][ld]: the odd columns shifted by one (position 0 is column -1), then the even ones.
// The taps of output j are odd[j], even[j] and odd[j + 1]. Columns outside the image hold the
// padding value, to the end of the last vector.
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
  long ld;  // floats of a half row: at least round_up(halved(W), kLanes) + 1
};

// Columns i, i + 1, ... of one channel, i even.
EVIT_INLINE void put(const Pixels& p, f32 even, f32 odd, int i, float* out) {
  store(out + 1 + i / 2, odd);
  store(out + p.ld + i / 2, even);
}

// Columns from i on, one by one.
template <class T>
EVIT_INLINE void put_each(const Pixels& p, const T* x, int i, float* out) {
  for (; i < p.W; i++) out[(i % 2 ? 1 : p.ld) + i / 2] = (float)x[i * p.stride_w];
}

// Where the step that should begin at column i begins: the last one of a row reaches back instead
// of over its end.
EVIT_INLINE int step_at(const Pixels& p, int i) {
  return i + kSplit <= p.W ? i : (p.W - kSplit) / 2 * 2;
}

template <class T>
EVIT_NOINLINE void split_row(const Pixels& p, int row, float* out) {
  const T* x = (const T*)p.x + row * p.stride_h;
  const long next = 2 * p.ld;
  const bool steps = p.W >= kSplit;
  const bool rgb = p.in == 3 && p.stride_w == 3 && p.stride_c == 1;
  for (int ci = 0; ci < p.in; ci++) {
    const float pad = p.pad ? p.pad[ci] : 0.0f;
    out[ci * next] = pad;
    if (p.W % kSplit) put(p, splat(pad), splat(pad), p.W / kSplit * kSplit, out + ci * next);
  }
  if (steps && rgb) {
    for (int i = 0; i < p.W; i += kSplit) {
      const int at = step_at(p, i);
      f32 even[3], odd[3];
      deinterleave_rgb(x + 3L * at, even, odd);
      EVIT_UNROLL for (int ci = 0; ci < 3; ci++) put(p, even[ci], odd[ci], at, out + ci * next);
    }
  } else if (steps && p.stride_w == 1) {
    for (int ci = 0; ci < p.in; ci++) {
      for (int i = 0; i < p.W; i += kSplit) {
        const int at = step_at(p, i);
        f32 even, odd;
        deinterleave(x + ci * p.stride_c + at, &even, &odd);
        put(p, even, odd, at, out + ci * next);
      }
    }
  }
  const int done =
      steps && (rgb || p.stride_w == 1) ? p.W / 2 * 2 : 0;  // an odd width leaves one column
  for (int ci = 0; ci < p.in; ci++) put_each(p, x + ci * p.stride_c, done, out + ci * next);
}

EVIT_INLINE void input_row(const Pixels& p, int row, float* out) {
  if (p.type == PixelType::kUint8)
    split_row<uint8_t>(p, row, out);
  else
    split_row<float>(p, row, out);
}

// A row outside the image; needs p.pad.
EVIT_INLINE void padding_row(const Pixels& p, float* out) {
  for (int ci = 0; ci < p.in; ci++)
    for (long i = 0; i < 2 * p.ld; i++) *out++ = p.pad[ci];
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
