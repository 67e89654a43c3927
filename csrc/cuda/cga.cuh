// Cascaded group attention in CUDA. Meaning: evit_fast/ops/cga.py.
//
// `attention`: one block = `windows` windows, all heads one after the other. A window's S tokens
// are padded to SP = 16, 32, .. rows, so a block has R = windows * SP rows. In shared memory:
//
//   input   T [R][DV]      the head's input: its slice of x plus the output of the head before
//   v       T [DV][R]      transposed: P V wants the keys next to each other
//   k, q    T [R][16]      q after its convolution
//   raw_q   float [windows * S][16]  before it: threads slide over it without conversions
//   p       T [warps][16][keys]      in raw_q's place: probabilities, where a tile cannot take them
//                                    from registers
//   taps    float [KS * KS][16]
//   concat  T [R][C]       relu of the heads' outputs, where `fused`
//
// Scores and probabilities of 16 queries stay in the registers of a warp. Three barriers a head:
// the input is there; q, k, v are there; q's convolution is there. The next head's input is written
// by the store of this head's output. `fused` = 1: the block ends in the projection with the
// residual. 0: it writes relu(concat) to scratch [T, C], and `projection`, one block = `tokens`
// tokens of the map x 1/split of the columns, goes on: 64 useful rows where a window has 49, and
// two attention blocks fit on an SM (on a model of a V100: 38.7 k cycles a window of M5's second
// stage against 54.5 k).
#pragma once

#include "cga_sizes.cuh"

#if defined(EVIT_DEVICE_CODE)
#include "gemm.cuh"
#include "instructions.cuh"
#include "softmax.cuh"

namespace evit::cuda {

// Four neighbours as they lie in memory: of 16-bit numbers, half the registers of four floats.
template <typename X>
struct CgaFour {
  using Raw = u32x2;
  EVIT_DEVICE static void unpack(float* to, Raw v) {
    to[0] = low<X>(v.x), to[1] = high<X>(v.x), to[2] = low<X>(v.y), to[3] = high<X>(v.y);
  }
};
template <>
struct CgaFour<float> {
  using Raw = f32x4;
  EVIT_DEVICE static void unpack(float* to, Raw v) {
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
};

template <typename Tile, CgaSizes S>
struct CgaKernel {
  using T = typename Tile::Number;
  using X = typename NumberOf<S.x_kind>::Type;
  using Y = typename NumberOf<S.y_kind>::Type;
  using Fragment = typename Tile::Fragment;
  using Accumulator = typename Tile::Accumulator;
  using Four = CgaFour<X>;
  using Args = CgaAttentionArgs<T>;

  static constexpr int kFamily = Tile::kFamily, kThreads = S.warps * 32;
  static constexpr int WIN = S.window, kS = WIN * WIN, kR = cga_rows(S), kSP = kR / S.windows;
  static constexpr int DK = kCgaKeyDim, DV = S.C / S.heads, CT = S.C / 16;
  static constexpr int MT = kR / 16, kKeyTiles = kSP / 16;
  static constexpr int kValueTiles = DV / 16, kQkvTiles = 2 + kValueTiles;  // q, k, v
  static constexpr CgaMemory kMemory = cga_memory(S, kFamily);
  static constexpr int kStrideInput = cga_stride(kFamily, DV), kStrideV = cga_stride(kFamily, kR);
  static constexpr int kStrideQ = cga_stride(kFamily, DK), kStrideC = cga_stride(kFamily, S.C);
  static constexpr int kChunk = cga_chunk(S, kFamily), kStrideP = cga_stride(kFamily, kChunk * 16);
  static constexpr bool kStoreOnce = !Tile::kAccumulatorIsOperand && kChunk == kKeyTiles;
  static constexpr int kTaps = cga_largest_ks(S) * cga_largest_ks(S) * DK;  // of a head
  static constexpr bool kStageTaps = kFamily != 0;

