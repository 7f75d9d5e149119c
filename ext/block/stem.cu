// Passes over channel-major matrices that memory bounds, on NVIDIA GPUs: checks the arguments and launches the kernels of
// block/stem.cuh, and registers the operators.
#include "block/operators.h"
#include "block/geometry.h"
#include "block/stem.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(rubiks, m) {
  // Columns are pixels of clips of 8 or 16 frames, geometry N, T, H, W, in the order N, H, W, T.
  // The windows (28, P) of a 3x3 convolution with stride 2 and padding 1, and a row of zeros. images (N*T, 3, H, W).
  m.def("stem_columns(Tensor images, int frames) -> Tensor");
  // The columns (C, P') at rows and columns 0, stride, 2 * stride, ... of every frame. x (C, P).
  m.def("every(Tensor x, int[] geometry, int stride) -> Tensor");
}

namespace rubiks {
namespace {

constexpr int64_t kStemRows = 28;  // as rubiks/ops/fused.py

using bfloat16 = __nv_bfloat16;

// Of blocks with a thread for each pixel of a channel.
dim3 grid(const char* op, int64_t pixels, int64_t channels) {
  constexpr int64_t most = (int64_t{1} << 31) - kThreads;  // threads are counted in 32 bits
  STD_TORCH_CHECK(pixels <= most && channels < 65536, op, ": too large, it has ", pixels, " pixels in each of ",
                  channels, " channels; at most ", most, " and 65535");
  return dim3(static_cast<unsigned>(ceil_div(pixels, kThreads)), static_cast<unsigned>(channels));
}

}  // namespace

Tensor stem_columns_cuda(const Tensor& images, int64_t frames) {
  const auto type = images.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float,
                  "stem_columns: images must be bfloat16 or float32, got ", type);
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == 3 && frames > 0 && images.size(0) % frames == 0,
                  "stem_columns: images must have shape (N * ", frames, ", 3, H, W), got ", text(shape(images)));
  STD_TORCH_CHECK(images.is_contiguous(), "stem_columns: images must be contiguous");
  const int64_t height = images.size(2), width = images.size(3);
  const Geometry geometry("stem_columns",
                          {images.size(0) / frames, frames, ceil_div(height, 2), ceil_div(width, 2)});
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor columns = empty(images, {kStemRows, geometry.columns()}, ScalarType::BFloat16);
  if (columns.numel() == 0) return columns;
  const int64_t pixels = geometry.columns() / frames;
  geometry.with_frames("stem_columns", [&](auto count) {
    const auto run = [&](auto element) {
      using scalar = decltype(element);
      launch(stem_columns_kernel<scalar, count>, grid("stem_columns", pixels, 3), dim3(kThreads), 0, images,
             pointer<scalar>(images), static_cast<Unit*>(columns.mutable_data_ptr()), height, width, geometry.height,
             geometry.width, pixels);
    };
    type == ScalarType::Float ? run(float{}) : run(bfloat16{});
  });
  return columns;
}

Tensor every_cuda(const Tensor& x, Sizes sizes, int64_t stride) {
  const Geometry large("every", sizes), small = large.strided("every", stride);
  const int64_t c = x.dim() ? x.size(0) : 0;
  Checks("every", x).pixels("x", x, c, large.columns());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty(x, {c, small.columns()}, ScalarType::BFloat16);
  if (x.numel() == 0) return out;
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  const int64_t x_pixels = large.columns() / large.frames, pixels = small.columns() / large.frames;
  grid("every", x_pixels, c);  // checks
  const Every a = {narrow(large.height), narrow(large.width), narrow(small.height), narrow(small.width),
                   narrow(stride), static_cast<unsigned>(x_pixels), static_cast<unsigned>(pixels)};
  large.with_frames("every", [&](auto frames) {
    launch(every_kernel<frames>, grid("every", pixels, c), dim3(kThreads), 0, x, a, pointer<Unit>(x),
           static_cast<Unit*>(out.mutable_data_ptr()));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rubiks, CUDA, m) {
  m.impl("stem_columns", TORCH_BOX(&stem_columns_cuda));
  m.impl("every", TORCH_BOX(&every_cuda));
}

}  // namespace rubiks
