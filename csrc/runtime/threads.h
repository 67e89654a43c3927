// How many of the threads that a caller asks for really run.
#pragma once

#include <string>

namespace evit {

// `threads`, but no more than the processors that this process may use: further ranks would only
// wait for each other's time slices (M0, one image, 8 ranks on two cores: 1.3 times one rank's
// time). Numbers that are out of range stay so. The environment variable EVIT_FAST_MAX_THREADS puts
// another number in the place of the processors'. Both are read once. 0 and one sentence when the
// variable holds no number from 1 to 256.
int running_threads(int threads, std::string* error);

}  // namespace evit
