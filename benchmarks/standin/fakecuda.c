/* A CUDA driver library that runs nothing: it looks at what launches and tensor maps are given, counts them, and refuses
   what a card would refuse. Limits are those of the CUDA Driver API (cuLaunchKernelEx, cuTensorMapEncodeTiled).
   Only what Triton 3.6 to 3.9 calls is here. driver.py builds and loads it. */

#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* ------------------------------------------------------------------------------- what driver.py sets and reads */

static int capability_major = 9, capability_minor = 0, multiprocessors = 132, shared_limit = 232448;
static long launches = 0, maps = 0, faults = 0;
static char fault[256] = "no fault";

void standin_card(int major, int minor, int processors, int shared) {
  capability_major = major, capability_minor = minor, multiprocessors = processors, shared_limit = shared;
}
long standin_launches(void) { return launches; }
long standin_maps(void) { return maps; }
long standin_faults(void) { return faults; }

static CUresult refuse(const char *what, unsigned long long value) {
  faults++;
  snprintf(fault, sizeof fault, "%s: %llu", what, value);
  return CUDA_ERROR_INVALID_VALUE;
}

/* -------------------------------------------------------------------------------- what is looked at, and counted */

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  launches++;
  if (!f) return refuse("launch of no function", 0);
  if (c->gridDimX < 1 || c->gridDimX > 2147483647u) return refuse("launch with a grid x", c->gridDimX);
  if (c->gridDimY < 1 || c->gridDimY > 65535) return refuse("launch with a grid y", c->gridDimY);
  if (c->gridDimZ < 1 || c->gridDimZ > 65535) return refuse("launch with a grid z", c->gridDimZ);
  if (c->blockDimX < 1 || c->blockDimX > 1024) return refuse("launch with threads a block", c->blockDimX);
  if (c->sharedMemBytes > (unsigned)shared_limit) return refuse("launch with shared memory", c->sharedMemBytes);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes_of_type[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned bytes_of_swizzle[] = {1u << 30, 32, 64, 128, 128, 128, 128};
  maps++;
  if ((uintptr_t)map % 64) return refuse("tensor map not at a multiple of 64 bytes", (uintptr_t)map % 64);
  if (type >= sizeof bytes_of_type / sizeof *bytes_of_type) return refuse("tensor map of type", type);
  if (rank < 1 || rank > 5) return refuse("tensor map of rank", rank);
  if ((uintptr_t)address % 16) return refuse("tensor map of an address that is 16 n +", (uintptr_t)address % 16);
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) return refuse("tensor map with a dimension", dims[i]);
    if (box[i] < 1 || box[i] > 256) return refuse("tensor map with a box side", box[i]);
    if (steps[i] < 1 || steps[i] > 8) return refuse("tensor map with an element stride", steps[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++)
    if (strides[i] % 16 || strides[i] >= 1ull << 40) return refuse("tensor map with a stride in bytes", strides[i]);
  unsigned inner = box[0] * bytes_of_type[type];
  if (inner % 16) return refuse("tensor map with inner bytes of a box", inner);
  if (swizzle >= sizeof bytes_of_swizzle / sizeof *bytes_of_swizzle) return refuse("tensor map with a swizzle", swizzle);
  if (inner > bytes_of_swizzle[swizzle]) return refuse("tensor map, more than its swizzle spans, of bytes", inner);
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = fault;
  return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------------------------- what is only answered */

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability_major; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability_minor; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1000000; /* clock rates and the like */
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
static int handle; /* of the one context, and of all modules */
static uintptr_t functions = 0;
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)&handle, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice d) { return *context = (CUcontext)&handle, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)&handle, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { return *f = (CUfunction)++functions, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p) { return *(uint64_t *)out = p, CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 132, CUDA_SUCCESS; }
