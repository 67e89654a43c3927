// patch_merge on the CPU, in three phases:
//   1. per image and panel of 64 hidden channels: 1x1 + ReLU, stride-2 depthwise + ReLU, sums for
//   the pool. The hidden
//      map exists one panel at a time (14x14: 50 KB instead of 600).
//   2. squeeze-excite over all images at hand as two small layers; sigmoid.
//   3. gate, then the last 1x1.
// Scratch: g [B*HO*WO][F] (halved map), pool and gate [B][F], mid [B][R]; per rank a hidden panel
// [H*W][64].
#include "cpu/depthwise.h"
#include "cpu/gemm.h"
#include "cpu/isa_ops.h"

namespace evit::cpu::EVIT_ISA {
namespace {

constexpr int kHiddenPanel = 64;
constexpr int kColumnSplitTokens = 64;

// Floats between rows of width F. Rows 4 KiB apart share one set of a 32 KiB L1: fourteen of them
// in a GEMM tile evict each other (M4's second merge, F=1024: 84 % of peak).
EVIT_INLINE long row_stride(const PatchMergeShape& s) {
  return s.F % 1024 == 0 ? s.F + kPanel : s.F;
}

struct Layout {
  long tokens, g, pool, gate, mid, hidden, total;  // sizes in floats but tokens
  Layout(const PatchMergeShape& s, int B, int H, int W, int team) {
    tokens = (long)B * halved(H) * halved(W);
    g = tokens * row_stride(s);
    pool = gate = (long)B * row_stride(s);
    mid = (long)B * s.R;
    hidden = (long)H * W * kHiddenPanel;
    total = g + pool + gate + mid + hidden * team;
  }
};

// Stride-2 depthwise + ReLU of `channels` channels of one image [H*W][channels] into g (pixel
// stride F); means into pool.
EVIT_NOINLINE void reduce(const PatchMergeShape& s, const PatchMergeWeights& w, int H, int W,
                          int c0, int channels, const float* hidden, float* g, float* pool) {
  const int HO = halved(H), WO = halved(W);
  for (int c = 0; c < channels; c += kPanel) {
    const DepthwiseRow d{hidden + c,         channels, H, W, w.dw + (long)(c0 + c) * 9,
                         w.dw_bias + c0 + c, nullptr,  0};
    for (int v = 0; v < kPanel; v += kLanes) {
      f32 sum = splat(0.0f);
      for (int y = 0; y < HO; y++) {
        float* row = g + (long)y * WO * row_stride(s) + c + v;
        depthwise_row<2>(d, y, WO, v, [&](int x, f32 a) {
          a = relu(a);
          sum += a;
          store(row + x * row_stride(s), a);
        });
      }
      store(pool + c + v, sum * splat(1.0f / ((float)HO * (float)WO)));
    }
  }
}

void expand_and_reduce(const PatchMergeShape& s, const PatchMergeWeights& w, const MapIo& io,
                       float* g, float* pool, float* hidden) {
  const int panels = (s.F + kHiddenPanel - 1) / kHiddenPanel, T = io.H * io.W;
  const long ld = row_stride(s), out = (long)halved(io.H) * halved(io.W) * ld;
  const long tasks = (long)io.B * panels;
  const long first = tasks * io.team.rank / io.team.size,
             last = tasks * (io.team.rank + 1) / io.team.size;
  for (long t = first; t < last; t++) {
    const int b = (int)(t / panels), n = (int)(t % panels) * kHiddenPanel;
    const int width = s.F - n < kHiddenPanel ? s.F - n : kHiddenPanel;
    EVIT_STAGE(kExpand);
    gemm(Epilogue::kRelu, {T, s.C, width, io.x + (long)b * T * s.C, s.C, w.w1 + (long)n * s.C,
                           w.b1 + n, hidden, width, nullptr, 0});
    EVIT_STAGE(kDepthwise);  // and the sums of the pool, in its registers
    reduce(s, w, io.H, io.W, n, width, hidden, g + b * out + n, pool + b * ld + n);
  }
}

// gate[b] = sigmoid(gate[b]) over the columns c0..c1.
void gate_columns(const PatchMergeShape& s, int B, int c0, int c1, float* gate) {
  for (int b = 0; b < B; b++)
    for (int c = c0; c < c1; c += kLanes)
      store(gate + b * row_stride(s) + c, sigmoid(load(gate + b * row_stride(s) + c)));
}

void scale_rows(const PatchMergeShape& s, long per_image, long t0, long t1, const float* gate,
                float* g) {
  for (long t = t0; t < t1; t++) {
    const float* m = gate + t / per_image * row_stride(s);
    float* row = g + t * row_stride(s);
    for (int c = 0; c < s.F; c += kLanes) store(row + c, load(row + c) * load(m + c));
  }
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA

namespace EVIT_KERNELS {

size_t patch_merge_scratch(const PatchMergeShape& s, int B, int H, int W, int team) {
  return (size_t)Layout(s, B, H, W, team).total;
}

void patch_merge(const PatchMergeShape& s, const PatchMergeWeights& w, const MapIo& io) {
  const Team& team = io.team;
  const Layout l(s, io.B, io.H, io.W, team.size);
  float* g = io.scratch;
  float* pool = g + l.g;
  float* gate = pool + l.pool;
  float* mid = gate + l.gate;
  const long ld = row_stride(s);
  expand_and_reduce(s, w, io, g, pool, mid + l.mid + l.hidden * team.rank);
  team.sync();

  EVIT_STAGE(kSqueeze);
  gemm(Epilogue::kRelu,
       gemm_columns({io.B, s.F, s.R, pool, ld, w.se1, w.se1_bias, mid, s.R, nullptr, 0}, team.rank,
                    team.size));
  team.sync();
  EVIT_STAGE(kExcite);
  const GemmArgs excite = gemm_columns(
      {io.B, s.R, s.F, mid, s.R, w.se2, w.se2_bias, gate, ld, nullptr, 0}, team.rank, team.size);
  gemm(Epilogue::kBias, excite);
  EVIT_STAGE(kGate);
  gate_columns(s, io.B, (int)(excite.c - gate), (int)(excite.c - gate) + excite.N, gate);
  team.sync();

  const long t0 = l.tokens * team.rank / team.size, t1 = l.tokens * (team.rank + 1) / team.size;
  scale_rows(s, (long)halved(io.H) * halved(io.W), t0, t1, gate, g);
  EVIT_STAGE(kProject);
  if (team.size > 1 && l.tokens <= kColumnSplitTokens) {
    team.sync();
    gemm(Epilogue::kBias,
         gemm_columns({(int)l.tokens, s.F, s.CO, g, ld, w.w3, w.b3, io.y, s.CO, nullptr, 0},
                      team.rank, team.size));
  } else {
    gemm(Epilogue::kBias, {(int)(t1 - t0), s.F, s.CO, g + t0 * ld, ld, w.w3, w.b3, io.y + t0 * s.CO,
                           s.CO, nullptr, 0});
  }
}

}  // namespace EVIT_KERNELS
