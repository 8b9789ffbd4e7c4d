// What a kernel compiled for the emulator calls. cuda.h gives these functions their CUDA names and
// cuda/primitives.cuh those of PTX; kernels call none of them directly.
//
// All are real calls: the return address is the place in the kernel that an error names.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#define EMU_API __attribute__((visibility("default")))

namespace emu {

struct Index3 {
  unsigned x, y, z;
};
struct U2 {
  uint32_t v[2];
};
struct U4 {
  uint32_t v[4];
};
struct F4 {
  float v[4];
};
struct S4 {
  int32_t v[4];
};

// --- where am I ---------------------------------------------------------------------------------
EMU_API Index3 thread_idx() __attribute__((const));
EMU_API Index3 block_idx() __attribute__((const));
EMU_API Index3 block_dim() __attribute__((const));
EMU_API Index3 grid_dim() __attribute__((const));
EMU_API void* dynamic_shared();
EMU_API uint32_t active_mask();

// --- barriers -----------------------------------------------------------------------------------
enum class Vote { None, Count, And, Or };
EMU_API int sync_threads(Vote vote = Vote::None, int predicate = 0);
EMU_API void barrier_sync(int id, int threads);
EMU_API void barrier_arrive(int id, int threads);
EMU_API void sync_warp(uint32_t mask);

// --- warp-wide operations -----------------------------------------------------------------------
enum class Shuffle { Index, Up, Down, Xor };
EMU_API uint64_t shuffle(Shuffle mode, uint32_t mask, uint64_t value, int argument, int width);
EMU_API uint32_t ballot(uint32_t mask, int predicate);
EMU_API uint32_t match_any(uint32_t mask, uint64_t value);
EMU_API uint32_t match_all(uint32_t mask, uint64_t value, int* predicate);
enum class Reduce { Add, Min, Max, MinSigned, MaxSigned, And, Or, Xor };
EMU_API uint32_t reduce(Reduce op, uint32_t mask, uint32_t value);
EMU_API U4 ldmatrix(int matrices, bool transposed, const void* row);
enum class Half { F16, BF16 };
EMU_API F4 mma_m16n8k16(Half type, U4 a, U2 b, F4 c);
EMU_API S4 mma_m16n8k32(bool a_signed, bool b_signed, U4 a, U2 b, S4 c);

// --- asynchronous copies ------------------------------------------------------------------------
EMU_API void cp_async(void* shared, const void* global, int bytes, int source_bytes);
EMU_API void cp_async_commit();
EMU_API void cp_async_wait(int groups_left);
EMU_API void mbarrier_init(uint64_t* barrier, int arrivals);
EMU_API void mbarrier_arrive(uint64_t* barrier, int expect_bytes);
EMU_API bool mbarrier_try_wait(uint64_t* barrier, int parity);
EMU_API void cp_async_mbarrier_arrive(uint64_t* barrier);  // .noinc
EMU_API void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier);

// --- memory -------------------------------------------------------------------------------------
EMU_API void load(void* registers, const void* memory, int bytes);
EMU_API void store(void* memory, const void* registers, int bytes);
enum class Atomic { Add, Min, Max, And, Or, Xor, Exchange, CompareExchange };
enum class Number { S32, U32, U64, F32, F64 };
enum Order { kRelaxed = 0, kAcquire = 1, kRelease = 2 };
EMU_API uint64_t atomic(Atomic op, Number type, void* at, uint64_t value, uint64_t compare,
                        int order);
EMU_API uint32_t load_acquire(const uint32_t* at);
EMU_API void store_release(uint32_t* at, uint32_t value);
EMU_API void fence();
EMU_API void guard(const volatile void* begin, int bytes);  // shared memory of no variable
EMU_API void nanosleep();
EMU_API void count(const char* instruction);  // a literal; for the table of instructions
[[noreturn]] EMU_API void trap(const char* message);

// --- launches -----------------------------------------------------------------------------------
struct LaunchConfig {
  Index3 grid, block;
  size_t shared_bytes;
  const char* name;
  const void* code;  // an address in the kernel's library, for source lines
};
// Runs the grid; null, or what went wrong, valid until this thread's next launch.
EMU_API const char* launch(const LaunchConfig& config, void (*lane)(const void*),
                           const void* arguments, size_t argument_bytes);

}  // namespace emu

// The C interface that Python uses.
extern "C" {
EMU_API void emulator_configure(uint64_t seed, int threads);
// Global memory that kernels may touch; `name` appears in messages.
EMU_API void emulator_register(const void* base, size_t bytes, const char* name);
EMU_API void emulator_unregister_all();
// JSON: a list of the launches since the last call, with their traffic.
EMU_API const char* emulator_report();
}
