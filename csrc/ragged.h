// Ragged rows of token ids, checked once.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastpref {

// Rows of token ids: row i is values[offsets[i] .. offsets[i + 1]). Borrows the values, owns the offsets.
class Ragged {
 public:
  // Throws std::invalid_argument unless offsets are non-decreasing within [0, values.size()], rows are shorter than
  // 2^31, and every id of a row is in [0, vocab_size). Nothing is read through an offset before that is known.
  Ragged(std::span<const std::int32_t> values, std::vector<std::int64_t> offsets, std::int64_t vocab_size);

  std::int64_t rows() const noexcept { return static_cast<std::int64_t>(offsets_.size()) - 1; }

  // Row `index` must be in [0, rows()).
  std::span<const std::int32_t> row(std::int64_t index) const noexcept {
    return values_.subspan(static_cast<std::size_t>(offsets_[index]),
                           static_cast<std::size_t>(offsets_[index + 1] - offsets_[index]));
  }

 private:
  std::span<const std::int32_t> values_;
  std::vector<std::int64_t> offsets_;
};

}  // namespace fastpref
