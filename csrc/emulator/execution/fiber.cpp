#include "emulator/execution/fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace foveate::emulator {

#if defined(__x86_64__)

// Saves what the System V ABI lets a caller expect unchanged, so a switch costs a dozen instructions and no system call.
asm(R"(
.text
.type foveate_emulator_switch, @function
foveate_emulator_switch:
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
.size foveate_emulator_switch, .-foveate_emulator_switch
)");
extern "C" void foveate_emulator_switch(void** from_stack_pointer, void* to_stack_pointer);

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  // Six saved registers, the address to return to, and one word above it, as after a call: the ABI aligns the stack so.
  auto** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  void** frame = top - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
}

void Fiber::exchange(Fiber& from, Fiber& to) { foveate_emulator_switch(&from.stack_pointer_, to.stack_pointer_); }

#else

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::exchange(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

#endif

#if defined(__SANITIZE_ADDRESS__)

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  stack_ = stack;
  bytes_ = bytes;
  fake_stack_ = nullptr;
  __asan_unpoison_memory_region(stack, bytes);  // what ran here before was left in the middle of its functions
  prepare(stack, bytes, entry);
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  if (!from.stack_) {  // that of the OS thread
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &from.bytes_);
    pthread_attr_destroy(&attributes);
    from.stack_ = stack;
  }
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.bytes_);
  exchange(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
}

void Fiber::entered() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }

#else

void Fiber::start(void* stack, size_t bytes, void (*entry)()) { prepare(stack, bytes, entry); }
void Fiber::switch_to(Fiber& from, Fiber& to) { exchange(from, to); }
void Fiber::entered() {}

#endif

namespace {
constexpr size_t kGuard = 16 * 1024;  // a multiple of the page size on x86-64 and 64-bit Arm but for its 64 KiB pages
constexpr size_t kStride = Stacks::kBytes + kGuard;
}  // namespace

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (memory_) munmap(memory_, count_ * kStride);
  memory_ = nullptr;
  count_ = 0;
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  release();
  void* memory = mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(memory_ + i * kStride, kGuard, PROT_NONE);
}

void* Stacks::operator[](int i) const { return memory_ + i * kStride + kGuard; }

}  // namespace foveate::emulator
