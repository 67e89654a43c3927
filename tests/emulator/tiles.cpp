// The tiles of every family on the emulator, for ctypes.
#include "tiles.cuh"

#include "tile_f32.cuh"
#include "tile_sm70.cuh"
#include "tile_sm75.cuh"
#include "tile_sm80.cuh"

namespace {

using namespace evit::cuda;

template <typename Tile>
void run(float* y, const void* a, const void* b, const void* packed_a, const void* packed_b,
         int order) {
  using T = typename Tile::Number;
  emulator::Launch launch;
  launch.block.x = 32;
  launch.shared_bytes = 2 * 16 * row_stride(Tile::kFamily, 16) * sizeof(T);
  launch.order = static_cast<emulator::Order>(order);
  const T *pa = static_cast<const T*>(a), *pb = static_cast<const T*>(b);
  const T *qa = static_cast<const T*>(packed_a), *qb = static_cast<const T*>(packed_b);
  void* args[] = {&y, &pa, &pb, &qa, &qb};
  emulator::run_kernel(tile_body<Tile>, launch, args);
}

}  // namespace

extern "C" int run_tile(int family, int is_bf16, float* y, const void* a, const void* b,
                        const void* packed_a, const void* packed_b, int order) {
  switch (family) {
    case 0:
      run<TileF32>(y, a, b, packed_a, packed_b, order);
      return 0;
    case 70:
      run<TileSm70>(y, a, b, packed_a, packed_b, order);
      return 0;
    case 75:
      run<TileSm75>(y, a, b, packed_a, packed_b, order);
      return 0;
    case 80:
      is_bf16 ? run<TileSm80<bf16>>(y, a, b, packed_a, packed_b, order)
              : run<TileSm80<f16>>(y, a, b, packed_a, packed_b, order);
      return 0;
    default:
      return 1;
  }
}
