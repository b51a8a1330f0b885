// What a launch costs in a CUDA graph, whatever a kernel does: the floor of docs/measurements.
//   nvcc -O3 -arch=native -o build/launches scripts/benchmarks/launches.cu && build/launches
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

static void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("launches: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

__global__ void nothing() {}
__global__ void load_and_end(const int* from, int* to) {
  if (from[0] == 12345) to[0] = 1;
}
// As a decode kernel must: a slot, then what lies at it.
__global__ void look_up_and_load(const int* slot_of, const float* from, float* to) {
  const float x = from[static_cast<size_t>(slot_of[blockIdx.x]) * 7168 + threadIdx.x];
  if (x == 1234.5f) to[0] = x;
}
__global__ void look_up_and_store(const int* slot_of, float* to) {
  to[static_cast<size_t>(slot_of[blockIdx.x]) * 512 + threadIdx.x] = 1.0f;
}

// The time of one of 200 kernels, one after the other in a graph.
static void time(const char* name, const std::function<void(cudaStream_t, int)>& launch) {
  constexpr int kKernels = 200, kReplays = 5;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream));
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kKernels; ++i) launch(stream, i);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  for (int i = 0; i < kReplays; ++i) check(cudaGraphLaunch(replay, stream));
  check(cudaStreamSynchronize(stream));
  float best = 1e9f;
  for (int repeat = 0; repeat < 7; ++repeat) {
    check(cudaEventRecord(begin, stream));
    for (int i = 0; i < kReplays; ++i) check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::min(best, milliseconds);
  }
  std::printf("%-56s %.3f us\n", name, best * 1000 / kReplays / kKernels);
}

static void launch_in_clusters(cudaStream_t stream, const int* from, int* to, int blocks, int threads, int bytes, int cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, load_and_end, from, to));
}

int main() {
  int *slots, *sink;
  float *from, *to;
  check(cudaMalloc(&slots, 1 << 20));
  check(cudaMalloc(&sink, 1 << 20));
  check(cudaMalloc(&from, 1 << 28));
  check(cudaMalloc(&to, 1 << 28));
  std::vector<int> host(1 << 18);
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<int>(i % 64);
  check(cudaMemcpy(slots, host.data(), 1 << 20, cudaMemcpyHostToDevice));
  check(cudaFuncSetAttribute(load_and_end, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));

  time("nothing, 1 block of 32", [&](cudaStream_t s, int) { nothing<<<1, 32, 0, s>>>(); });
  time("load and end, 1 block of 32", [&](cudaStream_t s, int) { load_and_end<<<1, 32, 0, s>>>(slots, sink); });
  time("load and end, 136 blocks of 256", [&](cudaStream_t s, int) { load_and_end<<<136, 256, 0, s>>>(slots, sink); });
  time("look up and load, 64 blocks of 256", [&](cudaStream_t s, int i) {
    look_up_and_load<<<64, 256, 0, s>>>(slots, from + static_cast<size_t>(i % 32) * 1000000, to);
  });
  time("look up and store, 64 blocks of 128", [&](cudaStream_t s, int i) {
    look_up_and_store<<<64, 128, 0, s>>>(slots, to + static_cast<size_t>(i % 20) * 1000000);
  });
  time("load and end, 512 blocks of 256", [&](cudaStream_t s, int) { launch_in_clusters(s, slots, sink, 512, 256, 0, 1); });
  time("load and end, 512 blocks of 256, 47 KiB, clusters of 8",
       [&](cudaStream_t s, int) { launch_in_clusters(s, slots, sink, 512, 256, 47 << 10, 8); });
  time("the same and 136 blocks of 256 in turns", [&](cudaStream_t s, int i) {
    i % 2 ? launch_in_clusters(s, slots, sink, 512, 256, 47 << 10, 8) : launch_in_clusters(s, slots, sink, 136, 256, 0, 1);
  });
}
