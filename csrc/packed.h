// Pairs written into the rows of a packed batch. The fields are those of fastpref.data.PackedPairs, which says what
// each place of them means.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "pack.h"

namespace fastpref {

enum class Style { kShared, kSeparate, kEncoderDecoder };

struct Layout {
  Style style;
  std::int32_t start_token;  // first decoder input of an encoder-decoder model
};

// One prompt with its completions, of which the second may be missing: then it has no tokens.
struct Pair {
  std::span<const std::int32_t> prompt;
  std::array<std::span<const std::int32_t>, 2> completions;
  std::array<float, 2> ref_logps;
  float preference;
  std::int64_t id;
  std::array<float, 2> scores{};
};

// Places of a pair with that many tokens; kTooLong in both streams where a stream would need more than kMaxRowTokens.
// The prompt and the first completion have at least one token.
inline constexpr std::int32_t kTooLong = 1 << 30;
Size size_of(const Layout& layout, std::size_t prompt, std::size_t first, std::size_t second);

struct PackedShape {
  std::int32_t rows;      // R
  std::int32_t tokens;    // L
  std::int32_t prompt;    // S
  std::int32_t pairs;     // M
  bool operator==(const PackedShape&) const = default;

  std::size_t slots() const { return static_cast<std::size_t>(rows) * static_cast<std::size_t>(pairs); }
};

enum Field : std::size_t {
  kTokens, kTargets, kPositions, kPairs, kStreams, kSequences,
  kPromptTokens, kPromptPositions, kPromptPairs,
  kLengths, kPreference, kWhere, kIds, kRefLogps, kScores,
  kFields
};

// Where each field lies in one piece of memory, at multiples of kAlignment.
struct PackedOffsets {
  std::array<std::size_t, kFields> at;
  std::size_t bytes;
};

// Throws std::bad_alloc where the bytes cannot be counted.
PackedOffsets offsets_of(const PackedShape& shape);

// Writes rows of one batch, one after another, into memory that is aligned and large enough.
class PackedWriter {
 public:
  // `first_row` is the number of row 0 in the batch over all hosts: segment ids count from there.
  PackedWriter(const Layout& layout, const PackedShape& shape, std::int64_t first_row, std::byte* memory);

  // At most `shape.pairs` pairs, whose sizes fit `shape` together; none for an empty row.
  void write(std::span<const Pair> pairs);

 private:
  void put_prompt(std::span<const std::int32_t> tokens, std::int32_t stream);
  void put_completion(std::int32_t before, std::span<const std::int32_t> tokens, std::int32_t position, std::int32_t k);
  void put_encoded(std::span<const std::int32_t> tokens);
  void label(std::size_t places, std::int32_t position, std::int32_t pair, std::int32_t stream, std::int32_t sequence);

  Layout layout_;
  PackedShape shape_;
  std::int64_t row_;       // over all hosts
  std::int32_t slot_ = 0;  // in the row
  // Where the next place of each field goes.
  std::int32_t *tokens_, *targets_, *positions_, *pairs_, *streams_, *sequences_;
  std::int32_t *prompt_tokens_, *prompt_positions_, *prompt_pairs_;
  std::int32_t* lengths_;
  float* preference_;
  bool* where_;
  std::int64_t* ids_;
  float *ref_logps_, *scores_;
};

}  // namespace fastpref
