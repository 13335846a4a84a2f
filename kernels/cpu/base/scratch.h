// Memory that a thread keeps from call to call.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "elements.h"

namespace pagoda {

// Uninitialised float32 scratch; grows, and stays for the next call.
class Scratch {
 public:
  float* floats(size_t count) {
    if (count > capacity_) {
      memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{kAlignment})));
      capacity_ = count;
    }
    return memory_.get();
  }

 private:
  struct Release {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<float, Release> memory_;
  size_t capacity_ = 0;
};

}  // namespace pagoda
