// Launching kernels: the stream, attributes of the device, and starting one kernel while the one before it ends.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace rubiks {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaStream_t current_stream(const torch::stable::Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// compute(), or its last result where the key is the same as last time: questions to the CUDA runtime take as long as a
// launch. Each place that calls this, and each thread, has a memory of its own.
template <typename Key, typename F>
auto cached(const Key& key, const F& compute) {
  static thread_local std::optional<std::pair<Key, decltype(compute())>> last;
  if (!last || last->first != key) last.emplace(key, compute());
  return last->second;
}

// An attribute of the device of x.
template <cudaDeviceAttr name>
int attribute(const torch::stable::Tensor& x) {
  return cached(x.get_device_index(), [&] {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.get_device_index()));
    return value;
  });
}

namespace {

// Lets a kernel use all shared memory that a block may have on the device of x.
template <auto kernel>
void allow_shared_memory(const torch::stable::Tensor& x) {
  cached(x.get_device_index(), [&] {
    const int bytes = attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(x);
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    return bytes;
  });
}

__global__ void empty_kernel() {}

// Whether the kernels of this file wait for the kernel before them on the device of x: those compiled for compute
// capability 9.0 or later do, code for an earlier one that the driver has translated for this GPU does not.
bool kernels_wait(const torch::stable::Tensor& x) {
  return cached(x.get_device_index(), [] {
    cudaFuncAttributes found = {};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&found, empty_kernel));
    return found.ptxVersion >= 90;
  });
}

// Launches a kernel on the current stream of x's device, where it may start while the one before it ends. It must call
// wait_for_previous_kernel().
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
