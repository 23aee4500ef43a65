// Whole pairs into rows of fixed capacity: best fit, the largest first.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastpref {

inline constexpr std::int32_t kMaxRowTokens = 1 << 24;
inline constexpr std::int32_t kMaxWindow = 1 << 16;

// Places of a pair, or of a row, in the decoder's stream and in the encoder's (0 for a decoder-only model).
struct Size {
  std::int32_t tokens;
  std::int32_t prompt;
  bool operator==(const Size&) const = default;
};

inline bool fits(Size pair, Size row) { return pair.tokens <= row.tokens && pair.prompt <= row.prompt; }

// Rows of pairs: row r holds pairs[ends[r - 1] .. ends[r]), the first from 0.
struct Rows {
  std::vector<std::int32_t> pairs;
  std::vector<std::int64_t> ends;
};

// Pairs are taken by falling share of the capacity (the larger of the two shares; ties in the order given). Each goes to
// the row that it leaves the fewest decoder places free in, of those with places enough in both streams and fewer than
// `max_pairs` pairs; of several, to the one changed last. Where there is none it opens a row.
class Packer {
 public:
  // `capacity.tokens` is in [1, kMaxRowTokens], `capacity.prompt` in [0, kMaxRowTokens].
  Packer(Size capacity, std::int32_t max_pairs);

  // Appends the rows of at most kMaxWindow `pairs`, in the order opened, each with its pairs in the order taken.
  // Pair i has size sizes[i], which fits into an empty row and has at least one decoder place.
  void pack(std::span<const std::int32_t> pairs, std::span<const Size> sizes, Rows& rows);

 private:
  struct Open {
    std::int32_t tokens, prompt, pairs;    // what is left of it
    std::int32_t newer, older;             // rows with as many places left
  };

  void insert(std::int32_t row);
  void remove(std::int32_t row);
  std::int32_t first_with(std::int32_t tokens) const;
  std::int32_t find(Size pair) const;

  Size capacity_;
  std::int32_t max_pairs_;
  std::vector<std::int32_t> newest_;       // by places left: the row changed last, or -1
  std::vector<std::uint64_t> some_;        // one bit for each entry of newest_ that is a row
  std::vector<std::uint64_t> some_words_;  // one bit for each word of some_ that is not 0
  std::vector<Open> open_;
  std::vector<std::uint64_t> order_;
  std::vector<std::int32_t> row_of_;
};

}  // namespace fastpref
