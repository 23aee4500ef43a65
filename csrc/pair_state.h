// Where a batcher of packed pairs stands, and of which data, plan and configuration, in a few bytes.
//
// Layout, little-endian: magic "FPPAIRS\0", u32 format, u32 plan version, 16-byte data fingerprint, 16-byte tokenizer
// hash, u64 pairs, u64 seed, u32 layout, i32 start token, u32 pairs in a row, u32 window, u32 number of shapes, three
// i32 (rows, decoder places, encoder places) for each shape, u64 epoch, u64 batches handed over in it, u64 hash of its
// plan, u64 FNV-1a of all bytes before it. Hosts, threads and prefetching are no part of it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "packed.h"
#include "pair_plan.h"
#include "state.h"

namespace fastpref {

inline constexpr std::uint32_t kPairStateFormat = 1;

struct PairIdentity {
  std::array<unsigned char, kFingerprintBytes> fingerprint, tokenizer;
  std::uint64_t pairs;
  Layout layout;
  PackConfig pack;
};

struct PairState {
  std::uint64_t epoch, batch, plan;
};

// At most 316 bytes.
std::string encode_pair_state(const PairIdentity& identity, const PairState& state);

// Throws std::invalid_argument, naming the field, where the bytes are damaged or of something else than `expected`.
PairState decode_pair_state(std::string_view bytes, const PairIdentity& expected);

}  // namespace fastpref
