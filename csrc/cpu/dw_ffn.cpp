// dw_ffn on the CPU: y = dw(x); out = y + W2 relu(W1 y). One block = a few rows of tokens:
// depthwise, both layers and the hidden activations stay in cache, so nothing of width F grows with
// the batch. Scratch per rank: y [block][C], hidden [block][F].
#include "cpu/depthwise.h"
#include "cpu/gemm.h"
#include "cpu/isa_ops.h"

namespace evit::cpu::EVIT_ISA {
namespace {

constexpr int kColumnSplitTokens = 64;  // at most this many tokens: ranks share columns, not rows

// Tokens of a block: small while both matrices stay in L2 beside it, large where they must be read
// again per block.
EVIT_INLINE int block_tokens(const DwFfnShape& s) {
  const long weight_bytes = 2L * s.C * s.F * 4;
  return weight_bytes < (400 << 10) ? 28 : weight_bytes < (1 << 20) ? 56 : 256;
}

struct Blocks {
  int rows, count, max_rows;  // rows of tokens over all images; blocks of nearly equal height
  Blocks(const DwFfnShape& s, int B, int H, int W, int team) {
    rows = B * H;
    int per_block = block_tokens(s) / W;
    if (per_block < 1) per_block = 1;
    count = (rows + per_block - 1) / per_block;
    if (count < team) count = team < rows ? team : rows;
    max_rows = count > 0 ? (rows + count - 1) / count : 0;
  }
  int start(int block) const { return (int)((long)rows * block / count); }
};

EVIT_INLINE bool split_columns(int B, int H, int W, int team) {
  return team > 1 && (long)B * H * W <= kColumnSplitTokens;
}

// Depthwise of global rows r0..r1 (row r belongs to image r/H), channels c0..c1, into y [..][C].
EVIT_NOINLINE void depthwise_rows(const DwFfnShape& s, const DwFfnWeights& w, const MapIo& io,
                                  int r0, int r1, int c0, int c1, float* y) {
  const long image = (long)io.H * io.W * s.C;
  for (int r = r0; r < r1; r++) {
    float* row = y + (long)(r - r0) * io.W * s.C;
    for (int c = c0; c < c1; c += kPanel) {
      const DepthwiseRow d{
          io.x + r / io.H * image + c, s.C, io.H, io.W, w.dw + c * 9, w.dw_bias + c, row + c, s.C};
      for (int v = 0; v < kPanel; v += kLanes) {
        depthwise_row<1>(d, r % io.H, io.W, v,
                         [&](int x, f32 a) { store(d.out + x * d.out_pixel + v, a); });
      }
    }
  }
}

EVIT_INLINE GemmArgs up(const DwFfnShape& s, const DwFfnWeights& w, int T, const float* y,
                        float* hidden) {
  return {T, s.C, s.F, y, s.C, w.w1, w.b1, hidden, s.F, nullptr, 0};
}

EVIT_INLINE GemmArgs down(const DwFfnShape& s, const DwFfnWeights& w, int T, const float* hidden,
                          const float* y, float* out) {
  return {T, s.F, s.C, hidden, s.F, w.w2, w.b2, out, s.C, y, s.C};
}

void by_columns(const DwFfnShape& s, const DwFfnWeights& w, const MapIo& io) {
  const Team& team = io.team;
  const int T = io.B * io.H * io.W, groups = s.C / kPanel;
  float* y = io.scratch;
  float* hidden = y + (long)T * s.C;
  const int c0 = (int)((long)groups * team.rank / team.size) * kPanel;
  const int c1 = (int)((long)groups * (team.rank + 1) / team.size) * kPanel;
  depthwise_rows(s, w, io, 0, io.B * io.H, c0, c1, y);
  team.sync();
  gemm(Epilogue::kRelu, gemm_columns(up(s, w, T, y, hidden), team.rank, team.size));
  team.sync();
  gemm(Epilogue::kResidual, gemm_columns(down(s, w, T, hidden, y, io.y), team.rank, team.size));
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA

namespace EVIT_KERNELS {

size_t dw_ffn_scratch(const DwFfnShape& s, int B, int H, int W, int team) {
  if (split_columns(B, H, W, team)) return (size_t)B * H * W * (s.C + s.F);
  return (size_t)Blocks(s, B, H, W, team).max_rows * W * (s.C + s.F) * team;
}

void dw_ffn(const DwFfnShape& s, const DwFfnWeights& w, const MapIo& io) {
  if (split_columns(io.B, io.H, io.W, io.team.size)) return by_columns(s, w, io);
  const Blocks blocks(s, io.B, io.H, io.W, io.team.size);
  float* y = io.scratch + (size_t)io.team.rank * blocks.max_rows * io.W * (s.C + s.F);
  float* hidden = y + (size_t)blocks.max_rows * io.W * s.C;
  for (int b = io.team.rank; b < blocks.count; b += io.team.size) {
    const int r0 = blocks.start(b), r1 = blocks.start(b + 1), T = (r1 - r0) * io.W;
    EVIT_STAGE(kDepthwise);
    depthwise_rows(s, w, io, r0, r1, 0, s.C, y);
    EVIT_STAGE(kUp);
    gemm(Epilogue::kRelu, up(s, w, T, y, hidden));
    EVIT_STAGE(kDown);
    gemm(Epilogue::kResidual, down(s, w, T, hidden, y, io.y + (long)r0 * io.W * s.C));
  }
}

}  // namespace EVIT_KERNELS
