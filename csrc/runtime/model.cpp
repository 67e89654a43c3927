#include "runtime/model.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "common/layout.h"
#include "cpu/pool.h"

namespace evit {
namespace {

size_t align16(size_t floats) { return (floats + 15) / 16 * 16; }

size_t op_scratch(const cpu::Kernels& k, const Op& op, int B, MapSize in, int team) {
  switch (op.kind) {
    case OpKind::kStem:
      return k.stem_scratch(op.stem(), in.H, in.W, team);
    case OpKind::kDwFfn:
      return k.dw_ffn_scratch(op.dw_ffn(), B, in.H, in.W, team);
    case OpKind::kCga:
      return k.cga_scratch(op.cga(), B, in.H, in.W, team);
    case OpKind::kPatchMerge:
      return k.patch_merge_scratch(op.patch_merge(), B, in.H, in.W, team);
    case OpKind::kClassifier:
      return k.classifier_scratch(op.classifier(), B, in.H, in.W, team);
  }
  return 0;
}

// Images that go together. Large maps go one by one: sixteen of them (and their hidden activations)
// would leave the L2 cache. Small ones share each read of the weights.
int group_size(MapSize map, int max_chunk) {
  const long tokens = (long)map.H * map.W;
  if (tokens >= 128) return 1;
  return std::max(1,
                  std::min(max_chunk, (int)std::min<long>(kMaxGroup, 1024 / std::max(1L, tokens))));
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Run {
  const Model& m;
  const cpu::Kernels& k;
  const Plan& plan;
  const evit_tensor& x;
  float* y;
  float* workspace;
  double* op_seconds;
  uint64_t* stage_ticks;
  std::atomic<int> next_chunk{0};
  SpinBarrier barrier{};

  int chunk_start(int c) const { return (int)((int64_t)x.sizes[0] * c / plan.chunks); }
  void chunk(int c, float* arena, Team team);
  void op(int i, int images, const float* in, float* out, int first_image, float* scratch,
          Team team);
};

void Run::op(int i, int images, const float* in, float* out, int first_image, float* scratch,
             Team team) {
  const BoundOp& b = m.ops[i];
  const MapSize s = plan.sizes[i];
  const cpu::MapIo io{in, out, images, s.H, s.W, scratch, team};
  switch (b.op.kind) {
    case OpKind::kStem: {
      const bool pixels = x.dtype == EVIT_UINT8;
      const int64_t* st = x.strides;
      for (int n = 0; n < images; n++) {
        const int64_t at = (first_image + n) * st[0];
        const void* image = pixels ? (const void*)((const uint8_t*)x.data + at)
                                   : (const void*)((const float*)x.data + at);
        k.stem(b.op.stem(), b.stem,
               {image, pixels ? cpu::PixelType::kUint8 : cpu::PixelType::kFloat32, st[1], st[2],
                st[3], out + n * plan.sizes[i + 1].floats(), s.H, s.W, scratch, team});
      }
      break;
    }
    case OpKind::kDwFfn:
      k.dw_ffn(b.op.dw_ffn(), b.dw_ffn, io);
      break;
    case OpKind::kCga:
      k.cga(b.op.cga(), b.cga, io);
      break;
    case OpKind::kPatchMerge:
      k.patch_merge(b.op.patch_merge(), b.patch_merge, io);
      break;
    case OpKind::kClassifier:
      k.classifier(b.op.classifier(), b.classifier, io);
      break;
  }
  team.sync();
}

void Run::chunk(int c, float* arena, Team team) {
  const int image0 = chunk_start(c), images = chunk_start(c + 1) - image0;
  for (size_t s = 0; s < m.segments.size(); s++) {
    const Segment& seg = m.segments[s];
    const bool last_segment = s + 1 == m.segments.size();
    for (int g = 0; g < images; g += plan.groups[s]) {
      const int n = std::min(plan.groups[s], images - g);
      const float* in = s > 0 ? arena + plan.boundary[s] + g * plan.sizes[seg.first].floats()
                        : m.starts_with_stem()
                            ? nullptr
                            : (const float*)x.data + (image0 + g) * plan.sizes[0].floats();
      for (int i = seg.first; i < seg.last; i++) {
        const size_t out_floats = plan.sizes[i + 1].floats();
        float* out = i + 1 < seg.last ? arena + ((i - seg.first) % 2 ? plan.pong : plan.ping)
                     : last_segment   ? y + (image0 + g) * out_floats
                                      : arena + plan.boundary[s + 1] + g * out_floats;
        const double start = op_seconds ? seconds() : 0.0;
        if (stage_ticks) cpu::begin_stages(stage_ticks + (size_t)i * cpu::kStageCount);
        op(i, n, in, out, image0 + g, arena + plan.scratch, team);
        if (stage_ticks) cpu::end_stages();
        if (op_seconds && team.rank == 0) op_seconds[i] += seconds() - start;
        in = out;
      }
    }
  }
}

// One team of all ranks, or every rank its own team.
void run_rank(void* ctx, int rank, int size) {
  Run& run = *(Run*)ctx;
  if (run.plan.team > 1) {
    if (size != run.plan.team) {  // fewer threads than asked for: the caller works alone
      if (rank > 0) return;
      size = 1;
    }
    for (int c = 0; c < run.plan.chunks; c++)
      run.chunk(c, run.workspace, {rank, size, &run.barrier});
    return;
  }
  float* arena = run.workspace + rank * run.plan.arena;
  for (int c; (c = run.next_chunk.fetch_add(1, std::memory_order_relaxed)) < run.plan.chunks;)
    run.chunk(c, arena, {0, 1, nullptr});
}

}  // namespace

bool model_bind(const std::string& program, const void* blob, size_t blob_bytes, Model* m,
                std::string* error) {
  std::vector<Op> ops;
  if (!parse_program(program, (int64_t)blob_bytes, &ops, error)) return false;
  if (ops.size() > (size_t)kMaxOps) {
    *error = "program: " + std::to_string(ops.size()) + " lines, expected at most " +
             std::to_string(kMaxOps);
    return false;
  }
  if ((uintptr_t)blob % 64) {
    *error = "blob: expected memory aligned to 64 bytes";
    return false;
  }
  m->ops.clear();
  m->segments.clear();
  int first = 0;
  for (size_t i = 0; i < ops.size(); i++) {
    if (ops[i].dtype != DType::kFloat32) {
      *error = "program line " + std::to_string(i + 1) +
               ": the cpu column runs float32, this op is " + dtype_name(ops[i].dtype) +
               "; use the reference column";
      return false;
    }
    BoundOp b{ops[i], {}, {}, {}, {}, {}};
    switch (b.op.kind) {
      case OpKind::kStem:
        bind_weights(b.op, blob, &b.stem);
        break;
      case OpKind::kDwFfn:
        bind_weights(b.op, blob, &b.dw_ffn);
        break;
      case OpKind::kCga:
        bind_weights(b.op, blob, &b.cga);
        break;
      case OpKind::kPatchMerge:
        bind_weights(b.op, blob, &b.patch_merge);
        break;
      case OpKind::kClassifier:
        bind_weights(b.op, blob, &b.classifier);
        break;
    }
    m->ops.push_back(std::move(b));
    if (m->segments.size() == (size_t)kMaxSegments) {
      *error = "program: more than " + std::to_string(kMaxSegments) + " patch_merge ops";
      return false;
    }
    if (ops[i].kind == OpKind::kPatchMerge || i + 1 == ops.size()) {
      m->segments.push_back({first, (int)i + 1});
      first = (int)i + 1;
    }
  }
  return true;
}

MapSize op_output(const Op& op, MapSize in) {
  switch (op.kind) {
    case OpKind::kStem:
      for (int i = 0; i < 4; i++) in.H = halved(in.H), in.W = halved(in.W);
      return {in.H, in.W, op.C};
    case OpKind::kPatchMerge:
      return {halved(in.H), halved(in.W), op.CO};
    case OpKind::kClassifier:
      return {1, 1, op.N > 0 ? op.N : op.C};
    default:
      return in;
  }
}

bool make_plan(const Model& m, const cpu::Kernels& k, int64_t B, int64_t H, int64_t W, int threads,
               Plan* plan) {
  if (B < 0 || B > (1 << 30) || H < 1 || W < 1 || H > kMaxSide || W > kMaxSide || threads < 1 ||
      threads > kMaxThreads)
    return false;
  if (!m.starts_with_stem() && H * W > kMaxSide * kMaxSide / 256) return false;
  const bool one_team = B < threads;
  plan->team = one_team ? threads : 1;
  plan->teams = one_team ? 1 : threads;
  plan->chunks = (int)std::max<int64_t>(1, (B + kMaxGroup - 1) / kMaxGroup);
  if (!one_team) plan->chunks = (plan->chunks + threads - 1) / threads * threads;
  plan->max_chunk = (int)((B + plan->chunks - 1) / plan->chunks);

  plan->sizes[0] = {(int)H, (int)W, m.input_channels()};
  for (size_t i = 0; i < m.ops.size(); i++)
    plan->sizes[i + 1] = op_output(m.ops[i].op, plan->sizes[i]);

  size_t side = 0, scratch = 0, at = 0;
  for (size_t s = 0; s < m.segments.size(); s++) {
    const Segment& seg = m.segments[s];
    // The map inside a segment: behind a stem, before everything else.
    const MapSize map = plan->sizes[seg.first + (seg.first == 0 && m.starts_with_stem())];
    const int group = group_size(map, plan->max_chunk);
    plan->groups[s] = group;
    plan->boundary[s] = at;
    if (seg.first > 0) at += align16(plan->max_chunk * plan->sizes[seg.first].floats());
    for (int i = seg.first; i < seg.last; i++) {
      if (i + 1 < seg.last) side = std::max(side, group * plan->sizes[i + 1].floats());
      // A pool that gives fewer threads leaves the caller alone: scratch for a team of one must fit
      // as well.
      for (const int team : {1, plan->team})
        scratch = std::max(scratch, op_scratch(k, m.ops[i].op, group, plan->sizes[i], team));
    }
  }
  plan->ping = at;
  plan->pong = plan->ping + align16(side);
  plan->scratch = plan->pong + align16(side);
  plan->arena = plan->scratch + align16(scratch);
  return true;
}

void run_plan(const Model& m, const cpu::Kernels& k, const Plan& plan, const evit_tensor& x,
              float* y, float* workspace, double* op_seconds, double* stage_seconds) {
  std::vector<uint64_t> ticks(stage_seconds ? m.ops.size() * cpu::kStageCount : 0);
  Run run{m, k, plan, x, y, workspace, op_seconds, stage_seconds ? ticks.data() : nullptr};
  const double start = stage_seconds ? seconds() : 0.0;
  const uint64_t first = stage_seconds ? cpu::stage_ticks_now() : 0;
  pool_run(plan.team > 1 ? plan.team : plan.teams, run_rank, &run);
  if (!stage_seconds) return;
  const double each = (seconds() - start) / (double)(cpu::stage_ticks_now() - first);
  for (size_t i = 0; i < ticks.size(); i++) stage_seconds[i] += (double)ticks[i] * each;
}

const std::vector<cpu::Stage>& op_stages(OpKind kind) {
  using S = cpu::Stage;
  static const std::vector<S> kStem = {S::kLoad, S::kConv1, S::kConv2, S::kConv3, S::kConv4},
                              kDwFfn = {S::kDepthwise, S::kUp, S::kDown},
                              kCga = {S::kGather,  S::kQkv,    S::kDepthwise, S::kScores,
                                      S::kSoftmax, S::kValues, S::kProject},
                              kPatchMerge = {S::kExpand, S::kDepthwise, S::kSqueeze,
                                             S::kExcite, S::kGate,      S::kProject},
                              kClassifier = {S::kPool, S::kLinear};
  switch (kind) {
    case OpKind::kStem:
      return kStem;
    case OpKind::kDwFfn:
      return kDwFfn;
    case OpKind::kCga:
      return kCga;
    case OpKind::kPatchMerge:
      return kPatchMerge;
    default:
      return kClassifier;
  }
}

}  // namespace evit