  // q, k, v: kRows x kColumns warps share token tiles x channel tiles; a weight is read kRows
  // times.
  static constexpr int kRows = MT > 1 ? 2 : 1, kColumns = S.warps / kRows;
  static constexpr int kRowTiles = MT > 2 ? 2 : 1;
  static constexpr int kGroup = (kQkvTiles + kColumns - 1) / kColumns;
  // Attention: kSharers warps for 16 queries.
  static constexpr int kSharers = cga_sharers(S), kQueryStep = S.warps / kSharers;
  static constexpr int kShare = (kValueTiles + kSharers - 1) / kSharers;
  // Tiles of output that a warp sums at once. Many keys leave few registers for them; so does sm_70
  // with the registers of its operands: 6 tiles spill (M5's second stage), 3 take 242 of 255.
  static constexpr int kMostSums = kFamily == 70 ? 3 : kKeyTiles > 4 ? 4 : kShare;
  static constexpr int kSums = kShare < kMostSums ? kShare : kMostSums;
  static_assert(kGroup * kRowTiles <= 10 && kKeyTiles <= 13, "more than the registers hold");

  EVIT_DEVICE static void attention(const Args& p) {
    load_input(p);
    store_taps(load_taps(p, 0));
    for (int h = 0; h < S.heads; h++) {
      qkv(p, h);
      sync_block();
      // Asked for before the convolution, used after it.
      Accumulator scores[kKeyTiles];
      if constexpr (MT <= kQueryStep) load_bias(p, h, query_tile(), scores);
      convolve(p, h);
      sync_block();
      Taps taps;
      if (kStageTaps && h + 1 < S.heads) taps = load_taps(p, h + 1);
      for (int m = query_tile(); m < MT; m += kQueryStep) {
        if constexpr (MT > kQueryStep) load_bias(p, h, m, scores);
        attend(p, h, m, scores);
      }
      if (kStageTaps && h + 1 < S.heads) store_taps(taps);
    }
    if constexpr (S.fused) {
      sync_block();
      project(p);
    }
  }

  // y = x + rows proj^T + proj_bias for `tokens` tokens and 1/split of the columns.
  EVIT_DEVICE static void projection(const CgaProjectionArgs<T>& p) {
    constexpr int kStride = row_stride(kFamily, S.C), kWidth = 16 / sizeof(T);
    constexpr int kRowChunks = S.C / kWidth, kTiles = (CT + S.split - 1) / S.split;
    T* s_rows = reinterpret_cast<T*>(shared_memory());
    const i64 first = static_cast<i64>(block_x()) * S.tokens;
    for (int i = thread_id(); i < S.tokens * kRowChunks; i += S.projection_warps * 32) {
      const int row = i / kRowChunks, c = i % kRowChunks * kWidth;
      const bool inside = first + row < p.count;
      copy_async(s_rows + row * kStride + c, p.rows + (inside ? first + row : 0) * S.C + c, inside);
    }
    commit_copies();
    wait_copies<0>();
    sync_block();
    const int begin = block_y() * kTiles, tiles = begin + kTiles < CT ? kTiles : CT - begin;
    multiply<Tile, S.projection_warps, S.tokens / 16, CT, 3>(
        s_rows, kStride, p.proj + begin * CT * Tile::kPacked, tiles,
        [&](int row, int column, const Accumulator& c) {
          EVIT_UNROLL
          for (int half = 0; half < 2; half++) {
            const i64 token = first + row + Tile::row(half);
            if (token < p.count) {
              store_output(p.y, p.x, p.proj_bias, token, begin * 16 + column, half, c);
            }
          }
        });
  }

 private:
  EVIT_DEVICE static T* shared(int at) { return reinterpret_cast<T*>(shared_memory() + at); }
  EVIT_DEVICE static float* shared_floats(int at) {
    return reinterpret_cast<float*>(shared_memory() + at);
  }
  EVIT_DEVICE static int window_of(int row) { return S.windows == 1 ? 0 : row / kSP; }

