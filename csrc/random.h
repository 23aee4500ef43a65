// Seeded permutations that are the same everywhere. The standard library's shuffle and distributions are not used because
// their results differ between implementations.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fastpref {

__extension__ using Uint128 = unsigned __int128;

inline constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;

// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
inline std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// What a permutation is of; kRows + i for the rows of shape i.
enum Purpose : std::uint64_t { kRecords = 0, kBatches = 1, kRows = 2 };

// SplitMix64 keyed by (seed, epoch, purpose).
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t epoch, std::uint64_t purpose)
      : state_(mix(mix(mix(seed + kGolden) + epoch + kGolden) + purpose + kGolden)) {}

  // In [0, bound), each value as likely as the next up to bound / 2^64.
  std::uint64_t below(std::uint64_t bound) {
    return static_cast<std::uint64_t>(static_cast<Uint128>(next()) * bound >> 64);
  }

 private:
  std::uint64_t next() { return mix(state_ += kGolden); }

  std::uint64_t state_;
};

// Thrown where work is given up because nobody waits for it any more.
struct Cancelled : std::runtime_error {
  Cancelled() : std::runtime_error("the batcher was closed") {}
};

inline void check(const std::atomic<bool>* cancel) {
  if (cancel != nullptr && cancel->load(std::memory_order_relaxed)) throw Cancelled();
}

// The first `head` entries of a random permutation of [0, size): the forward Fisher-Yates shuffle, stopped early.
template <class Index>
std::vector<Index> permutation_head(Index size, Index head, Random random, const std::atomic<bool>* cancel = nullptr) {
  constexpr Index kPatience = 1 << 20;
  std::vector<Index> order(static_cast<std::size_t>(size));
  std::iota(order.begin(), order.end(), Index{0});
  for (Index i = 0; i < head; ++i) {
    if (i % kPatience == 0) check(cancel);
    std::swap(order[i], order[i + static_cast<Index>(random.below(static_cast<std::uint64_t>(size - i)))]);
  }
  order.resize(static_cast<std::size_t>(head));
  return order;
}

}  // namespace fastpref
