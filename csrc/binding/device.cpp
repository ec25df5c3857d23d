#include "device.h"

#include <utility>

namespace binding {

namespace {

thread_local bool allowed = false, is_first = false;

bool may_depend() {
  const bool may = allowed && !is_first;
  is_first = false;
  return may;
}

}  // namespace

bool set_dependent_launches(bool now) {
  is_first = now && !allowed;
  return std::exchange(allowed, now);
}

}  // namespace binding

#ifdef GEMMA4_EMULATION

#include "../emulation/emulation.h"

namespace binding {

CurrentDevice::CurrentDevice(const torch::stable::Tensor&) {
  const auto& card = emulation::settings();
  device_ = {.stream = nullptr,
             .sm_count = card.sm_count,
             .max_smem_bytes = card.max_smem_bytes,
             .capability = card.has_wgmma ? 9 : 8,
             .dependent_launches = may_depend()};
}

CurrentDevice::~CurrentDevice() { emulation::forget(); }

void allow(const void* begin, size_t bytes, const char* name, bool writable) {
  emulation::allow(begin, bytes, name, writable);
}

const void* mapped(const void* host) { return host; }

}  // namespace binding

#else

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

namespace binding {

namespace {

// Raises CUDA's error, and takes it back from where the next call would find it.
void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  STD_TORCH_CHECK(false, cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

// All devices' limits, asked for once, by whichever thread comes first.
const gemma4::Device& limits_of(int index) {
  static const std::vector<gemma4::Device> all = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count));
    std::vector<gemma4::Device> devices(count);
    for (int i = 0; i < count; i++)
      devices[i] = {.stream = nullptr,
                    .sm_count = attribute(cudaDevAttrMultiProcessorCount, i),
                    .max_smem_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i),
                    .capability = attribute(cudaDevAttrComputeCapabilityMajor, i),
                    .index = i};
    return devices;
  }();
  return all.at(index);
}

}  // namespace

CurrentDevice::CurrentDevice(const torch::stable::Tensor& on)
    : device_(limits_of(on.get_device_index())), guard_(on.get_device_index()) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(on.get_device_index(), &device_.stream));
  device_.dependent_launches = may_depend();
}

CurrentDevice::~CurrentDevice() = default;

void allow(const void*, size_t, const char*, bool) {}

const void* mapped(const void* host) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return attributes.type == cudaMemoryTypeHost ? attributes.devicePointer : nullptr;
}

}  // namespace binding

#endif
