// Switching between stacks: a few instructions, no system call.
#pragma once
#include <cstdint>

extern "C" void emu_switch(void** save_sp, void* to_sp);

namespace emu {

// A stack that, once switched to, calls `entry`, which must not return.
inline void* fresh_stack(char* top, void (*entry)()) {
  auto* sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
#if defined(__x86_64__)
  *--sp = nullptr;  // keeps the alignment that a call would have left
  *--sp = reinterpret_cast<void*>(entry);
  return sp - 6;  // rbp, rbx, r12-r15
#elif defined(__aarch64__)
  sp -= 20;  // x19-x30, d8-d15
  sp[11] = reinterpret_cast<void*>(entry);
  return sp;
#endif
}

}  // namespace emu