  // The token of the map at a row of the block; -1: padding, of the rows or of the map.
  EVIT_DEVICE static i64 token_at(const Args& p, int row) {
    const u32 across = static_cast<u32>((p.W + WIN - 1) / WIN);
    const u32 down = static_cast<u32>((p.H + WIN - 1) / WIN);
    const u32 w = static_cast<u32>(block_x() * S.windows + window_of(row));
    const int t = row - window_of(row) * kSP;
    const i64 image = w / (across * down);
    const i64 y = w / across % down * WIN + t / WIN, x = w % across * WIN + t % WIN;
    if (t >= kS || image >= p.B || y >= p.H || x >= p.W) return -1;
    return (image * p.H + y) * p.W + x;
  }

  // The first head's input. Rows of padding are zeros: they stay so, and no NaN comes from them.
  EVIT_DEVICE static void load_input(const Args& p) {
    constexpr int kChunks = DV / 8;
    T* s_input = shared(kMemory.input);
    const X* x = static_cast<const X*>(p.x);
    for (int i = thread_id(); i < kR * kChunks; i += kThreads) {
      const int row = i / kChunks, c = i % kChunks * 8;
      const i64 token = token_at(p, row);
      float value[8] = {};
      if (token >= 0) load_numbers<8>(value, x + token * S.C + c);
      store_8(s_input + row * kStrideInput + c, value);
    }
  }

  // A head's taps, spread over the threads.
  struct Taps {
    f32x4 part[(kTaps / 4 + kThreads - 1) / kThreads];
  };
  EVIT_DEVICE static Taps load_taps(const Args& p, int h) {
    Taps taps;
    EVIT_UNROLL
    for (int i = 0; i * kThreads * 4 < kTaps; i++) {
      const int at = (thread_id() + i * kThreads) * 4;
      if (kStageTaps && at < kTaps) taps.part[i] = load_f32x4(p.dw + h * kTaps + at);
    }
    return taps;
  }
  EVIT_DEVICE static void store_taps(const Taps& taps) {
    EVIT_UNROLL
    for (int i = 0; i * kThreads * 4 < kTaps; i++) {
      const int at = (thread_id() + i * kThreads) * 4;
      if (kStageTaps && at < kTaps) store_vector(shared_floats(kMemory.taps) + at, taps.part[i]);
    }
  }

  // raw_q, k and v of one head, transposed: weights are A, tokens B, so that v comes out as P V
  // wants it. Begins with a barrier: the first weights do not depend on the head before.
  EVIT_DEVICE static void qkv(const Args& p, int h) {
    const int n0 = warp_id() / kRows;
    const T* weights = p.qkv + h * kQkvTiles * kValueTiles * Tile::kPacked;
    const float* bias = p.qkv_bias + h * kQkvTiles * 16;
    const T* s_input = shared(kMemory.input);
    Fragment a[2][kGroup], b[2][kRowTiles];
    Accumulator c[kGroup][kRowTiles];
    const auto load_weights = [&](int k, Fragment* to) {
      EVIT_UNROLL
      for (int j = 0; j < kGroup; j++) {
        const int n = n0 + j * kColumns;
        if (n >= kQkvTiles) continue;
        Tile::load_packed_a(to[j], weights + (n * kValueTiles + k) * Tile::kPacked);
      }
    };
    load_weights(0, a[0]);
    sync_block();
    for (int m0 = warp_id() % kRows * kRowTiles; m0 < MT; m0 += kRows * kRowTiles) {
      const auto load_tokens = [&](int k, Fragment* to) {
        EVIT_UNROLL
        for (int m = 0; m < kRowTiles; m++) {
          if (m0 + m >= MT) continue;
          Tile::load_b(to[m], s_input + (m0 + m) * 16 * kStrideInput + k * 16, kStrideInput);
        }
      };
      const auto step = [&](int k, int parity) {
        if (k + 1 < kValueTiles) {
          load_tokens(k + 1, b[parity ^ 1]);
          load_weights(k + 1, a[parity ^ 1]);
        }
        EVIT_UNROLL
        for (int j = 0; j < kGroup; j++) {
          if (n0 + j * kColumns >= kQkvTiles) continue;
          EVIT_UNROLL
          for (int m = 0; m < kRowTiles; m++) {
            if (m0 + m < MT) Tile::mma(c[j][m], a[parity][j], b[parity][m]);
          }
        }
      };
      load_tokens(0, b[0]);
      if (m0 >= kRows * kRowTiles) load_weights(0, a[0]);
      start_at_bias(c, bias, n0);
      for (int k = 0; k < kValueTiles; k += 2) {
        step(k, 0);
        if (k + 1 < kValueTiles) step(k + 1, 1);
      }
      EVIT_UNROLL
      for (int j = 0; j < kGroup; j++) {
        if (n0 + j * kColumns >= kQkvTiles) continue;
        EVIT_UNROLL
        for (int m = 0; m < kRowTiles; m++) {
          if (m0 + m < MT) store_qkv(n0 + j * kColumns, (m0 + m) * 16 + Tile::column(), c[j][m]);
        }
      }
    }
  }

