// What the bindings ask of the device itself: of CUDA, or of the emulator in its place.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <optional>

#include "../common/types.h"

namespace binding {

// Makes a tensor's device current, for as long as it lives, and knows its stream and its limits.
class CurrentDevice {
 public:
  explicit CurrentDevice(const torch::stable::Tensor& on);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;

  const gemma4::Device& get() const { return device_; }

  // For an op whose parameters the stream's last kernel made.
  void launch_fully() { device_.dependent_launches = false; }

 private:
  gemma4::Device device_{};
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Whether the ops that this thread calls may launch kernels that start while others still run, and
// what was so before. The first op after that it became so does not: what the stream was given
// until then, weights among it, is done when its kernels start.
bool set_dependent_launches(bool allowed);

// Lets kernels touch this memory while the CurrentDevice lives. Under emulation all else is out of
// bounds; CUDA does not ask.
void allow(const void* begin, size_t bytes, const char* name, bool writable);

// Where the current device finds memory of the host; null if it is not pinned.
const void* mapped(const void* host);

}  // namespace binding
