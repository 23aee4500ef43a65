// Packed batches in the order of the plan, assembled ahead by threads that know nothing of Python.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <thread>
#include <vector>

#include "ragged.h"
#include "packed.h"
#include "pair_plan.h"
#include "slab.h"

namespace fastpref {

// Borrowed: all of it must outlive the loader. Every column has as many rows as there are ids.
struct PairSource {
  const Ragged* prompts;
  const Ragged* first;
  const Ragged* second;
  std::span<const float> preference;
  std::span<const float> ref_logps;  // two for each record, or none
  std::span<const std::int64_t> ids;

  Pair pair(std::int64_t record) const;
};

struct LoaderConfig {
  PackConfig pack;
  Layout layout;
  std::int32_t host, hosts;  // `hosts` divides the rows of every shape
  std::int32_t threads;      // at least 1
  std::int32_t prefetch;     // batches assembled ahead; with 0 there are no threads
  bool poison;               // see SlabPool
};

// `batch` batches of epoch `epoch` were handed over.
struct Position {
  std::uint64_t epoch;
  std::int64_t batch;
};

// A position, with the number of batches of its epoch and the hash of their plan.
struct Standing {
  Position position;
  std::int64_t batches;
  std::uint64_t plan;
};

struct PackedBatch {
  PackedShape shape;
  std::unique_ptr<Lease> memory;
};

// Calls may come from any thread. What a batch is depends on source, layout, plan and host alone.
class Loader {
 public:
  // Record records[i] is pair i of the plan; with no `records` it is record i.
  Loader(const PairSource& source, std::vector<std::int32_t> records, std::vector<Size> sizes,
         const LoaderConfig& config);
  // Never to be called where `forked` is true: it would wait for threads that are not there. Leave the memory be.
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // The next batch, or nothing where it is not ready within `patience`: ask again. Throws Cancelled once closed,
  // std::logic_error in a child of fork.
  std::optional<PackedBatch> next(std::chrono::milliseconds patience);

  // The plan of an epoch, made now where it is not there yet.
  std::shared_ptr<const PairPlan> plan(std::uint64_t epoch);

  // Plans the first epoch where nothing was handed over yet.
  Standing standing();

  // Goes on behind `batch` batches of an epoch. What was assembled ahead is thrown away. Throws std::invalid_argument where
  // the epoch has another plan than one of that hash, or fewer batches.
  void seek(std::uint64_t epoch, std::int64_t batch, std::uint64_t hash);

  // Decoder places of all pairs of a plan.
  std::int64_t tokens(const PairPlan& plan) const;

  // Ends the threads and lets go of everything but batches that were handed out. May be called again.
  void close();

  // Whether this is a child of fork, which the threads, and perhaps a lock that one of them held, did not come along to.
  bool forked() const noexcept;

 private:
  struct Slot {
    Standing after;
    bool ready = false;
    std::exception_ptr error;
    std::optional<PackedBatch> batch;
  };
  using Plan = std::shared_ptr<const PairPlan>;

  void work(const std::stop_token& stop);
  void plan_ahead(const std::stop_token& stop);
  void fail(std::exception_ptr error);
  PackedBatch assemble(const PairPlan& plan, std::int64_t batch) const;
  void stand(const Standing& standing);
  void check_process() const;

  PairSource source_;
  std::vector<std::int32_t> records_;
  std::vector<Size> sizes_;
  LoaderConfig config_;
  std::shared_ptr<SlabPool> pool_;
  pid_t process_;
  std::atomic<bool> closed_ = false;

  std::mutex one_at_a_time_;  // callers of next() without threads
  mutable std::mutex mutex_;  // everything below
  std::condition_variable_any room_, ready_, advance_;
  Position issued_{0, 0};            // given to a thread
  std::uint64_t epoch_ = 0;          // of the batch handed over last
  std::optional<Standing> standing_;  // none as long as nothing is known
  std::deque<std::shared_ptr<Slot>> queue_;
  std::map<std::uint64_t, std::shared_future<Plan>> plans_;
  std::vector<std::jthread> threads_;
};

}  // namespace fastpref
