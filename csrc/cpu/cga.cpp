// Cascaded group attention on the CPU: y = x + proj(relu(concat of the heads)). A rank takes whole
// windows, one at a time; where a map is a single window, the qkv and proj layers run over a group
// of images at once. q, k, v, scores, the cascade sum and the concat never leave scratch. With too
// few windows for the team, ranks share each window: columns of qkv and proj, blocks of queries of
// the attention. Scratch: areas of f [tokens][DV], qkv [tokens][2*DK+DV], concat [tokens][C]; per
// rank one block of queries.
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/isa_ops.h"
#include "cpu/window.h"

namespace evit::cpu::EVIT_ISA {
namespace {

constexpr int kGroupTokens = 256;  // of the images that share one pass over the weights

struct Plan {
  WindowGrid grid;
  int windows;
  bool shared;                  // all ranks work on all windows together
  int group;                    // windows of an area
  size_t f, qkv, concat, area;  // floats
  size_t block, tokens, zeros, rank;

  size_t floats(int team) const { return area * (shared ? 1 : team) + rank * team; }
};

EVIT_INLINE Plan plan(const CgaShape& s, int B, int H, int W, int team) {
  Plan p;
  p.grid = window_grid(B, H, W, s.C, s.window);
  p.windows = p.grid.count();
  // Dealing whole windows needs no synchronisation, but leaves ranks idle in the last round.
  const long rounds = (p.windows + team - 1) / team;
  p.shared = team > 1 && 4L * p.windows < 3 * rounds * team;
  const int most = p.shared ? p.windows : p.grid.single() ? (int)rounds : 1;
  const int wanted = p.shared ? p.windows : kGroupTokens / s.s();
  p.group = most < wanted ? most : wanted > 1 ? wanted : 1;
  const size_t tokens = (size_t)p.group * s.s();
  p.f = tokens * s.dv();
  p.qkv = tokens * s.qkv();
  p.concat = tokens * s.C;
  p.area = p.f + p.qkv + p.concat;
  p.block = block_floats(s.window);
  p.tokens = round_up((int)(tokens * sizeof(float*) / sizeof(float)), 16);
  p.zeros = s.C;
  p.rank = p.block + p.tokens + p.zeros;
  return p;
}

// The windows that lie in an area together, and the ranks that work on them.
struct Task {
  const CgaShape& s;
  const CgaWeights& w;
  const MapIo& io;
  const WindowGrid& grid;
  const Team& team;  // of one rank unless windows are shared
  float *f, *qkv, *concat;
  const float* zeros;    // [C]
  const float** tokens;  // [group][S] where the tokens lie in x
  Block block;