  EVIT_DEVICE static void start_at_bias(Accumulator (&c)[kGroup][kRowTiles], const float* bias,
                                        int n0) {
    EVIT_UNROLL
    for (int j = 0; j < kGroup; j++) {
      const int n = n0 + j * kColumns;
      EVIT_UNROLL
      for (int half = 0; half < 2; half++) {
        const float start = n < kQkvTiles ? bias[n * 16 + Tile::row(half)] : 0.0f;
        EVIT_UNROLL
        for (int m = 0; m < kRowTiles; m++) {
          EVIT_UNROLL
          for (int i = 0; i < 4; i++) c[j][m].d[Tile::at(half, i)] = start;
        }
      }
    }
  }

  // Tile n of q, k, v: 16 channels; this lane has the rows (tokens) `row` to `row` + 3.
  EVIT_DEVICE static void store_qkv(int n, int row, const Accumulator& c) {
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      const int channel = Tile::row(half);
      float value[4];
      EVIT_UNROLL
      for (int i = 0; i < 4; i++) value[i] = c.d[Tile::at(half, i)];
      if (n == 0) {
        const int t = row - window_of(row) * kSP;
        float* s_raw = shared_floats(kMemory.raw_q) + (window_of(row) * kS + t) * DK + channel;
        EVIT_UNROLL
        for (int i = 0; i < 4; i++) {
          if (t + i < kS) s_raw[i * DK] = value[i];
        }
      } else if (n == 1) {
        T* s_k = shared(kMemory.k) + row * kStrideQ + channel;
        EVIT_UNROLL
        for (int i = 0; i < 4; i++) s_k[i * kStrideQ] = Number<T>::from(value[i]);
      } else {
        store_4(shared(kMemory.v) + ((n - 2) * 16 + channel) * kStrideV + row, value);
      }
    }
  }

  EVIT_DEVICE static void convolve(const Args& p, int h) {
    int side = S.ks[0];
    EVIT_UNROLL
    for (int i = 1; i < S.heads; i++) side = h == i ? S.ks[i] : side;
    if (side == 1) convolve_by<1>(p, h);
    if (side == 3) convolve_by<3>(p, h);
    if (side == 5) convolve_by<5>(p, h);
    if (side == 7) convolve_by<7>(p, h);
  }

  EVIT_HOST_DEVICE static bool has(int side) {
    for (int h = 0; h < S.heads; h++) {
      if (S.ks[h] == side) return true;
    }
    return false;
  }

