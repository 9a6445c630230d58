// A CUDA runtime that only counts: enough of libcudart.so.13 for the caching allocator of libc10_cuda.so to run without a card.
// CARD_BYTES in the environment is the memory that may be handed out. Addresses rise and are never used twice.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

namespace {

constexpr size_t kPage = 2ull << 20;  // granularity of cudaMalloc and of cuMemCreate

size_t card_bytes() {
  static const size_t bytes = [] {
    const char* text = std::getenv("CARD_BYTES");
    return text ? std::strtoull(text, nullptr, 10) : (80ull << 30);
  }();
  return bytes;
}

size_t used = 0;
uint64_t next_address = 0x700000000000ull;
uint64_t next_handle = 1;
std::unordered_map<uint64_t, size_t> segments;  // address -> bytes, of cudaMalloc
std::unordered_map<uint64_t, size_t> handles;   // handle -> bytes, of cuMemCreate
cudaError_t last_error = cudaSuccess;

uint64_t addresses(size_t bytes) {
  const uint64_t first = next_address;
  next_address += (bytes + kPage) / kPage * kPage + (1ull << 30);
  return first;
}

CUresult reserve(CUdeviceptr* pointer, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  *pointer = addresses(bytes);
  return CUDA_SUCCESS;
}

CUresult create(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp*, unsigned long long) {
  if (used + bytes > card_bytes()) return CUDA_ERROR_OUT_OF_MEMORY;
  used += bytes;
  *handle = next_handle++;
  handles[*handle] = bytes;
  return CUDA_SUCCESS;
}

CUresult release(CUmemGenericAllocationHandle handle) {
  const auto found = handles.find(handle);
  if (found != handles.end()) {
    used -= found->second;
    handles.erase(found);
  }
  return CUDA_SUCCESS;
}

CUresult granularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = kPage;
  return CUDA_SUCCESS;
}

CUresult device(CUdevice* number, int) {
  *number = 0;
  return CUDA_SUCCESS;
}

CUresult attribute(int* value, CUdevice_attribute, CUdevice) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult succeed() { return CUDA_SUCCESS; }

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
  if (used + rounded > card_bytes()) {
    *pointer = nullptr;
    return last_error = cudaErrorMemoryAllocation;
  }
  const uint64_t address = addresses(rounded);
  segments[address] = rounded;
  used += rounded;
  *pointer = reinterpret_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  const auto found = segments.find(reinterpret_cast<uint64_t>(pointer));
  if (found != segments.end()) {
    used -= found->second;
    segments.erase(found);
  }
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = card_bytes() - used;
  *total = card_bytes();
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* number) { return *number = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "counted out"; }
const char* cudaGetErrorName(cudaError_t) { return "counted out"; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "counting card");
  properties->major = 8;
  properties->totalGlobalMem = card_bytes();
  properties->multiProcessorCount = 72;
  properties->warpSize = 32;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  static uint64_t made = 0;
  return *stream = reinterpret_cast<cudaStream_t>(0x1000 * ++made), cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  static uint64_t made = 0;
  return *event = reinterpret_cast<cudaEvent_t>(0x100 * ++made), cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const std::string name(symbol);
  if (result) *result = cudaDriverEntryPointSuccess;
  *function = name == "cuMemAddressReserve"             ? reinterpret_cast<void*>(reserve)
      : name == "cuMemCreate"                           ? reinterpret_cast<void*>(create)
      : name == "cuMemRelease"                          ? reinterpret_cast<void*>(release)
      : name == "cuMemGetAllocationGranularity"         ? reinterpret_cast<void*>(granularity)
      : name == "cuDeviceGet"                           ? reinterpret_cast<void*>(device)
      : name == "cuDeviceGetAttribute"                  ? reinterpret_cast<void*>(attribute)
                                                        : reinterpret_cast<void*>(succeed);
  return cudaSuccess;
}

}  // extern "C"
