// Drives the real CUDACachingAllocator of libc10_cuda.so with a recorded sequence and prints what it held.
// argv[1]: a file of int64 triples (block, bytes, stream); block > 0 allocates, block < 0 frees -block.
#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdint>
#include <cstdio>
#include <unordered_map>

namespace c10::cuda::detail {
void init_p2p_access_cache(int64_t);
}

int main(int, char** arguments) {
  using namespace c10::cuda;
  detail::init_p2p_access_cache(1);
  CUDACachingAllocator::init(1);
  auto* allocator = CUDACachingAllocator::get();
  std::unordered_map<int64_t, void*> held;
  FILE* file = std::fopen(arguments[1], "rb");
  if (!file) return 2;
  int64_t event[3];
  bool fits = true;
  try {
    while (std::fread(event, sizeof(int64_t), 3, file) == 3) {
      if (event[0] > 0) {
        held[event[0]] = allocator->raw_alloc_with_stream(event[1], reinterpret_cast<cudaStream_t>(event[2] * 4096));
      } else {
        const auto found = held.find(-event[0]);
        if (found == held.end()) return 3;
        allocator->raw_delete(found->second);
        held.erase(found);
      }
    }
  } catch (const std::exception&) {
    fits = false;
  }
  const auto stats = allocator->getDeviceStats(0);
  std::printf(
      "{\"allocated\": %lld, \"reserved\": %lld, \"retries\": %lld, \"fits\": %s}\n",
      static_cast<long long>(stats.allocated_bytes[0].peak), static_cast<long long>(stats.reserved_bytes[0].peak),
      static_cast<long long>(stats.num_alloc_retries), fits ? "true" : "false");
  std::fflush(stdout);
  std::_Exit(0);
}
