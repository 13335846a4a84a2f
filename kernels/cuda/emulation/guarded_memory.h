// Memory that ends where an unreadable page begins: reading or writing past it ends the process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

class GuardedMemory {
 public:
  GuardedMemory() = default;
  GuardedMemory(const GuardedMemory&) = delete;
  ~GuardedMemory() { release(); }

  // num_bytes: a multiple of 16. Content is undefined.
  void allocate(size_t num_bytes) {
    if (num_bytes == num_bytes_ && mapped_) return;
    release();
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (num_bytes + page - 1) / page * page;
    mapped_bytes_ = usable + 2 * page;
    mapped_ = static_cast<char*>(mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapped_ == MAP_FAILED || (usable && mprotect(mapped_ + page, usable, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("guarded memory");
      std::abort();
    }
    num_bytes_ = num_bytes;
    data_ = mapped_ + page + usable - num_bytes;
  }

  void fill(int byte) {
    if (num_bytes_) std::memset(data_, byte, num_bytes_);
  }

  char* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  void release() {
    if (mapped_) munmap(mapped_, mapped_bytes_);
    mapped_ = nullptr;
  }

  char* mapped_ = nullptr;
  char* data_ = nullptr;
  size_t mapped_bytes_ = 0;
  size_t num_bytes_ = 0;
};

}  // namespace emulation
