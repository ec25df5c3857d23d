// The functions that g++ -fsanitize=thread calls before every load and store of a kernel. The
// sanitizer's own library is not linked: these take its place.
#include <cstddef>
#include <cstdint>

namespace emulation {
void plain_access(const void* p, int bytes, bool write, uintptr_t code);
}

#define CODE reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define ACCESS(bytes)                                                                            \
  void __tsan_read##bytes(void* p) { emulation::plain_access(p, bytes, false, CODE); }           \
  void __tsan_write##bytes(void* p) { emulation::plain_access(p, bytes, true, CODE); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulation::plain_access(p, bytes, false, CODE); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::plain_access(p, bytes, true, CODE); }

#pragma GCC visibility push(hidden)
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t bytes) {
  emulation::plain_access(p, static_cast<int>(bytes), false, CODE);
}
void __tsan_write_range(void* p, size_t bytes) {
  emulation::plain_access(p, static_cast<int>(bytes), true, CODE);
}
}
#pragma GCC visibility pop
