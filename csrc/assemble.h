// Ragged int32 rows in, padded arrays out.
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

// tokens[i, k, :] = row rows[i] of columns[k], then zeros; lengths[i, k] = its length.
// `tokens` has rows * columns * width places, `lengths` rows * columns. Throws std::invalid_argument for a row that is
// out of range or wider than `width`; the outputs are then unspecified.
void gather(std::span<const Ragged* const> columns, std::span<const std::int64_t> rows, std::int32_t width,
            std::int32_t* tokens, std::int32_t* lengths);

}  // namespace fastpref
