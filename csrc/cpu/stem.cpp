// Stem on the CPU: four 3x3 stride-2 convolutions, chained row by row. A row of conv4 asks for the
// rows of conv3 that it reads, those for rows of conv2, and so on up to the pixels, so three rows
// per map are alive at a time (M5 at 224: 110 KB of rings) and nothing between the image and y
// leaves L2. Every rank computes a band of output rows in rings of its own and recomputes the few
// rows above its band.
#include "cpu/isa_ops.h"
#include "cpu/stem_conv.h"
#include "cpu/stem_input.h"

namespace evit::cpu::EVIT_ISA {
namespace {

constexpr int kRing = 3;
constexpr int kLeft =
    kPanel;  // floats before pixel 0 of a planar row: one would do, a cache line keeps it aligned

struct Ring {
  float* base;
  long row;  // floats
  int H;     // rows of the map
  float* at(int r) const { return base + r % kRing * row; }
};

// Sizes of the maps and, in floats, of their rows.
struct Plan {
  int H[5], W[5];   // of the image, then of each convolution's output
  long ld_in, ld1;  // half an input row; one channel of a planar row
  long row0, row1, row2, row3;
  long rank;  // scratch of one rank
};

Plan plan(const StemShape& s, int H, int W) {
  Plan p;
  p.H[0] = H, p.W[0] = W;
  for (int i = 1; i < 5; i++) p.H[i] = halved(p.H[i - 1]), p.W[i] = halved(p.W[i - 1]);
  p.ld_in = round_up(p.W[1], kPanel) + kPanel;  // position 0 is column -1
  p.ld1 = kLeft + round_up(p.W[1] + 1, kPanel);
  p.row0 = 2L * s.in * p.ld_in;
  p.row1 = s.c1() * p.ld1;
  p.row2 = (p.W[2] + 2L) * s.c2();  // a pixel of zeros on either side
  p.row3 = (p.W[3] + 2L) * s.c3();
  p.rank =
      (kRing + 1) * p.row0 + kRing * (p.row1 + p.row2 + p.row3);  // + 1: the row outside the image
  return p;
}

// The input rows of output row r of a 3x3 stride-2 convolution; `outside` replaces rows beyond the
// image (null: skipped).
Taps taps_of(const Ring& in, int r, const float* outside) {
  Taps t;
  t.dy0 = r == 0 && !outside ? 1 : 0;
  t.dy1 = 2 * r + 1 < in.H || outside ? 3 : 2;
  for (int dy = 0; dy < 3; dy++) {
    const int y = 2 * r - 1 + dy;
    t.row[dy] = y >= 0 && y < in.H ? in.at(y) : outside;
  }
  return t;
}

// The rows of one rank's chain, each made from the rings above it.
struct Chain {
  StemShape s;
  StemWeights w;
  Plan p;
  Pixels pixels;
  const float* outside;  // padding row of the image, null where zeros are skipped
  Ring in, map1, map2, map3;
  float* y;

  void input(int r) const { input_row(pixels, r, in.at(r)); }
  void conv1(int r) const {
    const bool u8 = pixels.type == PixelType::kUint8;
    conv1_row({taps_of(in, r, outside), s.in, s.c1(), p.ld_in, p.W[1], u8 ? w.conv1_u8 : w.conv1,
               u8 ? w.bias1_u8 : w.bias1, map1.at(r) + kLeft, p.ld1});
  }
  void conv2(int r) const {
    Taps t = taps_of(map1, r, nullptr);
    for (int dy = t.dy0; dy < t.dy1; dy++) t.row[dy] += kLeft - 1;
    conv2_row({t, s.c1(), s.c2(), p.ld1, p.W[2], w.conv2, w.bias2, map2.at(r) + s.c2()});
  }
  void conv3(int r) const {
    conv_nhwc_row<true>({taps_of(map2, r, nullptr), s.c2(), s.c3(), 0, p.W[3], w.conv3, w.bias3,
                         map3.at(r) + s.c3()});
  }
  void conv4(int r) const {
    conv_nhwc_row<false>({taps_of(map3, r, nullptr), s.c3(), s.C, 0, p.W[4], w.conv4, w.bias4,
                          y + (long)r * p.W[4] * s.C});
  }
};

// The pixels left and right of every row; the convolutions write between them.
void zero_borders(const Chain& c) {
  const int c2 = c.s.c2(), c3 = c.s.c3();
  for (int r = 0; r < kRing; r++) {
    for (int i = 0; i < c.s.c1(); i++) c.map1.at(r)[i * c.p.ld1 + kLeft - 1] = 0.0f;
    zero(c.map2.at(r), c2);
    zero(c.map2.at(r) + (c.p.W[2] + 1L) * c2, c2);
    zero(c.map3.at(r), c3);
    zero(c.map3.at(r) + (c.p.W[3] + 1L) * c3, c3);
  }
}

EVIT_INLINE int first_needed(int r) { return r > 0 ? 2 * r - 1 : 0; }
EVIT_INLINE int needed_end(int r, int H) { return 2 * r + 2 < H ? 2 * r + 2 : H; }

}  // namespace
}  // namespace evit::cpu::EVIT_ISA

namespace EVIT_KERNELS {

size_t stem_scratch(const StemShape& s, int H, int W, int team) {
  return (size_t)plan(s, H, W).rank * team;
}

void stem(const StemShape& s, const StemWeights& w, const StemIo& io) {
  const Plan p = plan(s, io.H, io.W);
  const int y0 = (int)((long)p.H[4] * io.team.rank / io.team.size);
  const int y1 = (int)((long)p.H[4] * (io.team.rank + 1) / io.team.size);
  if (y0 == y1) return;

  EVIT_STAGE(kLoad);
  const bool u8 = io.type == PixelType::kUint8;
  float* scratch = io.scratch + p.rank * io.team.rank;
  float* outside = scratch;
  float* map0 = outside + p.row0;
  float* map1 = map0 + kRing * p.row0;
  float* map2 = map1 + kRing * p.row1;
  float* map3 = map2 + kRing * p.row2;
  const Pixels pixels = {io.x,        io.type,     io.stride_c,
                         io.stride_h, io.stride_w, u8 ? w.pad_u8 : nullptr,
                         s.in,        io.W,        p.ld_in};
  const Chain c = {s,
                   w,
                   p,
                   pixels,
                   u8 ? outside : nullptr,
                   {map0, p.row0, p.H[0]},
                   {map1, p.row1, p.H[1]},
                   {map2, p.row2, p.H[2]},
                   {map3, p.row3, p.H[3]},
                   io.y};
  if (u8) padding_row(pixels, outside);
  zero_borders(c);

  int n3 = first_needed(y0), n2 = first_needed(n3), n1 = first_needed(n2), n0 = first_needed(n1);
  for (int y = y0; y < y1; y++) {
    for (; n3 < needed_end(y, p.H[3]); n3++) {
      for (; n2 < needed_end(n3, p.H[2]); n2++) {
        for (; n1 < needed_end(n2, p.H[1]); n1++) {
          EVIT_STAGE(kLoad);
          for (; n0 < needed_end(n1, p.H[0]); n0++) c.input(n0);
          EVIT_STAGE(kConv1);
          c.conv1(n1);
        }
        EVIT_STAGE(kConv2);
        c.conv2(n2);
      }
      EVIT_STAGE(kConv3);
      c.conv3(n3);
    }
    EVIT_STAGE(kConv4);
    c.conv4(y);
  }
}

}  // namespace EVIT_KERNELS
