// What all launchers of CUDA kernels share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace rubiks {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaStream_t current_stream(const torch::stable::Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of the device of x. The last answer is kept: asking takes as long as a launch.
template <cudaDeviceAttr name>
int attribute(const torch::stable::Tensor& x) {
  static thread_local int device = -1, value = 0;
  if (device != x.get_device_index()) {
    device = x.get_device_index();
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  }
  return value;
}

namespace {

__global__ void nothing() {}

// Whether the kernels of this file are, on the device of x, those compiled for compute capability 9.0 or later: code for
// an earlier one, compiled anew for this GPU, does not wait for the kernel before.
bool kernels_wait(const torch::stable::Tensor& x) {
  static thread_local int device = -1;
  static thread_local bool result = false;
  if (device != x.get_device_index()) {
    cudaFuncAttributes found = {};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&found, nothing));
    device = x.get_device_index(), result = found.ptxVersion >= 90;
  }
  return result;
}

// Launches a kernel on the current stream of x's device, where it may start while the one before it ends. It must call
// wait_for_kernel_before().
template <typename... Parameters, typename... Values>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
            const torch::stable::Tensor& x, const Values&... values) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes, config.stream = current_stream(x);
  config.attrs = &early, config.numAttrs = kernels_wait(x);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(values)...));
}

}  // namespace
}  // namespace rubiks
