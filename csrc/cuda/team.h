// A team: the blocks that share one task through a whole inner loop. Launches of a grid whose blocks
// of one x are a team, and what the device lets a team be.
//
// A task's tiles are dealt to `shares`, a number that follows from the job alone; each share leaves
// a row of P + 1 sums, and the rows are added in their order. Who runs the shares does not show in
// the bits, so the device may choose:
//
//   cluster     2, 4 or 8 shares, sm_90 on: a block a share, rows in distributed shared memory
//   resident    more shares, or sm_80: at most a block a share, all there at once (a cooperative
//               launch); rows in device memory
//   one block   where no two fit, or there is one share
//
// Bytes and latency of a step, width 64 (P = 8707, 35 KB a row; a tile of 64 points about 10 µs of
// a block, estimated from the bytes that it moves in shared memory; barriers as published for
// Hopper, none of it timed):
//
//   T    N      shares  tiles a share  team's share of a step
//   1    30000  235     2, 20 µs       rows out and in 16 MB of L2, 3 to 4 µs; 2 meetings, 3 µs
//   3    8000   63      2, 20 µs       13 MB of L2, 3 µs; 2 meetings, 3 µs
//   64   1000   4       4, 40 µs       clusters: 35 KB a block, 1 to 2 µs; 2 meetings, 0.5 µs
//
// One block would take 4.7 ms, 1.3 ms and 160 µs a step. Clusters alone leave T = 1 at 8 blocks of
// 132 multiprocessors (590 µs); the resident form alone costs T = 64 some 3 µs a step and is bound
// to what the device holds at once, where clusters come one after the other. Hence both, which
// differ in where a row lies and in the barrier.
#pragma once

#include "launch.h"

#if !defined(FM_EMULATE)
#include <cuda_runtime.h>
#endif

namespace fastmeta {

constexpr int kClusterLimit = 8;  // what every device with clusters runs

#if defined(FM_EMULATE)

#define FM_MULTIPROCESSORS emulator::multiprocessors
// Runs a kernel on a grid of x teams of that many blocks: the CUDA error.
#define FM_LAUNCH_TEAM(kernel, x, blocks, clustered, threads, bytes, stream, ...)            \
  (static_cast<void>(stream), static_cast<void>(clustered),                                  \
   emulator::launch(                                                                         \
       {static_cast<int>(x), static_cast<int>(blocks)}, threads, static_cast<size_t>(bytes), \
       [&] { kernel(__VA_ARGS__); }, true)                                                   \
       ? 0                                                                                   \
       : 1)
template <class Kernel>
bool runs_clusters(Kernel*, int64_t blocks, int, int) {
  return blocks <= emulator::cluster_limit;
}
template <class Kernel>
int64_t blocks_at_once(Kernel*, int, int) {
  return emulator::block_limit;
}
inline int clear(void* at, size_t bytes, void*) {
  std::memset(at, 0, bytes);
  return 0;
}

#else

// Of a large device; not the device's own.
#define FM_MULTIPROCESSORS 132
#define FM_LAUNCH_TEAM(kernel, x, blocks, clustered, threads, bytes, stream, ...) \
  launch_team(kernel, x, blocks, clustered, threads, bytes, stream, __VA_ARGS__)

struct TeamConfig {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  TeamConfig(int64_t teams, int64_t blocks, bool clustered, int threads, int bytes, void* stream) {
    if (clustered) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {1, static_cast<unsigned>(blocks), 1};
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.gridDim = dim3(static_cast<unsigned>(teams), static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

template <class... Expected, class... Given>
int launch_team(void (*kernel)(Expected...), int64_t teams, int64_t blocks, bool clustered,
                int threads, int bytes, void* stream, const Given&... given) {
  const TeamConfig team(teams, blocks, clustered, threads, bytes, stream);
  static_cast<void>(cudaLaunchKernelEx(&team.config, kernel, given...));
  return static_cast<int>(cudaGetLastError());
}

// Whether a query was answered; an error is not left for the next launch to report.
inline bool answered(cudaError_t error) {
  if (error) cudaGetLastError();
  return !error;
}
inline int attribute_of_device(cudaDeviceAttr which) {
  int device = 0, value = 0;
  const bool known =
      answered(cudaGetDevice(&device)) && answered(cudaDeviceGetAttribute(&value, which, device));
  return known ? value : 0;
}

// Machine code for an older architecture, or compiled from its PTX, has no clusters.
template <class Kernel>
bool runs_clusters(Kernel* kernel, int64_t blocks, int threads, int bytes) {
  if (blocks > kClusterLimit || !attribute_of_device(cudaDevAttrClusterLaunch)) return false;
  cudaFuncAttributes about;
  if (!answered(cudaFuncGetAttributes(&about, kernel)) || about.ptxVersion < 90) return false;
  const TeamConfig team(1, blocks, true, threads, bytes, nullptr);
  int clusters = 0;
  return answered(cudaOccupancyMaxActiveClusters(&clusters, kernel, &team.config)) && clusters > 0;
}
// Blocks that the device holds side by side; 0 where it cannot promise to.
template <class Kernel>
int64_t blocks_at_once(Kernel* kernel, int threads, int bytes) {
  if (!attribute_of_device(cudaDevAttrCooperativeLaunch)) return 0;
  int each = 0;
  if (!answered(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads,
                                                              static_cast<size_t>(bytes))))
    return 0;
  return static_cast<int64_t>(each) * attribute_of_device(cudaDevAttrMultiProcessorCount);
}
inline int clear(void* at, size_t bytes, void* stream) {
  return static_cast<int>(cudaMemsetAsync(at, 0, bytes, static_cast<cudaStream_t>(stream)));
}

#endif

}  // namespace fastmeta
