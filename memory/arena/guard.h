// The requests of one step, recorded or served from planned addresses. Shared by cpu.cpp and cuda.cpp.
//
// The plan says which address each request of a step gets, in order. A request is given a planned address only if its size is
// that of the plan's entry AND no live block overlaps the address; the order of requests is a hint where to look, never proof.
// So a step that differs from the recorded one (other order, other sizes, more threads) can cost addresses, never data: whatever
// does not fit goes to the fallback allocator and is counted. Every method locks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace efflaunch {

struct Counts {
  int64_t served = 0;        // from the plan, the next entry in line
  int64_t out_of_order = 0;  // from the plan, an entry further on or passed over
  int64_t outside = 0;       // the plan itself leaves them to the fallback: they outlive the step
  int64_t foreign = 0;       // of other threads (CPU) or streams (CUDA): never in the arena
  int64_t fallback = 0;      // everything else
  int64_t fallback_bytes = 0;
  int64_t fallback_peak = 0;  // most bytes of the fallback live at one time, of any kind, since begin()
  int64_t arena_peak = 0;     // highest address in use since begin()
};

class Guard {
 public:
  enum Mode { PASS, RECORD, REPLAY };

  explicit Guard(int64_t alignment) : alignment_(alignment) {}

  void begin_record(uint64_t owner) {
    std::lock_guard<std::mutex> hold(mutex_);
    begin(RECORD, owner);
    events_.clear();
    next_number_ = 0;
  }

  void begin_replay(uint64_t owner, int64_t count, const int64_t* sizes, const int64_t* offsets) {
    std::lock_guard<std::mutex> hold(mutex_);
    begin(REPLAY, owner);
    sizes_.assign(sizes, sizes + count);
    offsets_.assign(offsets, offsets + count);
    used_.assign(count, 0);
    next_ = 0;
  }

  void end() {
    std::lock_guard<std::mutex> hold(mutex_);
    mode_ = PASS;
    ++window_;
  }


  // An address in the arena, or null: then the caller allocates elsewhere and calls took_elsewhere().
  char* take(int64_t size, uint64_t owner) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (mode_ != REPLAY || size <= 0) return nullptr;
    if (owner != owner_) {
      ++counts_.foreign;
      return nullptr;
    }
    const int64_t entry = find(size);
    const bool in_line = entry == next_;
    if (entry >= 0) {
      used_[entry] = 1;
      next_ = std::max(next_, entry + 1);
    }
    if (entry < 0 || !is_free(entry)) {
      ++counts_.fallback;
      counts_.fallback_bytes += size;
      return nullptr;
    }
    if (offsets_[entry] < 0) {
      ++counts_.outside;
      return nullptr;
    }
    ++(in_line ? counts_.served : counts_.out_of_order);
    const int64_t low = offsets_[entry];
    live_[low] = low + rounded(size);
    counts_.arena_peak = std::max(counts_.arena_peak, low + rounded(size));
    return base_ + low;
  }

  void took_elsewhere(void* address, int64_t size, uint64_t owner) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (mode_ == PASS || address == nullptr) return;
    int64_t number = -1;
    if (mode_ == RECORD) {
      if (owner != owner_) {
        ++counts_.foreign;
        return;
      }
      number = ++next_number_;
      events_.push_back(number);
      events_.push_back(size);
    }
    elsewhere_[address] = Block{size, number, window_};
    fallback_live_ += size;
    counts_.fallback_peak = std::max(counts_.fallback_peak, fallback_live_);
  }

  // True: it was the arena's and is free again. False: the caller's to free.
  bool give_back(void* address) {
    std::lock_guard<std::mutex> hold(mutex_);
    char* place = static_cast<char*>(address);
    if (base_ != nullptr && place >= base_ && place < base_ + bytes_) {
      live_.erase(place - base_);
      return true;
    }
    const auto found = elsewhere_.find(address);
    if (found == elsewhere_.end()) return false;
    const Block block = found->second;
    elsewhere_.erase(found);
    fallback_live_ -= block.size;
    if (mode_ == RECORD && block.number > 0 && block.window == window_) {
      events_.push_back(block.number);
      events_.push_back(0);
    }
    return false;
  }

  // Takes over the memory of a new arena and hands out the old one (null: there was none). Only while nothing lives in the old.
  bool replace(char* base, int64_t bytes, char** old) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (!live_.empty()) return false;
    *old = base_;
    base_ = base;
    bytes_ = bytes;
    return true;
  }

  int64_t bytes() {
    std::lock_guard<std::mutex> hold(mutex_);
    return bytes_;
  }

  int64_t num_live() {
    std::lock_guard<std::mutex> hold(mutex_);
    return static_cast<int64_t>(live_.size());
  }

  int64_t num_events() {
    std::lock_guard<std::mutex> hold(mutex_);
    return static_cast<int64_t>(events_.size() / 2);
  }

  void copy_events(int64_t* out) {
    std::lock_guard<std::mutex> hold(mutex_);
    std::copy(events_.begin(), events_.end(), out);
  }

  Counts counts() {
    std::lock_guard<std::mutex> hold(mutex_);
    return counts_;
  }

 private:
  struct Block {
    int64_t size, number, window;
  };
  // How far from the expected entry one of the same size is looked for.
  static constexpr int64_t kWindow = 64;

  void begin(Mode mode, uint64_t owner) {
    mode_ = mode;
    owner_ = owner;
    counts_ = Counts();
    counts_.fallback_peak = fallback_live_;
    ++window_;
  }

  int64_t rounded(int64_t size) const { return (size + alignment_ - 1) / alignment_ * alignment_; }

  // Whether nothing lives at the entry's address, so that it may be given out.
  bool is_free(int64_t entry) const {
    if (offsets_[entry] < 0) return true;
    const int64_t low = offsets_[entry], high = low + rounded(sizes_[entry]);
    if (base_ == nullptr || high > bytes_) return false;
    auto after = live_.lower_bound(high);
    // Live blocks never overlap each other, so only the last one that starts below `high` can reach in.
    return after == live_.begin() || std::prev(after)->second <= low;
  }

  // The entry the request stands for, -1 if none. The next in line if it has the size, free or not: where a block merely lives
  // on longer than planned, the order still holds, and taking another entry would lose it. Else one of the size nearby that is free.
  int64_t find(int64_t size) const {
    const int64_t count = static_cast<int64_t>(sizes_.size());
    if (next_ < count && sizes_[next_] == size) return next_;
    const int64_t last = std::min(count, next_ + kWindow);
    for (int64_t entry = std::max<int64_t>(0, next_ - kWindow); entry < last; ++entry)
      if (!used_[entry] && sizes_[entry] == size && is_free(entry)) return entry;
    return -1;
  }

  const int64_t alignment_;
  std::mutex mutex_;
  Mode mode_ = PASS;
  uint64_t owner_ = 0;
  int64_t window_ = 0, next_ = 0, next_number_ = 0, fallback_live_ = 0;
  Counts counts_;
  std::vector<int64_t> events_, sizes_, offsets_;
  std::vector<char> used_;
  char* base_ = nullptr;
  int64_t bytes_ = 0;
  std::map<int64_t, int64_t> live_;
  std::unordered_map<void*, Block> elsewhere_;
};

}  // namespace efflaunch
