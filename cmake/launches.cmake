# Writes OUT, a C++ file with one row for every `LaunchShape <kernel>_launch(const <Sizes>& s, int family, i64 ..)` in
# the list FILES (csrc/cuda/launcher.h declares them): a kernel needs no line anywhere but in its own file.
set(includes "")
set(rows "")
set(count 0)
foreach(path ${FILES})
  get_filename_component(name "${path}" NAME)
  file(READ "${path}" body)
  string(REGEX MATCHALL "LaunchShape[ \n]+[a-z0-9_]+_launch\\([ \n]*const[ \n]+[A-Za-z0-9]+& s,[ \n]+int( family)?,[ \n]+i64" found "${body}")
  if(found)
    string(APPEND includes "#include \"cuda/${name}\"\n")
  endif()
  foreach(function ${found})
    string(REGEX MATCH "([a-z0-9_]+)_launch\\([ \n]*const[ \n]+([A-Za-z0-9]+)&" matched "${function}")
    string(APPEND rows "    row<${CMAKE_MATCH_2}, ${CMAKE_MATCH_1}_launch>(\"${CMAKE_MATCH_1}\"),\n")
    math(EXPR count "${count} + 1")
  endforeach()
endforeach()
file(WRITE "${OUT}" "#include \"cuda/launcher.h\"

#include <cstring>

${includes}
namespace evit::cuda {
namespace {

template <typename Sizes, LaunchShape (*function)(const Sizes&, int, i64, i64, i64)>
LaunchRow row(const char* kernel) {
  static_assert(sizeof(Sizes) % sizeof(int) == 0, \"all fields of Sizes are int\");
  return {kernel, sizeof(Sizes) / sizeof(int),
          [](const int* sizes, int family, i64 B, i64 H, i64 W) {
            Sizes s;
            std::memcpy(&s, sizes, sizeof s);
            return function(s, family, B, H, W);
          }};
}

}  // namespace

const LaunchRow kLaunchRows[] = {
${rows}    {nullptr, 0, nullptr}};
const int kLaunchRowCount = ${count};

}  // namespace evit::cuda
")
