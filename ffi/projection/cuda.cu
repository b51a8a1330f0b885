// project on Hopper GPUs. Contract and jax.numpy form: dsv4_jax/ops/nn/projection.py.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/export.h"
#include "common/launched.h"
#include "projection/many_tokens.cuh"
#include "projection/op.h"
#include "projection/some_tokens.cuh"

namespace dsv4 {
namespace {

namespace kernels = projection;

constexpr int kBlocks = 132;  // a Hopper's multiprocessors
constexpr int kMostShared = 232448;
constexpr int64_t kPiece = 64;  // tokens that a kernel of some takes at most

using kernels::Before;

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, int shared, cudaStream_t stream, bool overlap, Args... args) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  cudaLaunchAttribute attribute = {};  // begin while the kernel before ends: each waits for what it needs
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// One or two tokens: every block has all columns of its rows.
template <int kColumns, Before kBefore>
cudaError_t run_few(const kernels::Call& call, cudaStream_t stream, bool overlap) {
  using F = kernels::Few<kColumns>;
  const int places = call.tokens;
  int stages = 6;
  while (stages > 1 && F::shared_bytes(stages, call.columns, places) > kMostShared) --stages;
  const auto run = [&](auto kernel) {
    return launch(kernel, dim3(std::min(kBlocks, call.rows / F::kRows)), kernels::kThreads,
                  F::shared_bytes(stages, call.columns, places), stream, overlap, call, stages);
  };
  return places == 1 ? run(kernels::few_tokens_kernel<kColumns, 1, kBefore>)
                     : run(kernels::few_tokens_kernel<kColumns, 2, kBefore>);
}

template <Before kBefore>
cudaError_t run_few(const kernels::Call& call, cudaStream_t stream, bool overlap) {
  return call.columns % 2048 == 0   ? run_few<2048, kBefore>(call, stream, overlap)
         : call.columns % 1024 == 0 ? run_few<1024, kBefore>(call, stream, overlap)
                                    : run_few<512, kBefore>(call, stream, overlap);
}

// A piece of up to 64 tokens, in slices of the columns. Scratch: split activations, what to multiply by, sums of
// slices.
template <int kTokens, Before kBefore>
cudaError_t run_some(const kernels::Call& call, int slice, uint8_t* scratch, cudaStream_t stream, bool overlap) {
  constexpr bool kInside = kTokens <= kernels::kInsideTokens;
  const int blocks = call.rows / kernels::kSomeRows, in_group = blocks / call.groups, slices = call.columns / slice;
  int each = 1;
  const int64_t at_once = (kInside ? 2 : 1) * kBlocks;  // two blocks a multiprocessor
  while (static_cast<int64_t>(blocks) * slices > at_once * each && in_group % (2 * each) == 0) each *= 2;
  uint8_t* split = scratch;
  float* inverse = reinterpret_cast<float*>(split + static_cast<int64_t>(call.groups) * call.columns * 2 * kTokens);
  float* parts = kInside ? reinterpret_cast<float*>(scratch) : inverse + call.groups * kTokens;
  cudaError_t status = cudaSuccess;
  if (!kInside) {
    status = launch(kernels::split_kernel<kBefore>, dim3(kTokens, call.groups), 256, 0, stream, overlap, call, kTokens,
                    split, inverse);
    if (status != cudaSuccess) return status;
  }
  status =
      launch(kernels::some_tokens_kernel < kTokens, kInside ? kBefore : Before::kNothing >, dim3(blocks / each, slices),
             kernels::kSomeThreads, kernels::some_shared<kTokens>(slice), stream, !kInside || overlap, call, each,
             slice, static_cast<const uint8_t*>(split), static_cast<const float*>(inverse), parts);
  if (status != cudaSuccess || slices == 1) return status;
  const int64_t size = static_cast<int64_t>(call.tokens) * call.rows;
  return launch(kernels::sum_parts_kernel, dim3(static_cast<unsigned>((size / 4 + 255) / 256)), 256, 0, stream, true,
                call, static_cast<const float*>(parts), slices);
}

int places_of(int64_t tokens) { return tokens <= 4 ? 4 : tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

int64_t some_scratch(const kernels::Call& call, int64_t tokens, int64_t slice) {
  const int64_t places = places_of(tokens), slices = call.columns / slice;
  return (places > kernels::kInsideTokens ? call.groups * places * (2 * call.columns + 4) : 0) +
         (slices > 1 ? slices * tokens * call.rows * 4 : 0);
}

// With a constant that is what is done before.
template <typename Run>
cudaError_t with(Before before, Run run) {
  switch (before) {
    case Before::kNorm:
      return run(std::integral_constant<Before, Before::kNorm>());
    case Before::kSwiGLU:
      return run(std::integral_constant<Before, Before::kSwiGLU>());
    default:
      return run(std::integral_constant<Before, Before::kNothing>());
  }
}

// Up to 64 tokens; without a slice one or two. With `overlap` it begins while the kernel before it ends.
cudaError_t run_piece(const kernels::Call& call, Before before, int slice, uint8_t* scratch, cudaStream_t stream,
                      bool overlap) {
  const int places = places_of(call.tokens);
  return with(before, [&](auto constant) {
    constexpr Before kBefore = decltype(constant)::value;
    return !slice         ? run_few<kBefore>(call, stream, overlap)
           : places == 4  ? run_some<4, kBefore>(call, slice, scratch, stream, overlap)
           : places == 8  ? run_some<8, kBefore>(call, slice, scratch, stream, overlap)
           : places == 16 ? run_some<16, kBefore>(call, slice, scratch, stream, overlap)
           : places == 32 ? run_some<32, kBefore>(call, slice, scratch, stream, overlap)
                          : run_some<64, kBefore>(call, slice, scratch, stream, overlap);
  });
}

int64_t images_of(int64_t tokens) { return (tokens + kernels::kManyTokens - 1) / kernels::kManyTokens; }

int64_t many_scratch(const kernels::Call& call) {
  return call.groups * images_of(call.tokens) * kernels::kManyTokens * (2 * call.columns + 4);
}

// Many tokens. Scratch: images of the activations, what to multiply by.
cudaError_t run_many(const kernels::Call& call, Before before, uint8_t* scratch, cudaStream_t stream) {
  const int64_t places = images_of(call.tokens) * kernels::kManyTokens;
  float* inverse = reinterpret_cast<float*>(scratch + call.groups * places * call.columns * 2);
  const cudaError_t status = with(before, [&](auto constant) {
    return launch(kernels::image_kernel<decltype(constant)::value>, dim3(places / 8, call.groups), 256, 0, stream,
                  false, call, scratch, inverse);
  });
  if (status != cudaSuccess) return status;
  const int number = static_cast<int>(images_of(call.tokens));
  const int clusters = std::min(kBlocks / kernels::kManyCluster, call.rows / kernels::kManyRows * number);
  return launch(kernels::many_tokens_kernel, dim3(clusters * kernels::kManyCluster), kernels::kManyThreads,
                kernels::kManyShared, stream, true, call, static_cast<const uint8_t*>(scratch),
                static_cast<const float*>(inverse), number);
}

// Operands: x, where `normed` the norm's weight (K), where `gated` the up projection as x, then codes and scale of each
// weight. Results: y of each weight, scratch. With `then` of 0 or more the last weight is not of x but of the first
// result, its groups side by side, in slices of so many columns; that is what is normed.
ffi::Error project_on_device(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t slice,
                             int64_t normed, int64_t gated, float number, int64_t then) {
  Projection bound;
  Operands operands("project", args);
  kernels::Call call = {};
  bind_input(operands, &bound);
  const Operands::Shape shape = {bound.tokens, bound.groups, bound.columns};
  if (normed) call.norm = operands.take<const float>("norm", {ffi::DataType::F32}, {then < 0 ? bound.columns : -1});
  if (gated) call.up = operands.take<const __nv_bfloat16>("up", {ffi::DataType::BF16}, shape);
  call.eps = call.limit = number;
  const Before before = normed ? Before::kNorm : gated ? Before::kSwiGLU : Before::kNothing;
  while (operands.ok() && operands.left() > (then < 0 ? 0 : 2)) {
    if (call.number == kernels::kMostWeights || (call.number && bound.groups > 1)) {
      operands.fail("too many weights", "up to 3, and one where x has groups");
      break;
    }
    bind_weight(operands, results, call.number, &bound);
    if (bound.is_float || bound.columns % 512 || bound.rows / bound.groups % kernels::kManyRows)
      operands.fail("another size or dtype", "bfloat16, a multiple of 512 columns and of 256 rows in every group");
    const int rows = static_cast<int>(bound.rows);
    call.weights[call.number++] = {bound.codes, bound.scale, static_cast<__nv_bfloat16*>(bound.y), call.rows, rows};
    call.rows += rows;
  }
  kernels::Call second = {};
  if (then >= 0 && operands.ok() && call.number) {
    Projection of_first;
    of_first.tokens = bound.tokens, of_first.groups = 1, of_first.columns = call.weights[0].rows;
    of_first.is_float = bound.is_float;
    bind_weight(operands, results, call.number, &of_first);
    second.x = call.weights[0].y, second.norm = call.norm, second.eps = number, second.number = 1;
    second.tokens = static_cast<int>(bound.tokens), second.groups = 1, second.rows = static_cast<int>(of_first.rows);
    second.columns = static_cast<int>(of_first.columns);
    second.weights[0] = {of_first.codes, of_first.scale, static_cast<__nv_bfloat16*>(of_first.y), 0, second.rows};
    call.norm = nullptr;
    if (second.columns % 512 || second.rows % kernels::kManyRows || (then && second.columns % then) || gated)
      operands.fail("a second weight of another size", "a multiple of 512 columns and of 256 rows");
  }
  if (!operands.ok()) return operands.error();
  if (!call.number) return ffi::Error::InvalidArgument("project: got no weight; expected one.");
  if (!bound.tokens) return ffi::Error::Success();
  bound.rows = call.rows;
  call.x = static_cast<const __nv_bfloat16*>(bound.x), call.tokens = static_cast<int>(bound.tokens);
  call.groups = static_cast<int>(bound.groups), call.columns = static_cast<int>(bound.columns);
  auto scratch = results.get<ffi::AnyBuffer>(call.number + second.number);
  if (!scratch.has_value()) return ffi::Error::InvalidArgument("project: got no scratch; expected one.");
  uint8_t* data = static_cast<uint8_t*>((*scratch)->untyped_data());
  const int64_t have = static_cast<int64_t>((*scratch)->size_bytes());
  const int64_t piece = std::min(bound.tokens, kPiece);
  const bool in_pieces = slice || bound.tokens <= kernels::kFewTokens;
  int64_t needed = in_pieces ? 0 : many_scratch(call);
  for (const auto& [of, columns] : {std::pair(&call, slice), std::pair(&second, then)}) {
    if (!of->number || !in_pieces) continue;
    if (columns > 0 ? of->columns % columns || columns % 256 || columns * places_of(piece) * 2 + 1024 > kMostShared
                    : bound.tokens > kernels::kFewTokens) {
      return ffi::Error::InvalidArgument("project: got a slice of " + std::to_string(columns) +
                                         " columns that does not fit.");
    }
    if (columns > 0) needed = std::max(needed, some_scratch(*of, piece, columns));
  }
  if (have < needed) {
    return ffi::Error::InvalidArgument("project: got scratch of " + std::to_string(have) + " bytes; expected " +
                                       std::to_string(needed) + ".");
  }
  if (second.number) {
    if (bound.tokens > kPiece) {
      return ffi::Error::InvalidArgument("project: got " + std::to_string(bound.tokens) + " tokens; expected up to " +
                                         std::to_string(kPiece) + " where products follow each other.");
    }
    cudaError_t status = run_piece(call, Before::kNothing, static_cast<int>(slice), data, stream, false);
    if (status == cudaSuccess) status = run_piece(second, before, static_cast<int>(then), data, stream, true);
    return launched("project", status);
  }
  if (!in_pieces) return launched("project", run_many(call, before, data, stream));
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < bound.tokens && status == cudaSuccess; first += kPiece) {
    kernels::Call part = call;
    part.x += first * bound.groups * bound.columns;
    if (part.up) part.up += first * bound.groups * bound.columns;
    part.tokens = static_cast<int>(std::min(bound.tokens - first, kPiece));
    for (int i = 0; i < part.number; ++i) part.weights[i].y += first * part.weights[i].rows;
    status = run_piece(part, before, static_cast<int>(slice), data, stream, false);
  }
  return launched("project", status);
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Project);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Project, dsv4::project_on_device,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("slice")
                                  .Attr<int64_t>("normed")
                                  .Attr<int64_t>("gated")
                                  .Attr<float>("number")
                                  .Attr<int64_t>("then"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
