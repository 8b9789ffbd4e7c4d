// Kernels of a user's file, callable by name with arguments that Python packed: what
// pyllm/emulator.py generates for a file is the file itself, then
//   EMULATE_BEGIN EMULATE_KERNEL(saxpy) EMULATE_KERNEL(scale<float>) EMULATE_END
#pragma once
#include <string>
#include <utility>

#include "cuda/launch.cuh"

namespace emu {

struct Entry {
  const char* name;
  const char*
      signature;  // of each parameter: p pointer, f float, i signed, u unsigned, x other; size
  const char* (*launch)(const unsigned* dims, size_t shared_bytes, void** arguments);
};

template <class... P>
const char* signature_of(void (*)(P...)) {
  auto kind = [](char of, size_t bytes) {
    return std::string(1, of) + std::to_string(bytes) + " ";
  };
  static const std::string text = (std::string() + ... +
                                   kind(std::is_pointer_v<P>          ? 'p'
                                        : std::is_floating_point_v<P> ? 'f'
                                        : !std::is_integral_v<P>      ? 'x'
                                        : std::is_signed_v<P>         ? 'i'
                                                                      : 'u',
                                        sizeof(P)));
  return text.c_str();
}

template <class... P, size_t... I>
const char* launch_entry(const char* name, void (*kernel)(P...), const unsigned* d, size_t shared,
                         void** arguments, std::index_sequence<I...>) {
  return pyllm::cuda::launch(name, kernel, dim3(d[0], d[1], d[2]), dim3(d[3], d[4], d[5]), shared,
                             nullptr, *static_cast<P*>(arguments[I])...);
}
template <class... P>
const char* launch_entry(const char* name, void (*kernel)(P...), const unsigned* dims,
                         size_t shared, void** arguments) {
  return launch_entry(name, kernel, dims, shared, arguments, std::index_sequence_for<P...>());
}

}  // namespace emu

#define EMULATE_BEGIN                                       \
  extern "C" EMU_API const emu::Entry* emulator_entries() { \
    static const emu::Entry entries[] = {
#define EMULATE_KERNEL(...)                                                         \
  {#__VA_ARGS__, emu::signature_of(&__VA_ARGS__),                                   \
   [](const unsigned* dims, size_t shared, void** arguments) {                      \
     return emu::launch_entry(#__VA_ARGS__, &__VA_ARGS__, dims, shared, arguments); \
   }},
#define EMULATE_END           \
  {                           \
    nullptr, nullptr, nullptr \
  }                           \
  }                           \
  ;                           \
  return entries;             \
  }
