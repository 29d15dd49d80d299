// A pluggable CUDA allocator: a guarded arena for planned steps, and the driver's stream-ordered pool for everything else.
//
// It replaces torch's caching allocator as a whole. Inside a MemPool the caching allocator would stand between tensors and this
// file: it asks for segments, not tensors, and keeps what is freed, so planned addresses would never reach a tensor.
//
// Streams. A block belongs to the stream it was allocated on. The arena serves one stream, that of the step; requests of others
// go to the pool. A block that another stream has used (record_stream) is freed after that stream: its own stream waits.
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>

#include "guard.h"

namespace {

constexpr int64_t kAlignment = 512;  // as torch's own allocator on CUDA

efflaunch::Guard& guard() {
  static auto* one = new efflaunch::Guard(kAlignment);
  return *one;
}

struct Users {
  std::mutex mutex;
  std::unordered_map<void*, std::set<cudaStream_t>> streams;
};

Users& users() {
  static auto* one = new Users();
  return *one;
}

std::atomic<int64_t> live_bytes{0}, peak_bytes{0};

void check(cudaError_t code, const char* what) { TORCH_CHECK(code == cudaSuccess, what, ": ", cudaGetErrorString(code)); }

uint64_t owner_of(cudaStream_t stream) { return reinterpret_cast<uint64_t>(stream); }

void keep_freed_memory(int device) {
  // By default the pool gives everything back at each synchronisation, and asks for it again.
  static std::once_flag once;
  std::call_once(once, [device] {
    cudaMemPool_t pool;
    check(cudaDeviceGetDefaultMemPool(&pool, device), "the default memory pool");
    uint64_t all = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "the pool's release threshold");
  });
}

void give_back_unused(int device) {
  cudaMemPool_t pool;
  check(cudaDeviceSynchronize(), "waiting for the device");
  check(cudaDeviceGetDefaultMemPool(&pool, device), "the default memory pool");
  check(cudaMemPoolTrimTo(pool, 0), "trimming the pool");
}

void* from_pool(int64_t size, int device, cudaStream_t stream) {
  keep_freed_memory(device);
  void* address = nullptr;
  cudaError_t code = cudaMallocAsync(&address, static_cast<size_t>(size), stream);
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    give_back_unused(device);
    code = cudaMallocAsync(&address, static_cast<size_t>(size), stream);
  }
  TORCH_CHECK_WITH(
      OutOfMemoryError, code != cudaErrorMemoryAllocation, "CUDA out of memory. Tried to allocate ", size, " bytes on GPU ", device,
      " beside ", live_bytes.load(), " bytes of tensors outside the arena and the arena of ", guard().bytes(), " bytes");
  check(code, "allocating");
  return address;
}

void wait_for_users(void* address, cudaStream_t stream) {
  std::set<cudaStream_t> others;
  {
    std::lock_guard<std::mutex> hold(users().mutex);
    const auto found = users().streams.find(address);
    if (found == users().streams.end()) return;
    others.swap(found->second);
    users().streams.erase(found);
  }
  for (cudaStream_t other : others) {
    if (other == stream) continue;
    cudaEvent_t done;
    check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "an event");
    check(cudaEventRecord(done, other), "recording an event");
    check(cudaStreamWaitEvent(stream, done, 0), "waiting for an event");
    check(cudaEventDestroy(done), "giving an event back");
  }
}

}  // namespace

extern "C" {
void* arena_cuda_alloc(ssize_t size, int device, cudaStream_t stream) {
  if (size <= 0) return nullptr;
  void* address = guard().take(size, owner_of(stream));
  if (address != nullptr) return address;
  address = from_pool(size, device, stream);
  guard().took_elsewhere(address, size, owner_of(stream));
  const int64_t live = live_bytes += size;
  int64_t peak = peak_bytes;
  while (live > peak && !peak_bytes.compare_exchange_weak(peak, live)) {
  }
  return address;
}
void arena_cuda_free(void* address, ssize_t size, int /*device*/, cudaStream_t stream) {
  if (address == nullptr) return;
  wait_for_users(address, stream);
  if (guard().give_back(address)) return;
  live_bytes -= size;
  // An error here would be one of the process's end, when the driver has gone: there is nothing left to free.
  if (cudaFreeAsync(address, stream) != cudaSuccess) cudaGetLastError();
}
void arena_cuda_record_stream(void* address, cudaStream_t stream) {
  std::lock_guard<std::mutex> hold(users().mutex);
  users().streams[address].insert(stream);
}
// 0: done. 1: no memory. 2: blocks live in the arena that is there.
int arena_reserve(int64_t bytes) {
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  if (guard().num_live() > 0) return 2;
  // Freed blocks may still be in use by kernels that are under way; and the old arena goes first, for there may not be room for both.
  give_back_unused(device);
  char* old = nullptr;
  if (!guard().replace(nullptr, 0, &old)) return 2;
  if (old != nullptr) check(cudaFree(old), "giving the old arena back");
  void* address = nullptr;
  if (bytes > 0 && cudaMalloc(&address, static_cast<size_t>(bytes)) != cudaSuccess) {
    cudaGetLastError();
    return 1;
  }
  guard().replace(static_cast<char*>(address), bytes, &old);
  return 0;
}
void arena_begin_record(uint64_t stream) { guard().begin_record(stream); }
void arena_begin_replay(uint64_t stream, int64_t count, const int64_t* sizes, const int64_t* offsets) {
  guard().begin_replay(stream, count, sizes, offsets);
}
#include "exports.h"
// Most bytes outside the arena live at one time, ever.
int64_t arena_cuda_peak() { return peak_bytes; }
}
