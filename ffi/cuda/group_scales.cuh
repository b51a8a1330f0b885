// The power-of-two scales of a record's groups, for products of halves.
#ifndef DSV4_CUDA_GROUP_SCALES_CUH_
#define DSV4_CUDA_GROUP_SCALES_CUH_

#include <cstdint>

namespace dsv4 {

// The largest of the scales of kGroups groups, stored as E8M0 bytes, the first in the low byte; store(i, factor) is
// given that of group i relative to it, as a half.
template <int kGroups, typename Store>
__device__ __forceinline__ float unpack_scales(uint64_t stored, const Store& store) {
  int largest = 1;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) largest = max(largest, static_cast<int>((stored >> (8 * i)) & 0xFF));
  if (largest == 255) largest = 254;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int byte = static_cast<int>((stored >> (8 * i)) & 0xFF), below = largest - byte;
    uint16_t factor = below > 24   ? 0
                      : below > 14 ? static_cast<uint16_t>(1 << (24 - below))
                                   : static_cast<uint16_t>((15 - below) << 10);
    if (byte == 255) factor = 0x7E00;
    store(i, factor);
  }
  return __uint_as_float(static_cast<uint32_t>(largest) << 23);
}

}  // namespace dsv4

#endif  // DSV4_CUDA_GROUP_SCALES_CUH_
