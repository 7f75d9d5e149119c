// From compute capability 9.0 on a kernel may start while the one before it in the stream ends, if it is launched so
// (`launch` in common/launch.h).
#pragma once

namespace rubiks {
namespace {

// Waits until the kernel before has ended and what it wrote is there; the next one may start from here on. Every kernel
// calls this before it reads or writes what others do.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace
}  // namespace rubiks
