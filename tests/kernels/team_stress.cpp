// Loops of all sizes from several callers at once, each unit counted. Prints what went wrong; ends with 1 if anything.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "team.h"

namespace {

std::atomic<int> num_wrong = 0;

void call(unsigned seed, int num_loops) {
  for (int loop = 0; loop < num_loops; ++loop) {
    const int64_t count = rand_r(&seed) % 40;
    const int num_threads = 1 + rand_r(&seed) % 5;
    // Of this loop alone, and not atomic: a unit that is done twice, or after the loop, is a race.
    const std::unique_ptr<int[]> times(new int[count]());
    pagoda::for_units(num_threads, count, [&](int64_t unit) {
      times[unit] += 1;
      if (unit % 16 == 3) std::this_thread::yield();
    });
    for (int64_t unit = 0; unit < count; ++unit) {
      if (times[unit] != 1) {
        ++num_wrong;
        std::printf("unit %ld of %ld was done %d times\n", static_cast<long>(unit), static_cast<long>(count), times[unit]);
      }
    }
    std::vector<int> seen(count);
    pagoda::for_many(num_threads, count, 10, [&](int64_t i) { seen[i] += 1; });
    for (const int times_seen : seen) num_wrong += times_seen != 1;
    if (loop % 64 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // helpers fall asleep
  }
}

}  // namespace

int main(int, char** arguments) {
  const int num_loops = std::atoi(arguments[1]);
  std::vector<std::thread> callers;
  for (unsigned seed = 1; seed <= 2; ++seed) callers.emplace_back(call, seed, num_loops);
  for (std::thread& caller : callers) caller.join();
  call(3, num_loops);
  if (num_wrong) std::printf("%d wrong\n", num_wrong.load());
  std::fflush(stdout);
  std::_Exit(num_wrong != 0);  // the helpers never end
}
