// Sizes and bound weights of the five ops, as kernels see them. PODs only: instruction-set files
// include this. Weight pointers are in the packed layout of layout.h; the natural shapes stand
// beside them.
#pragma once

namespace evit {

constexpr int kMaxHeads = 16;
constexpr int kPanel = 16;  // output channels per packed panel

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int halved(int n) { return (n + 1) / 2; }  // 3x3, stride 2, padding 1

struct StemShape {
  int in, C;
  int c1() const { return C / 8; }
  int c2() const { return C / 4; }
  int c3() const { return C / 2; }
};
struct StemWeights {
  const float *conv1, *bias1;  // conv_first [C/8, in, 3, 3]
  const float *conv1_u8, *bias1_u8,
      *pad_u8;                 // the same for pixels; pad_u8 [in]: value outside the image
  const float *conv2, *bias2;  // conv_planar [C/4, C/8, 3, 3]
  const float *conv3, *bias3;  // conv_nhwc [C/2, C/4, 3, 3]
  const float *conv4, *bias4;  // conv_nhwc [C, C/2, 3, 3]
};

struct DwFfnShape {
  int C, F;
};
struct DwFfnWeights {
  const float *dw, *dw_bias;  // depthwise [C, 3, 3], residual in the centre tap
  const float *w1, *b1;       // panel [F, C]
  const float *w2, *b2;       // panel [C, F]
};

struct CgaShape {
  int C, heads, dk, window;
  int ks[kMaxHeads];
  int dv() const { return C / heads; }
  int qkv() const { return 2 * dk + dv(); }
  int s() const { return window * window; }
  int sp() const { return round_up(s(), 16); }
};
struct CgaHeadWeights {
  const float *qkv, *qkv_bias;  // panel [2*dk+dv, dv]: rows q, k, v
  const float *dw, *dw_bias;    // depthwise [dk, ks, ks], times dk^-0.5 * log2(e)
  const float* bias;            // [S keys][SP queries], times log2(e)
};
struct CgaWeights {
  CgaHeadWeights head[kMaxHeads];
  const float *proj, *proj_bias;  // panel [C, C]
};

struct PatchMergeShape {
  int C, F, R, CO;
};
struct PatchMergeWeights {
  const float *w1, *b1;         // panel [F, C]
  const float *dw, *dw_bias;    // depthwise [F, 3, 3]
  const float *se1, *se1_bias;  // panel [R, F]
  const float *se2, *se2_bias;  // panel [F, R]
  const float *w3, *b3;         // panel [CO, F]
};

struct ClassifierShape {
  int C, N;  // N = 0: pool only
};
struct ClassifierWeights {
  const float *w, *bias;  // panel [N, C]
};

}  // namespace evit
