// Stored weights as operands of the tensor cores, and what streams them through shared memory (sm_90).
//
// A weight's codes are converted in registers, exactly, to half precision: E4M3 as they are, E2M1 times a power of two
// relative to the largest scale of the row's part, so that any scales fit. The order in which a product runs over its
// inner index is free: a thread takes 16 contiguous bytes of a row, and activations are put into the same order.
#ifndef DSV4_CUDA_WEIGHT_MMA_CUH_
#define DSV4_CUDA_WEIGHT_MMA_CUH_

#include <cuda_fp16.h>

#include <cstdint>

namespace dsv4 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// D += A B, 16 rows of weights by 8 tokens.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Two E4M3 codes as halves.
__device__ __forceinline__ uint32_t halves_of_e4m3(uint32_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  return halves;
}

// Eight E2M1 codes as halves times `scale` / 64, in the order (0, 2), (4, 6), (1, 3), (5, 7): as E4M3 codes first,
// which takes two operations on four values each.
__device__ __forceinline__ void halves_of_e2m1(uint32_t codes, uint32_t scale, uint32_t (&halves)[4]) {
  const uint32_t even = ((codes << 4) & 0x80808080u) | ((codes << 2) & 0x1C1C1C1Cu);
  const uint32_t odd = (codes & 0x80808080u) | ((codes >> 2) & 0x1C1C1C1Cu);
  halves[0] = multiply_halves(halves_of_e4m3(even), scale);
  halves[1] = multiply_halves(halves_of_e4m3(even >> 16), scale);
  halves[2] = multiply_halves(halves_of_e4m3(odd), scale);
  halves[3] = multiply_halves(halves_of_e4m3(odd >> 16), scale);
}

__device__ __forceinline__ uint32_t largest_byte(const uint4& bytes) {
  uint32_t m = __vmaxu4(__vmaxu4(bytes.x, bytes.y), __vmaxu4(bytes.z, bytes.w));
  m = __vmaxu4(m, m >> 16);
  return max(m & 0xFFu, (m >> 8) & 0xFFu);
}

// E8M0 byte `scale` relative to `largest`, as two halves: 2^(15 + scale - largest), 0 where that is far too small.
__device__ __forceinline__ uint32_t relative_scale(uint32_t scale, uint32_t largest) {
  const int exponent = static_cast<int>(scale) - static_cast<int>(largest) + 30;
  return static_cast<uint32_t>(max(exponent, 0)) * 0x04000400u;
}
// What sums of products with halves_of_e2m1(…, relative_scale(…)) have to be multiplied by.
__device__ __forceinline__ float largest_scale(uint32_t largest) { return __uint_as_float(largest << 23) * 0x1p-9f; }

// Packed pairs of bfloat16: the larger magnitudes' bits.
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) { return __vmaxu2(a, b & 0x7FFF7FFFu); }

// The power of two that brings values up to a magnitude (the bits of a bfloat16) well into the range of halves.
__device__ __forceinline__ float into_halves(uint32_t magnitude) {
  const int exponent = magnitude >> 7;
  return __uint_as_float(static_cast<uint32_t>(exponent == 255 ? 127 : min(265 - exponent, 253)) << 23);
}
__device__ __forceinline__ float inverse_power(float power) {
  return __uint_as_float((254u << 23) - __float_as_uint(power));
}

__device__ __forceinline__ uint32_t halves(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Eight bfloat16 times a power of two, as halves in the order of halves_of_e2m1.
__device__ __forceinline__ uint4 halves_in_order(const uint4& x, float power) {
  const auto low = [power](uint32_t pair) { return __uint_as_float(pair << 16) * power; };
  const auto high = [power](uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u) * power; };
  return make_uint4(halves(low(x.x), low(x.y)), halves(low(x.z), low(x.w)), halves(high(x.x), high(x.y)),
                    halves(high(x.z), high(x.w)));
}
}  // namespace dsv4

#endif  // DSV4_CUDA_WEIGHT_MMA_CUH_
