// Launches the 1x1 convolution for all GPUs.
#include "block/conv1x1_sm80.cuh"
#include "common/launch.h"

#include <utility>

namespace rubiks {
namespace {

// Blocks of a kernel that a multiprocessor holds.
template <auto kernel, int threads>
int resident_blocks(size_t bytes, const Tensor& x) {
  allow_shared_memory<kernel>(x);
  return cached(std::pair(x.get_device_index(), bytes), [&] {
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes));
    return blocks;
  });
}

// Launches with as many blocks as are resident at once. Those of a slice each leave a part of `sums`.
template <typename Prologue, typename Epilogue, typename Shape>
void run(Conv1x1& a, const Tensor& x, MaybeTensor* sums) {
  constexpr auto kernel = conv1x1_sm80_kernel<Prologue, Epilogue, Shape>;
  const size_t bytes = conv1x1_sm80_bytes<Prologue, Epilogue, Shape>(a.k);
  const int processors = attribute<cudaDevAttrMultiProcessorCount>(x);
  const int blocks = processors * resident_blocks<kernel, Shape::threads>(bytes, x);
  a.slices = (a.m + Shape::rows - 1) / Shape::rows;
  const int64_t per_slice = std::min<int64_t>(ceil_div(a.p, kColumns), std::max(1, blocks / a.slices));
  if constexpr (Epilogue::sums) {
    *sums = empty(x, {per_slice, 2, a.m}, ScalarType::Float);
    a.sums = mutable_pointer(*sums);
  }
  launch(kernel, dim3(static_cast<unsigned>(per_slice * a.slices)), dim3(Shape::threads), bytes, x, a);
}

// Calls f with the shape that has the fewest rows of padding.
template <typename F>
void with_shape(const Conv1x1& a, const F& f) {
  if (a.k > 288) return f(Shape<4, 4, 4, 2>{});
  int best = 9, fewest = 1 << 30;
  for (const int tiles : {9, 7, 5, 4}) {
    const int rows = (a.m + 16 * tiles - 1) / (16 * tiles) * 16 * tiles;
    if (rows < fewest) best = tiles, fewest = rows;
  }
  switch (best) {
    case 4:
      return f(Shape<4, 4, 4, 4>{});
    case 5:
      return f(Shape<5, 4, 4, 4>{});
    case 7:
      return f(Shape<7, 4, 3, 3>{});
    default:
      return f(Shape<9, 4, 3, 2>{});
  }
}

}  // namespace

void conv1x1_sm80(Conv1x1& a, bool sum_rows, const Tensor& x, MaybeTensor* sums) {
  with_shape(a, [&](auto shape) {
    with_steps(a, sum_rows, [&](auto prologue, auto epilogue) {
      run<decltype(prologue), decltype(epilogue), decltype(shape)>(a, x, sums);
    });
  });
}

}  // namespace rubiks
