// The stages of the fused ops, and the clock that adds up their ticks. The op files are compiled
// twice: as they run, where EVIT_STAGE is nothing, and with EVIT_STAGES=1 into a second table of
// kernels, which only a run that asks for stage times calls. Both forms share gemm.cpp. Clocks
// belong to the calling thread, so a timed op runs in a team of one.
#pragma once

#include <stdint.h>

namespace evit::cpu {

enum class Stage {
  kLoad,
  kConv1,
  kConv2,
  kConv3,
  kConv4,
  kDepthwise,
  kUp,
  kDown,
  kGather,
  kQkv,
  kScores,
  kSoftmax,
  kValues,
  kProject,
  kExpand,
  kSqueeze,
  kExcite,
  kGate,
  kPool,
  kLinear,
};
constexpr int kStageCount = (int)Stage::kLinear + 1;

const char* stage_name(Stage s);

uint64_t stage_ticks_now();  // of a counter that runs at one speed

// The stages that this thread enters add to ticks[kStageCount], until end_stages().
void begin_stages(uint64_t* ticks);
// From here to the next stage, or to the end, the time is this stage's.
void enter_stage(Stage s);
void end_stages();

}  // namespace evit::cpu
