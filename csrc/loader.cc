#include "loader.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "random.h"

namespace fastpref {

Pair PairSource::pair(std::int64_t record) const {
  const auto at = static_cast<std::size_t>(record);
  Pair pair{prompts->row(record), {first->row(record), second->row(record)}, {}, preference[at], ids[at]};
  if (!ref_logps.empty()) pair.ref_logps = {ref_logps[2 * at], ref_logps[2 * at + 1]};
  return pair;
}

Loader::Loader(const PairSource& source, std::vector<std::int32_t> records, std::vector<Size> sizes,
               const LoaderConfig& config)
    : source_(source),
      records_(std::move(records)),
      sizes_(std::move(sizes)),
      config_(config),
      pool_(std::make_shared<SlabPool>(static_cast<std::size_t>(config.prefetch) + 2, config.poison)),
      process_(getpid()) {
  if (config_.prefetch == 0) return;
  try {
    threads_.emplace_back([this](const std::stop_token& stop) { plan_ahead(stop); });
    for (std::int32_t i = 0; i < std::min(config_.threads, config_.prefetch); ++i) {
      threads_.emplace_back([this](const std::stop_token& stop) { work(stop); });
    }
  } catch (...) {
    close();
    throw;
  }
}

Loader::~Loader() { close(); }

void Loader::close() {
  if (forked()) return;
  std::vector<std::jthread> threads;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    std::swap(threads, threads_);
  }
  for (std::jthread& thread : threads) thread.request_stop();
  ready_.notify_all();
  threads.clear();
  const std::lock_guard lock(mutex_);
  queue_.clear();
  plans_.clear();
  pool_->close();
}

bool Loader::forked() const noexcept { return getpid() != process_; }

void Loader::check_process() const {
  if (forked()) {
    throw std::logic_error("a batcher must be used in the process that made it, but received a child of fork. Make one there.");
  }
}

Standing Loader::standing() {
  check_process();
  {
    const std::lock_guard lock(mutex_);
    if (standing_) return *standing_;
  }
  const Plan first = plan(0);
  const std::lock_guard lock(mutex_);
  if (!standing_) stand({{0, 0}, static_cast<std::int64_t>(first->batches.size()), first->hash});
  return *standing_;
}

void Loader::stand(const Standing& standing) {
  standing_ = standing;
  epoch_ = standing.position.epoch;
}

std::shared_ptr<const PairPlan> Loader::plan(std::uint64_t epoch) {
  check_process();
  check(&closed_);
  std::promise<Plan> promise;
  std::shared_future<Plan> made;
  bool mine = false;
  {
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(epoch);
    if (found != plans_.end()) {
      made = found->second;
    } else {
      mine = true;
      made = promise.get_future().share();
      // Those of epochs that were handed over are not asked for again, except by name.
      std::erase_if(plans_, [&](const auto& entry) {
        return entry.first < epoch_ || entry.first > issued_.epoch + 1;
      });
      plans_.emplace(epoch, made);
    }
  }
  if (mine) {
    try {
      promise.set_value(std::make_shared<const PairPlan>(plan_pairs(sizes_, config_.pack, epoch, &closed_)));
    } catch (...) {
      promise.set_exception(std::current_exception());
      const std::lock_guard lock(mutex_);
      plans_.erase(epoch);
    }
  }
  return made.get();
}

std::int64_t Loader::tokens(const PairPlan& plan) const {
  std::int64_t tokens = 0;
  for (const std::int32_t pair : plan.rows.pairs) tokens += sizes_[static_cast<std::size_t>(pair)].tokens;
  return tokens;
}

PackedBatch Loader::assemble(const PairPlan& plan, std::int64_t number) const {
  const PairBatchPlan& batch = plan.batches[static_cast<std::size_t>(number)];
  const RowShape& shape = config_.pack.shapes[static_cast<std::size_t>(batch.shape)];
  const std::int32_t rows = shape.rows / config_.hosts;
  const std::int32_t first = rows * config_.host;
  const PackedShape packed{rows, shape.capacity.tokens, shape.capacity.prompt, config_.pack.max_pairs};
  PackedBatch made{packed, std::make_unique<Lease>(pool_, offsets_of(packed).bytes)};
  PackedWriter writer(config_.layout, packed, first, made.memory->data());
  std::vector<Pair> pairs;
  for (std::int32_t row = first; row < first + rows; ++row) {
    pairs.clear();
    if (row < batch.rows) {
      const std::int64_t at = batch.first_row + row;
      for (std::int64_t i = plan.row_begin(at); i < plan.rows.ends[at]; ++i) {
        const std::int32_t pair = plan.rows.pairs[i];
        pairs.push_back(source_.pair(records_.empty() ? pair : records_[pair]));
      }
    }
    writer.write(pairs);
  }
  return made;
}

