#include "emulation/fiber.h"

#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Keeps what the System V ABI wants kept on the stack that is left, and takes it from the one that is entered. The
// control words of floating point are the same on all fibers.
extern "C" void moetrain_switch_stack(void** left, void* entered);
asm(R"(
    .text
    .p2align 4
    .type moetrain_switch_stack, @function
moetrain_switch_stack:
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
    .size moetrain_switch_stack, . - moetrain_switch_stack
)");
#endif

namespace moetrain::emulation {

void prepare_fiber(Context& context, std::byte* stack, size_t stack_bytes, void (*entry)()) {
    context.stack = stack;
    context.stack_bytes = stack_bytes;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, stack_bytes);  // a fiber that failed leaves the marks of its frames
#endif
#ifdef __x86_64__
    constexpr size_t kAlignment = 16;
    constexpr size_t kNumKept = 6;
    auto top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) / kAlignment * kAlignment;
    auto* slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // where `entry` would return to: it finds its stack as after a call
    *--slot = reinterpret_cast<void*>(entry);
    for (size_t i = 0; i < kNumKept; ++i)
        *--slot = nullptr;
    context.stack_pointer = slot;
#else
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = stack;
    context.machine.uc_stack.ss_size = stack_bytes;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry, 0);
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool leaves_for_good) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(leaves_for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __x86_64__
    moetrain_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.machine, &to.machine);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrive_on_fiber([[maybe_unused]] Context& from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
}

}  // namespace moetrain::emulation
