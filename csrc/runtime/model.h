// A program bound to its blob, and how it runs on the CPU.
#pragma once

#include <string>
#include <vector>

#include "common/container.h"
#include "common/grammar.h"
#include "cpu/ops.h"
#include "cpu/stages.h"
#include "evit_fast.h"

namespace evit {

constexpr int kMaxGroup = 16;        // images that go through an op together, at most
constexpr int64_t kMaxSide = 16384;  // pixels or tokens

struct BoundOp {
  Op op;
  StemWeights stem;
  DwFfnWeights dw_ffn;
  CgaWeights cga;
  PatchMergeWeights patch_merge;
  ClassifierWeights classifier;
};

struct MapSize {
  int H, W, C;
  size_t floats() const { return (size_t)H * W * C; }
};

// Ops that take the same group of images: up to and including the next patch_merge.
struct Segment {
  int first, last;  // ops [first, last)
};

struct Model {
  std::vector<BoundOp> ops;
  std::vector<Segment> segments;

  bool starts_with_stem() const { return ops[0].op.kind == OpKind::kStem; }
  int input_channels() const { return starts_with_stem() ? ops[0].op.in : ops[0].op.C; }
  bool pooled() const { return ops.back().op.kind == OpKind::kClassifier; }
};

bool model_bind(const std::string& program, const void* blob, size_t blob_bytes, Model* m,
                std::string* error);

// Size of the map behind op, for a map of size `in` before it. A classifier gives {1, 1, N or C}.
MapSize op_output(const Op& op, MapSize in);

constexpr int kMaxOps = 512;  // lines of a program
constexpr int kMaxSegments = 64;

// How one call is cut: `teams` arenas, each takes chunks of images through the whole program by
// itself; or, with fewer images than threads, one team of all threads works inside the ops.
struct Plan {
  int team;                       // ranks of a team
  int teams;                      // arenas
  int chunks;                     // of nearly equal size, at most kMaxGroup images each
  int max_chunk;                  // images
  MapSize sizes[kMaxOps + 1];     // before op i; one more for the output
  int groups[kMaxSegments];       // images at a time, per segment
  size_t boundary[kMaxSegments];  // offset of a segment's input in an arena, in floats (unused for
                                  // the first)
  size_t ping, pong, scratch;     // offsets in an arena, in floats
  size_t arena;                   // floats
  size_t bytes() const { return arena * teams * sizeof(float); }
};

// False when the sizes are out of range.
bool make_plan(const Model& m, const cpu::Kernels& k, int64_t B, int64_t H, int64_t W, int threads,
               Plan* plan);

// x, y and the workspace have been checked against the plan. op_seconds (null: off) gets the
// seconds of every op added, all images together; only for a plan of one arena. stage_seconds
// (null: off; else kStageCount for every op) gets those of every stage; only for one thread, with k
// from stage_kernels().
void run_plan(const Model& m, const cpu::Kernels& k, const Plan& plan, const evit_tensor& x,
              float* y, float* workspace, double* op_seconds = nullptr,
              double* stage_seconds = nullptr);

}  // namespace evit

// The handle of the C API.
struct evit_model {
  evit::Model model;
  evit::EvitFile file;  // open when the model came from a path
  bool mapped = false;
};

namespace evit {

// evit_run that also adds up the seconds of every op (op_seconds: one entry per line, or null) and
// of every stage (stage_seconds: kStageCount entries per line, or null).
int timed_run(const evit_model* model, const evit_tensor* x, evit_tensor* y, void* workspace,
              size_t workspace_bytes, int threads, double* op_seconds, double* stage_seconds,
              char* err);

// The stages of an op, in the order of its work.
const std::vector<cpu::Stage>& op_stages(OpKind kind);

}  // namespace evit