void Loader::fail(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  auto slot = std::make_shared<Slot>();
  slot->ready = true;
  slot->error = std::move(error);
  queue_.push_back(std::move(slot));
  ready_.notify_all();
}

void Loader::plan_ahead(const std::stop_token& stop) {
  std::uint64_t done = 0;
  for (bool first = true;; first = false) {
    std::uint64_t wanted = 0;
    {
      std::unique_lock lock(mutex_);
      advance_.wait(lock, stop, [&] { return first || issued_.epoch + 1 != done; });
      if (stop.stop_requested()) return;
      wanted = first ? issued_.epoch : issued_.epoch + 1;
      done = wanted;
    }
    try {
      plan(wanted);
    } catch (...) {
      // Whoever needs the plan makes it, and tells.
    }
  }
}

void Loader::work(const std::stop_token& stop) {
  while (true) {
    std::unique_lock lock(mutex_);
    room_.wait(lock, stop, [&] { return queue_.size() < static_cast<std::size_t>(config_.prefetch); });
    if (stop.stop_requested()) return;
    const std::uint64_t epoch = issued_.epoch;
    lock.unlock();
    std::shared_ptr<Slot> slot;
    try {
      const Plan made = plan(epoch);
      lock.lock();
      if (issued_.epoch != epoch || queue_.size() >= static_cast<std::size_t>(config_.prefetch)) continue;
      if (issued_.batch >= static_cast<std::int64_t>(made->batches.size())) {
        issued_ = {epoch + 1, 0};
        advance_.notify_all();
        continue;
      }
      slot = std::make_shared<Slot>();
      const std::int64_t number = issued_.batch++;
      slot->after = {issued_, static_cast<std::int64_t>(made->batches.size()), made->hash};
      queue_.push_back(slot);
      lock.unlock();
      PackedBatch batch = assemble(*made, number);
      lock.lock();
      slot->batch = std::move(batch);
    } catch (...) {
      if (stop.stop_requested()) return;
      if (!slot) {
        fail(std::current_exception());
        continue;
      }
      if (!lock.owns_lock()) lock.lock();
      slot->error = std::current_exception();
    }
    slot->ready = true;
    ready_.notify_all();
  }
}

std::optional<PackedBatch> Loader::next(std::chrono::milliseconds patience) {
  check_process();
  if (config_.prefetch == 0) {
    const std::lock_guard turn(one_at_a_time_);
    check(&closed_);
    const Standing now = standing();
    Position at = now.position;
    Plan made = plan(at.epoch);
    // An epoch of fewer pairs than a batch may have none.
    while (at.batch >= static_cast<std::int64_t>(made->batches.size())) {
      at = {at.epoch + 1, 0};
      made = plan(at.epoch);
    }
    PackedBatch batch = assemble(*made, at.batch);
    const std::lock_guard lock(mutex_);
    issued_ = {at.epoch, at.batch + 1};
    stand({issued_, static_cast<std::int64_t>(made->batches.size()), made->hash});
    return batch;
  }
  std::unique_lock lock(mutex_);
  const bool there = ready_.wait_for(lock, patience, [&] {
    return closed_ || (!queue_.empty() && queue_.front()->ready);
  });
  check(&closed_);
  if (!there) return std::nullopt;
  const std::shared_ptr<Slot> slot = queue_.front();
  if (slot->error) std::rethrow_exception(slot->error);
  queue_.pop_front();
  stand(slot->after);
  room_.notify_one();
  return std::move(*slot->batch);
}

void Loader::seek(std::uint64_t epoch, std::int64_t batch, std::uint64_t hash) {
  check_process();
  check(&closed_);
  const Plan made = plan(epoch);
  const auto batches = static_cast<std::int64_t>(made->batches.size());
  if (hash != made->hash || batch > batches) {
    throw std::invalid_argument("state must be of this batcher's plan, " + std::to_string(made->hash) + " with " +
                                std::to_string(batches) + " batches, but received " + std::to_string(hash) +
                                " at batch " + std::to_string(batch) + ". Restore with what it was saved with, or start anew.");
  }
  const std::lock_guard turn(one_at_a_time_);
  const std::lock_guard lock(mutex_);
  issued_ = {epoch, batch};
  stand({issued_, batches, hash});
  queue_.clear();
  room_.notify_all();
  advance_.notify_all();
}

}  // namespace fastpref
