#include "common/layout.h"

#include <cstring>

namespace evit {
namespace {

struct Lister {
  const Op& op;
  std::vector<Section> out;
  int64_t end = 0;

  void add(std::string name, SectionKind kind, std::vector<int> dims) {
    const bool weight = kind == SectionKind::kPanel || kind == SectionKind::kConvPlanar ||
                        kind == SectionKind::kConvNhwc || kind == SectionKind::kConvFirst;
    const DType dtype = weight || op.dtype == DType::kFloat64 ? op.dtype : DType::kFloat32;
    int64_t n = 1;
    switch (kind) {
      case SectionKind::kPanel:
        n = (int64_t)round_up(dims[0], kPanel) * dims[1];
        break;
      case SectionKind::kConvPlanar:
      case SectionKind::kConvNhwc:
        n = (int64_t)round_up(dims[0], kPanel) * dims[1] * dims[2] * dims[3];
        break;
      case SectionKind::kVector:
        n = round_up(dims[0], kPanel);
        break;
      case SectionKind::kScores:
        n = (int64_t)dims[0] * round_up(dims[0], kPanel);
        break;
      case SectionKind::kConvFirst:
      case SectionKind::kDepthwise:
        for (int d : dims) n *= d;
        break;
    }
    out.push_back({std::move(name), kind, std::move(dims), dtype, end, n});
    end += (out.back().bytes() + 63) / 64 * 64;
  }
  void panel(const std::string& name, const std::string& bias, int N, int K) {
    add(name, SectionKind::kPanel, {N, K});
    add(bias, SectionKind::kVector, {N});
  }
};

void list_stem(Lister& l, const StemShape& s) {
  l.add("conv1", SectionKind::kConvFirst, {s.c1(), s.in, 3, 3});
  l.add("bias1", SectionKind::kVector, {s.c1()});
  l.add("conv1_u8", SectionKind::kConvFirst, {s.c1(), s.in, 3, 3});
  l.add("bias1_u8", SectionKind::kVector, {s.c1()});
  l.add("pad_u8", SectionKind::kVector, {s.in});
  l.add("conv2", SectionKind::kConvPlanar, {s.c2(), s.c1(), 3, 3});
  l.add("bias2", SectionKind::kVector, {s.c2()});
  l.add("conv3", SectionKind::kConvNhwc, {s.c3(), s.c2(), 3, 3});
  l.add("bias3", SectionKind::kVector, {s.c3()});
  l.add("conv4", SectionKind::kConvNhwc, {s.C, s.c3(), 3, 3});
  l.add("bias4", SectionKind::kVector, {s.C});
}

void list_dw_ffn(Lister& l, const DwFfnShape& s) {
  l.add("dw", SectionKind::kDepthwise, {s.C, 3, 3});
  l.add("dw_bias", SectionKind::kVector, {s.C});
  l.panel("w1", "b1", s.F, s.C);
  l.panel("w2", "b2", s.C, s.F);
}

void list_cga(Lister& l, const CgaShape& s) {
  for (int h = 0; h < s.heads; h++) {
    const std::string i = std::to_string(h);
    l.panel("qkv" + i, "qkv_bias" + i, s.qkv(), s.dv());
    l.add("dw" + i, SectionKind::kDepthwise, {s.dk, s.ks[h], s.ks[h]});
    l.add("dw_bias" + i, SectionKind::kVector, {s.dk});
    l.add("bias" + i, SectionKind::kScores, {s.s(), s.s()});
  }
  l.panel("proj", "proj_bias", s.C, s.C);
}

void list_patch_merge(Lister& l, const PatchMergeShape& s) {
  l.panel("w1", "b1", s.F, s.C);
  l.add("dw", SectionKind::kDepthwise, {s.F, 3, 3});
  l.add("dw_bias", SectionKind::kVector, {s.F});
  l.panel("se1", "se1_bias", s.R, s.F);
  l.panel("se2", "se2_bias", s.F, s.R);
  l.panel("w3", "b3", s.CO, s.F);
}

void list_classifier(Lister& l, const ClassifierShape& s) {
  if (s.N > 0) l.panel("w", "bias", s.N, s.C);
}

uint16_t to_bfloat16(double v) {
  const float f = (float)v;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(double v) {  // round to nearest even, through float32
  const float f = (float)v;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000, a = bits & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // 65536 and up
  if (a < 0x33000000) return (uint16_t)sign;              // below half of the least subnormal
  const int e = (int)(a >> 23) - 127;
  const uint32_t m = (a & 0x7fffff) | 0x800000;
  const int shift = e < -14 ? 13 + (-14 - e) : 13;
  uint32_t half = (m >> shift) + (e < -14 ? 0u : (uint32_t)(e + 14) << 10);
  const uint32_t rest = m & ((1u << shift) - 1), mid = 1u << (shift - 1);
  if (rest > mid || (rest == mid && (half & 1))) half++;
  return (uint16_t)(sign | half);
}

void put(void* out, DType d, int64_t i, double v) {
  switch (d) {
    case DType::kFloat32:
      ((float*)out)[i] = (float)v;
      return;
    case DType::kFloat64:
      ((double*)out)[i] = v;
      return;
    case DType::kFloat16:
      ((uint16_t*)out)[i] = to_float16(v);
      return;
    case DType::kBFloat16:
      ((uint16_t*)out)[i] = to_bfloat16(v);
      return;
  }
}

// Takes the sections of an op one after the other.
struct Binder {
  std::vector<Section> sections;
  const char* base;
  size_t next = 0;
  Binder(const Op& op, const void* blob)
      : sections(op_sections(op)), base((const char*)blob + op.at) {}
  void operator()(const float*& p) { p = (const float*)(base + sections[next++].offset); }
  template <class... Rest>
  void operator()(const float*& p, Rest&... rest) {
    (*this)(p);
    (*this)(rest...);
  }
};

}  // namespace

const char* section_kind_name(SectionKind k) {
  static const char* const names[] = {"panel",     "conv_planar", "conv_nhwc", "conv_first",
                                      "depthwise", "vector",      "scores"};
  return names[(int)k];
}

std::vector<Section> op_sections(const Op& op) {
  Lister l{op, {}, 0};
  switch (op.kind) {
    case OpKind::kStem:
      list_stem(l, op.stem());
      break;
    case OpKind::kDwFfn:
      list_dw_ffn(l, op.dw_ffn());
      break;
    case OpKind::kCga:
      list_cga(l, op.cga());
      break;
    case OpKind::kPatchMerge:
      list_patch_merge(l, op.patch_merge());
      break;
    case OpKind::kClassifier:
      list_classifier(l, op.classifier());
      break;
  }
  return std::move(l.out);
}

int64_t op_bytes(const Op& op) {
  const std::vector<Section> s = op_sections(op);
  return s.empty() ? 0 : s.back().offset + (s.back().bytes() + 63) / 64 * 64;
}

void pack_section(const Section& s, const double* x, void* out) {
  std::memset(out, 0, (size_t)s.bytes());
  const auto& d = s.dims;
  switch (s.kind) {
    case SectionKind::kPanel:
      for (int64_t n = 0; n < d[0]; n++)
        for (int64_t k = 0; k < d[1]; k++)
          put(out, s.dtype, (n / kPanel * d[1] + k) * kPanel + n % kPanel, x[n * d[1] + k]);
      return;
    case SectionKind::kConvPlanar:
    case SectionKind::kConvNhwc:
    case SectionKind::kConvFirst: {
      const int width = s.kind == SectionKind::kConvFirst ? 8 : kPanel;
      const int64_t I = d[1], K = 9 * I;
      for (int64_t n = 0; n < d[0]; n++)
        for (int64_t i = 0; i < I; i++)
          for (int64_t t = 0; t < 9; t++) {
            const int64_t k =
                s.kind == SectionKind::kConvNhwc ? t * I + i : (t / 3 * I + i) * 3 + t % 3;
            put(out, s.dtype, (n / width * K + k) * width + n % width, x[(n * I + i) * 9 + t]);
          }
      return;
    }
    case SectionKind::kDepthwise: {
      const int64_t taps = (int64_t)d[1] * d[2];
      for (int64_t c = 0; c < d[0]; c++)
        for (int64_t t = 0; t < taps; t++)
          put(out, s.dtype, (c / kPanel * taps + t) * kPanel + c % kPanel, x[c * taps + t]);
      return;
    }
    case SectionKind::kVector:
      for (int64_t n = 0; n < d[0]; n++) put(out, s.dtype, n, x[n]);
      return;
    case SectionKind::kScores: {
      const int64_t S = d[0], SP = round_up(d[0], kPanel);
      for (int64_t q = 0; q < S; q++)
        for (int64_t k = 0; k < S; k++) put(out, s.dtype, k * SP + q, x[q * S + k]);
      return;
    }
  }
}

void bind_weights(const Op& op, const void* blob, StemWeights* w) {
  Binder bind(op, blob);
  bind(w->conv1, w->bias1, w->conv1_u8, w->bias1_u8, w->pad_u8, w->conv2, w->bias2, w->conv3,
       w->bias3, w->conv4, w->bias4);
}

void bind_weights(const Op& op, const void* blob, DwFfnWeights* w) {
  Binder bind(op, blob);
  bind(w->dw, w->dw_bias, w->w1, w->b1, w->w2, w->b2);
}

void bind_weights(const Op& op, const void* blob, CgaWeights* w) {
  Binder bind(op, blob);
  for (int h = 0; h < op.heads; h++) {
    CgaHeadWeights& head = w->head[h];
    bind(head.qkv, head.qkv_bias, head.dw, head.dw_bias, head.bias);
  }
  bind(w->proj, w->proj_bias);
}

void bind_weights(const Op& op, const void* blob, PatchMergeWeights* w) {
  Binder bind(op, blob);
  bind(w->w1, w->b1, w->dw, w->dw_bias, w->se1, w->se1_bias, w->se2, w->se2_bias, w->w3, w->b3);
}

void bind_weights(const Op& op, const void* blob, ClassifierWeights* w) {
  *w = {};
  if (op.N == 0) return;
  Binder bind(op, blob);
  bind(w->w, w->bias);
}

}  // namespace evit
