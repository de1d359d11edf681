/* The libcuda.so.1 of a machine without a GPU: every call succeeds at once and does nothing, so that what is left of a call
 * is the time of the host. An H200 in name; its memory is the host's. Built and used by host_cost.py. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *const HANDLE = (void *)0x1000;

enum { MAX_THREADS_PER_BLOCK = 1, WARP_SIZE = 10, MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, OUT_OF_RANGE = 101 };
enum { DEVICE_POINTER = 3 };

static int succeed(void) { return 0; }

static int get_attribute(int *value, int attribute, int device)
{
    switch (attribute) {
    case MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case WARP_SIZE: *value = 32; break;
    case MULTIPROCESSORS: *value = 132; break;
    case MAJOR: *value = 9; break;
    case MINOR: *value = 0; break;
    default: *value = 1;
    }
    return 0;
}

static int get_count(int *count) { *count = 1; return 0; }
static int get_version(int *version) { *version = 13000; return 0; }
static int get_captured(void *stream, int *status) { *status = 0; return 0; }
static int get_current(int *device) { *device = 0; return 0; }
static int get_device(int *device, int ordinal) { *device = ordinal; return ordinal ? OUT_OF_RANGE : 0; }
static int get_name(char *name, int size, int device) { snprintf(name, size, "no GPU"); return 0; }
static int get_uuid(char *uuid, int device) { memset(uuid, 1, 16); return 0; }
static int get_handle(void **handle) { *handle = HANDLE; return 0; }
static int make_handle(void **handle) { static char *last = (char *)0x2000; *handle = ++last; return 0; }
static int get_memory(size_t *available, size_t *total) { *available = *total = (size_t)1 << 37; return 0; }
static int get_text(int error, const char **text) { *text = "an error"; return 0; }
static int get_kernel_attribute(int *value) { *value = 0; return 0; }
static int get_elapsed(float *milliseconds) { *milliseconds = 1; return 0; }
static int copy(void *destination, const void *source, size_t size) { memcpy(destination, source, size); return 0; }
static int release(uint64_t address) { free((void *)address); return 0; }

static int get_pointer_attribute(void *value, int attribute, uint64_t address)
{
    if (attribute == DEVICE_POINTER)
        *(uint64_t *)value = address;
    else
        *(int *)value = 0;
    return 0;
}

static int allocate(uint64_t *address, size_t size)
{
    *address = (uint64_t)aligned_alloc(512, (size + 511) / 512 * 512);
    return 0;
}

int cuInit(unsigned flags) { return 0; }

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
    static const struct { const char *name; void *function; } known[] = {
        {"cuCtxGetCurrent", get_handle}, {"cuCtxGetDevice", get_current}, {"cuCtxPopCurrent", get_handle},
        {"cuDeviceGet", get_device}, {"cuDeviceGetAttribute", get_attribute}, {"cuDeviceGetCount", get_count},
        {"cuDeviceGetName", get_name}, {"cuDeviceGetUuid", get_uuid}, {"cuDevicePrimaryCtxRetain", get_handle},
        {"cuDriverGetVersion", get_version}, {"cuEventCreate", make_handle}, {"cuEventElapsedTime", get_elapsed},
        {"cuGetErrorName", get_text}, {"cuGetErrorString", get_text}, {"cuGetProcAddress", cuGetProcAddress_v2},
        {"cuKernelGetAttribute", get_kernel_attribute},
        {"cuKernelGetFunction", get_handle}, {"cuKernelGetLibrary", get_handle}, {"cuLibraryGetKernel", get_handle},
        {"cuLibraryGetModule", get_handle}, {"cuLibraryLoadData", make_handle}, {"cuMemAlloc", allocate},
        {"cuMemFree", release}, {"cuMemGetInfo", get_memory}, {"cuMemcpyDtoH", copy}, {"cuMemcpyHtoD", copy},
        {"cuPointerGetAttribute", get_pointer_attribute},
        {"cuStreamCreate", make_handle}, {"cuStreamCreateWithPriority", make_handle},
        {"cuStreamIsCapturing", get_captured},
    };
    *function = (void *)succeed;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name))
            *function = known[i].function;
    if (status)
        *status = 0;
    return 0;
}
