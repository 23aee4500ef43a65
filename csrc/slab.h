// Memory of whole batches, used again when the last reference to a batch has gone.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "buffer.h"

namespace fastpref {

inline constexpr unsigned char kPoison = 0xA5;

class SlabPool {
 public:
  using Slab = Buffer<std::byte>;

  // Keeps at most `limit` unused slabs. With `poison`, a slab that came back is overwritten with kPoison.
  SlabPool(std::size_t limit, bool poison) : limit_(limit), poison_(poison), process_(getpid()) {}

  Slab take(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (Slab& slab : free_) {
        if (slab.size() != bytes) continue;
        std::swap(slab, free_.back());
        Slab taken = std::move(free_.back());
        free_.pop_back();
        return taken;
      }
    }
    return Slab(bytes);
  }

  void give(Slab slab) noexcept {
    if (poison_) std::memset(slab.data(), kPoison, slab.size());
    // A child of fork may have been born while a thread that it does not have held the lock.
    if (getpid() != process_) return;
    const std::lock_guard lock(mutex_);
    if (open_ && free_.size() < limit_) {
      try {
        free_.push_back(std::move(slab));
      } catch (const std::bad_alloc&) {  // then it is freed
      }
    }
  }

  // Slabs are freed from now on.
  void close() {
    const std::lock_guard lock(mutex_);
    open_ = false;
    free_.clear();
  }

 private:
  std::mutex mutex_;
  std::vector<Slab> free_;
  std::size_t limit_;
  bool poison_;
  bool open_ = true;
  pid_t process_;
};

// A slab that goes back to its pool with the lease; the pool lives as long as its leases.
class Lease {
 public:
  Lease(std::shared_ptr<SlabPool> pool, std::size_t bytes) : pool_(std::move(pool)), slab_(pool_->take(bytes)) {}
  ~Lease() { pool_->give(std::move(slab_)); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  std::byte* data() noexcept { return slab_.data(); }

 private:
  std::shared_ptr<SlabPool> pool_;
  SlabPool::Slab slab_;
};

}  // namespace fastpref
