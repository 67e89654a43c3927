// Which instruction sets this machine has, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/ops.h"

namespace evit {

// Names of the instruction sets that this machine runs, lowest first.
std::vector<std::string> available_isas();

// Caps the choice at `name` (null: no cap). False and one sentence for an unknown name; a set that
// the machine lacks is a legal cap.
bool set_max_isa(const char* name, std::string* error);

// The kernels in use, or null and one sentence when EVIT_FAST_MAX_ISA holds an unknown name.
const cpu::Kernels* kernels(std::string* error);

// The form of these kernels that enters stages (cpu/stages.h).
const cpu::Kernels* stage_kernels(const cpu::Kernels* k);

}  // namespace evit
