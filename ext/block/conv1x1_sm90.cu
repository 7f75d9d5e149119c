// Matrix products of 1x1 convolutions with many rows on Hopper: chooses and launches the kernel.
#include "common/tensors.h"
#include "block/conv1x1_sm90.cuh"

namespace rubiks {
namespace {

// Whether the kernel is in the library for the GPU of x: its instructions are Hopper's alone.
template <auto function>
bool available(const Tensor& x) {
  static thread_local int device = -1;
  static thread_local bool result = false;
  if (device != x.get_device_index()) {
    device = x.get_device_index();
    cudaFuncAttributes found = {};
    const bool compiled = cudaFuncGetAttributes(&found, function) == cudaSuccess && found.ptxVersion >= 90;
    result = compiled && attribute<cudaDevAttrComputeCapabilityMajor>(x) == 9;
    if (!compiled) cudaGetLastError();  // is no error here
    if (result) allow_shared_memory<function>(x);
  }
  return result;
}

template <Start start, Ending ending>
bool run(Pointwise& a, const Tensor& x, MaybeTensor* sums) {
  constexpr auto function = hopper_kernel<start, ending>;
  if (!available<function>(x)) return false;
  const int64_t tiles = ceil_div(a.p, kColumns);
  const int64_t blocks = std::min<int64_t>(attribute<cudaDevAttrMultiProcessorCount>(x), ceil_div(tiles, kGroups));
  if constexpr (ending != Ending::plain) {
    *sums = empty(x, {blocks, 2, a.m}, ScalarType::Float);
    a.sums = mutable_pointer(*sums);
  }
  launch(function, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads), hopper_bytes<start, ending>(a.k), x, a);
  return true;
}

template <Start start>
bool choose(Pointwise& a, Ending ending, const Tensor& x, MaybeTensor* sums) {
  if (ending == Ending::plain) return run<start, Ending::plain>(a, x, sums);
  if constexpr (start == Start::plain || start == Start::mix) {
    if (ending == Ending::mask) return run<start, Ending::mask>(a, x, sums);
  }
  if constexpr (start == Start::mix) {
    if (ending == Ending::attend) return run<start, Ending::attend>(a, x, sums);
  }
  if constexpr (start != Start::mix) {
    if (ending == Ending::sums) return run<start, Ending::sums>(a, x, sums);
  }
  return false;
}

}  // namespace

bool pointwise_hopper(Pointwise& a, Ending ending, const Tensor& x, MaybeTensor* sums) {
  // With fewer rows the other kernel, which then reads x once too, has less padding.
  if (a.m <= kHalf || a.m > kMaxRows || a.k > kMaxDepth || a.k % kUnitElements != 0) return false;
  if (reinterpret_cast<uintptr_t>(a.weight) % sizeof(Unit) != 0) return false;
  if (a.attention) return choose<Start::attend>(a, ending, x, sums);
  if (a.mix) return choose<Start::mix>(a, ending, x, sums);
  if (a.scale) return choose<Start::norm>(a, ending, x, sums);
  return choose<Start::plain>(a, ending, x, sums);
}

}  // namespace rubiks
