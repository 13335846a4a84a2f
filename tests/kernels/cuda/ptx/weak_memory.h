// Global memory as the multiprocessors of a device see it that keeps no more than the PTX ISA promises.
//
// What a thread writes, its own multiprocessor sees at once, the others once the thread has passed a fence, or after
// the launch. What a multiprocessor has read it may know already, whatever others have written since, until a fence
// there. So blocks that meet in memory without fences find what was there before.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLineBytes = 32;  // read at once

// What one multiprocessor sees. Accesses have up to 16 bytes and lie at a multiple of their size, thus in one line.
class View {
 public:
  void load(char* to, uint64_t address, int num_bytes) {
    std::memcpy(to, line(address / kLineBytes) + address % kLineBytes, num_bytes);
  }

  void store(int thread, const char* from, uint64_t address, int num_bytes) {
    Store store = {thread, address, num_bytes, {}};
    std::memcpy(store.bytes, from, num_bytes);
    std::memcpy(line(address / kLineBytes) + address % kLineBytes, from, num_bytes);
    unfenced_[address / kLineBytes].push_back(store);
    lines_of_[thread].push_back(address / kLineBytes);
  }

  // All see what the thread wrote; what was read here, is read again.
  void fence(int thread) {
    for (uint64_t number : lines_of_[thread]) publish(number, thread);
    lines_of_.erase(thread);
    lines_.clear();
  }

  // The thread is about to change what is in memory, at once for all.
  void meet(int thread, uint64_t address) {
    publish(address / kLineBytes, thread);
    lines_.erase(address / kLineBytes);
  }

  void end_launch() {
    for (const auto& [_, stores] : unfenced_) {
      for (const Store& store : stores) store.write();
    }
    unfenced_.clear();
    lines_of_.clear();
    lines_.clear();
  }

 private:
  struct Store {
    int thread;
    uint64_t address;
    int num_bytes;
    char bytes[16];

    void write() const { std::memcpy(reinterpret_cast<char*>(address), bytes, num_bytes); }
  };

  struct Line {
    char bytes[kLineBytes];
  };

  // Its bytes: read now, if they are not known, with what is written to them here.
  char* line(uint64_t number) {
    const auto [found, is_new] = lines_.try_emplace(number);
    char* bytes = found->second.bytes;
    if (!is_new) return bytes;
    std::memcpy(bytes, reinterpret_cast<const char*>(number * kLineBytes), kLineBytes);
    if (const auto unfenced = unfenced_.find(number); unfenced != unfenced_.end()) {
      for (const Store& store : unfenced->second) {
        std::memcpy(bytes + store.address % kLineBytes, store.bytes, store.num_bytes);
      }
    }
    return bytes;
  }

  // What the thread wrote to a line goes to memory.
  void publish(uint64_t number, int thread) {
    const auto unfenced = unfenced_.find(number);
    if (unfenced == unfenced_.end()) return;
    std::vector<Store>& stores = unfenced->second;
    const auto is_its_own = [thread](const Store& store) { return store.thread == thread; };
    for (const Store& store : stores) {
      if (is_its_own(store)) store.write();
    }
    stores.erase(std::remove_if(stores.begin(), stores.end(), is_its_own), stores.end());
    if (stores.empty()) unfenced_.erase(unfenced);
  }

  std::unordered_map<uint64_t, Line> lines_;
  std::unordered_map<uint64_t, std::vector<Store>> unfenced_;  // by line, each in their order
  std::unordered_map<int, std::vector<uint64_t>> lines_of_;    // of each thread's unfenced stores
};

}  // namespace ptx
