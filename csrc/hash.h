// Numbers from counters, and checksums of bytes: the same on every machine.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace fastpref {

static_assert(std::endian::native == std::endian::little, "words are read from bytes as they lie");

inline constexpr std::uint64_t kGoldenRatio = 0x9E3779B97F4A7C15;

// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection.
inline std::uint64_t mix64(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// A 64-bit checksum that goes on from `before`, eight bytes a time, the last word filled with zeros. Each step is a
// bijection of the state for every word and of the word for every state, so any change within one word is found for
// certain, any other but for one in 2^64. It is no defence against an adversary.
inline std::uint64_t checksum(std::uint64_t before, std::string_view bytes) {
  std::uint64_t hash = mix64(before + kGoldenRatio * (bytes.size() + 1));
  while (!bytes.empty()) {
    std::uint64_t word = 0;
    const std::size_t count = bytes.size() < sizeof(word) ? bytes.size() : sizeof(word);
    std::memcpy(&word, bytes.data(), count);
    bytes.remove_prefix(count);
    hash = (hash ^ word) * 0x9FB21C651E98DF25;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace fastpref
