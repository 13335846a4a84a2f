// A stack that can be left and entered again: what an emulated CUDA thread runs on.
// Owns the switch between stacks (x86-64, System V). Knows nothing of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#error "the emulation switches stacks on x86-64 only"
#endif

// Leaves this stack, keeping its stack pointer in *left, and goes on where `entered` was left.
extern "C" void pagoda_switch_stack(void** left, void* entered);

// The callee-saved registers are pushed here and popped on the other side.
asm(R"(
.text
.globl pagoda_switch_stack
pagoda_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emulation {

class Fiber {
 public:
  Fiber() : stack_(static_cast<char*>(std::aligned_alloc(64, kStackBytes))) {}
  Fiber(Fiber&& other) noexcept : stack_(other.stack_), left_(other.left_) { other.stack_ = nullptr; }
  Fiber(const Fiber&) = delete;
  ~Fiber() { std::free(stack_); }

  // The next `enter` begins `function`, which must never return.
  void reset(void (*function)()) {
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
    *--top = nullptr;  // where `function` would return to; it also aligns the stack as a call does
    *--top = reinterpret_cast<void*>(function);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    left_ = top;
  }

  // Runs it until it leaves.
  void enter() { pagoda_switch_stack(&entered_from_, left_); }

  // Called on the fiber's own stack: goes back to where it was entered.
  void leave() { pagoda_switch_stack(&left_, entered_from_); }

 private:
  static constexpr size_t kStackBytes = 64 << 10;
  static constexpr int kSavedRegisters = 6;
  char* stack_;
  void* left_ = nullptr;
  void* entered_from_ = nullptr;
};

}  // namespace emulation
