#include "team.h"

#include <atomic>
#include <mutex>
#include <thread>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace pagoda {
namespace {

// Looks at a variable before a thread sleeps: some twenty microseconds, longer than from one loop of a step to the
// next.
constexpr int kLooks = 600;

void pause() {
#ifdef __x86_64__
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Until `variable` is no longer `value`.
void await_change(const std::atomic<uint32_t>& variable, uint32_t value) {
  for (int i = 0; i < kLooks; ++i) {
    if (variable.load(std::memory_order_acquire) != value) return;
    pause();
  }
  variable.wait(value, std::memory_order_acquire);
}

// One loop. Its fields are atomic for a helper that comes late and reads the fields of another loop: it claims nothing.
struct Loop {
  std::atomic<RunUnit> run;
  std::atomic<const void*> context;
  std::atomic<uint32_t> count;
  std::atomic<uint32_t> num_threads;
  std::atomic<uint32_t> num_done;
};

class Team {
 public:
  // False where another thread's loop is under way.
  bool share(uint32_t num_threads, uint32_t count, RunUnit run, const void* context) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    while (num_helpers_ + 1 < num_threads) {
      std::thread([this, id = ++num_helpers_] { help(id); }).detach();
    }
    const uint32_t number = number_.load(std::memory_order_relaxed) + 1;
    Loop& loop = loops_[number % 2];
    loop.run.store(run, std::memory_order_relaxed);
    loop.context.store(context, std::memory_order_relaxed);
    loop.count.store(count, std::memory_order_relaxed);
    loop.num_threads.store(num_threads, std::memory_order_relaxed);
    loop.num_done.store(0, std::memory_order_relaxed);
    next_.store(uint64_t{number} << 32, std::memory_order_release);
    number_.store(number, std::memory_order_release);
    number_.notify_all();
    work(0);
    for (uint32_t done; (done = loop.num_done.load(std::memory_order_acquire)) != count;) {
      await_change(loop.num_done, done);
    }
    return true;
  }

 private:
  void help(uint32_t id) {
    for (uint32_t seen = 0;;) {
      await_change(number_, seen);
      seen = number_.load(std::memory_order_acquire);
      work(id);
    }
  }

  // Claims and does units until none is left; id: 0 is the caller's.
  void work(uint32_t id) {
    uint32_t num_mine = 0;
    Loop* mine = nullptr;
    uint64_t next = next_.load(std::memory_order_acquire);
    for (;;) {
      Loop& loop = loops_[(next >> 32) % 2];
      const RunUnit run = loop.run.load(std::memory_order_relaxed);
      const void* const context = loop.context.load(std::memory_order_relaxed);
      const uint32_t unit = static_cast<uint32_t>(next);
      const bool is_left = unit < loop.count.load(std::memory_order_relaxed);
      if (!is_left || id >= loop.num_threads.load(std::memory_order_relaxed)) break;
      // Only where `next` is still of the loop whose fields were read: those of the one after lie elsewhere, and those
      // of the second after are written when `next` has moved on.
      if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) {
        run(context, unit);
        mine = &loop;
        ++num_mine;
        next = next_.load(std::memory_order_acquire);
      }
    }
    if (mine) finish(*mine, num_mine);
  }

  static void finish(Loop& loop, uint32_t num_units) {
    const uint32_t count = loop.count.load(std::memory_order_relaxed);
    if (loop.num_done.fetch_add(num_units, std::memory_order_acq_rel) + num_units == count) loop.num_done.notify_all();
  }

  std::mutex mutex_;
  uint32_t num_helpers_ = 0;
  Loop loops_[2] = {};  // of an even number, of an odd one
  alignas(64) std::atomic<uint64_t> next_ = 0;  // the loop's number, the next unit
  alignas(64) std::atomic<uint32_t> number_ = 0;
};

}  // namespace

void share_units(int num_threads, int64_t count, RunUnit run, const void* context) {
  static Team& team = *new Team;  // never destroyed: its threads are never joined
  if (num_threads > 1 && count > 1 && team.share(num_threads, count, run, context)) return;
  for (int64_t unit = 0; unit < count; ++unit) run(context, unit);
}

}  // namespace pagoda
