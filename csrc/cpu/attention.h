// One head of cascaded group attention on a block of queries of one window: depthwise on q, scores,
// softmax, P*v. Scores are kept transposed, [key][query]: queries lie in lanes, so the softmax has
// no horizontal step, padding queries need no mask (they never mix with others), and the product
// with v broadcasts P. Per output the order of every sum is fixed by the window alone, so neither
// the block nor the tile changes its bits.
#pragma once

#include "cpu/isa_ops.h"
#include "cpu/simd.h"

namespace evit::cpu::EVIT_ISA {
namespace {

constexpr int kDK = 16;          // width of q and k: one panel
constexpr int kBlockPanels = 4;  // queries of a block, in panels of 16
constexpr int kBlock = kBlockPanels * kPanel;

struct Head {
  int WIN, S, SP, KS, DV;
  const float* qkv;  // [S][ld]: q, k, v
  long ld;
  const CgaHeadWeights* w;
  float* concat;  // this head's columns, row stride ldc; receives relu(o)
  long ldc;
  const float* const* tokens;  // [S] rows of x; null: last head
  int next_column;             // of the next head's slice in a row of x
  float* f;                    // [S][DV] input of the next head: o + that slice
};

// Columns of a depthwise row in registers: neighbouring taps share loads, so the compiler keeps
// about as many inputs.
constexpr int kSpan = kLanes == 16 ? 14 : 6;

// Rows of a tile by its panels of 16 columns. 49 rows of P*v are 25+24, 13+12+12+12 or 9+8*5.
// Scores keep a register for the largest beside the tile.
constexpr int kTileRows1 = kLanes == 16 ? 25 : kRows1;
constexpr int kTileRows2 = kLanes == 16 ? 13 : 0;
constexpr int kTileRows3 = kLanes == 16 ? 9 : 0;
constexpr int kScoreRows1 = kLanes == 16 ? 16 : kRows1;
constexpr int kScoreRows2 = kLanes == 16 ? 12 : 0;
constexpr int kScoreRows3 = kTileRows3;

// Scratch of one block of queries.
struct Block {
  float* rows;     // [kBlock + 2*WIN][16] depthwise output
  float* padded;   // [WIN][WIN+6][16] q with a border, for windows without a kernel of their own
  float* q;        // [16][kBlock] transposed
  float* p;        // [S][kBlock]
  float* largest;  // [kBlock]
  float* inverse;  // [kBlock] 1/sum
  float* keys;     // [16][16] k transposed, then [SP] scores of a query alone
};

constexpr bool has_own_depthwise(int WIN) { return WIN == 7 || WIN == 4; }

EVIT_INLINE size_t block_floats(int WIN) {
  const size_t padded = has_own_depthwise(WIN) ? 0 : WIN * (WIN + 6) * kDK;
  return (kBlock + 2 * WIN) * kDK + padded + kDK * kBlock + (size_t)WIN * WIN * kBlock +
         2 * kBlock + kPanel * kDK + round_up(WIN * WIN, kPanel);
}

EVIT_INLINE Block block_at(int WIN, float* scratch) {
  Block b;
  b.rows = scratch;
  b.padded = b.rows + (kBlock + 2 * WIN) * kDK;
  b.q = b.padded + (has_own_depthwise(WIN) ? 0 : WIN * (WIN + 6) * kDK);
  b.p = b.q + kDK * kBlock;
  b.largest = b.p + (long)WIN * WIN * kBlock;
  b.inverse = b.largest + kBlock;
  b.keys = b.inverse + kBlock;
  return b;
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(Count<n>) for a run-time n of 1..N.
template <int N, class F>
EVIT_INLINE void with_count(int n, F&& f) {
  if constexpr (N == 1) {
    f(Count<1>());
  } else {
    if (n == N)
      f(Count<N>());
    else
      with_count<N - 1>(n, f);
  }
}

// Calls f(Count<rows>, first) for tiles of at most N rows, as even as they can be.
template <int N, class F>
EVIT_INLINE void even_tiles(int rows, F&& f) {
  const int tiles = (rows + N - 1) / N;
  for (int t = 0; t < tiles; t++) {
    const int first = rows * t / tiles;
    with_count<N>(rows * (t + 1) / tiles - first, [&](auto n) { f(n, first); });
  }
}

// --- Depthwise KS x KS on q, zero-padded at the window's border: rows y0..y1 of outputs.

// WIN accumulators; each input is loaded once per kernel row.
template <int WIN, int KS>
EVIT_NOINLINE void depthwise_window(const Head& h, int y0, int y1, float* out) {
  for (int y = y0; y < y1; y++) {
    for (int c = 0; c < kDK; c += kLanes) {
      f32 acc[WIN];
      const f32 bias = load(h.w->dw_bias + c);
      EVIT_UNROLL for (int i = 0; i < WIN; i++) acc[i] = bias;
      for (int dy = 0; dy < KS; dy++) {
        const int yy = y + dy - KS / 2;
        if (yy < 0 || yy >= WIN) continue;
        const float* r = h.qkv + (long)yy * WIN * h.ld + c;
        const float* w = h.w->dw + dy * KS * kDK + c;
        EVIT_UNROLL for (int xx = 0; xx < WIN; xx++) {
          const f32 v = load(r + xx * h.ld);
          EVIT_UNROLL for (int x = 0; x < WIN; x++) {
            const int dx = xx - x + KS / 2;
            if (dx >= 0 && dx < KS) acc[x] = fma(v, load(w + dx * kDK), acc[x]);
          }
        }
      }
      EVIT_UNROLL for (int i = 0; i < WIN; i++) store(out + ((y - y0) * WIN + i) * kDK + c, acc[i]);
    }
  }
}

template <int WIN>
EVIT_INLINE void depthwise_own(const Head& h, int y0, int y1, float* out) {
  switch (h.KS) {
    case 1:
      return depthwise_window<WIN, 1>(h, y0, y1, out);
    case 3:
      return depthwise_window<WIN, 3>(h, y0, y1, out);
    case 5:
      return depthwise_window<WIN, 5>(h, y0, y1, out);
    default:
      return depthwise_window<WIN, 7>(h, y0, y1, out);
  }
}

template <int N>
EVIT_NOINLINE void depthwise_span(const Head& h, const float* padded, int y, int x0, float* out) {
  const int side = h.KS / 2;
  const long row = (h.WIN + 2 * side) * kDK;
  for (int c = 0; c < kDK; c += kLanes) {
    f32 acc[N];
    const f32 bias = load(h.w->dw_bias + c);
    EVIT_UNROLL for (int i = 0; i < N; i++) acc[i] = bias;
    for (int dy = 0; dy < h.KS; dy++) {
      const int yy = y + dy - side;
      if (yy < 0 || yy >= h.WIN) continue;
      const float* r = padded + yy * row + x0 * kDK + c;
      const float* w = h.w->dw + dy * h.KS * kDK + c;
      for (int dx = 0; dx < h.KS; dx++, r += kDK, w += kDK) {
        const f32 v = load(w);
        EVIT_UNROLL for (int i = 0; i < N; i++) acc[i] = fma(load(r + i * kDK), v, acc[i]);
      }
    }
    EVIT_UNROLL for (int i = 0; i < N; i++) store(out + i * kDK + c, acc[i]);
  }
}

// Any window: q is copied with zeros at the left and right, so that no tap meets a border.
EVIT_NOINLINE void depthwise_any(const Head& h, const Block& b, int y0, int y1) {
  const int WIN = h.WIN, side = h.KS / 2;
  const int from = y0 - side < 0 ? 0 : y0 - side, to = y1 + side > WIN ? WIN : y1 + side;
  for (int y = from; y < to; y++) {
    float* p = b.padded + (long)y * (WIN + 2 * side) * kDK;
    zero(p, side * kDK);
    for (int x = 0; x < WIN; x++)
      for (int c = 0; c < kDK; c += kLanes)
        store(p + (side + x) * kDK + c, load(h.qkv + ((long)y * WIN + x) * h.ld + c));
    zero(p + (side + WIN) * kDK, side * kDK);
  }
  for (int y = y0; y < y1; y++) {
    even_tiles<kSpan>(WIN, [&](auto n, int x0) {
      depthwise_span<n.value>(h, b.padded, y, x0, b.rows + ((y - y0) * WIN + x0) * kDK);
    });
  }
}

// Depthwise of queries n0 .. n0+count-1; the first 16*panels of them transposed into b.q, with
// zeros past the window. Returns the row of query n0.
EVIT_INLINE const float* queries(const Head& h, const Block& b, int n0, int count, int panels) {
  const int y0 = n0 / h.WIN, y1 = (n0 + count - 1) / h.WIN + 1;
  if (h.WIN == 7)
    depthwise_own<7>(h, y0, y1, b.rows);
  else if (h.WIN == 4)
    depthwise_own<4>(h, y0, y1, b.rows);
  else
    depthwise_any(h, b, y0, y1);
  float* rows = b.rows + (n0 - y0 * h.WIN) * kDK;
  if (count < panels * kPanel) zero(rows + count * kDK, (panels * kPanel - count) * kDK);
  for (int i = 0; i < panels; i++) {
    transpose16(rows + i * kPanel * kDK, kDK, b.q + i * kPanel, kBlock);
  }
  return rows;
}

// --- Scores: p[key][query] = bias + k . q, and the largest of each query.

template <int MR, int NP>
EVIT_NOINLINE void scores_tile(const Head& h, const Block& b, const float* bias, int key,
                               int column) {
  constexpr int NV = NP * kVecs;
  const float* k = h.qkv + (long)key * h.ld + kDK;
  const float* q = b.q + column;
  f32 acc[MR][NV];
  EVIT_UNROLL for (int i = 0; i < MR; i++) {
    EVIT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] =
        load(bias + (long)(key + i) * h.SP + column + j * kLanes);
  }
  for (int d = 0; d < kDK; d++, q += kBlock) {
    f32 v[NV];
    EVIT_UNROLL for (int j = 0; j < NV; j++) v[j] = load(q + j * kLanes);
    EVIT_UNROLL for (int i = 0; i < MR; i++) {
      const f32 x = splat(k[i * h.ld + d]);
      EVIT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fma(x, v[j], acc[i][j]);
    }
  }
  float* p = b.p + (long)key * kBlock + column;
  EVIT_UNROLL for (int j = 0; j < NV; j++) {
    f32 m = load(b.largest + column + j * kLanes);
    EVIT_UNROLL for (int i = 0; i < MR; i++) {
      m = vmax(m, acc[i][j]);
      store(p + i * kBlock + j * kLanes, acc[i][j]);
    }
    store(b.largest + column + j * kLanes, m);
  }
}

template <int MR, int NP>
EVIT_INLINE void scores_columns(const Head& h, const Block& b, const float* bias, int column) {
  even_tiles<MR>(h.S, [&](auto n, int key) { scores_tile<n.value, NP>(h, b, bias, key, column); });
}

EVIT_INLINE void scores(const Head& h, const Block& b, int n0, int panels) {
  for (int i = 0; i < panels * kPanel; i += kLanes) store(b.largest + i, splat(-__builtin_inff()));
  const float* bias = h.w->bias + n0;
  int n = 0;
  if constexpr (kScoreRows3 > 0) {
    if (panels == 3) return scores_columns<kScoreRows3, 3>(h, b, bias, 0);
  }
  if constexpr (kScoreRows2 > 0) {
    for (; n + 2 <= panels; n += 2) scores_columns<kScoreRows2, 2>(h, b, bias, n * kPanel);
  }
  for (; n < panels; n++) scores_columns<kScoreRows1, 1>(h, b, bias, n * kPanel);
}

// --- Softmax: p = 2^(p - largest); keys of even and odd index are summed apart.

EVIT_NOINLINE void softmax(const Head& h, const Block& b, int panels) {
  constexpr int NV = 1;
  for (int n = 0; n < panels * kPanel; n += NV * kLanes) {
    float* p = b.p + n;
    f32 m[NV], even[NV], odd[NV];
    EVIT_UNROLL for (int j = 0; j < NV; j++) {
      m[j] = load(b.largest + n + j * kLanes);
      even[j] = odd[j] = splat(0.0f);
    }
    int key = 0;
    for (; key + 2 <= h.S; key += 2, p += 2 * kBlock) {
      EVIT_UNROLL for (int j = 0; j < NV; j++) {
        const f32 x = exp2_small(load(p + j * kLanes) - m[j]);
        const f32 y = exp2_small(load(p + kBlock + j * kLanes) - m[j]);
        even[j] += x;
        odd[j] += y;
        store(p + j * kLanes, x);
        store(p + kBlock + j * kLanes, y);
      }
    }
    if (key < h.S) {
      EVIT_UNROLL for (int j = 0; j < NV; j++) {
        const f32 x = exp2_small(load(p + j * kLanes) - m[j]);
        even[j] += x;
        store(p + j * kLanes, x);
      }
    }
    EVIT_UNROLL for (int j = 0; j < NV; j++)
        store(b.inverse + n + j * kLanes, splat(1.0f) / (even[j] + odd[j]));
  }
}

// --- One query alone: 49 queries would leave 15 of 16 lanes of their last panel empty. Here keys
// lie in lanes; the sums run in the same order as above, so the bits are the same.

EVIT_NOINLINE void lone_query(const Head& h, const Block& b, const float* q, int query,
                              int column) {
  EVIT_STAGE(kScores);
  const int panels = h.S / kPanel;  // and one more key
  float* e = b.keys + kPanel * kDK;
  for (int key = 0; key < h.S; key++) e[key] = h.w->bias[(long)key * h.SP + query];
  const float* k = h.qkv + kDK;
  for (int i = 0; i < panels; i++, k += kPanel * h.ld) {
    transpose16(k, h.ld, b.keys, kPanel);
    for (int n = 0; n < kPanel; n += kLanes) {
      f32 acc = load(e + i * kPanel + n);
      EVIT_UNROLL for (int d = 0; d < kDK; d++) acc =
          fma(splat(q[d]), load(b.keys + d * kPanel + n), acc);
      store(e + i * kPanel + n, acc);
    }
  }
  f32 acc = splat(e[h.S - 1]);
  EVIT_UNROLL for (int d = 0; d < kDK; d++) acc = fma(splat(q[d]), splat(k[d]), acc);
  store(e + panels * kPanel, acc);
  EVIT_STAGE(kSoftmax);
  f32 m = acc, sum = splat(0.0f);
  for (int n = 0; n < panels * kPanel; n += kLanes) m = vmax(m, load(e + n));
  m = splat(hmax(m));
  for (int n = 0; n < panels * kPanel; n += kLanes) {
    const f32 x = exp2_small(load(e + n) - m);
    sum += x;
    store(e + n, x);
  }
  store(e + panels * kPanel, exp2_small(acc - m));
  float* p = b.p + column;
  for (int key = 0; key < h.S; key++) p[(long)key * kBlock] = e[key];
  b.inverse[column] = 1.0f / (hsum(sum) + e[h.S - 1]);
}

// --- o = P v / sum; concat receives relu(o), f receives o + the next head's slice.

template <int MR, int NP>
EVIT_NOINLINE void values_tile(const Head& h, const Block& b, int n0, int query, int column) {
  constexpr int NV = NP * kVecs;
  const float* v = h.qkv + 2 * kDK + column;
  const float* p = b.p + query;
  f32 acc[MR][NV];
  EVIT_UNROLL for (int i = 0; i < MR; i++) {
    EVIT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = splat(0.0f);
  }
  for (int key = 0; key < h.S; key++, v += h.ld, p += kBlock) {
    f32 x[NV];
    EVIT_UNROLL for (int j = 0; j < NV; j++) x[j] = load(v + j * kLanes);
    EVIT_UNROLL for (int i = 0; i < MR; i++) {
      const f32 y = splat(p[i]);
      EVIT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fma(y, x[j], acc[i][j]);
    }
  }
  float* concat = h.concat + (long)(n0 + query) * h.ldc + column;
  EVIT_UNROLL for (int i = 0; i < MR; i++) {
    const f32 inverse = splat(b.inverse[query + i]);
    EVIT_UNROLL for (int j = 0; j < NV; j++) {
      acc[i][j] = acc[i][j] * inverse;
      store(concat + i * h.ldc + j * kLanes, relu(acc[i][j]));
    }
  }
  if (!h.tokens) return;
  float* f = h.f + (long)(n0 + query) * h.DV + column;
  const float* const* tokens = h.tokens + n0 + query;
  EVIT_UNROLL for (int i = 0; i < MR; i++) {
    const float* next = tokens[i] + h.next_column + column;
    EVIT_UNROLL for (int j = 0; j < NV; j++)
        store(f + (long)i * h.DV + j * kLanes, acc[i][j] + load(next + j * kLanes));
  }
}

template <int MR, int NP>
EVIT_INLINE void values_columns(const Head& h, const Block& b, int n0, int queries, int column) {
  even_tiles<MR>(queries,
                 [&](auto n, int query) { values_tile<n.value, NP>(h, b, n0, query, column); });
}

EVIT_INLINE void values(const Head& h, const Block& b, int n0, int count) {
  const int panels = h.DV / kPanel;
  int n = 0;
  if constexpr (kTileRows3 > 0) {
    for (; (panels - n) % 2 == 1 && panels - n >= 3; n += 3)
      values_columns<kTileRows3, 3>(h, b, n0, count, n * kPanel);
  }
  if constexpr (kTileRows2 > 0) {
    for (; n + 2 <= panels; n += 2) values_columns<kTileRows2, 2>(h, b, n0, count, n * kPanel);
  }
  for (; n < panels; n++) values_columns<kTileRows1, 1>(h, b, n0, count, n * kPanel);
}

// Queries n0 .. n0+count-1 of the window, count <= kBlock.
EVIT_NOINLINE void attend(const Head& h, const Block& b, int n0, int count) {
  const bool lone = h.S % kPanel == 1 && count % kPanel == 1;
  const int panels = lone ? count / kPanel : (count + kPanel - 1) / kPanel;
  EVIT_STAGE(kDepthwise);
  const float* rows = queries(h, b, n0, count, panels);
  EVIT_STAGE(kScores);
  scores(h, b, n0, panels);
  EVIT_STAGE(kSoftmax);
  softmax(h, b, panels);
  if (lone) lone_query(h, b, rows + (count - 1) * kDK, n0 + count - 1, count - 1);
  EVIT_STAGE(kValues);
  values(h, b, n0, count);
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
