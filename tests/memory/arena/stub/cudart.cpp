// A device of `stub_room` bytes; `stub_waits` counts how often one stream was made to wait for another.
#include "cuda_runtime_api.h"

#include <cstdlib>
#include <mutex>
#include <unordered_map>

static std::mutex mutex;
static std::unordered_map<void*, size_t> blocks;
static size_t used = 0;

extern "C" {
int64_t stub_room = 1 << 20, stub_waits = 0, stub_trims = 0;

static cudaError_t take(void** out, size_t size) {
  std::lock_guard<std::mutex> hold(mutex);
  if (used + size > static_cast<size_t>(stub_room)) return cudaErrorMemoryAllocation;
  *out = std::aligned_alloc(512, (size + 511) / 512 * 512);
  blocks[*out] = size;
  used += size;
  return cudaSuccess;
}
static cudaError_t drop(void* address) {
  std::lock_guard<std::mutex> hold(mutex);
  const auto found = blocks.find(address);
  if (found == blocks.end()) return 1;
  used -= found->second;
  blocks.erase(found);
  std::free(address);
  return cudaSuccess;
}
int64_t stub_used() { return static_cast<int64_t>(used); }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stub"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t*, int) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return ++stub_trims, cudaSuccess; }
cudaError_t cudaMalloc(void** out, size_t size) { return take(out, size); }
cudaError_t cudaFree(void* address) { return drop(address); }
cudaError_t cudaMallocAsync(void** out, size_t size, cudaStream_t) { return take(out, size); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return drop(address); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return ++stub_waits, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
}
