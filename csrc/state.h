// Where a batcher stands, and of which data and configuration, in a few bytes.
//
// Layout, little-endian: magic "FPBATCH\0", u32 format, u32 plan version, 16-byte data fingerprint, u64 records,
// u64 seed, u64 batch size, u32 completions, u32 number of shapes, two i32 for each shape, u64 batches handed out,
// u64 FNV-1a of all bytes before it.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "plan.h"

namespace fastpref {

inline constexpr std::uint32_t kStateFormat = 1;
inline constexpr std::size_t kMaxShapes = 32;
inline constexpr std::size_t kFingerprintBytes = 16;

// Everything that decides what the batches are. `completions` is K, 0 for prompts alone.
struct Identity {
  std::array<unsigned char, kFingerprintBytes> fingerprint;
  std::uint64_t records;
  std::uint64_t seed;
  std::uint64_t batch_size;
  std::uint32_t completions;
  std::vector<Shape> shapes;
};

// At most 336 bytes.
std::string encode_state(const Identity& identity, std::uint64_t batches);

// The number of batches handed out. Throws std::invalid_argument, naming the field, where the bytes are damaged or of
// another format, data, seed, batch size or shapes than `expected`.
std::uint64_t decode_state(std::string_view bytes, const Identity& expected);

}  // namespace fastpref
