// What Python's TensorRT module is to a process: a library linked to libnvinfer and opened late, for itself alone.
#include <NvInfer.h>

// The number of registered creators once a runtime was made.
extern "C" __attribute__((visibility("default"))) int count_creators() {
  int marker = 0, count = -1;
  if (createInferRuntime_INTERNAL(&marker, NV_TENSORRT_VERSION) != &marker) return -1;  // must reach the real one
  getPluginRegistry()->getAllCreators(&count);
  return count;
}
