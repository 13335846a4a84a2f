// Threads that share the units of a loop with whoever calls it.
//
// A step is hundreds of loops of some ten microseconds on cores that other processes want too. So nobody waits for
// anybody to arrive: units are claimed one by one, the caller claims like the others, and a loop ends when all units
// are done, whoever did them. A helper that is not running, or is not there, costs its help and nothing else.
#pragma once

#include <cstdint>

namespace pagoda {

using RunUnit = void (*)(const void* context, int64_t unit);

// run(context, unit) for units 0 to count - 1, on at most num_threads threads, the caller's among them.
void share_units(int num_threads, int64_t count, RunUnit run, const void* context);

// run(unit) for units 0 to count - 1, as share_units. Which thread does which is left to chance.
template <class Run>
inline void for_units(int num_threads, int64_t count, const Run& run) {
  share_units(
      num_threads, count, [](const void* context, int64_t unit) { (*static_cast<const Run*>(context))(unit); }, &run);
}

// run(i) for 0 to count - 1, some neighbours at a time; fewer than `few` are not worth waking other threads.
template <class Run>
inline void for_many(int num_threads, int64_t count, int64_t few, const Run& run) {
  const int64_t num_units = count < few ? 1 : num_threads * int64_t{4};
  for_units(num_threads, num_units, [&](int64_t unit) {
    for (int64_t i = count * unit / num_units; i < count * (unit + 1) / num_units; ++i) run(i);
  });
}

}  // namespace pagoda
