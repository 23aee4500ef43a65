#include "ragged.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastpref {

Ragged::Ragged(std::span<const std::int32_t> values, std::vector<std::int64_t> offsets, std::int64_t vocab_size)
    : values_(values), offsets_(std::move(offsets)) {
  if (offsets_.empty()) throw std::invalid_argument("offsets must hold at least one entry, but received none");
  if (offsets_.front() < 0) {
    throw std::invalid_argument("offsets must start at 0 or later, but received " + std::to_string(offsets_.front()));
  }
  for (std::int64_t i = 0; i < rows(); ++i) {
    if (offsets_[i + 1] < offsets_[i]) {
      throw std::invalid_argument("offsets must not decrease, but received " + std::to_string(offsets_[i]) + " then " +
                                  std::to_string(offsets_[i + 1]) + " at record " + std::to_string(i));
    }
    if (offsets_[i + 1] - offsets_[i] > std::numeric_limits<std::int32_t>::max()) {
      throw std::invalid_argument("a row must be shorter than 2^31 tokens, but received " +
                                  std::to_string(offsets_[i + 1] - offsets_[i]) + " at record " + std::to_string(i));
    }
  }
  if (offsets_.back() > static_cast<std::int64_t>(values_.size())) {
    throw std::invalid_argument("offsets must end within the " + std::to_string(values_.size()) + " values, but received " +
                                std::to_string(offsets_.back()));
  }
  for (std::int64_t i = 0; i < rows(); ++i) {
    for (const std::int32_t token : row(i)) {
      if (token < 0 || token >= vocab_size) {
        throw std::invalid_argument("token ids must be in [0, " + std::to_string(vocab_size) + "), but received " +
                                    std::to_string(token) + " at record " + std::to_string(i));
      }
    }
  }
}

}  // namespace fastpref
