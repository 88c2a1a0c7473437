// Fibers: functions on stacks of their own, which go on where they left off.
//
// A kernel's threads hand over to one another some hundred times each. swapcontext asks the kernel of the operating
// system twice at every switch, to change a signal mask that never changes; on x86-64 the switch is therefore ten
// instructions of our own.
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>

namespace moetrain::emulation {

// Where a fiber, or who started it, goes on; and its stack, of which AddressSanitizer wants to know at every switch.
struct Context {
#ifdef __x86_64__
    void* stack_pointer = nullptr;
#else
    ucontext_t machine{};
#endif
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;
};

// The first switch to `context` calls `entry`, which must not return, on that stack.
void prepare_fiber(Context& context, std::byte* stack, size_t stack_bytes, void (*entry)());

// `from` goes on where this call returns, unless it leaves for good.
void switch_context(Context& from, Context& to, bool leaves_for_good = false);

// The first thing to call on a fiber's own stack; `from` is what switched to it.
void arrive_on_fiber(Context& from);

}  // namespace moetrain::emulation