  int share(int n, int rank) const { return (int)((long)n * rank / team.size); }
};

// A layer's rows and panels dealt over the team: columns first, so that a weight is read by as few
// ranks as possible.
EVIT_INLINE void shared_gemm(const Team& team, Epilogue e, GemmArgs g) {
  const int panels = g.N / kPanel;
  const int row_parts = (team.size + panels - 1) / panels, column_parts = team.size / row_parts;
  if (team.rank >= row_parts * column_parts) return;
  const int part = team.rank / column_parts;
  const int t0 = (int)((long)g.T * part / row_parts),
            t1 = (int)((long)g.T * (part + 1) / row_parts);
  g.T = t1 - t0;
  g.a += t0 * g.lda;
  g.c += t0 * g.ldc;
  if (g.r) g.r += t0 * g.ldr;
  gemm(e, gemm_columns(g, team.rank % column_parts, column_parts));
}

// q, k, v of head i for the windows' tokens.
void project_in(const Task& t, int first, int count, int i) {
  const int S = t.s.s(), DV = t.s.dv(), T = count * S;
  const CgaHeadWeights& w = t.w.head[i];
  const bool in_place = i == 0 && t.grid.single();
  const float* a = in_place ? t.io.x + (long)first * S * t.s.C : t.f;
  shared_gemm(t.team, Epilogue::kBias,
              {T, DV, t.s.qkv(), a, in_place ? t.s.C : DV, w.qkv, w.qkv_bias, t.qkv, t.s.qkv(),
               nullptr, 0});
}

// From q, k, v to this head's columns of the concat and the next head's input.
void attention(const Task& t, int count, int i) {
  const int S = t.s.s(), DV = t.s.dv(), panels = t.s.sp() / kPanel;
  const int blocks = (panels + kBlockPanels - 1) / kBlockPanels;
  // Alone, a rank takes blocks as wide as they come; together, the panels of all windows are dealt.
  const int end = t.share(count * panels, t.team.rank + 1);
  for (int u = t.share(count * panels, t.team.rank); u < end;) {
    const int window = u / panels, panel = u % panels;
    int n = panels / blocks + (panels % blocks > 0);
    if (n > panels - panel) n = panels - panel;
    if (n > end - u) n = end - u;
    const long token = (long)window * S;
    const bool last = i + 1 == t.s.heads;
    const Head h{t.s.window,
                 S,
                 t.s.sp(),
                 t.s.ks[i],
                 DV,
                 t.qkv + token * t.s.qkv(),
                 t.s.qkv(),
                 &t.w.head[i],
                 t.concat + token * t.s.C + i * DV,
                 t.s.C,
                 last ? nullptr : t.tokens + token,
                 (i + 1) * DV,
                 t.f + token * DV};
    const int rest = S - panel * kPanel;
    attend(h, t.block, panel * kPanel, n * kPanel < rest ? n * kPanel : rest);
    u += n;
  }
}

// A window row alone would leave tiles with too few chains to hide an FMA's latency (AVX2: 7 rows =
// 4 + 3, 84 % of peak where whole windows reach 97 %).
EVIT_INLINE bool rows_too_short(int WIN) {
  const int tiles = (WIN + kRows1 - 1) / kRows1;
  return kLanes < 16 && WIN / tiles * kVecs < 8;
}

// y = x + proj(concat) of one window, some columns at a time through the scratch of q, k, v.
void project_out_by_columns(const Task& t, const Window& win) {
  const int S = t.s.s(), C = t.s.C, WIN = t.s.window, width = t.s.qkv();
  for (int n = 0; n < C; n += width) {
    const int N = C - n < width ? C - n : width;
    gemm(Epilogue::kBias,
         {S, C, N, t.concat, C, t.w.proj + (long)n * C, t.w.proj_bias + n, t.qkv, N, nullptr, 0});
    for (int r = 0; r < win.rows; r++) {
      for (int i = 0; i < win.columns; i++) {
        const long out = (win.origin + (long)r * t.grid.W + i) * C + n;
        const float* o = t.qkv + ((long)r * WIN + i) * N;
        for (int j = 0; j < N; j += kLanes)
          store(t.io.y + out + j, load(o + j) + load(t.io.x + out + j));
      }
    }
  }
}

// y = x + proj(concat), cropped to the map.
void project_out(const Task& t, int first, int count) {
  const int S = t.s.s(), C = t.s.C, WIN = t.s.window;
  GemmArgs g{count * S, C, C, t.concat, C, t.w.proj, t.w.proj_bias, nullptr, C, nullptr, C};
  if (t.grid.single()) {
    g.c = t.io.y + (long)first * S * C;
    g.r = t.io.x + (long)first * S * C;
    return shared_gemm(t.team, Epilogue::kResidual, g);
  }
  for (int i = 0; i < count; i++) {
    const Window win = window_at(t.grid, first + i);
    if (t.team.size == 1 && rows_too_short(WIN)) {
      project_out_by_columns(t, win);
      continue;
    }
    for (int r = 0; r < win.rows; r++) {  // one window row is a run of tokens
      const long out = (win.origin + (long)r * t.grid.W) * C;
      g.T = win.columns;
      g.a = t.concat + ((long)i * S + r * WIN) * C;
      g.c = t.io.y + out;
      g.r = t.io.x + out;
      shared_gemm(t.team, Epilogue::kResidual, g);
    }
  }
}

void windows(const Task& t, int first, int count) {
  const int S = t.s.s();
  EVIT_STAGE(kGather);
  for (int i = 0; i < count; i++) {
    window_tokens(t.grid, window_at(t.grid, first + i), t.io.x, t.zeros, t.tokens + (long)i * S);
  }
  if (!t.grid.single()) {
    gather(t.tokens, t.share(count * S, t.team.rank), t.share(count * S, t.team.rank + 1), t.s.dv(),
           t.f);
  }
  for (int i = 0; i < t.s.heads; i++) {
    t.team.sync();
    EVIT_STAGE(kQkv);
    project_in(t, first, count, i);
    t.team.sync();
    attention(t, count, i);
  }
  t.team.sync();
  EVIT_STAGE(kProject);
  project_out(t, first, count);
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA

namespace EVIT_KERNELS {

size_t cga_scratch(const CgaShape& s, int B, int H, int W, int team) {
  size_t most = 0;  // a smaller team than planned for may come
  for (int i = 1; i <= team; i++) {
    const size_t n = plan(s, B, H, W, i).floats(i);
    if (n > most) most = n;
  }
  return most;
}

void cga(const CgaShape& s, const CgaWeights& w, const MapIo& io) {
  const Team alone{0, 1, nullptr};
  const Plan p = plan(s, io.B, io.H, io.W, io.team.size);
  float* area = io.scratch + (p.shared ? 0 : p.area * io.team.rank);
  float* own = io.scratch + p.area * (p.shared ? 1 : io.team.size) + p.rank * io.team.rank;
  float* zeros = own + p.block;
  zero(zeros, s.C);
  const Task t{s,
               w,
               io,
               p.grid,
               p.shared ? io.team : alone,
               area,
               area + p.f,
               area + p.f + p.qkv,
               zeros,
               (const float**)(zeros + p.zeros),
               block_at(s.window, own)};
  if (p.shared) return windows(t, 0, p.windows);
  const int end = (int)((long)p.windows * (io.team.rank + 1) / io.team.size);
  for (int i = (int)((long)p.windows * io.team.rank / io.team.size); i < end; i += p.group) {
    windows(t, i, end - i < p.group ? end - i : p.group);
  }
}

}  // namespace EVIT_KERNELS
