// The CPU allocator of torch with a guarded arena in front of it. Installed once, for the life of the process: tensors remember
// the allocator they came from. While no step is recorded or replayed it only passes requests on.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "guard.h"

namespace {

constexpr int64_t kAlignment = 64;  // c10's own on CPU

efflaunch::Guard& guard() {
  // Never destroyed: tensors are released after static objects are.
  static auto* one = new efflaunch::Guard(kAlignment);
  return *one;
}

c10::Allocator* base() {
  static c10::Allocator* one = c10::GetDefaultCPUAllocator();
  return one;
}

uint64_t this_thread() { return std::hash<std::thread::id>()(std::this_thread::get_id()); }

void release(void* address) {
  if (address != nullptr && !(guard().give_back(address))) base()->raw_deallocate(address);
}

struct ArenaAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const auto owner = this_thread();
    void* address = guard().take(static_cast<int64_t>(size), owner);
    if (address == nullptr) {
      address = base()->raw_allocate(size);
      guard().took_elsewhere(address, static_cast<int64_t>(size), owner);
    }
    return {address, address, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

}  // namespace

extern "C" {
void arena_install() {
  static auto* one = new ArenaAllocator();
  base();
  c10::SetCPUAllocator(one, 255);
}
// 0: done. 1: no memory. 2: blocks live in the arena that is there.
int arena_reserve(int64_t bytes) {
  void* address = nullptr;
  if (bytes > 0 && posix_memalign(&address, 4096, static_cast<size_t>(bytes)) != 0) return 1;
  char* old = nullptr;
  if (!guard().replace(static_cast<char*>(address), bytes, &old)) {
    std::free(address);
    return 2;
  }
  std::free(old);
  return 0;
}
// The owner of a step is the thread that begins it; the first argument is CUDA's.
void arena_begin_record(uint64_t) { guard().begin_record(this_thread()); }
void arena_begin_replay(uint64_t, int64_t count, const int64_t* sizes, const int64_t* offsets) {
  guard().begin_replay(this_thread(), count, sizes, offsets);
}
#include "exports.h"
}
