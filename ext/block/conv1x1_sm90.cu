// Launches the 1x1 convolution with many rows on Hopper.
#include "block/conv1x1_sm90.cuh"
#include "common/launch.h"

namespace rubiks {
namespace {

// Whether the library has the kernel for the GPU of x: only Hopper has its instructions.
template <auto kernel>
bool available(const Tensor& x) {
  return cached(x.get_device_index(), [&] {
    cudaFuncAttributes found = {};
    if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess) {
      cudaGetLastError();  // not an error here
      return false;
    }
    const bool result = found.ptxVersion >= 90 && attribute<cudaDevAttrComputeCapabilityMajor>(x) == 9;
    if (result) allow_shared_memory<kernel>(x);
    return result;
  });
}

template <typename Prologue, typename Epilogue>
bool run(Conv1x1& a, const Tensor& x, MaybeTensor* sums) {
  constexpr auto kernel = conv1x1_sm90_kernel<Prologue, Epilogue>;
  if (!available<kernel>(x)) return false;
  const int64_t tiles = ceil_div(a.p, kColumns);
  const int64_t blocks = std::min<int64_t>(attribute<cudaDevAttrMultiProcessorCount>(x), ceil_div(tiles, kGroups));
  if constexpr (Epilogue::sums) {
    *sums = empty(x, {blocks, 2, a.m}, ScalarType::Float);
    a.sums = mutable_pointer(*sums);
  }
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads),
         conv1x1_sm90_bytes<Prologue, Epilogue>(a.k), x, a);
  return true;
}

}  // namespace

bool conv1x1_sm90(Conv1x1& a, bool sum_rows, const Tensor& x, MaybeTensor* sums) {
  // With fewer rows the other kernel also reads x once, and has less padding.
  if (a.m <= kHalf || a.m > kMaxM || a.k > kMaxK || a.k % kUnitElements != 0) return false;
  if (reinterpret_cast<uintptr_t>(a.weight) % sizeof(Unit) != 0) return false;
  return with_steps(a, sum_rows, [&](auto prologue, auto epilogue) {
    return run<decltype(prologue), decltype(epilogue)>(a, x, sums);
  });
}

}  // namespace rubiks
