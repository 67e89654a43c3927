// classifier on the CPU: mean over the tokens of an image, then one layer (BN folded). N = 0 stops
// after the pool. Scratch: pooled rows [B][C], and one partial panel [B][16] where N is not a
// multiple of 16.
#include "cpu/gemm.h"
#include "cpu/isa_ops.h"

namespace evit::cpu::EVIT_ISA {
namespace {

// Means of the channels c0..c1, tokens summed in order.
EVIT_NOINLINE void pool(const MapIo& io, int C, int c0, int c1, float* out) {
  const long tokens = (long)io.H * io.W;
  const f32 scale = splat(1.0f / (float)tokens);
  for (int b = 0; b < io.B; b++)
    for (int c = c0; c < c1; c += kLanes) {
      const float* x = io.x + b * tokens * C + c;
      f32 sum = load(x);
      for (long t = 1; t < tokens; t++) sum += load(x + t * C);
      store(out + (long)b * C + c, sum * scale);
    }
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA

namespace EVIT_KERNELS {

size_t classifier_scratch(const ClassifierShape& s, int B, int, int, int) {
  return (size_t)B * (s.C + kPanel);
}

void classifier(const ClassifierShape& s, const ClassifierWeights& w, const MapIo& io) {
  const Team& team = io.team;
  const int groups = s.C / kPanel;
  const int c0 = (int)((long)groups * team.rank / team.size) * kPanel;
  const int c1 = (int)((long)groups * (team.rank + 1) / team.size) * kPanel;
  float* pooled = s.N == 0 ? io.y : io.scratch;
  EVIT_STAGE(kPool);
  pool(io, s.C, c0, c1, pooled);
  if (s.N == 0) return;
  team.sync();

  EVIT_STAGE(kLinear);
  const int whole = s.N / kPanel * kPanel;
  const GemmArgs layer{io.B, s.C, whole, pooled, s.C, w.w, w.bias, io.y, s.N, nullptr, 0};
  gemm(Epilogue::kBias, gemm_columns(layer, team.rank, team.size));
  if (whole == s.N || team.rank != team.size - 1) return;

  float* tail = io.scratch + (size_t)io.B * s.C;
  gemm(Epilogue::kBias, {io.B, s.C, kPanel, pooled, s.C, w.w + (long)whole * s.C, w.bias + whole,
                         tail, kPanel, nullptr, 0});
  for (int b = 0; b < io.B; b++)
    for (int n = whole; n < s.N; n++) io.y[(long)b * s.N + n] = tail[(long)b * kPanel + n - whole];
}

}  // namespace EVIT_KERNELS
