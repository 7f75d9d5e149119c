// Programmatic dependent launch: from compute capability 9.0 on, a kernel may start while the one before it in the
// stream ends, if it is launched so (`launch` in common/launch.h).
#pragma once

namespace rubiks {
namespace {

// Waits until the previous kernel has ended and its writes are visible; the next kernel may start from here on. Every
// kernel calls this before it reads or writes what others do.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace
}  // namespace rubiks
