// One emulated thread block: its threads, who waits for what, and who runs next.
//
// Threads run one at a time, each until it waits for its warp or its block. The order is drawn from a seed, and a warp
// is often driven as far ahead of the others as it can get: code that lacks a barrier reads what is not yet written.
// A block in which nobody can go on, or whose threads disagree about what they wait for, fails with a message.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulation {

constexpr int kWarpSize = 32;
constexpr int kMaxPostBytes = 64;

// A 16-byte asynchronous copy into shared memory; a source of null writes zeros.
struct Copy {
  char* destination;
  const char* source;
};

// Asynchronous copies of one thread. Committed groups wait in order; a group that was waited for has arrived but is
// seen by nobody, its own thread included, before the next barrier of warp or block.
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> arrived;
};

enum class State { kReady, kAtWarp, kAtBlock, kEnded };

struct Thread {
  Fiber fiber;
  int index = 0;
  State state = State::kReady;
  const char* waits_at = "";
  Copies copies;

  int lane() const { return index % kWarpSize; }
};

struct Warp {
  int num_arrived = 0;
  const char* operation = "";
  alignas(16) char posts[kWarpSize][kMaxPostBytes];
  alignas(16) char results[kWarpSize][kMaxPostBytes];
};

class Block {
 public:
  // Makes `body` what all threads do; go_on runs them.
  void start(int num_threads, uint64_t seed, std::function<void()> body) {
    seed_ = seed;
    random_.seed(seed);
    stay_share_ = seed == 0 ? 1.0 : draw() < 0.5 ? 0.99 : 0.5;
    warp_ = 0;
    prepare(num_threads, std::move(body));
  }

  // Lets one warp go on until its lanes wait. Returns whether there is more to do.
  bool go_on() {
    if (!failure_.empty()) return false;
    running() = this;
    warp_ = choose_warp(draw() < stay_share_ ? warp_ : static_cast<int>(random_() % warps_.size()));
    if (warp_ < 0) {
      failure_ = describe_deadlock();
    } else {
      run_lanes(warp_);
    }
    return num_ended_ < num_threads_ && failure_.empty();
  }

  // What went wrong, or nothing.
  const std::string& failure() const { return failure_; }

  static Block*& running() {
    static thread_local Block* block = nullptr;
    return block;
  }

  Thread& thread() { return *current_; }
  Warp& warp() { return warps_[current_->index / kWarpSize]; }

  void wait_for_block(const char* where) {
    if (++num_at_barrier_ == static_cast<int>(num_threads_)) {
      num_at_barrier_ = 0;
      for (int i = 0; i < num_threads_; ++i) threads_[i].state = State::kReady;
    } else {
      wait(State::kAtBlock, where);
    }
  }

  // Waits for the warp's other lanes at the same `operation`; true for the last one, which then calls `release_warp`.
  bool arrive_in_warp(const char* operation) {
    Warp& mine = warp();
    if (mine.num_arrived == 0) mine.operation = operation;
    if (std::strcmp(mine.operation, operation) != 0) {
      fail(std::string("divergence: lanes of one warp are at ") + mine.operation + " and at " + operation);
    }
    if (++mine.num_arrived == kWarpSize) return true;
    wait(State::kAtWarp, operation);
    return false;
  }

  void release_warp() {
    warp().num_arrived = 0;
    const int first = current_->index / kWarpSize * kWarpSize;
    for (int i = first; i < first + kWarpSize; ++i) threads_[i].state = State::kReady;
  }

  // Ends the block with a message; does not return.
  [[noreturn]] void fail(const std::string& message) {
    failure_ = message + " (thread " + std::to_string(current_->index) + ")";
    for (;;) current_->fiber.leave();
  }

 private:
  void prepare(int num_threads, std::function<void()> body) {
    body_ = std::move(body);
    num_threads_ = num_threads;
    num_ended_ = num_at_barrier_ = 0;
    failure_.clear();
    warps_.assign(num_threads / kWarpSize, Warp());
    if (num_threads % kWarpSize) failure_ = "a block must be made of whole warps";
    while (static_cast<int>(threads_.size()) < num_threads) threads_.emplace_back();
    for (int i = 0; i < num_threads; ++i) {
      threads_[i].index = i;
      threads_[i].state = State::kReady;
      threads_[i].copies = Copies();
      threads_[i].fiber.reset(&Block::run_thread);
    }
  }

  static void run_thread() {
    Block& block = *running();
    block.body_();
    const Copies& copies = block.current_->copies;
    for (const auto& group : copies.committed) {
      if (!group.empty()) block.fail("a thread ends with copies that it never waited for");
    }
    if (!copies.open.empty()) block.fail("a thread ends with copies that it never committed");
    ++block.num_ended_;
    block.current_->state = State::kEnded;
    for (;;) block.current_->fiber.leave();
  }

  void wait(State state, const char* where) {
    current_->state = state;
    current_->waits_at = where;
    current_->fiber.leave();
  }

  bool can_run(int warp) const {
    for (int i = warp * kWarpSize; i < (warp + 1) * kWarpSize; ++i) {
      if (threads_[i].state == State::kReady) return true;
    }
    return false;
  }

  // `wanted`, or the next that can run, or -1.
  int choose_warp(int wanted) const {
    const int num_warps = static_cast<int>(warps_.size());
    for (int i = 0; i < num_warps; ++i) {
      if (can_run((wanted + i) % num_warps)) return (wanted + i) % num_warps;
    }
    return -1;
  }

  void run_lanes(int warp) {
    int order[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) order[i] = i;
    if (seed_ != 0) std::shuffle(order, order + kWarpSize, random_);
    for (int lane : order) {
      current_ = &threads_[warp * kWarpSize + lane];
      if (current_->state == State::kReady) current_->fiber.enter();
      if (!failure_.empty()) return;
    }
  }

  std::string describe_deadlock() const {
    std::string text = "deadlock:";
    const Thread* told = nullptr;
    for (int i = 0; i < num_threads_; ++i) {
      const Thread& thread = threads_[i];
      if (told && told->state == thread.state && std::strcmp(told->waits_at, thread.waits_at) == 0) continue;
      const bool has_ended = thread.state == State::kEnded;
      text += " thread " + std::to_string(i) + (has_ended ? " has ended" : " waits at ");
      text += has_ended ? ";" : std::string(thread.waits_at) + ";";
      told = &thread;
      if (text.size() > 400) break;
    }
    return text;
  }

  double draw() { return std::uniform_real_distribution<>(0.0, 1.0)(random_); }

  uint64_t seed_ = 0;
  std::mt19937_64 random_;
  double stay_share_ = 1.0;  // how often the warp that ran goes on
  int warp_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::function<void()> body_;
  Thread* current_ = nullptr;
  int num_threads_ = 0, num_ended_ = 0, num_at_barrier_ = 0;
  std::string failure_;
};

}  // namespace emulation