  // q = the depthwise convolution of raw_q. A thread owns a row of a window, in one channel.
  template <int KS>
  EVIT_DEVICE static void convolve_by(const Args& p, int h) {
    if constexpr (has(KS)) {
      const float* all_taps = kStageTaps ? shared_floats(kMemory.taps) : p.dw + h * kTaps;
      for (int i = thread_id(); i < S.windows * WIN * DK; i += kThreads) {
        const int channel = i % DK, row = i / DK % WIN, w = i / DK / WIN;
        const float* s_raw = shared_floats(kMemory.raw_q) + w * kS * DK + channel;
        const float bias = p.dw_bias[h * DK + channel];
        float sum[WIN];
        EVIT_UNROLL
        for (float& s : sum) s = bias;
        for (int dy = 0; dy < KS; dy++) {
          const int y = row + dy - KS / 2;
          if (y < 0 || y >= WIN) continue;
          float value[WIN], tap[KS];
          EVIT_UNROLL
          for (int dx = 0; dx < KS; dx++) tap[dx] = all_taps[(dy * KS + dx) * DK + channel];
          EVIT_UNROLL
          for (int x = 0; x < WIN; x++) value[x] = s_raw[(y * WIN + x) * DK];
          EVIT_UNROLL
          for (int dx = 0; dx < KS; dx++) {
            EVIT_UNROLL
            for (int x = 0; x < WIN; x++) {
              const int from = x + dx - KS / 2;
              if (from >= 0 && from < WIN) sum[x] += value[from] * tap[dx];
            }
          }
        }
        T* s_q = shared(kMemory.q) + (w * kSP + row * WIN) * kStrideQ + channel;
        EVIT_UNROLL
        for (int x = 0; x < WIN; x++) s_q[x * kStrideQ] = Number<T>::from(sum[x]);
      }
    }
  }

  EVIT_DEVICE static int query_tile() { return warp_id() / kSharers; }

  // The scores of 16 queries start at the attention bias, which lies in accumulator order.
  EVIT_DEVICE static void load_bias(const Args& p, int h, int m, Accumulator (&scores)[kKeyTiles]) {
    const int tile = (h * kKeyTiles + m % kKeyTiles) * kKeyTiles;
    EVIT_UNROLL
    for (int j = 0; j < kKeyTiles; j++) {
      EVIT_UNROLL
      for (int part = 0; part < 2; part++) {
        const float* bias = p.bias + ((tile + j) * 2 + part) * 128 + lane_id() * 4;
        load_numbers<4>(scores[j].d + part * 4, bias);
      }
    }
  }

  // One head's output for the 16 queries of row tile m; `scores` come as their bias.
  EVIT_DEVICE static void attend(const Args& p, int h, int m, Accumulator (&scores)[kKeyTiles]) {
    const int first_key = window_of(m * 16) * kSP;
    Fragment q;
    Tile::load_a(q, shared(kMemory.q) + m * 16 * kStrideQ, kStrideQ);
    EVIT_UNROLL
    for (int j = 0; j < kKeyTiles; j++) {
      Fragment k;
      Tile::load_b(k, shared(kMemory.k) + (first_key + j * 16) * kStrideQ, kStrideQ);
      Tile::mma(scores[j], q, k);
    }
    float inverse[2];
    softmax<Tile>(scores, inverse);
    if constexpr (kStoreOnce) store_probabilities(scores, probabilities(m));
    for (int n0 = warp_id() % kSharers; n0 < kValueTiles; n0 += kSums * kSharers) {
      times_v(p, h, m, n0, scores, inverse);
    }
  }

  // Columns n0, n0 + kSharers, .. of P V: stores them as output and as the next head's input.
  EVIT_DEVICE static void times_v(const Args& p, int h, int m, int n0,
                                  const Accumulator (&scores)[kKeyTiles],
                                  const float (&inverse)[2]) {
    const int first_key = window_of(m * 16) * kSP;
    const auto column_of = [&](int j) { return (n0 + j * kSharers) * 16; };
    i64 token[2];
    typename Four::Raw next[kSums][2];  // of x: asked for before the products, used after them
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      token[half] = token_at(p, m * 16 + Tile::row(half));
      EVIT_UNROLL
      for (int j = 0; j < kSums; j++) {
        next[j][half] = {};
        if (h + 1 == S.heads || token[half] < 0 || column_of(j) >= DV) continue;
        next[j][half] =
            load_vector<typename Four::Raw>(static_cast<const X*>(p.x) + token[half] * S.C +
                                            (h + 1) * DV + column_of(j) + Tile::column());
      }
    }
    Accumulator sum[kSums];
    EVIT_UNROLL
    for (Accumulator& s : sum) {
      EVIT_UNROLL
      for (float& d : s.d) d = 0.0f;
    }
    T* s_p = probabilities(m);
    EVIT_UNROLL
    for (int j0 = 0; j0 < kKeyTiles; j0 += kChunk) {
      if constexpr (!Tile::kAccumulatorIsOperand && !kStoreOnce) {
        store_probabilities(scores + j0, s_p);
      }
      EVIT_UNROLL
      for (int k = j0; k < j0 + kChunk; k++) {
        Fragment a;
        if constexpr (Tile::kAccumulatorIsOperand) {
          Tile::from_accumulator(a, scores[k]);
        } else {
          Tile::load_a(a, s_p + (k - j0) * 16, kStrideP);
        }
        EVIT_UNROLL
        for (int j = 0; j < kSums; j++) {
          if (column_of(j) >= DV) continue;
          Fragment v;
          const T* s_v = shared(kMemory.v) + column_of(j) * kStrideV + first_key + k * 16;
          Tile::load_b(v, s_v, kStrideV);
          Tile::mma(sum[j], a, v);
        }
      }
    }
    EVIT_UNROLL
    for (int j = 0; j < kSums; j++) {
      if (column_of(j) >= DV) continue;
      EVIT_UNROLL
      for (int half = 0; half < 2; half++) {
        const int row = m * 16 + Tile::row(half), column = column_of(j) + Tile::column();
        if (row - window_of(row) * kSP >= kS) continue;
        float out[4], more[4];
        EVIT_UNROLL
        for (int i = 0; i < 4; i++) out[i] = sum[j].d[Tile::at(half, i)] * inverse[half];
        if (h + 1 < S.heads) {
          Four::unpack(more, next[j][half]);
          EVIT_UNROLL
          for (int i = 0; i < 4; i++) more[i] += out[i];
          store_4(shared(kMemory.input) + row * kStrideInput + column, more);
        }
        EVIT_UNROLL
        for (float& o : out) o = relu(o);
        if constexpr (S.fused) {
          store_4(shared(kMemory.concat) + row * kStrideC + h * DV + column, out);
        } else if (token[half] >= 0) {
          store_4(static_cast<T*>(p.y) + token[half] * S.C + h * DV + column, out);
        }
      }
    }
  }

  // Where a warp's probabilities lie, for row tile m.
  EVIT_DEVICE static T* probabilities(int m) {
    if (kMemory.p == kMemory.q) return shared(kMemory.q) + m * 16 * kStrideQ;
    return shared(kMemory.p) + warp_id() * 16 * kStrideP;
  }

  EVIT_DEVICE static void store_probabilities(const Accumulator* scores, T* s_p) {
    sync_warp();  // what lay there has been read
    EVIT_UNROLL
    for (int j = 0; j < kChunk; j++) {
      EVIT_UNROLL
      for (int half = 0; half < 2; half++) {
        float value[4];
        EVIT_UNROLL
        for (int i = 0; i < 4; i++) value[i] = scores[j].d[Tile::at(half, i)];
        store_4(s_p + Tile::row(half) * kStrideP + j * 16 + Tile::column(), value);
      }
    }
    sync_warp();
  }

  EVIT_DEVICE static void project(const Args& p) {
    multiply<Tile, S.warps, MT, CT, 3>(shared(kMemory.concat), kStrideC, p.proj, CT,
                                       [&](int row, int column, const Accumulator& c) {
                                         EVIT_UNROLL
                                         for (int half = 0; half < 2; half++) {
                                           const i64 token = token_at(p, row + Tile::row(half));
                                           if (token >= 0)
                                             store_output(p.y, p.x, p.proj_bias, token, column,
                                                          half, c);
                                         }
                                       });
  }

  // y = x + c + bias: one token, four columns.
  EVIT_DEVICE static void store_output(void* y, const void* x, const float* proj_bias, i64 token,
                                       int column, int half, const Accumulator& c) {
    column += Tile::column();
    const i64 at = token * S.C + column;
    float out[4], bias[4];
    load_numbers<4>(out, static_cast<const X*>(x) + at);
    load_numbers<4>(bias, proj_bias + column);
    EVIT_UNROLL
    for (int i = 0; i < 4; i++) out[i] += c.d[Tile::at(half, i)] + bias[i];
    store_4(static_cast<Y*>(y) + at, out);
  }
};

}  // namespace evit::cuda
#endif
